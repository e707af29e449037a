"""Batches: each scored position predicts its target, and the coefficients hold the whole normalisation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnf_core.batching import Batch, Example, collate, epoch_order, micro_batches, steps, steps_per_epoch

PAD = 999


def example(prompt: int, completion: int, label: bool, first: int = 1) -> Example:
    """Every token id of a row is different, so that a position one off cannot go unnoticed."""
    ids = tuple(range(first, first + prompt + completion))
    return Example(ids[:prompt], ids[prompt:], label)


rows = st.lists(
    st.builds(example, st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(1, 50)), min_size=1, max_size=7
)

FOUR = [example(3, 2, True), example(1, 5, False, 20), example(4, 1, True, 40), example(2, 2, False, 60)]


def test_a_batch_by_hand() -> None:
    batch = collate(FOUR[:2], [0, 1], num_sequences=2, pad_id=PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, PAD], [20, 21, 22, 23, 24, 25]]
    assert batch.lengths.tolist() == [5, 6]
    assert batch.positions.tolist() == [2, 3, 6, 7, 8, 9, 10]  # the last prompt token predicts the first target
    assert batch.targets.tolist() == [4, 5, 21, 22, 23, 24, 25]
    assert batch.rows.tolist() == [0, 0, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(batch.coefficients, np.array([1 / 4] * 2 + [-1 / 10] * 5, np.float32))
    assert batch.labels.tolist() == [1, -1]
    assert [a.dtype for a in (batch.input_ids, batch.lengths, batch.positions, batch.targets, batch.rows)] == [
        np.int32,
        np.int32,
        np.int64,
        np.int32,
        np.int32,
    ]


@given(rows)
@settings(max_examples=50, deadline=None)
def test_every_position_predicts_its_target(examples: list[Example]) -> None:
    batch = collate(examples, range(len(examples)), len(examples), PAD)
    grid = batch.input_ids.reshape(-1)
    width = batch.input_ids.shape[1]
    np.testing.assert_array_equal(grid[batch.positions + 1], batch.targets)
    np.testing.assert_array_equal(batch.positions // width, batch.rows)
    for row, e in enumerate(examples):
        np.testing.assert_array_equal(batch.targets[batch.rows == row], e.completion_ids)
    assert PAD not in batch.targets


@given(rows)
@settings(max_examples=50, deadline=None)
def test_coefficients_sum_to_the_mean_label(examples: list[Example]) -> None:
    """Not to a mean over tokens, which would weigh long completions more."""
    batch = collate(examples, range(len(examples)), len(examples))
    labels = [1 if e.label else -1 for e in examples]
    np.testing.assert_allclose(batch.coefficients.sum(dtype=np.float64), np.mean(labels), atol=1e-6)
    per_row = np.bincount(batch.rows, weights=batch.coefficients)
    np.testing.assert_allclose(per_row, np.asarray(labels) / len(examples), rtol=1e-6)


def test_the_end_of_turn_counts_in_the_length() -> None:
    with_eos = Example((1, 2), (3, 4, 5, 0), True)  # three tokens of text and the end of turn
    batch = collate([with_eos], [0], 1)
    assert batch.targets[-1] == 0
    np.testing.assert_array_equal(batch.coefficients, np.full(4, 0.25, np.float32))


def scored(batches: list[Batch]) -> dict[tuple[int, int], float]:
    """Coefficient by data row and target, whichever batch it is in."""
    return {
        (int(b.row_ids[row]), int(target)): float(c)
        for b in batches
        for row, target, c in zip(b.rows, b.targets, b.coefficients, strict=True)
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_cut_into_micro_batches_changes_nothing(size: int) -> None:
    """Rejects a mean of micro-batch means: the coefficients would depend on the cut."""
    order = [2, 0, 3, 1]
    cut = micro_batches(FOUR, order, size)
    assert [len(b.labels) for b in cut] == [size] * (4 // size) + [4 % size] * bool(4 % size)
    assert scored(cut) == scored([collate(FOUR, order, 4)])
    assert sorted(int(i) for b in cut for i in b.row_ids) == [0, 1, 2, 3]


def test_micro_batches_hold_rows_of_similar_length() -> None:
    cut = micro_batches([example(1, n, True) for n in (9, 1, 8, 2)], range(4), 2)
    assert [sorted(b.lengths.tolist()) for b in cut] == [[2, 3], [9, 10]]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_order(100, 0, seed=3)
    np.testing.assert_array_equal(first, epoch_order(100, 0, seed=3))
    assert not np.array_equal(first, epoch_order(100, 1, seed=3))
    assert not np.array_equal(first, epoch_order(100, 0, seed=4))
    # Written down, so that a change of generator cannot silently change every run made so far.
    assert epoch_order(8, 0, seed=0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


def test_each_epoch_visits_every_row_once_and_keeps_the_short_last_batch() -> None:
    assert steps_per_epoch(10, 4) == 3
    taken = list(steps(10, 4, num_steps=6, seed=0))
    assert [step for step, _ in taken] == [0, 1, 2, 3, 4, 5]
    assert [len(ids) for _, ids in taken] == [4, 4, 2, 4, 4, 2]
    epochs = [[i for _, ids in part for i in ids] for part in (taken[:3], taken[3:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]


def test_a_resumed_run_goes_on_with_the_same_batches() -> None:
    assert list(steps(10, 4, 9, seed=1, start=4)) == list(steps(10, 4, 9, seed=1))[4:]


def test_a_short_batch_is_normalised_by_its_own_number_of_sequences() -> None:
    _, ids = list(steps(4, 3, 2, seed=0))[-1]
    (batch,) = micro_batches(FOUR, ids, 3)
    assert len(ids) == 1
    np.testing.assert_allclose(np.abs(batch.coefficients).sum(), 1.0, rtol=1e-6)
