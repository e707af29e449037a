"""Loading feedback as tokens: the first step of every job that reads data."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from bnf_align.run.progress import bar
from bnf_core.config import DataConfig, TrainConfig
from bnf_core.data import sources
from bnf_core.data.feedback import FeedbackTokenizer, Tally
from bnf_core.data.rendering import asks_for_date, chat_of
from bnf_core.data.streaming import FeedbackStream
from bnf_core.data.table import Columns, ExampleTable, Part
from bnf_core.data.token_cache import Making, TokenCache, cache_folder, made_of
from bnf_core.data.tokenization import CHUNK, Fate
from bnf_core.errors import UserError
from bnf_core.steps.batching import Rows, require_units, rows_alone
from bnf_core.steps.steps import Data
from bnf_core.storage.digests import json_digest, tokenizer_digest
from bnf_core.types import Example, Unit


def load_split(
    path: str, split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> ExampleTable:
    """The tokenised rows of one file, or of one split of a folder or Hub data set.

    Raises:
        UserError: a missing file or a bad row.
    """
    return _told(ExampleTable([_columns(path, split, config, tokenizer, console)]), split, config, tokenizer, console)


def read_once(
    split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> Iterator[Example]:
    """The tokenised rows of one split, a thousand in memory at a time.

    Raises:
        UserError: a missing file or a bad row.
    """
    rows, tally = _stream(split, config, tokenizer)
    yield from rows.examples()
    _list_skipped(rows.skipped, rows.source.name, console, rows.skipped_count)
    _list_unused(rows.unused, console)
    tell(tally, console)


def tell(tally: Tally, console: Console) -> None:
    """Say what a person should know of the rows."""
    for note in tally.notes():
        console.print(f"[yellow]  {note}[/yellow]", highlight=False, soft_wrap=True)


def with_date(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *recorded: str | None) -> DataConfig:
    """The settings with the day that the chat template is told, where it asks for one: the one that is set, else the
    first that is recorded, else today.

    Raises:
        UserError: `data.chat_template` is a file that cannot be read.
    """
    if config.date is not None or not asks_for_date(tokenizer, chat_of(config)):
        return config
    return replace(config, date=next(filter(None, recorded), None) or date.today().isoformat())


def _stream(
    split: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shuffle_buffer: int = 1,
    seed: int = 0,
    unit: Unit = "row",
) -> tuple[FeedbackStream, Tally]:
    """The tokenised rows of one split, read as they are needed, and what became of those that were; in the order of
    the data, unless it is shuffled.

    Raises:
        UserError: nothing there, or no such split.
    """
    feedback = FeedbackTokenizer.of(tokenizer, config)
    tally = feedback.tally()
    rows = feedback.stream(config.path, split, shuffle_buffer=shuffle_buffer, seed=seed, unit=unit, report=tally.add)
    return rows, tally


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is evaluated on."""

    rows: Data
    examples: Sequence[Example] | None  # the training rows; None where they are streamed
    digest: str  # of the training rows, or of the files they are streamed from
    held_out: ExampleTable | None
    tally: Tally | None = None  # of streamed rows, of which more become known as they are met

    def num_steps(self, config: TrainConfig) -> int:
        """How many optimizer steps the run has: those of its epochs, but at most `max_steps`, which streams need."""
        if not isinstance(self.rows, Rows):
            assert config.max_steps is not None
            return config.max_steps
        steps = self.rows.steps_per_epoch(config.batch_size) * config.epochs
        return min(steps, config.max_steps or steps)

    @property
    def tables(self) -> list[ExampleTable]:
        """Training rows that are not streamed, and held-out rows."""
        return [rows for rows in (self.examples, self.held_out) if isinstance(rows, ExampleTable)]

    @property
    def held_out_digest(self) -> str | None:
        return None if self.held_out is None else self.held_out.digest


def load_training_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, console: Console) -> TrainingData:
    """Training rows, and held-out rows where the config or the data folder has any.

    Raises:
        UserError: a missing file or a bad row.
    """
    data, unit = config.data, config.make_objective().unit

    def loaded(path: str, split: str) -> ExampleTable:
        return _of_units(load_split(path, split, data, tokenizer, console), split, unit, data, console)

    valid = config.valid or (data.path if sources.has_split(data.path, "valid") else None)
    if data.streaming:
        return _streamed(config, tokenizer, None if valid is None else loaded(valid, "valid"), console)
    if valid is not None or not config.valid_fraction:
        train = loaded(data.path, "train")
        held_out = None if valid is None else loaded(valid, "valid")
    else:
        columns = _columns(data.path, "train", data, tokenizer, console)
        whole = ExampleTable([columns])
        held = sources.held_out_prompts(columns.prompts, config.valid_fraction, config.seed)
        is_held = np.isin(whole.column("groups"), np.fromiter(held, np.int64))
        train, held_out = (
            _of_units(_told(whole.take(side), split, data, tokenizer, console), split, unit, data, console)
            for split, side in (("train", ~is_held), ("valid", is_held))
        )
    return TrainingData(Rows(train, config.seed, unit), train, train.digest, held_out)


def _streamed(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, held_out: ExampleTable | None, console: Console
) -> TrainingData:
    data = config.data
    if held_out is None and config.valid_fraction > 0:
        raise UserError(
            "valid_fraction cannot hold out rows of streamed data: give held-out rows in a file, with --valid"
        )

    unit = config.make_objective().unit
    rows, tally = _stream("train", data, tokenizer, shuffle_buffer=data.shuffle_buffer, seed=config.seed, unit=unit)
    made = [f"{sources.digest(data.path, 'train')}, tokenizer {tokenizer_digest(tokenizer)}"]
    if template := chat_of(data).template:
        made.append(f"chat template {json_digest(template)}")
    return TrainingData(rows=rows, examples=None, digest=", ".join(made), held_out=held_out, tally=tally)


def _of_units(table: ExampleTable, name: str, unit: Unit, config: DataConfig, console: Console) -> ExampleTable:
    """Without the rows that the objective has nothing to compare with, where bad rows are to be skipped."""
    alone = rows_alone(table, unit if config.skip_bad_rows else "row")
    if 0 < len(alone) < len(table):
        console.print(f"[yellow]skipped {len(alone)} rows of {name} that lack what this objective compares[/yellow]")
        table = table.take(np.delete(np.arange(len(table)), alone))
    require_units(table, unit)
    return table


def _columns(
    path: str, split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> Columns:
    """The tokens of one split, from this machine's cache or made now, with what was skipped."""
    source = sources.find_source(path, split)
    feedback = FeedbackTokenizer.of(tokenizer, config)

    def say(message: str) -> None:
        console.print(f"[dim]  {escape(message)}[/dim]", highlight=False, soft_wrap=True)

    def make() -> Making:
        loaded = sources.load_feedback(source, split, config.skip_bad_rows)
        making = feedback.making(loaded)
        making.parts = _watched(making.parts, -(-len(loaded.rows) // CHUNK), console)
        return making

    columns = None
    if config.cache and source.files:
        cache = TokenCache(cache_folder())
        try:
            columns = cache.table(made_of(source, config, tokenizer), make, say)
        except OSError as error:
            say(f"tokens are kept in memory, not on the disk: {error}")
    columns = columns or make().columns()
    _list_skipped(columns.skipped, path, console)
    _list_unused(columns.unused, console)
    return columns


def _watched(parts: Iterator[Part], count: int, console: Console) -> Iterator[Part]:
    """The same, on a bar."""
    with bar("tokens", count, console) as progress:
        for part in parts:
            yield part
            progress.advance()


def _told(
    table: ExampleTable, name: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> ExampleTable:
    """The same, once it is said what there is."""
    tally = FeedbackTokenizer.of(tokenizer, config).tally()
    tally.add_table(table)
    console.print(
        f"{name}: {tally.rows:,} rows ({tally.chosen:,} chosen, {tally.rows - tally.chosen:,} rejected), "
        f"{table.column('lengths').sum():,} tokens",
        highlight=False,
    )
    tell(tally, console)
    verbatim = len(table) > 0 and bool(table.column("fates")[0] & Fate.VERBATIM)
    if config.template == "auto" and tokenizer.chat_template and verbatim:
        console.print(
            "[dim]  plain strings are used as they are; --template chat wraps them in the chat template[/dim]"
        )
    return table


def _list_unused(columns: Collection[str], console: Console) -> None:
    if columns:
        console.print(f"[dim]  columns that are not used: {escape(', '.join(sorted(columns)))}[/dim]", highlight=False)


def _list_skipped(messages: Sequence[str], name: str, console: Console, count: int | None = None) -> None:
    if messages:
        first = f", the first {len(messages)}" if count and count > len(messages) else ""
        console.print(f"[yellow]skipped {count or len(messages)} bad rows of {name}{first}:[/yellow]")
        for message in messages:
            console.print(f"  {message}", markup=False, highlight=False, soft_wrap=True)
