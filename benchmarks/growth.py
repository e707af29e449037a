"""`python -m benchmarks.growth`: how the time and memory of a step grow with the length of rows and the number of
completions of a prompt, with the prompt shared and not, and those of the loss with the vocabulary."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from rich.console import Console
from rich.table import Table

from benchmarks import loss as bench_loss
from benchmarks.command import main
from benchmarks.figures import Case, Figures, MeasureConfig, Measurement, lines, markdown
from benchmarks.interleaved import Work
from benchmarks.step import OURS, benchmark, contenders, peak_memory
from bnf_align.run.pictures import AFTER, PLAIN
from bnf_core.config import DataConfig, HardwareConfig, LoraConfig, TrainConfig
from bnf_core.models.architecture import Architecture
from bnf_core.models.model_folder import resolve_model
from bnf_core.types import Example

LENGTH, COMPLETIONS, VOCABULARY = "tokens of a row", "completions of a prompt", "vocabulary"
EACH = ", prompt each time"  # after the size, where completions do not share their prompt


@dataclass
class BenchGrowthConfig:
    """Time a step, and measure its memory, as it grows: rows of random tokens, of several lengths, with several
    completions of one prompt; and the loss, with several vocabularies."""

    model: str
    """A checkpoint folder or a Hub model."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    lengths: list[int] = field(default_factory=lambda: [128, 256, 512, 1024])
    """Tokens of a row, half of them the prompt's; four rows a step, each of another prompt."""
    completions: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Completions of one prompt, which are then the rows of a step: 128 tokens each, as many as the prompt has. They
    share it, and beside that they do not."""
    vocabularies: list[int] = field(default_factory=lambda: [8192, 16384, 32768, 65536, 131072])
    """Vocabularies of the loss of 512 tokens."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self) -> None:
        for name in ("lengths", "completions", "vocabularies"):
            if min(getattr(self, name), default=2) < (1 if name == "completions" else 2):
                raise ValueError(f"{name} is {getattr(self, name)}: expected larger numbers")


def bench_growth(config: BenchGrowthConfig, console: Console) -> Measurement:
    """Measure, print, and write figures, page and picture.

    Raises:
        UserError: no such model, or the file of figures holds those of something else.
    """
    folder = resolve_model(config.model)
    vocab = Architecture.of(folder).vocab
    measures = benchmark(config.hardware)
    facts = measures.facts() | {"model": config.model, "lora": f"r={config.lora.rank}"}
    measurement = Measurement(config.measure, f"growth-{config.hardware.backend}", facts, console)
    by_length = {n: [random_row(i, n // 2, n - n // 2, vocab) for i in range(4)] for n in config.lengths}
    by_count = {k: [random_row(0, 128, 128, vocab, i) for i in range(k)] for k in config.completions}
    whole = [
        measurement.run(_steps(LENGTH, config, folder, by_length)),
        measurement.run(_steps(COMPLETIONS, config, folder, by_count)),
        measurement.run(_losses(config)),
    ]
    for title, figures in measurement.cases.items():
        console.print(table(title, figures))
    command = (
        f"python -m benchmarks.growth --model {config.model} --backend {config.hardware.backend} "
        f"--device {config.hardware.device}"
    )
    measurement.finish(
        all(whole), picture(measurement.cases), page(measurement.facts, measurement.cases, command, measures.memory)
    )
    return measurement


def random_row(group: int, prompt: int, completion: int, vocab: int, number: int = 0) -> Example:
    """Random tokens; rows of one group share the prompt."""
    tokens = np.random.Generator(np.random.PCG64([1, group])).integers(vocab, size=prompt)
    more = np.random.Generator(np.random.PCG64([2, group, number])).integers(vocab, size=completion)
    return Example(tuple(tokens.tolist()), tuple(more.tolist()), label=number % 2 == 0, group=group)


def _steps(title: str, config: BenchGrowthConfig, folder: Path, rows: Mapping[int, Sequence[Example]]) -> Case:
    """A step of `bnf train` for each of several sets of rows; where rows have a prompt in common, also one that does
    not share it."""
    base = TrainConfig(str(folder), DataConfig(""), hardware=config.hardware, lora=config.lora)
    steps: dict[str, tuple[TrainConfig, Sequence[Example]]] = {}
    for size, part in rows.items():
        settings = replace(base, batch_size=len(part), micro_batch_size=len(part))
        steps[str(size)] = settings, part
        if len({row.group for row in part}) < len(part):
            steps[f"{size}{EACH}"] = replace(settings, share_prompts=False), part
    works = {name: contenders(*step, config.measure.rounds + 2)[OURS] for name, step in steps.items()}
    return Case(title, works, lambda name: peak_memory(*steps[name], OURS))


def _losses(config: BenchGrowthConfig) -> Case:
    """The loss for each of several vocabularies."""
    settings = {str(v): bench_loss.BenchLossConfig(vocab=v, hardware=config.hardware) for v in config.vocabularies}
    times = bench_loss.case(VOCABULARY, settings[str(min(config.vocabularies))], 512, False).times
    cases = {vocab: bench_loss.case(VOCABULARY, part, 512, False, times) for vocab, part in settings.items()}
    works: dict[str, Work | str] = {vocab: case.contenders[bench_loss.OURS] for vocab, case in cases.items()}
    return Case(VOCABULARY, works, lambda vocab: cases[vocab].memory(bench_loss.OURS), times=times)


NOT_MEASURED = "not measured, for no time was left"


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of the values' best fit a · sizeᵇ, by least squares of logarithms; NaN of fewer than two."""
    if len(sizes) < 2 or min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@dataclass(frozen=True)
class Growth:
    """Points of one case, and how they grow."""

    sizes: list[int]
    seconds: list[float]
    memory: list[float]  # bytes; NaN where it is not known

    @classmethod
    def of(cls, figures: Figures, kind: str = "") -> "Growth":
        """Of the contenders whose names are a size and then this."""
        found = {line.name.removesuffix(kind): line for line in lines(figures) if line.name.endswith(kind)}
        sizes = sorted(int(name) for name in found if name.isdigit())
        of_size = [found[str(size)] for size in sizes]
        return cls(
            sizes,
            [line.seconds for line in of_size],
            [math.nan if line.memory is None else line.memory for line in of_size],
        )

    @property
    def verdict(self) -> str:
        time = exponent(self.sizes, self.seconds)
        if not self.sizes:
            return NOT_MEASURED
        if len(self.sizes) < 2:
            return ""
        each = float(np.polyfit(self.sizes, self.memory, 1)[0]) / 2**20
        return f"time ∝ size^{time:.2f}; memory +{each:.3g} MiB for each"


def table(title: str, figures: Figures) -> Table:
    caption = Growth.of(figures).verdict
    made = Table(title=title, title_justify="left", box=None, caption=caption, caption_justify="left")
    headings, *rows = _rows(title, figures)
    for heading in headings:
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(*row)
    return made


def page(facts: Mapping[str, str], cases: Mapping[str, Figures], command: str, memory: str) -> str:
    """The figures as Markdown."""
    text = [f"`{command}`\n", "; ".join(f"{name} {value}" for name, value in facts.items()) + f". Memory: {memory}.\n"]
    for title, figures in cases.items():
        headings, *rows = _rows(title, figures)
        text += [*markdown(headings, rows), "", f"{Growth.of(figures).verdict}.\n"]
    return "\n".join(text)


def picture(cases: Mapping[str, Figures]) -> Figure:
    """Time and memory against size, with the fitted slope of time; in grey where prompts are not shared."""
    figure = Figure(figsize=(4 * max(len(cases), 1), 6), layout="constrained")
    grid = figure.subplots(2, max(len(cases), 1), squeeze=False)
    for (time, memory), (title, figures) in zip(grid.T, cases.items(), strict=False):
        if not figures.rounds:
            time.set_title(f"{title}: {NOT_MEASURED}", fontsize=10, loc="left")
            time.set_axis_off()
            memory.set_axis_off()
            continue
        for kind, colour in ((EACH, PLAIN), ("", AFTER)):
            growth = Growth.of(figures, kind)
            if not growth.sizes:
                continue
            time.loglog(growth.sizes, growth.seconds, "o", color=colour, label=kind.removeprefix(", ") or "shared")
            slope = exponent(growth.sizes, growth.seconds)
            if not math.isnan(slope):
                middle = np.exp(np.mean(np.log(growth.seconds)) - slope * np.mean(np.log(growth.sizes)))
                time.loglog(growth.sizes, middle * np.array(growth.sizes, float) ** slope, "--", color=colour, lw=1)
            memory.plot(growth.sizes, np.array(growth.memory) / 2**20, "o-", color=colour)
            time.set_title(f"{title}: time ∝ size^{slope:.2f}", fontsize=10, loc="left")
        if _unshared(figures):
            time.legend(frameon=False)
        time.set_ylabel("seconds")
        memory.set(xlabel=title, ylabel="MiB at the peak")
        memory.margins(y=0.1)
        memory.set_ylim(bottom=0)
        memory.xaxis.set_major_locator(MaxNLocator(4))
        memory.xaxis.set_major_formatter("{x:,.0f}")
        sizes = Growth.of(figures).sizes
        time.set_xticks(sizes, [f"{size:,}" for size in sizes])
        time.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        time.yaxis.set_major_formatter("{x:g}")
        for axis in (time.xaxis, time.yaxis):
            axis.set_minor_locator(NullLocator())
        for axes in (time, memory):
            axes.grid(alpha=0.25)
    return figure


def _rows(title: str, figures: Figures) -> list[list[str]]:
    """The headings, then the figures of each size; where prompts were shared, beside those where they were not."""
    rows = [[title, "seconds", "MiB"], *_cells(Growth.of(figures))]
    if _unshared(figures):
        rows[0] += [f"seconds{EACH}", "MiB", "÷ seconds shared"]
        unshared = {cells[0]: cells[1:] for cells in _cells(Growth.of(figures, EACH))}
        for row in rows[1:]:
            size = row[0].replace(",", "")
            ratios = [taken[size + EACH] / taken[size] for taken in figures.rounds if size + EACH in taken]
            row += [*unshared[row[0]], f"{statistics.median(ratios):.2f}"] if ratios else ["", "", ""]
    return rows


def _unshared(figures: Figures) -> bool:
    return any(name.endswith(EACH) for taken in figures.rounds for name in taken)


def _cells(growth: Growth) -> list[list[str]]:
    points = zip(growth.sizes, growth.seconds, growth.memory, strict=True)
    return [[f"{size:,}", f"{seconds:.3g}", f"{memory / 2**20:,.0f}"] for size, seconds, memory in points]


if __name__ == "__main__":
    main("growth", BenchGrowthConfig, bench_growth)
