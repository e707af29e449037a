"""What the three benchmarks share: contenders measured side by side, a file that an interrupted measurement goes on
from, a table, a page and a picture."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.interleaved import ContenderFailed, Work, rounds
from bnf_align.run.pictures import AFTER, PLAIN, save
from bnf_core.errors import UserError
from bnf_core.storage.files import replace_file

FLOOR = "bare matrix products"
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "mlx-lm", "mlx-lm-lora", "mlx-tune", "unsloth-zoo")


@dataclass
class MeasureConfig:
    """How long to measure, and where the figures go."""

    rounds: int = 5
    """How often each contender is timed, after it has been warmed up."""
    minutes: float = 9.0
    """Begin nothing more after so long; the same command then goes on."""
    cpu: bool = False
    """Count processor seconds, for a machine that does other work as well; with OMP_NUM_THREADS=1, or threads that wait
    for each other count too."""
    output: str = ""
    """The .json file of the figures; default: under runs/bench. A table (.md) and a picture (.png) lie beside it."""
    overwrite: bool = False
    """Begin anew, whatever the file holds."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"measure.rounds is {self.rounds}: expected an integer of at least 1")
        if self.output and not self.output.endswith(".json"):
            raise ValueError(f"measure.output is {self.output!r}: expected a name that ends in .json")


@dataclass
class Case:
    """Contenders that do the same work.

    Args:
        contenders: by name; instead of one that cannot run, why.
        memory: bytes at the peak, of the contender of that name.
        ours: whom the others are compared with; None: nobody.
        times: how many jobs a contender's piece of work is.
        beside: whom else of ours a contender is compared with.
    """

    title: str
    contenders: Mapping[str, Work | str]
    memory: Callable[[str], float]
    ours: str | None = None
    times: int = 1
    beside: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Figures:
    """What was measured of a case."""

    ours: str | None = None
    memory: dict[str, float | None] = field(default_factory=dict)  # bytes
    notes: dict[str, str] = field(default_factory=dict)  # why a contender has no figures
    rounds: list[dict[str, float]] = field(default_factory=list)  # seconds by contender
    beside: dict[str, str] = field(default_factory=dict)  # instead of `ours`, for a contender


@dataclass(frozen=True)
class Line:
    """A contender's figures."""

    name: str
    seconds: float  # median
    fastest: float
    slowest: float
    floors: float | None  # median ratio of its seconds to the floor's, within rounds
    ratio: float | None  # median ratio of our seconds to its
    ratio_spread: tuple[float, float] | None  # lowest and highest
    memory: float | None  # bytes
    memory_ratio: float | None  # ours to its


def lines(figures: Figures) -> list[Line]:
    """Of every contender that was timed. Ratios are taken within each round, then their median."""
    found = []
    for name in figures.rounds[0] if figures.rounds else ():
        seconds = [taken[name] for taken in figures.rounds]
        ours = None if figures.ours in (None, name) or name == FLOOR else figures.beside.get(name, figures.ours)
        ratios = [taken[ours] / taken[name] for taken in figures.rounds] if ours else []
        floors = [taken[name] / taken[FLOOR] for taken in figures.rounds if FLOOR in taken]
        memory, our_memory = figures.memory.get(name), figures.memory.get(ours or "")
        found.append(
            Line(
                name=name,
                seconds=statistics.median(seconds),
                fastest=min(seconds),
                slowest=max(seconds),
                floors=statistics.median(floors) if floors else None,
                ratio=statistics.median(ratios) if ratios else None,
                ratio_spread=(min(ratios), max(ratios)) if ratios else None,
                memory=memory,
                memory_ratio=our_memory / memory if our_memory and memory else None,
            )
        )
    return found


class Measurement:
    """The figures of one command, in a file.

    Raises:
        UserError: the file holds figures of something else.
    """

    def __init__(self, config: MeasureConfig, name: str, facts: Mapping[str, str], console: Console):
        self.config, self.console = config, console
        self.path = Path(config.output or f"runs/bench/{name}.json")
        self.facts = here() | dict(facts) | ({"seconds": "of the processor"} if config.cpu else {})
        self.cases: dict[str, Figures] = {}
        self.until = time.monotonic() + 60 * config.minutes
        if self.path.exists() and not config.overwrite:
            self._read()

    def run(self, case: Case) -> bool:
        """Measure what is still missing of a case; whether it is then whole."""
        self.console.print(f"[bold]{case.title}[/bold]", highlight=False)
        figures = self.cases.setdefault(case.title, Figures(case.ours, beside=dict(case.beside)))
        taken = 0.0
        for name, work in case.contenders.items():
            if name in figures.memory or name in figures.notes:
                continue
            if isinstance(work, str):
                figures.notes[name] = work
                continue
            if self._late():
                return False
            self.console.print(f"memory of {name}", highlight=False, markup=False)
            started = time.monotonic()
            try:
                figures.memory[name] = case.memory(name)
            except ContenderFailed as error:
                figures.notes[name] = error.reason
            taken += time.monotonic() - started
            self._write()
        # Warming up and a round take as long again.
        while not self._late(taken) and len(figures.rounds) < self.config.rounds:
            try:
                self._time(case, figures)
            except ContenderFailed as error:  # the others are timed without it, all of them anew
                figures.notes[error.name] = error.reason
                figures.rounds.clear()
        self._write()
        return len(figures.rounds) >= self.config.rounds

    def finish(self, whole: bool, figure: Figure, page: str) -> None:
        """Write page and picture."""
        replace_file(self.path.with_suffix(".md"), page)
        save(figure, self.path.with_suffix(".png"))
        for kind, suffix in (("figures", ".json"), ("page", ".md"), ("picture", ".png")):
            self.console.print(f"{kind:<8} {self.path.with_suffix(suffix)}", highlight=False, markup=False)
        if not whole:
            self.console.print(
                f"[yellow]{self.config.minutes:g} minutes are over: the same command measures what is missing[/yellow]"
            )

    def _time(self, case: Case, figures: Figures) -> None:
        able = {n: w for n, w in case.contenders.items() if not isinstance(w, str) and n not in figures.notes}
        if not able:
            raise UserError(f"{case.title}: no contender can run: {'; '.join(figures.notes.values())}")
        self.console.print(f"warming up {len(able)} contenders", highlight=False)
        for taken in rounds(able, cpu=self.config.cpu):
            figures.rounds.append({name: seconds / case.times for name, seconds in taken.items()})
            self._write()
            self.console.print(f"round {len(figures.rounds)}/{self.config.rounds}", highlight=False)
            if self._late(sum(taken.values())) or len(figures.rounds) >= self.config.rounds:
                return

    def _late(self, needed: float = 0.0) -> bool:
        """Whether there is no time left for work of so many seconds."""
        return time.monotonic() + needed > self.until

    def _read(self) -> None:
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            self.cases = {title: Figures(**figures) for title, figures in held["cases"].items()}
            facts = held["facts"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path} holds no figures of this command: choose another --output") from error
        changed = [
            f"{n}: {facts.get(n)} → {self.facts.get(n)}"
            for n in facts | self.facts
            if facts.get(n) != self.facts.get(n)
        ]
        if changed:
            raise UserError(
                f"{self.path} holds figures of something else:\n  "
                + "\n  ".join(changed)
                + "\nChoose another --output, or pass --overwrite"
            )

    def _write(self) -> None:
        held = {"facts": self.facts, "cases": {title: vars(figures) for title, figures in self.cases.items()}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, json.dumps(held, indent=1) + "\n")


def here() -> dict[str, str]:
    """This machine, and the versions of the peers that are installed."""
    facts = {"machine": f"{_processor()}, {platform.system()}", "bnf-align": version("bnf-align")}
    for package in PEERS:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


HEADINGS = ("", "seconds", "× products", "ours ÷ it", "MiB", "ours ÷ it")


def cells(line: Line) -> list[str]:
    """As HEADINGS name them; in brackets the lowest and the highest."""
    seconds, ratio = _number(line.seconds), _number(line.ratio)
    if line.ratio_spread is not None:
        ratio += f" ({'–'.join(map(_number, line.ratio_spread))})"
    memory = "" if line.memory is None else f"{line.memory / 2**20:,.0f}"
    seconds += f" ({_number(line.fastest)}–{_number(line.slowest)})"
    return [line.name, seconds, _number(line.floors), ratio, memory, _number(line.memory_ratio)]


def table(title: str, figures: Figures) -> Table:
    """For a terminal: the seconds without their spread."""
    made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, heading in enumerate(HEADINGS):
        made.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    for line in lines(figures):
        name, seconds, *rest = cells(line)
        made.add_row(name, seconds.partition(" (")[0], *rest)
    notes = "\n".join(f"{name}: {note}" for name, note in figures.notes.items())
    made.caption = Text(notes)  # Text: brackets such as bnf-align[bench] are no markup
    made.caption_justify = "left"
    return made


def page(facts: Mapping[str, str], cases: Mapping[str, Figures], command: str, memory: str) -> str:
    """The figures as Markdown, to be put into docs/performance.md as they are."""
    text = [f"`{command}`\n", "; ".join(f"{name} {value}" for name, value in facts.items()) + f". Memory: {memory}.\n"]
    for title, figures in cases.items():
        rows = [cells(line) for line in lines(figures)]
        text += [f"{title}, {len(figures.rounds)} rounds:\n", *markdown(HEADINGS, rows), ""]
        text += [f"- {name}: {note}" for name, note in figures.notes.items()] + [""] * bool(figures.notes)
    return "\n".join(text)


def markdown(headings: Any, rows: Any) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows)]


def bars(cases: Mapping[str, Figures], memory: str) -> Figure:
    """Seconds, with their spread, and memory of each contender; ours in colour."""
    figure = Figure(figsize=(11, 1 + 2.8 * max(len(cases), 1)), layout="constrained")
    grid = figure.subplots(max(len(cases), 1), 2, squeeze=False)
    for (left, right), (title, figures) in zip(grid, cases.items(), strict=False):
        found = lines(figures)[::-1]
        names = [line.name for line in found]
        colours = [AFTER if line.name.startswith(figures.ours or "\0") else PLAIN for line in found]
        middle = [line.seconds for line in found]
        spread = [
            [line.seconds - line.fastest for line in found],
            [line.slowest - line.seconds for line in found],
        ]
        left.barh(names, middle, xerr=spread, color=colours, height=0.6, ecolor="#888888")
        floor = next((line.seconds for line in found if line.name == FLOOR), None)
        if floor is not None:
            left.axvline(floor, color=PLAIN, linestyle=":", linewidth=1)
        left.set(title=title, xlabel="seconds, median and spread")
        right.barh(names, [(line.memory or 0) / 2**20 for line in found], color=colours, height=0.6)
        right.set(xlabel=f"MiB at the peak, {memory}", yticks=[])
        for axes in (left, right):
            axes.grid(alpha=0.25, axis="x")
            axes.set_axisbelow(True)
            axes.title.set_fontsize(11)
    return figure


def _number(value: float | None) -> str:
    """Three digits."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"
