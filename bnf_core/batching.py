"""From tokenised rows to optimizer steps: a seeded order, and batches whose coefficients already carry the
whole normalisation, so that no backend divides by anything.

The order and the batches depend on the data and the seed alone, never on the backend or on how a step is cut
into micro-batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


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


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids and, flat, every completion token to be scored.

    B rows of at most T tokens hold N completion tokens. The hidden state (or logits) at `positions[i]` of the
    flattened (B·T) grid predicts `targets[i]`: causal models need no mask, no shift and no padding to be
    skipped, because whatever is not listed does not count.
    """

    input_ids: Array  # (B, T) int32
    lengths: Array  # (B,) int32, tokens of each row before the padding
    positions: Array  # (N,) int64
    targets: Array  # (N,) int32
    rows: Array  # (N,) int32, the row in this batch
    coefficients: Array  # (N,) float32: label / (|y| · sequences in the global batch)
    labels: Array  # (B,) int32: +1 preferred, −1 dispreferred
    row_ids: Array  # (B,) int64, the row in the data set


def collate(examples: Sequence[Example], row_ids: Sequence[int], num_sequences: int, pad_id: int = 0) -> Batch:
    """Batch the examples named by `row_ids`.

    Args:
        examples: the whole data set.
        row_ids: which rows, in which order.
        num_sequences: sequences in the global batch, over all micro-batches and processes.
        pad_id: any token id; it is never scored and, in a causal model, never seen by a scored token.
    """
    chosen = [examples[i] for i in row_ids]
    width = max(len(e) for e in chosen)
    input_ids = np.full((len(chosen), width), pad_id, np.int32)
    positions, targets, rows, coefficients = [], [], [], []
    for row, e in enumerate(chosen):
        input_ids[row, : len(e)] = e.prompt_ids + e.completion_ids
        count = len(e.completion_ids)
        start = row * width + len(e.prompt_ids) - 1  # the last prompt token predicts the first completion token
        positions.append(np.arange(start, start + count, dtype=np.int64))
        targets.append(np.asarray(e.completion_ids, np.int32))
        rows.append(np.full(count, row, np.int32))
        weight = (1.0 if e.label else -1.0) / (count * num_sequences)
        coefficients.append(np.full(count, weight, np.float32))
    return Batch(
        input_ids=input_ids,
        lengths=np.asarray([len(e) for e in chosen], np.int32),
        positions=np.concatenate(positions),
        targets=np.concatenate(targets),
        rows=np.concatenate(rows),
        coefficients=np.concatenate(coefficients),
        labels=np.asarray([1 if e.label else -1 for e in chosen], np.int32),
        row_ids=np.asarray(row_ids, np.int64),
    )


def micro_batches(
    examples: Sequence[Example], row_ids: Sequence[int], micro_batch_size: int, pad_id: int = 0
) -> list[Batch]:
    """Cut one global batch into micro-batches of rows of similar length; their losses and gradients add up to
    the global batch's, whatever the cut."""
    by_length = sorted(row_ids, key=lambda i: (len(examples[i]), i))
    return [
        collate(examples, by_length[at : at + micro_batch_size], len(row_ids), pad_id)
        for at in range(0, len(by_length), micro_batch_size)
    ]


def epoch_order(num_rows: int, epoch: int, seed: int) -> Array:
    """The order of rows in one epoch, (num_rows,) int64: the same on every backend and machine."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)


def steps(num_rows: int, batch_size: int, num_steps: int, seed: int, start: int = 0) -> Iterator[tuple[int, list[int]]]:
    """(step, row ids) for steps start..num_steps, epoch after epoch; the last batch of an epoch may be short
    and is never dropped."""
    per_epoch = steps_per_epoch(num_rows, batch_size)
    for step in range(start, num_steps):
        epoch, at = divmod(step, per_epoch)
        order = epoch_order(num_rows, epoch, seed)
        yield step, [int(i) for i in order[at * batch_size : (at + 1) * batch_size]]


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    return -(-num_rows // batch_size)
