"""From tokenised rows to optimizer steps: a seeded order, and batches whose coefficients already carry the
whole normalisation, so that no backend divides by anything.

The order and the batches depend on the data and the seed alone, never on the backend or on how a step is cut
into micro-batches, packed, or dealt to processes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from bnf_core.data.table import column
from bnf_core.errors import UserError
from bnf_core.objectives import Objective
from bnf_core.steps.balance import ALIKE, label_factors, repeats, weighed
from bnf_core.steps.mismatched import mismatched_row
from bnf_core.steps.mixing import Mixture, epoch_order, first_of_unit
from bnf_core.types import Array, Batch, Counts, Example, Position, Unit

T = TypeVar("T")


def collate(
    examples: Sequence[Example],
    num_sequences: int,
    pad_id: int = 0,
    *,
    bins: Sequence[Sequence[int]] | None = None,
    share_prompts: bool = False,
    counts: Counts | None = None,
) -> Batch:
    """Batch examples.

    Args:
        examples: the sequences; with none, one token of padding that scores nothing.
        num_sequences: sequences in the global batch, over all micro-batches and processes.
        pad_id: any token id; it is never scored and never seen by a scored token.
        bins: which examples each row of the grid holds, every one once; default: one to a row.
        share_prompts: have neighbours of one prompt in a row of the grid share it.
        counts: of the global batch; default: that of the examples.
    """
    bins = [[i] for i in range(len(examples))] if bins is None else bins
    rows_of_units = [_units(examples, row, share_prompts) for row in bins]
    width = max((sum(_tokens(examples, unit) for unit in row) for row in rows_of_units), default=1)
    grid = (max(len(bins), 1), width)
    input_ids = np.full(grid, pad_id, np.int32)
    position_ids, segment_ids, prefix_ids, uses = (np.zeros(grid, np.int32) for _ in range(4))
    positions, targets, rows = ([np.zeros(0, t)] for t in (np.int64, np.int32, np.int32))
    coefficients, drawn = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for b, row in enumerate(rows_of_units):
        at = segment = 0
        for unit in row:
            prompt, prefix = examples[unit[0]].prompt_ids, segment
            last = at + len(prompt) - 1  # predicts the first token of every completion
            span = slice(at, last + 1)
            input_ids[b, span], position_ids[b, span] = prompt, np.arange(len(prompt))
            segment_ids[b, span] = prefix_ids[b, span] = segment
            uses[b, span] = len(unit)
            at = last + 1
            for i in unit:
                completion, count = examples[i].completion_ids, len(examples[i].completion_ids)
                segment += len(unit) > 1
                span = slice(at, at + count)
                input_ids[b, span], position_ids[b, span] = completion, len(prompt) + np.arange(count)
                segment_ids[b, span], prefix_ids[b, span], uses[b, span] = segment, prefix, 1
                trained = examples[i].trained_positions
                positions.append(b * width + np.array([last, *range(at, at + count - 1)], np.int64)[trained])
                targets.append(np.asarray(completion, np.int32)[trained])
                rows.append(np.full(len(trained), len(positions) - 2, np.int32))
                label = examples[i].weight if examples[i].label else -examples[i].weight
                weight = label / (len(trained) * num_sequences)
                coefficients.append(np.full(len(trained), weight, np.float32))
                by = examples[i].drawn
                log_probs = by.log_probs if by else (0.0,) * count
                drawn.append(np.asarray(log_probs, np.float32)[trained])
                at += count
            segment += 1
        position_ids[b, at:] = np.arange(width - at)
        segment_ids[b, at:] = prefix_ids[b, at:] = segment
    chosen = [examples[i] for row in bins for i in row]
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        prefix_ids=prefix_ids,
        uses=uses,
        packed=any(len(row) > 1 for row in rows_of_units),
        shared=any(len(unit) > 1 for row in rows_of_units for unit in row),
        lengths=np.asarray([len(e) for e in chosen], np.int32),
        positions=np.concatenate(positions),
        targets=np.concatenate(targets),
        sequence_ids=np.concatenate(rows),
        coefficients=np.concatenate(coefficients),
        labels=np.asarray([1 if e.label else -1 for e in chosen], np.int32),
        weights=np.asarray([e.weight for e in chosen], np.float32),
        groups=np.asarray([e.group for e in chosen], np.int64),
        pairs=_pairs(chosen),
        counts=counts or Counts.of(examples)._replace(rows=num_sequences),
        keys=np.asarray([e.key for e in chosen], np.uint64),
        drawn_log_p=np.concatenate(drawn),
        advantages=np.asarray([e.drawn.advantage if e.drawn else 0.0 for e in chosen], np.float32),
    )


def _pairs(examples: Sequence[Example]) -> Array:
    """(P, 2) int32: the chosen and the rejected example of each pair."""
    rejected = {e.pair: i for i, e in enumerate(examples) if e.pair and not e.label}
    found = [(i, rejected[e.pair]) for i, e in enumerate(examples) if e.pair in rejected and e.label]
    return np.asarray(found, np.int32).reshape(-1, 2)


def _units(examples: Sequence[Example], row: Sequence[int], share_prompts: bool) -> list[list[int]]:
    """What has a prompt of its own in a row of the grid."""
    if not share_prompts:
        return [[i] for i in row]
    return [list(unit) for _, unit in itertools.groupby(row, lambda i: examples[i].prompt_ids)]


def _tokens(examples: Sequence[Example], unit: Sequence[int]) -> int:
    """Of one prompt and its completions."""
    return len(examples[unit[0]].prompt_ids) + sum(len(examples[i].completion_ids) for i in unit)


@dataclass(frozen=True)
class MicroBatching:
    """How a global batch is cut into micro-batches: memory and speed, never the result."""

    micro_batch_size: int  # most sequences at a time, or rows of the grid if packed
    pack_to: int | None = None  # pack sequences into grid rows of up to so many tokens
    group_by_length: bool = True  # put sequences of similar length into one micro-batch: less padding
    multiple_of: int = 1  # processes: each gets the same number of micro-batches, some perhaps empty
    share_prompts: bool = False  # have the completions of one prompt in a micro-batch share it
    unit: Unit = "row"  # what the loss compares stays in one micro-batch, even where that is then larger


def micro_batches(examples: Sequence[Example], batching: MicroBatching, pad_id: int = 0) -> list[Batch]:
    """Cut one global batch; the losses and gradients of its parts add up to its own, whatever the cut."""
    whole = batching.unit != "row"
    if whole or batching.share_prompts:
        units = _by(examples, _unit_key(batching.unit) if whole else _prompt)
    else:
        units = [[i] for i in range(len(examples))]
    if batching.group_by_length or batching.pack_to:
        units = [sorted(unit, key=lambda i: (len(examples[i]), i)) for unit in units]
        units.sort(key=lambda unit: (len(examples[unit[-1]]), unit[-1]))
    if batching.pack_to is not None:
        parcels = [[row] for row in _pack(examples, units, batching, whole)]
    elif whole:
        parcels = [[[i] for i in unit] for unit in units]
    else:
        parcels = [[[i]] for unit in units for i in unit]
    parts, counts = [], Counts.of(examples)
    for part in _parts(parcels, batching.micro_batch_size, batching.multiple_of):
        chosen = [examples[i] for row in part for i in row]
        place = itertools.count()
        local = [[next(place) for _ in row] for row in part]
        if batching.share_prompts and batching.pack_to is None:
            chosen = _neighbours(chosen)
            local = _rows_of_one_prompt(chosen)
        parts.append(
            collate(chosen, len(examples), pad_id, bins=local, share_prompts=batching.share_prompts, counts=counts)
        )
    return parts


def _by(examples: Sequence[Example], key: Callable[[Example], object]) -> list[list[int]]:
    """The examples with one key, in the order in which the keys are met."""
    found: dict[object, list[int]] = {}
    for i, e in enumerate(examples):
        found.setdefault(key(e), []).append(i)
    return list(found.values())


def _prompt(example: Example) -> object:
    return example.prompt_ids


def _unit_key(unit: Unit) -> Callable[[Example], object]:
    """What the rows of one pair or prompt have alike."""
    return (lambda e: e.pair) if unit == "pair" else (lambda e: e.group)


def _parts(parcels: Sequence[list[list[int]]], most: int, multiple_of: int) -> list[list[list[int]]]:
    """Rows of a grid as micro-batches of up to `most` of them, all about as large. No parcel is parted, so that one
    larger than `most` makes a larger micro-batch."""
    size = max(map(len, parcels), default=1)
    if all(len(parcel) == size for parcel in parcels):
        count = -(-len(parcels) // max(most // size, 1))
        cut: list[Sequence[list[list[int]]]] = list(
            _even_parts(parcels, -(-max(count, 1) // multiple_of) * multiple_of)
        )
    else:
        greedy: list[list[list[list[int]]]] = [[]]
        for parcel in parcels:
            if greedy[-1] and sum(map(len, greedy[-1])) + len(parcel) > most:
                greedy.append([])
            greedy[-1].append(parcel)
        cut = [*greedy, *[[] for _ in range(-len(greedy) % multiple_of)]]
    return [[row for parcel in part for row in parcel] for part in cut]


def _neighbours(examples: Sequence[Example]) -> list[Example]:
    """With the examples of one prompt side by side."""
    return [examples[i] for unit in _by(examples, _prompt) for i in unit]


def _rows_of_one_prompt(examples: Sequence[Example]) -> list[list[int]]:
    """Rows of a grid with as many completions of one prompt to a row as make the grid smallest: more of them compute
    fewer prompts, but make longer rows and so more padding. One to a row is not to share at all."""
    units = _units(examples, range(len(examples)), True)
    candidates = [
        [unit[at : at + most] for unit in units for at in range(0, len(unit), most)]
        for most in range(1, 1 + max(map(len, units), default=1))
    ]
    return min(candidates, key=lambda rows: len(rows) * max((_tokens(examples, row) for row in rows), default=1))


def _pack(
    examples: Sequence[Example], units: Sequence[list[int]], batching: MicroBatching, whole: bool
) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest possible bins (Johnson, 1973). Where the completions of a
    prompt take more than the capacity, so many go together as fit, or all of them in a longer row if they are to stay
    `whole`; a longer sequence has a bin of its own."""
    capacity = batching.pack_to or 0

    def tokens(row: Sequence[int]) -> int:
        return sum(_tokens(examples, unit) for unit in _units(examples, row, batching.share_prompts))

    fitting: list[list[int]] = []
    for unit in units:
        fitting.append(unit if whole else unit[:1])
        for i in () if whole else unit[1:]:
            if tokens([*fitting[-1], i]) <= capacity:
                fitting[-1].append(i)
            else:
                fitting.append([i])
    bins: list[list[int]] = []
    room: list[int] = []
    for unit in sorted(fitting, key=lambda unit: (tokens(unit), unit[-1]), reverse=True):
        length = tokens(unit)
        at = next((b for b, left in enumerate(room) if left >= length), None)
        if at is None:
            bins.append(unit)
            room.append(capacity - length)
        else:
            bins[at] += unit
            room[at] -= length
    return bins


def _even_parts(items: Sequence[T], count: int) -> Iterator[Sequence[T]]:
    """So many consecutive parts whose sizes differ by one at most."""
    edges = [len(items) * part // count for part in range(count + 1)]
    return (items[a:b] for a, b in itertools.pairwise(edges))


def pairs(rows: Sequence[Example]) -> list[tuple[Example, Example]]:
    """A good and a bad row of one prompt each.

    Raises:
        ValueError: a row is left over.
    """
    good = [row for row in rows if row.label]
    bad_of = {row.group: row for row in rows if not row.label}
    if 2 * len(good) != len(rows) or {row.group for row in good} != bad_of.keys():
        raise ValueError("every prompt needs one good and one bad row")
    return [(row, bad_of[row.group]) for row in good]


class Rows:
    """Examples held in memory, and the batches they give: a fresh seeded order each epoch, in which completions of
    one prompt stay together, so that a batch can compare them and compute the prompt once.

    Args:
        unit: what the loss compares: never parted, so that a batch may have some more rows than asked for.
        mixture: of the sources that the examples are of.
        balance: weigh rows so that both labels come to the same over an epoch.
        mismatched: whether the loss compares rewards with those of mismatched rows: then each row is given its own,
            made with the next row of the data, the same in every epoch.
    Raises:
        UserError: rows that make no pair, or a prompt without a chosen or a rejected row, where the loss compares them.
    """

    ahead = True

    def __init__(
        self,
        examples: Sequence[Example],
        seed: int,
        unit: Unit = "row",
        mixture: Mixture | None = None,
        mismatched: bool = False,
        balance: bool = False,
    ):
        require_units(examples, unit)
        self.examples = examples
        self.seed = seed
        self.unit = unit
        self.mixture = mixture
        counts = np.unique(_keys(examples, unit), return_counts=True)[1]
        self._largest = 1 if unit == "row" else int(counts.max(initial=1))
        often = repeats(mixture.sizes, mixture.takes) if mixture else None
        self._factors = label_factors(examples, often) if balance else ALIKE
        self._longest = max(map(len, examples), default=0) if mismatched else None

    def __getitem__(self, i: int) -> Example:
        row = self.examples[i]
        if self._factors is not ALIKE:
            row = weighed(row, self._factors)
        return (
            row if self._longest is None else replace(row, mismatched=mismatched_row(self.examples, i, self._longest))
        )

    @property
    def epoch_rows(self) -> int:
        """How many rows an epoch has."""
        return self.mixture.rows if self.mixture else len(self.examples)

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-self.epoch_rows // max(batch_size, self._largest))

    def batches(self, batch_size: int, position: Position | None = None) -> Iterator[tuple[list[Example], Position]]:
        """Epoch after epoch without end; the last batch of an epoch may be short and is never dropped.

        Yields:
            the examples of a batch, and the position to resume from after it
        """
        epoch, at = (position["epoch"], position["rows"]) if position else (0, 0)
        batch_size = max(batch_size, self._largest)
        while True:
            order, edges = self.epoch(epoch, batch_size)
            for edge in edges:
                if edge > at:
                    yield [self[i] for i in order[at:edge].tolist()], {"epoch": epoch, "rows": edge}
                    at = edge
            epoch, at = epoch + 1, 0

    def epoch(self, epoch: int, batch_size: int) -> tuple[Array, list[int]]:
        """The rows of an epoch in their order, (rows,) int32, and where each batch ends."""
        batch_size = max(batch_size, self._largest)
        keys = _keys(self.examples, "prompt" if self.unit == "row" else self.unit)
        if self.mixture is None:
            order = epoch_order(len(self.examples), epoch, self.seed)
            keys = keys[order]
        else:
            order, keys = self.mixture.epoch(epoch, self.seed, keys)
        first = first_of_unit(keys, batch_size if self.unit == "row" else None)
        moved = np.argsort(first, kind="stable")
        rows = np.arange(batch_size, len(order) + batch_size, batch_size)
        if self.unit == "row":
            return order[moved].astype(np.int32), np.minimum(rows, len(order)).tolist()
        # Each batch has the units whose last rows are among its `batch_size`: as many batches in every epoch.
        unit_ends = np.flatnonzero(np.diff(first[moved], append=-1)) + 1
        edges = unit_ends[np.searchsorted(unit_ends, rows, "right") - 1]
        return order[moved].astype(np.int32), edges.tolist()

    def drawn(self, batch_size: int, position: Position) -> dict[str, int]:
        """How many rows each of several sources has given up to a position."""
        if self.mixture is None:
            return {}
        order, _ = self.epoch(position["epoch"], batch_size)
        return self.mixture.drawn(position["epoch"], order[: position["rows"]])


def _keys(examples: Sequence[Example], unit: Unit) -> Array:
    """What the rows of one pair or prompt have alike, (rows,) int64."""
    return column(examples, "pair" if unit == "pair" else "group")


def rows_alone(examples: Sequence[Example], unit: Unit) -> Array:
    """Which rows have nothing of the other label to be compared with, where the loss compares them."""
    if unit == "row":
        return np.zeros(0, np.int64)
    keys, chosen = _keys(examples, unit), column(examples, "label") > 0
    compared = np.isin(keys, keys[chosen]) & np.isin(keys, keys[~chosen])
    return np.flatnonzero(~compared | (keys == 0) if unit == "pair" else ~compared)


def require_units(examples: Sequence[Example], unit: Unit) -> None:
    """
    Raises:
        UserError: rows that have nothing to be compared with, with the first of them.
    """
    if len(alone := rows_alone(examples, unit)):
        wants = "pairs, with columns chosen and rejected" if unit == "pair" else "a prompt's chosen rows with rejected"
        raise UserError(
            f"this objective compares {wants}, and {len(alone)} of {len(examples)} rows have nothing to be compared "
            f"with, the first: {examples[int(alone[0])].source}. Give such data, or take an objective for single rows, "
            "such as bnf, kto or simper"
        )


def require_learnable(examples: Sequence[Example], objective: Objective) -> None:
    """
    Raises:
        UserError: rows that nobody is known to have drawn, and an objective that learns from samples of the policy; or
            rows that count more or less than others, and one that knows chosen and rejected ones alone.
    """
    unknown = next((e for e in examples if e.drawn is None), None) if objective.on_policy else None
    if unknown is not None:
        raise UserError(
            f"objective {objective}: it learns from the policy's own samples as `bnf online` draws them, and "
            f"{unknown.source} is none. Take an objective for any rows, such as bnf, kto or simper"
        )
    weighted = np.flatnonzero(column(examples, "weight") != 1)
    if len(weighted) and not objective.takes_weights:
        raise UserError(
            f"objective {objective}: a row is chosen or rejected to it and nothing between, and {len(weighted)} of "
            f"{len(examples)} rows have a graded label or a weight, the first: {examples[int(weighted[0])].source}. "
            'Leave out the weights and give data.label a rule, such as "label > 0", or take another objective, such as '
            "bnf, kto or simper"
        )
