"""From tokenised rows to optimizer steps: a seeded order, and batches whose coefficients already carry the
whole normalisation, so that no backend divides by anything.

The order and the batches depend on the data and the seed alone, never on the backend or on how a step is cut
into micro-batches, packed, or dealt to processes.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bnf_core.errors import UserError
from bnf_core.types import Array, Batch, Example, Position


def collate(
    examples: Sequence[Example],
    num_sequences: int,
    pad_id: int = 0,
    *,
    bins: Sequence[Sequence[int]] | None = None,
    share_prompts: bool = False,
) -> Batch:
    """Batch examples.

    Args:
        examples: the sequences; with none, one token of padding that scores nothing.
        num_sequences: sequences in the global batch, over all micro-batches and processes.
        pad_id: any token id; it is never scored and never seen by a scored token.
        bins: which examples each row of the grid holds, every one once; default: one to a row.
        share_prompts: have neighbours of one prompt in a row of the grid share it.
    """
    bins = [[i] for i in range(len(examples))] if bins is None else bins
    rows_of_units = [_units(examples, row, share_prompts) for row in bins]
    width = max((sum(_tokens(examples, unit) for unit in row) for row in rows_of_units), default=1)
    grid = (max(len(bins), 1), width)
    input_ids = np.full(grid, pad_id, np.int32)
    position_ids, segment_ids, prefix_ids = (np.zeros(grid, np.int32) for _ in range(3))
    positions, targets, rows, coefficients = ([np.zeros(0, t)] for t in (np.int64, np.int32, np.int32, np.float32))
    for b, row in enumerate(rows_of_units):
        at = segment = 0
        for unit in row:
            prompt, prefix = examples[unit[0]].prompt_ids, segment
            last = at + len(prompt) - 1  # predicts the first token of every completion
            span = slice(at, last + 1)
            input_ids[b, span], position_ids[b, span] = prompt, np.arange(len(prompt))
            segment_ids[b, span] = prefix_ids[b, span] = segment
            at = last + 1
            for i in unit:
                completion, count = examples[i].completion_ids, len(examples[i].completion_ids)
                segment += len(unit) > 1
                span = slice(at, at + count)
                input_ids[b, span], position_ids[b, span] = completion, len(prompt) + np.arange(count)
                segment_ids[b, span], prefix_ids[b, span] = segment, prefix
                trained = examples[i].trained_positions
                positions.append(b * width + np.array([last, *range(at, at + count - 1)], np.int64)[trained])
                targets.append(np.asarray(completion, np.int32)[trained])
                rows.append(np.full(len(trained), len(positions) - 2, np.int32))
                weight = (1.0 if examples[i].label else -1.0) / (len(trained) * num_sequences)
                coefficients.append(np.full(len(trained), weight, np.float32))
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
        packed=any(len(row) > 1 for row in rows_of_units),
        shared=any(len(unit) > 1 for row in rows_of_units for unit in row),
        lengths=np.asarray([len(e) for e in chosen], np.int32),
        positions=np.concatenate(positions),
        targets=np.concatenate(targets),
        sequence_ids=np.concatenate(rows),
        coefficients=np.concatenate(coefficients),
        labels=np.asarray([1 if e.label else -1 for e in chosen], np.int32),
        groups=np.asarray([e.group for e in chosen], np.int64),
        keys=np.asarray([e.key for e in chosen], np.uint64),
    )


def require_known_tokens(batch: Batch, vocabulary: int) -> None:
    """
    Args:
        vocabulary: how many token ids the model knows.
    Raises:
        UserError: the batch holds an id beyond them.
    """
    largest = max((int(ids.max()) for ids in (batch.input_ids, batch.targets) if ids.size), default=0)
    if largest >= vocabulary:
        raise UserError(
            f"the data holds token id {largest}, and the model knows ids below {vocabulary}: the tokenizer is that of "
            "another model, or has tokens that were added to it and not to the model. Give the model's own tokenizer"
        )


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


def micro_batches(examples: Sequence[Example], batching: MicroBatching, pad_id: int = 0) -> list[Batch]:
    """Cut one global batch; the losses and gradients of its parts add up to its own, whatever the cut."""
    units = _by_prompt(examples) if batching.share_prompts else [[i] for i in range(len(examples))]
    if batching.group_by_length or batching.pack_to:
        units = [sorted(unit, key=lambda i: (len(examples[i]), i)) for unit in units]
        units.sort(key=lambda unit: (len(examples[unit[-1]]), unit[-1]))
    bins = (
        [[i] for unit in units for i in unit] if batching.pack_to is None else _pack(examples, units, batching.pack_to)
    )
    count = -(-len(bins) // batching.micro_batch_size)
    count = -(-max(count, 1) // batching.multiple_of) * batching.multiple_of
    parts = []
    for part in _even_parts(bins, count):
        chosen = [examples[i] for row in part for i in row]
        place = itertools.count()
        local = [[next(place) for _ in row] for row in part]
        if batching.share_prompts and batching.pack_to is None:
            local = _rows_of_one_prompt(chosen)
        parts.append(collate(chosen, len(examples), pad_id, bins=local, share_prompts=batching.share_prompts))
    return parts


def _by_prompt(examples: Sequence[Example]) -> list[list[int]]:
    """The examples of each prompt, in the order in which the prompts are met."""
    units: dict[tuple[int, ...], list[int]] = {}
    for i, e in enumerate(examples):
        units.setdefault(e.prompt_ids, []).append(i)
    return list(units.values())


def _rows_of_one_prompt(examples: Sequence[Example]) -> list[list[int]]:
    """Rows of a grid with as many completions of one prompt to a row as make the grid smallest: more of them compute
    fewer prompts, but make longer rows and so more padding. One to a row is not to share at all."""
    units = _units(examples, range(len(examples)), True)
    candidates = [
        [unit[at : at + most] for unit in units for at in range(0, len(unit), most)]
        for most in range(1, 1 + max(map(len, units), default=1))
    ]
    return min(candidates, key=lambda rows: len(rows) * max((_tokens(examples, row) for row in rows), default=1))


def _pack(examples: Sequence[Example], units: Sequence[list[int]], capacity: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest possible bins (Johnson, 1973). Where the completions of a
    prompt take more than the capacity, so many go together as fit; a longer sequence has a bin of its own."""
    fitting: list[list[int]] = []
    for unit in units:
        fitting.append(unit[:1])
        for i in unit[1:]:
            if _tokens(examples, fitting[-1]) + len(examples[i].completion_ids) <= capacity:
                fitting[-1].append(i)
            else:
                fitting.append([i])
    bins: list[list[int]] = []
    room: list[int] = []
    for unit in sorted(fitting, key=lambda unit: (_tokens(examples, unit), unit[-1]), reverse=True):
        length = _tokens(examples, unit)
        at = next((b for b, left in enumerate(room) if left >= length), None)
        if at is None:
            bins.append(unit)
            room.append(capacity - length)
        else:
            bins[at] += unit
            room[at] -= length
    return bins


def _even_parts(items: Sequence[list[int]], count: int) -> Iterator[Sequence[list[int]]]:
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
    one prompt stay together, so that a batch can compare them and compute the prompt once."""

    def __init__(self, examples: Sequence[Example], seed: int):
        self.examples = examples
        self.seed = seed

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self.examples) // batch_size)

    def batches(self, batch_size: int, position: Position | None = None) -> Iterator[tuple[list[Example], Position]]:
        """Epoch after epoch without end; the last batch of an epoch may be short and is never dropped.

        Yields:
            the examples of a batch, and the position to go on from after it
        """
        epoch, at = (position["epoch"], position["rows"]) if position else (0, 0)
        while True:
            order = self._together(epoch_order(len(self.examples), epoch, self.seed), batch_size)
            while at < len(order):
                chosen = [self.examples[i] for i in order[at : at + batch_size]]
                at += len(chosen)
                yield chosen, {"epoch": epoch, "rows": at}
            epoch, at = epoch + 1, 0

    def _together(self, order: Array, most: int) -> list[int]:
        """The order, with rows of one prompt moved up to the first of them, but never more than `most` of them."""
        chunks: list[list[int]] = []
        open_chunks: dict[int, list[int]] = {}
        for i in order.tolist():
            group = self.examples[i].group
            if group not in open_chunks:
                open_chunks[group] = []
                chunks.append(open_chunks[group])
            open_chunks[group].append(i)
            if len(open_chunks[group]) == most:
                del open_chunks[group]
        return list(itertools.chain(*chunks))


def epoch_order(num_rows: int, epoch: int, seed: int) -> Array:
    """The order of rows in one epoch, (num_rows,) int64: the same on every backend and machine."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
