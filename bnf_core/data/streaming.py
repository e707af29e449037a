"""Feedback that need not fit in memory: read row by row, shuffled through a buffer, tokenised a batch at a time.

The order of an epoch is a function of the seed, the epoch, the size of the buffer and the number of rows, and of
nothing else. The buffer holds rows that are not yet decoded, so going on in the middle of an epoch costs no more than
reading up to there: the same draws over the same rows, with none of them parsed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.random import PCG64

from bnf_core.config import Where
from bnf_core.data.messages import RowError
from bnf_core.data.readers import RawRow
from bnf_core.data.reading import Reading, RowReader
from bnf_core.data.records import Feedback
from bnf_core.data.sources import find_source, no_rows, nothing_said, source_of
from bnf_core.errors import UserError
from bnf_core.types import Example, Position, Unit

MESSAGES = 20  # of bad rows that are kept

Row = TypeVar("Row")


class FeedbackStream:
    """Batches of rows that are read as they are needed.

    In memory are `shuffle_buffer` rows as they stand in the file and one batch of tokens; of parquet also some hundred
    decoded rows, and a .json file is read whole.

    Args:
        source: a file, folder or Hub data set, as for `sources.load_feedback`; or rows from Python, mappings that can
            be iterated once per epoch in the same order, such as a `datasets.IterableDataset`.
        split: train, valid or test.
        tokenize_rows: gives one example for each row, in order, and raises RowError for a row that it refuses.
        shuffle_buffer: how many rows to draw the next one from; 1 keeps the order of the data, as many as the data
            has, or more, shuffle it wholly.
        seed: a non-negative integer.
        skip_bad_rows: list bad rows in `skipped` instead of stopping at the first.
        unit: what the loss compares. A pair is never parted: a batch may have one row more than asked for.
        reading: the names of columns, and how labels are made.
        labelled: whether the labels are asked for; otherwise rules that compare the rows of a prompt are passed over.
    Raises:
        UserError: nothing there, no such split, no buffer, or a loss that compares all rows of a prompt.
    """

    ahead = True

    def __init__(
        self,
        source: str | Where | Iterable[Mapping[str, Any]],
        split: str,
        tokenize_rows: Callable[[list[Feedback]], list[Example]],
        *,
        shuffle_buffer: int,
        seed: int,
        skip_bad_rows: bool = False,
        unit: Unit = "row",
        reading: Reading | None = None,
        labelled: bool = True,
    ) -> None:
        if unit == "prompt":
            raise UserError("this objective compares all rows of a prompt, which streamed data do not hold together")
        if shuffle_buffer < 1:
            raise UserError(f"the shuffle buffer is {shuffle_buffer} rows: expected at least 1, which does not shuffle")
        self.source = find_source(source, split, True) if isinstance(source, str | Where) else source_of(source, split)
        self.split = split
        self.tokenize_rows = tokenize_rows
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.skip_bad_rows = skip_bad_rows
        self.unit = unit
        self.skipped: list[str] = []  # the first messages of bad rows, each once
        self._reading = reading
        self.reader = RowReader(reading, alone=labelled)
        self.skipped_count = 0  # bad rows met so far; what is met in two epochs counts twice

    def batches(self, batch_size: int, position: Position | None = None) -> Iterator[tuple[list[Example], Position]]:
        """Endless batches, epoch after epoch, each epoch in an order of its own.

        Args:
            batch_size: examples in a batch. The last batch of an epoch may be short; none spans two epochs.
            position: where to resume, as it came with a batch; by default the beginning.
        Returns:
            The batches, each with the position after it: `epoch`, `rows` of it used up in shuffled order, and
            `examples` used of the row after those, of which a pair has two.
        Raises:
            RowError: a bad row, unless they are to be skipped.
            UserError: an epoch without any usable row; data that cannot be read, or are not those of the position.
        """
        at = {"epoch": 0, "rows": 0, "examples": 0} if position is None else position
        if at.keys() != {"epoch", "rows", "examples"}:
            raise UserError(f"{at} is no position in streamed data. Go on with data.streaming as the run began.")
        while True:
            batch: list[Example] = []
            for example, after in self._epoch(at, batch_size):
                batch.append(example)
                if len(batch) >= batch_size and (self.unit == "row" or after["examples"] == 0):
                    yield batch, after
                    batch = []
            if batch:
                yield batch, after
            at = {"epoch": at["epoch"] + 1, "rows": 0, "examples": 0}

    def drawn(self, batch_size: int, position: Position) -> dict[str, int]:
        """Of one source, nothing to tell."""
        return {}

    def shape(self) -> str:
        """What the first row is of; nothing where it is bad, or there is none."""
        reader = RowReader(self._reading)
        for row in self.source.read():
            try:
                reader(row.columns(), row.source)
            except RowError:
                return ""
            return reader.described()
        return ""

    def examples(self, epoch: int = 0, chunk: int = 1000) -> Iterator[Example]:
        """The examples of one epoch, tokenised `chunk` rows at a time.

        Raises:
            RowError, UserError: as `batches`.
        """
        return (example for example, _ in self._epoch({"epoch": epoch, "rows": 0, "examples": 0}, chunk))

    def endless(self, at: Position, chunk: int) -> Iterator[tuple[Example, Position]]:
        """Example by example, epoch after epoch, each with the position after it; whole rows of the data end where
        that has no `examples`. Of what is `chunk` rows ahead tokens are made already."""
        while True:
            yield from self._epoch(at, chunk)
            at = {"epoch": at["epoch"] + 1, "rows": 0, "examples": 0}

    def _epoch(self, at: Position, chunk: int) -> Iterator[tuple[Example, Position]]:
        """The examples of an epoch from a position on, each with the position after it."""
        epoch, rows, used = at["epoch"], at["rows"], at["examples"]
        shuffled = shuffle(self.source.read(), self.shuffle_buffer, self.seed, epoch)
        passed = sum(1 for _ in islice(shuffled, rows))
        if passed < rows:
            raise self._other_data(f"{rows} rows of epoch {epoch} were used, but there are only {passed} now")
        usable = rows > 0
        while part := list(islice(shuffled, chunk)):
            for examples in self._tokenize(part):
                if 0 < used >= len(examples):
                    raise self._other_data(f"{used} completions of a row were used, and it has {len(examples)} now")
                for i in range(used, len(examples)):
                    usable, done = True, i + 1 == len(examples)
                    yield examples[i], {"epoch": epoch, "rows": rows + done, "examples": 0 if done else i + 1}
                rows, used = rows + 1, 0
        if used:
            raise self._other_data(f"{used} completions of a row were used that is not there now")
        if not usable:
            raise self._nothing(epoch, rows)

    def _tokenize(self, part: list[RawRow]) -> Iterator[list[Example]]:
        """The examples of each row: none of a bad one that is skipped."""
        parsed: list[list[Feedback]] = []
        for row in part:
            try:
                parsed.append(self.reader(row.columns(), row.source))
            except RowError as error:
                parsed.append(self._skip(error))
        flat = [feedback for several in parsed for feedback in several]
        try:
            found = [[example] for example in self.tokenize_rows(flat)] if flat else []
        except RowError:
            if not self.skip_bad_rows:
                raise
            found = [self._tokenize_one(feedback) for feedback in flat]
        if len(found) != len(flat):
            raise ValueError(f"tokenize_rows gave {len(found)} examples for {len(flat)} rows, expected one for each")
        remaining = iter(found)
        for row, several in zip(part, parsed, strict=True):
            examples = [example for _ in several for example in next(remaining)]
            if self.unit == "pair" and examples and len({e.label for e in examples}) < 2:
                problem = "makes no pair, which this objective compares: expected columns chosen and rejected"
                remedy = "Give paired data, or take an objective for single rows, such as bnf, kto or simper"
                examples = self._skip(RowError(row.source, "", problem, remedy))
            yield examples

    def _tokenize_one(self, feedback: Feedback) -> list[Example]:
        try:
            return self.tokenize_rows([feedback])
        except RowError as error:
            return self._skip(error)

    def _skip(self, error: RowError) -> list[Any]:
        if not self.skip_bad_rows:
            raise error
        self.skipped_count += 1
        if len(self.skipped) < MESSAGES and str(error) not in self.skipped:
            self.skipped.append(str(error))
        return []

    def _other_data(self, problem: str) -> UserError:
        return UserError(f"{self.source.name}: not the data that the run began with: {problem}. Give it the same data.")

    def _nothing(self, epoch: int, rows: int) -> UserError:
        if rows and not self.skipped:
            return nothing_said(self.source.name, self.reader.neither)
        if rows:
            return UserError(f"{self.source.name}: none of its {rows} rows is usable; the first: {self.skipped[0]}")
        if epoch:
            return UserError(
                f"{self.source.name}: no rows left in epoch {epoch}. Rows from Python must be such that they can be "
                "read again, as a list or a datasets.IterableDataset can, and a generator cannot."
            )
        return no_rows(self.source.name, self.split)


class MixedStream:
    """Batches of several streams, of which each gives its share: before each row a draw decides whose it is. Every
    stream begins anew when it is at its end.

    Args:
        streams: by name; all of one `unit`.
        weights: of each, 0 or more, one at least above 0.
        seed: of the draws.
    """

    ahead = True

    def __init__(self, streams: Mapping[str, FeedbackStream], weights: Sequence[float], seed: int):
        self.streams = streams
        sums = np.cumsum(weights)
        self._shares = sums / sums[-1]
        self._seed = seed
        self._whole = {stream.unit for stream in streams.values()} == {"pair"}

    def batches(self, batch_size: int, position: Position | None = None) -> Iterator[tuple[list[Example], Position]]:
        """Endless batches, as those of a FeedbackStream. A position has that of each stream, how many examples each
        has given, and the number of the draw.

        Raises:
            RowError, UserError: as of a FeedbackStream, or the position is of other streams.
        """
        parts = ("epoch", "rows", "examples", "given")
        start = {f"{name}/{part}": 0 for name in self.streams for part in parts} | {"draws": 0}
        at = dict(start if position is None else position)
        if at.keys() != start.keys():
            raise UserError(
                f"{position} is no position in these streams. Go on with the sources that the run began with."
            )
        sources = {
            name: stream.endless({part: at[f"{name}/{part}"] for part in parts[:3]}, batch_size)
            for name, stream in self.streams.items()
        }
        draws = PCG64([self._seed, len(sources)])
        draws.advance(at["draws"])
        batch: list[Example] = []
        while True:
            drawn = int(np.searchsorted(self._shares, (draws.random_raw() >> 11) / 2.0**53, "right"))
            name, within = list(sources)[drawn], True
            while within:
                example, after = next(sources[name])
                batch.append(example)
                within = after["examples"] > 0
                at |= {f"{name}/{part}": value for part, value in after.items()}
                at |= {f"{name}/given": at[f"{name}/given"] + 1, "draws": at["draws"] + (not within)}
                if len(batch) >= batch_size and not (within and self._whole):
                    yield batch, dict(at)
                    batch = []

    def drawn(self, batch_size: int, position: Position) -> dict[str, int]:
        """How many rows each stream has given up to a position."""
        return {name: position[f"{name}/given"] for name in self.streams}


def shuffle(rows: Iterable[Row], size: int, seed: int, epoch: int) -> Iterator[Row]:
    """Every row once, drawn from a buffer of the next `size` rows.

    Takes the raw numbers of the generator, the only ones that NumPy promises never to change; their remainders are
    uneven by less than size / 2^64.
    """
    generator = PCG64([seed, epoch])
    buffer: list[Row] = []

    def draw() -> Row:
        drawn = generator.random_raw() % len(buffer)
        buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
        return buffer.pop()

    for row in rows:
        buffer.append(row)
        if len(buffer) == size:
            yield draw()
    while buffer:
        yield draw()
