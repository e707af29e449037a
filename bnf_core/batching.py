"""From tokenised rows to optimizer steps: a seeded order, and batches whose coefficients already carry the
whole normalisation, so that no backend divides by anything.

The order and the batches depend on the data and the seed alone, never on the backend or on how a step is cut
into micro-batches, packed, or dealt to processes.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Position = dict[str, int]  # where in the data a run is; JSON


@dataclass(frozen=True)
class Example:
    """One tokenised row of feedback."""

    prompt_ids: tuple[int, ...]  # at least one token, or nothing predicts the first of the completion
    completion_ids: tuple[int, ...]  # at least one token, the end-of-turn token included
    label: bool  # True: preferred, False: dispreferred
    group: int = 0  # rows with one prompt share a number: they are compared with each other
    source: str = ""  # file:line, for messages

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def key(self) -> int:
        """64 bits of a hash of the tokens: what the row is known by, wherever it is met."""
        ids = np.asarray((len(self.prompt_ids), *self.prompt_ids, *self.completion_ids), "<i4")
        return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Batch:
    """A grid of token ids and, flat, every completion token to be scored.

    S sequences (rows of feedback) lie in a grid of B rows and T columns, one to a row or, packed, several one
    after another, padded on the right; N of their tokens are completion tokens. The hidden state (or logits) at
    `positions[i]` of the flattened (B·T) grid predicts `targets[i]`: what is not listed does not count, so
    nothing needs to be shifted or masked. A grid that is not packed needs no attention mask in a causal model;
    in a packed one a token sees the earlier tokens of its own segment.
    """

    input_ids: Array  # (B, T) int32
    position_ids: Array  # (B, T) int32, from 0 in each sequence
    segment_ids: Array  # (B, T) int32, from 0 in each grid row; padding is a segment of its own
    packed: bool  # whether any grid row holds more than one sequence
    lengths: Array  # (S,) int32, tokens of each sequence
    positions: Array  # (N,) int64
    targets: Array  # (N,) int32
    rows: Array  # (N,) int32, the sequence in this batch, 0..S
    coefficients: Array  # (N,) float32: label / (|y| · sequences in the global batch)
    labels: Array  # (S,) int32: +1 preferred, −1 dispreferred
    groups: Array  # (S,) int64, `Example.group`
    keys: Array  # (S,) uint64, `Example.key`


def collate(
    examples: Sequence[Example], num_sequences: int, pad_id: int = 0, *, bins: Sequence[Sequence[int]] | None = None
) -> Batch:
    """Batch examples.

    Args:
        examples: the sequences; with none, one token of padding that scores nothing.
        num_sequences: sequences in the global batch, over all micro-batches and processes.
        pad_id: any token id; it is never scored and never seen by a scored token.
        bins: which examples each row of the grid holds, every one once; default: one to a row.
    """
    bins = [[i] for i in range(len(examples))] if bins is None else bins
    width = max((sum(len(examples[i]) for i in row) for row in bins), default=1)
    grid = (max(len(bins), 1), width)
    input_ids, position_ids = np.full(grid, pad_id, np.int32), np.zeros(grid, np.int32)
    segment_ids = np.zeros(grid, np.int32)
    positions, targets, rows, coefficients = ([np.zeros(0, t)] for t in (np.int64, np.int32, np.int32, np.float32))
    order = [i for row in bins for i in row]
    for b, row in enumerate(bins):
        at = 0
        for segment, i in enumerate(row):
            e, span = examples[i], slice(at, at + len(examples[i]))
            input_ids[b, span] = e.prompt_ids + e.completion_ids
            position_ids[b, span] = np.arange(len(e))
            segment_ids[b, span] = segment
            count = len(e.completion_ids)
            first = b * width + at + len(e.prompt_ids) - 1  # the last prompt token predicts the first completion token
            positions.append(np.arange(first, first + count, dtype=np.int64))
            targets.append(np.asarray(e.completion_ids, np.int32))
            rows.append(np.full(count, len(positions) - 2, np.int32))
            weight = (1.0 if e.label else -1.0) / (count * num_sequences)
            coefficients.append(np.full(count, weight, np.float32))
            at += len(e)
        position_ids[b, at:] = np.arange(width - at)
        segment_ids[b, at:] = len(row)
    chosen = [examples[i] for i in order]
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        packed=any(len(row) > 1 for row in bins),
        lengths=np.asarray([len(e) for e in chosen], np.int32),
        positions=np.concatenate(positions),
        targets=np.concatenate(targets),
        rows=np.concatenate(rows),
        coefficients=np.concatenate(coefficients),
        labels=np.asarray([1 if e.label else -1 for e in chosen], np.int32),
        groups=np.asarray([e.group for e in chosen], np.int64),
        keys=np.asarray([e.key for e in chosen], np.uint64),
    )


@dataclass(frozen=True)
class Cut:
    """How a global batch is cut into micro-batches: memory and speed, never the result."""

    micro_batch_size: int  # most rows of the grid at a time
    pack_to: int | None = None  # pack sequences into grid rows of up to so many tokens
    group_by_length: bool = True  # put sequences of similar length into one micro-batch: less padding
    multiple_of: int = 1  # processes: each gets the same number of micro-batches, some perhaps empty


def micro_batches(examples: Sequence[Example], cut: Cut, pad_id: int = 0) -> list[Batch]:
    """Cut one global batch; the losses and gradients of its parts add up to its own, whatever the cut."""
    order = list(range(len(examples)))
    if cut.group_by_length or cut.pack_to:
        order.sort(key=lambda i: (len(examples[i]), i))
    bins = [[i] for i in order] if cut.pack_to is None else _pack(examples, order[::-1], cut.pack_to)
    count = -(-len(bins) // cut.micro_batch_size)
    count = -(-max(count, 1) // cut.multiple_of) * cut.multiple_of
    parts = []
    for part in _even_parts(bins, count):
        chosen = [i for row in part for i in row]
        place = {i: at for at, i in enumerate(chosen)}
        local = [[place[i] for i in row] for row in part]
        parts.append(collate([examples[i] for i in chosen], len(examples), pad_id, bins=local))
    return parts


def _pack(examples: Sequence[Example], longest_first: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: at most 11/9 of the fewest possible bins (Johnson, 1973). A sequence longer than the
    capacity has a bin of its own."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in longest_first:
        length = len(examples[i])
        at = next((b for b, left in enumerate(room) if left >= length), None)
        if at is None:
            bins.append([i])
            room.append(capacity - length)
        else:
            bins[at].append(i)
            room[at] -= length
    return bins


def _even_parts(items: Sequence[list[int]], count: int) -> Iterator[Sequence[list[int]]]:
    """So many consecutive parts whose sizes differ by one at most."""
    edges = [len(items) * part // count for part in range(count + 1)]
    return (items[a:b] for a, b in itertools.pairwise(edges))


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
