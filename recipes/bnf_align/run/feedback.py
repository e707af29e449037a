"""Loading feedback as tokens: the first step of every job that reads data."""

from collections.abc import Collection, Iterator, Mapping, Sequence
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
from bnf_core.data.reading import Reading
from bnf_core.data.rendering import asks_for_date, chat_of
from bnf_core.data.streaming import FeedbackStream, MixedStream
from bnf_core.data.table import Columns, ExampleTable, Part
from bnf_core.data.token_cache import Making, TokenCache, cache_folder, made_of
from bnf_core.data.tokenization import CHUNK, Fate, Tokenized
from bnf_core.errors import UserError
from bnf_core.objectives import Objective
from bnf_core.steps.batching import Rows, require_learnable, require_units, rows_alone
from bnf_core.steps.mixing import Mixture
from bnf_core.steps.steps import Data
from bnf_core.storage.digests import json_digest, tokenizer_digest
from bnf_core.types import Example, Position, Unit


def load_sets(
    config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase, console: Console
) -> dict[str, ExampleTable]:
    """The tokenised rows of one split of each source, by its name; a single source has none.

    Raises:
        UserError: a missing file or a bad row.
    """
    return {name: load_split(of, split, tokenizer, console, name) for name, of in config.each().items()}


def load_split(
    config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase, console: Console, name: str = ""
) -> ExampleTable:
    """The same of a single source.

    Args:
        name: of the source, for messages.
    """
    return _told(ExampleTable([_columns(config, split, tokenizer, console)]), split, config, tokenizer, console, name)


def splits_of(config: DataConfig) -> list[str]:
    """Those of train, valid and test that any source has; a file is train."""
    each = config.each().values()
    return [s for s in sources.SPLITS if any(sources.has_split(of.where, of.called(s)) for of in each)] or ["train"]


def read_once(
    split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> Iterator[Example]:
    """The tokenised rows of one split of a single source, a thousand in memory at a time; their labels are not to be
    relied on.

    Raises:
        UserError: a missing file or a bad row.
    """
    rows, tally = _stream(split, config, tokenizer, console, labelled=False)
    yield from rows.examples()
    _list_skipped(rows.skipped, rows.source.name, console, rows.skipped_count)
    _list_unused(rows.reader.unused, console)
    tell(tally, console, whole=config.label is None)


def tell(tally: Tally, console: Console, *, whole: bool = True) -> None:
    """Say what a person should know of the rows; `whole` as for `Tally.notes`."""
    for note in tally.notes(whole):
        console.print(f"[yellow]  {note}[/yellow]", highlight=False, soft_wrap=True)


def with_date(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *recorded: str | None) -> DataConfig:
    """The settings with the day that the chat template is told, where it asks for one: the one that is set, else the
    first that is recorded, else today.

    Raises:
        UserError: `data.chat_template` is a file that cannot be read.
    """
    if config.date is not None or not any(asks_for_date(tokenizer, chat_of(of)) for of in config.each().values()):
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
    labelled: bool = True,
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
            require_learnable(tokens.examples, objective)
        tally.add(tokens)
        tally.neither = rows.reader.neither

    rows = feedback.stream(
        config.where,
        config.called(split),
        shuffle_buffer=shuffle_buffer,
        seed=seed,
        unit=objective.unit if objective else "row",
        report=report,
        labelled=labelled,
    )
    _tell_shape(rows.source.name, rows.shape(), console)
    return rows, tally


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is evaluated on."""

    rows: Data
    examples: Sequence[Example] | None  # the training rows; None where they are streamed
    digest: str  # of the training rows, or of the files they are streamed from, and how they are mixed
    held_out: Mapping[str, ExampleTable]  # by the name of its source: nothing where there is only one
    tallies: Sequence[Tally] = ()  # of streamed rows, of which more become known as they are met

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
        return [rows for rows in (self.examples, *self.held_out.values()) if isinstance(rows, ExampleTable)]

    @property
    def held_out_digest(self) -> str | None:
        return "; ".join(_named(name, rows.digest) for name, rows in self.held_out.items()) or None

    def drawn(self, batch_size: int, position: Position | None) -> str | None:
        """How many rows each of several sources has given, in words; None: there is one source, or no step was
        taken."""
        counts = {} if position is None else self.rows.drawn(batch_size, position)
        total = sum(counts.values())
        shares = [f"{name} {count:,} ({count / total:.1%})" for name, count in counts.items() if total]
        return f"rows drawn: {', '.join(shares)}" if shares else None


def load_training_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, console: Console) -> TrainingData:
    """Training rows, and held-out rows where the config or the data folder has any.

    Raises:
        UserError: a missing file or a bad row.
    """
    data, objective = config.data, config.make_objective()

    def loaded(of: DataConfig, split: str, name: str) -> ExampleTable:
        return _of_units(load_split(of, split, tokenizer, console, name), split, objective, of, console)

    held_out: dict[str, ExampleTable] = {}
    train: dict[str, ExampleTable] = {}
    valid: dict[str, DataConfig] = {}
    if config.valid is not None:
        elsewhere = replace(data, path=config.valid, split=None, subset=None, revision=None, streaming=False)
        valid = elsewhere.each()
    for name, of in data.each().items():
        own = config.valid is None and sources.has_split(of.where, "valid")
        if own:
            valid[name] = replace(of, split=None)
        if data.streaming:
            continue
        if own or config.valid is not None or not config.valid_fraction:
            train[name] = loaded(of, "train", name)
            continue
        columns = _columns(of, "train", tokenizer, console)
        whole = ExampleTable([columns])
        held = sources.held_out_prompts(columns.prompts, config.valid_fraction, config.seed)
        is_held = np.isin(whole.column("groups"), np.fromiter(held, np.int64))
        for side, split, rows in ((train, "train", ~is_held), (held_out, "valid", is_held)):
            table = _told(whole.take(rows), split, of, tokenizer, console, name)
            side[name] = _of_units(table, split, objective, of, console)
    held_out |= {name: loaded(of, of.split or "valid", name) for name, of in valid.items()}
    if data.streaming:
        return _streamed(config, tokenizer, held_out, console)
    examples = ExampleTable.joined(train.values())
    mixture = _mixture(data, {name: len(table) for name, table in train.items()}, objective.unit)
    digest = examples.digest
    if mixture is not None:
        shares = zip(mixture.names, mixture.takes, mixture.sizes, strict=True)
        said = [f"{take:,} of the {size:,} rows of {name}" for name, take, size in shares]
        console.print(f"an epoch has {', '.join(said)}", highlight=False, markup=False, soft_wrap=True)
        digest += f"; an epoch has {', '.join(said)}"
    return TrainingData(
        Rows(
            examples,
            config.seed,
            objective.unit,
            mixture,
            objective.baseline_from == "mismatched",
            config.balance_labels,
        ),
        examples,
        digest,
        held_out,
    )


def _mixture(data: DataConfig, sizes: Mapping[str, int], unit: Unit) -> Mixture | None:
    if isinstance(data.path, str):
        return None
    weights, rows = [source.weight for source in data.path], [source.rows for source in data.path]
    return Mixture.of(list(sizes), list(sizes.values()), weights, rows, unit)


def _streamed(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, held_out: Mapping[str, ExampleTable], console: Console
) -> TrainingData:
    data = config.data
    if config.valid is None and len(held_out) < len(data.each()) and config.valid_fraction > 0:
        raise UserError(
            "valid_fraction cannot hold out rows of streamed data: give held-out rows in a file, with --valid"
        )

    objective = config.make_objective()
    streams, tallies, made = {}, [], []
    for name, of in data.each().items():
        streams[name], tally = _stream(
            "train", of, tokenizer, console, shuffle_buffer=data.shuffle_buffer, seed=config.seed, objective=objective
        )
        tallies.append(tally)
        made.append(_named(name, sources.digest(of.where, of.called("train"))))
        if template := chat_of(of).template:
            made.append(f"chat template {json_digest(template)}")
        if of.label or of.columns:
            made.append(f"columns and labels {json_digest([of.columns, of.label])}")
    rows: Data = streams[""] if "" in streams else _mixed(data, streams, config.seed)
    if isinstance(data.path, list):
        made += [f"weights {', '.join(str(source.weight) for source in data.path)}"]
    digest = ", ".join([made[0], f"tokenizer {tokenizer_digest(tokenizer)}", *made[1:]])
    return TrainingData(rows, None, digest, held_out, tallies)


def _mixed(data: DataConfig, streams: Mapping[str, FeedbackStream], seed: int) -> MixedStream:
    assert isinstance(data.path, list)
    return MixedStream(streams, [1.0 if source.weight is None else source.weight for source in data.path], seed)


def _named(name: str, text: str) -> str:
    return f"{name}: {text}" if name else text


def _of_units(
    table: ExampleTable, name: str, objective: Objective, config: DataConfig, console: Console
) -> ExampleTable:
    """Without the rows that the objective has nothing to compare with, where bad rows are to be skipped."""
    require_learnable(table, objective)
    unit = objective.unit
    alone = rows_alone(table, unit if config.skip_bad_rows else "row")
    if 0 < len(alone) < len(table):
        console.print(f"[yellow]skipped {len(alone)} rows of {name} that lack what this objective compares[/yellow]")
        table = table.take(np.delete(np.arange(len(table)), alone))
    require_units(table, unit)
    return table


def _columns(config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase, console: Console) -> Columns:
    """The tokens of one split, from this machine's cache or made now, with what was skipped."""
    name = config.called(split)
    source = sources.find_source(config.where, name)
    feedback = FeedbackTokenizer.of(tokenizer, config)

    def say(message: str) -> None:
        console.print(f"[dim]  {escape(message)}[/dim]", highlight=False, soft_wrap=True)

    def make() -> Making:
        loaded = sources.load_feedback(source, name, config.skip_bad_rows, Reading.of(config))
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
    about = columns.about
    _tell_shape(str(config.where), about.shape, console)
    _list_skipped(about.skipped, str(config.where), console)
    _list_unused(about.unused, console)
    tell(Tally(config.max_length, unused=set(about.unwritten), neither=about.neither), console)
    return columns


def _watched(parts: Iterator[Part], count: int, console: Console) -> Iterator[Part]:
    """The same, on a bar."""
    with bar("tokens", count, console) as progress:
        for part in parts:
            yield part
            progress.advance()


def _told(
    table: ExampleTable, split: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console, name: str
) -> ExampleTable:
    """The same, once it is said what there is."""
    tally = FeedbackTokenizer.of(tokenizer, config).tally()
    tally.add_table(table)
    console.print(
        f"{_named(name, split)}: {tally.rows:,} rows ({tally.chosen:,} chosen, {tally.rows - tally.chosen:,} "
        f"rejected), {table.column('lengths').sum():,} tokens",
        highlight=False,
        markup=False,
    )
    tell(tally, console)
    verbatim = len(table) > 0 and bool(table.column("fates")[0] & Fate.VERBATIM)
    if config.template == "auto" and tokenizer.chat_template and verbatim:
        console.print(
            "[dim]  plain strings are used as they are; --template chat wraps them in the chat template[/dim]"
        )
    return table


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
