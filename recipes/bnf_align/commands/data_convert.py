"""`bnf data convert`: feedback in any shape and kind of file, as .jsonl with our own columns."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from bnf_align.run.results import result_file
from bnf_core.config import DataConfig
from bnf_core.data.feedback import Tally
from bnf_core.data.reading import Reading
from bnf_core.data.records import Feedback
from bnf_core.data.sources import load_feedback
from bnf_core.errors import UserError
from bnf_core.storage.files import replace_file

SAMPLE = 3  # rows


@dataclass
class DataConvertConfig:
    """Write feedback of any shape as .jsonl: pairs as prompt, chosen and rejected, others as prompt, completion and
    label."""

    data: DataConfig
    output: str
    """The .jsonl file to write."""
    split: str = "train"
    """Which file of a data folder: train, valid or test."""
    overwrite: bool = False
    """Replace the file that is there."""


def data_convert(config: DataConvertConfig, console: Console) -> int:
    """Write the rows, and print what shape they had and the first of them; returns how many were written.

    Raises:
        UserError: no such data or a bad row, or the file is taken or cannot be written. Nothing is written then.
    """
    where = config.data.where
    output = Path(config.output).expanduser()
    if output.suffix.lower() != ".jsonl":
        raise UserError(f"{output}: expected the name of a .jsonl file to write")
    if output.exists() and (not config.overwrite or output.resolve() == Path(where.path).expanduser().resolve()):
        raise UserError(f"{output} is there already: give --output another name, or --overwrite to replace other data")
    loaded = load_feedback(where, config.data.called(config.split), config.data.skip_bad_rows, Reading.of(config.data))

    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    line(f"{where}: {loaded.shape}")
    for message in loaded.skipped:
        line(f"skipped: {message}", "yellow")
    if loaded.unused:
        line(f"columns that are not used: {', '.join(sorted(loaded.unused))}", "yellow")
    for note in Tally(0, neither=loaded.neither).notes():
        line(note, "yellow")
    rows = [json.dumps(row, ensure_ascii=False) for row in as_rows(loaded.rows)]
    try:
        replace_file(result_file(str(output), "output"), "".join(f"{row}\n" for row in rows))
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from error
    for row in islice(rows, SAMPLE):
        line(row)
    line(f"{output}: {len(rows):,} rows", "green")
    return len(rows)


def as_rows(feedback: Sequence[Feedback]) -> Iterator[dict[str, Any]]:
    """Rows that read as this feedback; the two of a pair follow each other."""
    following = iter(feedback)
    for row in following:
        beside = {"tools": row.tools, "chat_template_kwargs": row.template_kwargs}
        if row.paired:
            texts = {"chosen": row.completion, "rejected": next(following).completion}
            weight = row.weight
        else:
            graded = row.weight if row.label else -row.weight
            texts = {"completion": row.completion, "label": graded if row.weight < 1 else row.label}  # type: ignore[dict-item]
            weight = max(row.weight, 1.0)
        given = {column: value for column, value in beside.items() if value is not None}
        yield {"prompt": row.prompt, **texts, **given} | ({} if weight == 1 else {"weight": weight})


Config = DataConvertConfig
POSITIONAL = ("--data", "--output")


def run(config: DataConvertConfig, console: Console) -> int:
    data_convert(config, console)
    return 0
