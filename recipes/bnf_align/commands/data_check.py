"""`bnf data check`: every row of feedback judged before a run depends on it.

One pass, linear in the rows: parse each, measure it, and look its prompt and completion up among those seen before.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from bnf_align.run.pictures import AFTER, CHOSEN, PLAIN, REJECTED, save
from bnf_align.run.progress import bar
from bnf_align.run.results import result_file
from bnf_core.config import DataCheckConfig, DataConfig, Where
from bnf_core.data import sources
from bnf_core.data.messages import RowError, Text
from bnf_core.data.reading import Reading, RowReader
from bnf_core.data.records import Feedback
from bnf_core.data.rendering import chat_of
from bnf_core.data.tokenization import load_tokenizer, tokenize
from bnf_core.errors import UserError
from bnf_core.models.model_config import position_limit, resolved_config
from bnf_core.models.model_folder import ALLOWED, HUB_ID
from bnf_core.steps.limits import too_long
from bnf_core.storage.files import replace_file

CHUNK = 500  # rows tokenised in one call
EXAMPLES = 3  # how many rows of each finding are printed; the report has them all
BAR_WIDTH = 10

RawRow = tuple[str, Any]  # file:line, and the row there or the RowError met in reading it


class Size(NamedTuple):
    """How long one completion and its prompt are, in tokens or characters, before anything is cut."""

    source: str  # file:line
    label: bool
    prompt: int
    completion: int

    @property
    def whole(self) -> int:
        return self.prompt + self.completion

    # As `bnf_core.data.tokenization.tokenize` cuts: the prompt gives way, down to one token.

    def prompt_cut(self, max_length: int) -> bool:
        return self.prompt + min(self.completion, max_length - 1) > max_length

    def completion_cut(self, max_length: int) -> bool:
        return self.completion > max_length - 1


@dataclass(frozen=True)
class CheckedFile:
    rows: int  # as they stand in the file: a pair is one
    bad_rows: list[str]  # a message for each, with file:line and field
    sizes: list[Size]  # of every usable completion: a pair has two
    prompts: int  # different ones
    prompts_with_both: int  # with a completion labelled true and one labelled false
    reopened: int  # completions whose turn the chat template opens otherwise than it writes a finished one
    unused: set[str]  # columns that are passed over
    shape: str  # of the rows, in words
    neither: int  # completions whose label or weight is 0


@dataclass
class Repeats:
    """Completions that occur again after the same prompt, found by the digest of both."""

    duplicates: list[tuple[str, str]] = field(default_factory=list)  # where it was first, where it is again
    contradictions: list[tuple[str, str]] = field(default_factory=list)  # where chosen, where rejected
    _places: dict[object, dict[bool, str]] = field(default_factory=dict)  # digest -> label -> the first file:line

    def add(self, row: Feedback) -> None:
        places = self._places.setdefault(_digest(row), {})
        if row.label in places:
            self.duplicates.append((places[row.label], row.source))
            return
        places[row.label] = row.source
        if len(places) == 2:
            self.contradictions.append((places[True], places[False]))


@dataclass(frozen=True)
class DataReport:
    files: dict[str, CheckedFile]
    repeats: Repeats
    unit: str  # tokens or characters
    max_length: int | None  # in tokens; None where only characters are known

    @property
    def bad_rows(self) -> list[str]:
        return [message for file in self.files.values() for message in file.bad_rows]

    @property
    def sizes(self) -> list[Size]:
        return [size for file in self.files.values() for size in file.sizes]

    @property
    def prompts_cut(self) -> list[Size]:
        """Rows whose prompt would lose its beginning."""
        return [size for size in self.sizes if self.max_length and size.prompt_cut(self.max_length)]

    @property
    def completions_cut(self) -> list[Size]:
        """Rows whose completion, too long by itself, would lose its end."""
        return [size for size in self.sizes if self.max_length and size.completion_cut(self.max_length)]

    def histogram(self) -> list[dict[str, int]]:
        """Rows by length, each line twice as wide as the one before: from, to, prompt, completion, whole."""
        counts = {part: Counter(map(_bucket, values)) for part, values in _parts(self.sizes).items()}
        found = sorted(set().union(*counts.values()))
        return [
            {"from": _first_of(k), "to": _last_of(k)} | {part: count[k] for part, count in counts.items()}
            for k in (range(found[0], found[-1] + 1) if found else ())
        ]

    def as_dict(self) -> dict[str, Any]:
        """What `--report` writes."""
        return {
            "files": {name: _counts(file) for name, file in self.files.items()},
            "unit": self.unit,
            "lengths": {part: _statistics(values) for part, values in _parts(self.sizes).items()},
            "histogram": self.histogram(),
            "max_length": self.max_length,
            "prompts_cut": [size._asdict() for size in self.prompts_cut],
            "completions_cut": [size._asdict() for size in self.completions_cut],
            "duplicates": [{"first": first, "again": again} for first, again in self.repeats.duplicates],
            "contradictions": [
                {"chosen": chosen, "rejected": rejected} for chosen, rejected in self.repeats.contradictions
            ],
            "bad_rows": self.bad_rows,
        }


def data_check(config: DataCheckConfig, console: Console) -> DataReport:
    """Check all rows, print what was found, and write the report and the picture that are asked for.

    Bad rows are part of the result, not an error.

    Raises:
        UserError: no such data, model or split, no rows at all, a tokenizer without what the rows need, or a
            report or picture that cannot be written.
    """
    written = None if config.report is None else result_file(config.report, "report")
    drawn = None if config.picture is None else result_file(config.picture, "picture")
    folder = None if config.model is None else _folder(config.model)
    tokenizer = None if folder is None else load_tokenizer(folder)
    positions = None if folder is None else position_limit(resolved_config(folder))
    repeats, files = Repeats(), {}
    for of in config.data.each().values():
        for name, rows in _read(of, config.split).items():
            files[name] = _check(name, rows, of, tokenizer, positions, repeats, console)
    report = DataReport(
        files,
        repeats,
        unit="characters" if tokenizer is None else "tokens",
        max_length=None if tokenizer is None else config.data.max_length,
    )
    _print(report, config.data, console)
    try:
        if written is not None:
            replace_file(written, json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
        if drawn is not None and report.sizes:
            save(figure(report), drawn)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from error
    return report


# Reading


def _read(config: DataConfig, split: str) -> dict[str, list[RawRow]]:
    """The rows of each file, by its name; `all` is every split that the data has."""
    splits = [split]
    if split == "all":
        splits = [name for name in sources.SPLITS if sources.has_split(config.where, config.called(name))] or ["train"]
    files = {}
    for name in splits:
        rows = list(_rows(config.where, config.called(name)))
        if not rows:
            raise UserError(f"{config.where}: no rows in the {name} split. Expected at least one row of feedback.")
        # By file, because test may serve as valid and is then met twice.
        files[rows[0][0].rpartition(":")[0]] = rows
    return files


def _rows(path: Where, split: str) -> Iterator[RawRow]:
    try:
        yield from sources.read_rows(path, split)
    except RowError as error:  # a file that is broken from here on: its last row
        yield error.source, error


def _folder(model: str) -> Path:
    """Of a model in a folder or on the Hub, with its tokenizer; weights are neither fetched nor needed."""
    folder = Path(model).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(model):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, allow_patterns=[p for p in ALLOWED if "safetensors" not in p]))
        except Exception as error:  # the Hub's client has dozens of ways to fail, of several HTTP libraries
            raise UserError(
                f"model {model!r}: no such folder here, and its tokenizer cannot be fetched from the Hub: "
                f"{' '.join(str(error).split())}"
            ) from error
    return folder


# Checking


def _check(
    name: str,
    rows: Sequence[RawRow],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    positions: int | None,
    repeats: Repeats,
    console: Console,
) -> CheckedFile:
    bad_rows: list[str] = []
    parsed: list[Feedback] = []
    sizes: list[Size] = []
    reopened = 0
    reader = RowReader(Reading.of(config))
    with bar(f"check {Path(name).name}", len(rows), console) as progress:
        for source, row in rows:
            try:
                if isinstance(row, RowError):
                    raise row
                parsed.extend(reader(row, source))
            except RowError as error:
                bad_rows.append(str(error))
            progress.advance()
        feedback = reader.finish(parsed, (sources.group_of(row) for row in parsed))
        for at in range(0, len(feedback), CHUNK):
            measured, refused, differ = _measure(feedback[at : at + CHUNK], config, tokenizer, reader.unused)
            if positions is not None:
                lengths = [(size.source, min(size.whole, config.max_length)) for size in measured]
                too_many = [too_long(source, length, positions) for source, length in lengths if length > positions]
                bad_rows += dict.fromkeys(too_many)  # a pair has two completions
            sizes += measured
            reopened += differ
            bad_rows += refused
    for item in feedback:
        repeats.add(item)
    labels: dict[int, set[bool]] = {}
    for item in feedback:
        labels.setdefault(sources.group_of(item), set()).add(item.label)
    both = sum(len(found) == 2 for found in labels.values())
    found = reader.unused, reader.described(), reader.neither
    return CheckedFile(len(rows), bad_rows, sizes, len(labels), both, reopened, *found)


def _measure(
    rows: Sequence[Feedback], config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, unused: set[str]
) -> tuple[list[Size], list[str], int]:
    """Sizes of the rows, a message for each row that the tokenizer or its chat template refuses, and how many turns the
    template opens otherwise than it writes them; and what it is given and does not use, added to `unused`."""
    if tokenizer is None:
        return [Size(r.source, r.label, _characters(r.prompt), _characters(r.completion)) for r in rows], [], 0

    def sizes(part: Sequence[Feedback], skip_bad_rows: bool) -> tuple[list[Size], list[str], int]:
        tokens = tokenize(
            part,
            tokenizer,
            template=config.template,
            chat=chat_of(config),
            max_length=sys.maxsize,
            skip_bad_rows=skip_bad_rows,
        )
        unused.update(tokens.unused)
        found = [Size(e.source, e.label, len(e.prompt_ids), len(e.completion_ids)) for e in tokens.examples]
        return found, tokens.skipped, tokens.reopened

    try:
        found, refused, reopened = sizes(rows, skip_bad_rows=True)
    except UserError:  # all of them are refused, or the tokenizer lacks something: one at a time tells which
        found, refused, reopened = [], [], 0
        for row in rows:
            try:
                measured, _, differ = sizes([row], skip_bad_rows=False)
                found, reopened = found + measured, reopened + differ
            except RowError as error:
                refused.append(str(error))
    by_row = {message.partition(": ")[0]: message for message in reversed(refused)}  # both halves of a pair are one row
    return found, [message for message in dict.fromkeys(refused) if message in by_row.values()], reopened


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


def _digest(row: Feedback) -> object:
    """The same for equal prompts and completions, whatever the label; small, however long they are."""
    text = json.dumps([row.prompt, row.completion, row.tools, row.template_kwargs], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


# Counting


def _parts(sizes: Sequence[Size]) -> dict[str, list[int]]:
    return {
        "prompt": [s.prompt for s in sizes],
        "completion": [s.completion for s in sizes],
        "whole": [s.whole for s in sizes],
    }


def _bucket(length: int) -> int:
    """0: nothing, 1: 1, 2: 2, 3: 3 to 4, 4: 5 to 8, and so on: powers of two end a bucket, as they do a limit."""
    return (length - 1).bit_length() + 1 if length else 0


def _first_of(bucket: int) -> int:
    return _last_of(bucket - 1) + 1 if bucket else 0


def _last_of(bucket: int) -> int:
    return 2 ** (bucket - 1) if bucket else 0


def _statistics(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    return {"shortest": min(values), "median": float(np.median(values)), "longest": max(values), "sum": sum(values)}


def _counts(file: CheckedFile) -> dict[str, int]:
    good = sum(size.label for size in file.sizes)
    return {
        "rows": file.rows,
        "bad_rows": len(file.bad_rows),
        "labelled_chosen": good,
        "labelled_rejected": len(file.sizes) - good,
        "prompts": file.prompts,
        "prompts_with_both": file.prompts_with_both,
        "reopened": file.reopened,
        "neither": file.neither,
    }


# Showing


def _print(report: DataReport, config: DataConfig, console: Console) -> None:
    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    for name, file in report.files.items():
        if file.shape:
            line(f"{name}: {file.shape}")
    for message in report.bad_rows:
        line(message, "red")
    console.print(_summary(report))
    if report.sizes:
        console.print(_histogram(report))
    for title, places in _findings(report):
        line(f"{title}: {len(places):,}", "yellow" if places else "")
        for place in places[:EXAMPLES]:
            line(f"  {place}")
        if len(places) > EXAMPLES:
            line(f"  and {len(places) - EXAMPLES:,} more", "dim")
    if unused := set().union(*(file.unused for file in report.files.values())):
        line(f"columns and keys of messages that are not used: {', '.join(sorted(unused))}", "yellow")
    if neither := sum(file.neither for file in report.files.values()):
        line(f"completions that are left out, because their label or weight is 0: {neither:,}", "yellow")
    if differ := sum(file.reopened for file in report.files.values()):
        line(
            f"completions that follow the turn as generation opens it, otherwise than finished ones: {differ:,}",
            "yellow",
        )
    if report.max_length is None:
        line(f"longer than {config.max_length} tokens: not known without --model, whose tokenizer counts them", "dim")
    total = sum(file.rows for file in report.files.values())
    if report.bad_rows:
        line(f"{len(report.bad_rows):,} of {total:,} rows are bad: see above", "red")
    else:
        line(f"all {total:,} rows are good", "green")


def _summary(report: DataReport) -> Table:
    table = Table("", *(Path(name).name for name in report.files))
    counts = [_counts(file) for file in report.files.values()]
    completions = [max(1, c["labelled_chosen"] + c["labelled_rejected"]) for c in counts]
    for name, text in (("rows", "rows"), ("bad_rows", "bad rows")):
        table.add_row(text, *(f"{c[name]:,}" for c in counts))
    for name, text in (("labelled_chosen", "chosen completions"), ("labelled_rejected", "rejected completions")):
        table.add_row(text, *(f"{c[name]:,} ({c[name] / of:.1%})" for c, of in zip(counts, completions, strict=True)))
    table.add_row("different prompts", *(f"{c['prompts']:,}" for c in counts))
    table.add_row("prompts with both", *(f"{c['prompts_with_both']:,}" for c in counts))
    table.add_row(report.unit, *(f"{sum(s.whole for s in file.sizes):,}" for file in report.files.values()))
    return table


def _histogram(report: DataReport) -> Table:
    parts = _parts(report.sizes)
    lines = report.histogram()
    table = Table(report.unit, "prompt", "completion", "both together")
    table.columns[0].justify = "right"
    most = {part: max(line[part] for line in lines) for part in parts}
    for line in lines:
        span = f"{line['from']:,}–{line['to']:,}" if line["from"] < line["to"] else f"{line['to']:,}"
        table.add_row(span, *(_bar(line[part], most[part], len(str(most[part])) + 1) for part in parts))
    table.add_section()
    table.add_row("median", *(f"{np.median(values):,.0f}" for values in parts.values()))
    table.add_row("longest", *(f"{max(values):,}" for values in parts.values()))
    return table


def _bar(count: int, most: int, width: int) -> str:
    filled = -(-count * BAR_WIDTH // most)  # rounded up, so that a single row shows
    return f"{count:>{width},} {'█' * filled}".rstrip()


def _findings(report: DataReport) -> Iterable[tuple[str, list[str]]]:
    if report.max_length is not None:
        limit = f"over {report.max_length:,} tokens"
        yield f"prompts that lose their beginning, with the completion {limit}", _places(report.prompts_cut)
        yield f"completions that lose their end, with one token of prompt {limit}", _places(report.completions_cut)
    yield "duplicates: prompt, completion and label as before", [f"{b} as {a}" for a, b in report.repeats.duplicates]
    yield (
        "contradictions: prompt and completion with both labels",
        [f"{chosen} chosen, {rejected} rejected" for chosen, rejected in report.repeats.contradictions],
    )


def _places(sizes: Sequence[Size]) -> list[str]:
    return [
        f"{s.source} prompt {s.prompt:,}, {'chosen' if s.label else 'rejected'} completion {s.completion:,}"
        for s in sizes
    ]


def figure(report: DataReport) -> Figure:
    """Three histograms on one axis of length: prompts, completions by label, and both together with the limit."""
    sizes = report.sizes
    result = Figure(figsize=(11, 3.8), layout="constrained")
    prompts, completions, whole = result.subplots(1, 3, sharex=True)
    shortest = max(1, min(min(size.prompt, size.completion) for size in sizes))
    longest = max(size.whole for size in sizes)
    # Wider and wider bins for a logarithmic axis, on whole numbers; an empty prompt is drawn at 1.
    edges = np.unique(np.geomspace(shortest, longest + 1, 61).round()) - 0.5

    prompts.hist([max(s.prompt, 1) for s in sizes], edges, color=PLAIN)
    prompts.set_title("Prompts", fontsize=11, loc="left")
    for label, name, style in (
        (True, "chosen", {"color": CHOSEN}),
        (False, "rejected", {"color": REJECTED, "linestyle": "--"}),
    ):
        values = [s.completion for s in sizes if s.label is label]
        if values:
            completions.hist(values, edges, histtype="step", linewidth=1.8, label=f"{name}: {len(values):,}", **style)
    completions.set_title("Completions, by label", fontsize=11, loc="left")
    completions.legend(fontsize=8, frameon=False)
    whole.hist([s.whole for s in sizes], edges, color=PLAIN)
    whole.set_title("Prompt and completion", fontsize=11, loc="left")
    if report.max_length is not None:
        whole.axvline(report.max_length, color=AFTER, linewidth=1.8, label=f"max_length {report.max_length:,}")
        whole.legend(fontsize=8, frameon=False)
    for axes in (prompts, completions, whole):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(report.unit)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    prompts.set_ylabel("rows")
    return result


Config = DataCheckConfig
POSITIONAL = ("--data",)


def run(config: DataCheckConfig, console: Console) -> int:
    return 2 if data_check(config, console).bad_rows else 0
