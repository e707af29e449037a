"""Loading feedback as tokens: the first step of every job that reads data."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from bnf_core.config import DataConfig, TrainConfig
from bnf_core.data import sources
from bnf_core.data.feedback import FeedbackTokenizer, Tally
from bnf_core.data.reading import Reading
from bnf_core.data.records import Feedback
from bnf_core.data.rendering import asks_for_date, chat_of
from bnf_core.data.streaming import FeedbackStream
from bnf_core.data.tokenization import Tokenized
from bnf_core.errors import UserError
from bnf_core.objectives import Objective
from bnf_core.steps.batching import Rows, require_units, require_weights, rows_alone
from bnf_core.steps.steps import Data
from bnf_core.storage.digests import json_digest, rows_digest, tokenizer_digest
from bnf_core.types import Example


def load_split(
    path: str, split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> list[Example]:
    """The tokenised rows of one file, or of one split of a folder or Hub data set.

    Raises:
        UserError: a missing file or a bad row.
    """
    return _tokenized(_rows(path, split, config, console), split, config, tokenizer, console)


def read_once(
    split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> Iterator[Example]:
    """The tokenised rows of one split, a thousand in memory at a time.

    Raises:
        UserError: a missing file or a bad row.
    """
    rows, tally = _stream(split, config, tokenizer, console)
    yield from rows.examples()
    _list_skipped(rows.skipped, rows.source.name, console, rows.skipped_count)
    _list_unused(rows.reader.unused, console)
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
    console: Console,
    *,
    shuffle_buffer: int = 1,
    seed: int = 0,
    objective: Objective | None = None,
) -> tuple[FeedbackStream, Tally]:
    """The tokenised rows of one split, read as they are needed, and what became of those that were; in the order of
    the data, unless it is shuffled.

    Raises:
        UserError: nothing there, or no such split.
    """
    feedback = FeedbackTokenizer.of(tokenizer, config)
    tally = feedback.tally()

    def report(tokens: Tokenized) -> None:
        if objective is not None:
            require_weights(tokens.examples, objective)
        tally.add(tokens)
        tally.neither = rows.reader.neither

    unit = objective.unit if objective else "row"
    rows = feedback.stream(config.path, split, shuffle_buffer=shuffle_buffer, seed=seed, unit=unit, report=report)
    _tell_shape(rows.source.name, rows.shape(), console)
    return rows, tally


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is evaluated on."""

    rows: Data
    examples: Sequence[Example] | None  # the training rows; None where they are streamed
    digest: str  # of the training rows, or of the files they are streamed from
    held_out: list[Example] | None
    tally: Tally | None = None  # of streamed rows, of which more become known as they are met

    def num_steps(self, config: TrainConfig) -> int:
        """How many optimizer steps the run has: those of its epochs, but at most `max_steps`, which streams need."""
        if not isinstance(self.rows, Rows):
            assert config.max_steps is not None
            return config.max_steps
        steps = self.rows.steps_per_epoch(config.batch_size) * config.epochs
        return min(steps, config.max_steps or steps)

    @property
    def in_memory(self) -> list[Example]:
        """Training rows that are not streamed, and held-out rows."""
        return [*(self.examples or ()), *(self.held_out or ())]

    @property
    def held_out_digest(self) -> str | None:
        return None if self.held_out is None else rows_digest(self.held_out)


def load_training_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, console: Console) -> TrainingData:
    """Training rows, and held-out rows where the config or the data folder has any.

    Raises:
        UserError: a missing file or a bad row.
    """
    data, valid = config.data, None
    if config.valid is not None:
        valid = _rows(config.valid, "valid", data, console)
    elif sources.has_split(data.path, "valid"):
        valid = _rows(data.path, "valid", data, console)
    if data.streaming:
        return _streamed(config, tokenizer, valid, console)
    train = _rows(data.path, "train", data, console)
    if valid is None and config.valid_fraction > 0:
        train, valid = sources.split_by_prompt(train, config.valid_fraction, config.seed)
    objective = config.make_objective()
    examples = _of_units(_tokenized(train, "train", data, tokenizer, console), "train", objective, data, console)
    return TrainingData(
        rows=Rows(examples, config.seed, objective.unit),
        examples=examples,
        digest=rows_digest(examples),
        held_out=_held_out(valid, objective, data, tokenizer, console),
    )


def _streamed(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, valid: list[Feedback] | None, console: Console
) -> TrainingData:
    data = config.data
    if valid is None and config.valid_fraction > 0:
        raise UserError(
            "valid_fraction cannot hold out rows of streamed data: give held-out rows in a file, with --valid"
        )

    objective = config.make_objective()
    rows, tally = _stream(
        "train", data, tokenizer, console, shuffle_buffer=data.shuffle_buffer, seed=config.seed, objective=objective
    )
    made = [f"{sources.digest(data.path, 'train')}, tokenizer {tokenizer_digest(tokenizer)}"]
    if template := chat_of(data).template:
        made.append(f"chat template {json_digest(template)}")
    if data.label or data.columns:
        made.append(f"columns and labels {json_digest([data.columns, data.label])}")
    return TrainingData(
        rows=rows,
        examples=None,
        digest=", ".join(made),
        held_out=_held_out(valid, objective, data, tokenizer, console),
        tally=tally,
    )


def _held_out(
    rows: list[Feedback] | None,
    objective: Objective,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> list[Example] | None:
    if rows is None:
        return None
    return _of_units(_tokenized(rows, "valid", config, tokenizer, console), "valid", objective, config, console)


def _of_units(
    examples: list[Example], name: str, objective: Objective, config: DataConfig, console: Console
) -> list[Example]:
    """Without the rows that the objective has nothing to compare with, where bad rows are to be skipped."""
    require_weights(examples, objective)
    unit = objective.unit
    alone = rows_alone(examples, unit) if config.skip_bad_rows else []
    if alone:
        console.print(f"[yellow]skipped {len(alone)} rows of {name} that lack what this objective compares[/yellow]")
    kept = [e for i, e in enumerate(examples) if i not in set(alone)]
    require_units(kept or examples, unit)
    return kept


def _rows(path: str, split: str, config: DataConfig, console: Console) -> list[Feedback]:
    loaded = sources.load_feedback(path, split, config.skip_bad_rows, Reading.of(config))
    _tell_shape(path, loaded.shape, console)
    _list_skipped(loaded.skipped, path, console)
    _list_unused(loaded.unused, console)
    tell(Tally(config.max_length, neither=loaded.neither), console)
    return loaded.rows


def _tokenized(
    rows: Sequence[Feedback], name: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> list[Example]:
    feedback = FeedbackTokenizer.of(tokenizer, config)
    tokens = feedback(rows)
    _list_skipped(tokens.skipped, name, console)
    examples = tokens.examples
    chosen = sum(e.label for e in examples)
    console.print(
        f"{name}: {len(examples):,} rows ({chosen:,} chosen, {len(examples) - chosen:,} rejected), "
        f"{sum(map(len, examples)):,} tokens",
        highlight=False,
    )
    tell(feedback.tally(tokens), console)
    if config.template == "auto" and tokenizer.chat_template and isinstance(rows[0].prompt, str):
        console.print(
            "[dim]  plain strings are used as they are; --template chat wraps them in the chat template[/dim]"
        )
    return examples


def _tell_shape(name: str, shape: str, console: Console) -> None:
    if shape:
        console.print(f"{name}: {shape}", highlight=False, markup=False, soft_wrap=True)


def _list_unused(columns: Collection[str], console: Console) -> None:
    if columns:
        console.print(f"[dim]  columns that are not used: {escape(', '.join(sorted(columns)))}[/dim]", highlight=False)


def _list_skipped(messages: Sequence[str], name: str, console: Console, count: int | None = None) -> None:
    if messages:
        first = f", the first {len(messages)}" if count and count > len(messages) else ""
        console.print(f"[yellow]skipped {count or len(messages)} bad rows of {name}{first}:[/yellow]")
        for message in messages:
            console.print(f"  {message}", markup=False, highlight=False, soft_wrap=True)
