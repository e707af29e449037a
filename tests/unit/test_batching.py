"""Batches: each scored position predicts its target, and the coefficients hold the whole normalisation."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnf_core.errors import UserError
from bnf_core.objectives import parse
from bnf_core.steps.batching import MicroBatching, Rows, collate, epoch_order, micro_batches, require_learnable
from bnf_core.storage.digests import rows_digest
from bnf_core.types import Batch, Example

PAD = 999
KEY = 3912133894988409304


def example(prompt: int, completion: int, label: bool, first: int = 1) -> Example:
    """Every token id of a row is different, so that a position one off cannot go unnoticed."""
    ids = tuple(range(first, first + prompt + completion))
    return Example(ids[:prompt], ids[prompt:], label)


rows = st.lists(
    st.builds(example, st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(1, 50)), min_size=1, max_size=7
)

FOUR = [example(3, 2, True), example(1, 5, False, 20), example(4, 1, True, 40), example(2, 2, False, 60)]


def test_a_batch_by_hand() -> None:
    batch = collate(FOUR[:2], num_sequences=2, pad_id=PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, PAD], [20, 21, 22, 23, 24, 25]]
    assert batch.lengths.tolist() == [5, 6]
    assert batch.positions.tolist() == [2, 3, 6, 7, 8, 9, 10]  # the last prompt token predicts the first target
    assert batch.targets.tolist() == [4, 5, 21, 22, 23, 24, 25]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(batch.coefficients, np.array([1 / 4] * 2 + [-1 / 10] * 5, np.float32))
    assert batch.labels.tolist() == [1, -1]
    assert [a.dtype for a in (batch.input_ids, batch.lengths, batch.positions, batch.targets, batch.sequence_ids)] == [
        np.int32,
        np.int32,
        np.int64,
        np.int32,
        np.int32,
    ]


@given(rows)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_every_position_predicts_its_target(examples: list[Example]) -> None:
    batch = collate(examples, len(examples), PAD)
    grid = batch.input_ids.reshape(-1)
    width = batch.input_ids.shape[1]
    np.testing.assert_array_equal(grid[batch.positions + 1], batch.targets)
    np.testing.assert_array_equal(batch.positions // width, batch.sequence_ids)
    for row, e in enumerate(examples):
        np.testing.assert_array_equal(batch.targets[batch.sequence_ids == row], e.completion_ids)
    assert PAD not in batch.targets


@given(rows)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_coefficients_sum_to_the_mean_label(examples: list[Example]) -> None:
    """Not to a mean over tokens, which would weigh long completions more."""
    batch = collate(examples, len(examples))
    labels = [1 if e.label else -1 for e in examples]
    np.testing.assert_allclose(batch.coefficients.sum(dtype=np.float64), np.mean(labels), atol=1e-6)
    per_row = np.bincount(batch.sequence_ids, weights=batch.coefficients)
    np.testing.assert_allclose(per_row, np.asarray(labels) / len(examples), rtol=1e-6)


def test_only_what_is_trained_is_listed_and_counts_in_the_length() -> None:
    """Rejects a length that counts all tokens of the completion, and targets that slip to where the mask begins."""
    rows = [Example((1, 2), (3, 4, 5, 6), True, trained=(False, True, False, True)), Example((7,), (8, 9), False)]
    for share_prompts in (False, True):
        batch = collate(rows, 2, bins=[[0, 1]], share_prompts=share_prompts)
        assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]  # what is not trained is still read
        assert batch.positions.tolist() == [2, 4, 6, 7]
        assert batch.targets.tolist() == [4, 6, 8, 9]
        assert batch.sequence_ids.tolist() == [0, 0, 1, 1]
        np.testing.assert_array_equal(batch.coefficients, np.float32([1 / 4, 1 / 4, -1 / 4, -1 / 4]))
        assert batch.lengths.tolist() == [6, 3]


def test_the_end_of_turn_counts_in_the_length() -> None:
    with_eos = Example((1, 2), (3, 4, 5, 0), True)  # three tokens of text and the end of turn
    batch = collate([with_eos], 1)
    assert batch.targets[-1] == 0
    np.testing.assert_array_equal(batch.coefficients, np.full(4, 0.25, np.float32))


def test_a_packed_grid_by_hand() -> None:
    batch = collate(FOUR[:3], 3, PAD, bins=[[2, 1], [0]])
    assert batch.packed and not collate(FOUR, 4).packed
    assert batch.input_ids.tolist() == [[40, 41, 42, 43, 44, 20, 21, 22, 23, 24, 25], [1, 2, 3, 4, 5] + [PAD] * 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]
    assert batch.segment_ids.tolist() == [[0] * 5 + [1] * 6, [0] * 5 + [1] * 6]
    assert batch.positions.tolist() == [3, 5, 6, 7, 8, 9, 13, 14]
    assert batch.sequence_ids.tolist() == [0, 1, 1, 1, 1, 1, 2, 2]
    assert batch.labels.tolist() == [1, -1, 1] and batch.lengths.tolist() == [5, 6, 5]
    assert batch.keys.tolist() == [FOUR[2].key, FOUR[1].key, FOUR[0].key]


def test_a_batch_of_nothing_scores_nothing() -> None:
    batch = collate([], 4, PAD)
    assert batch.input_ids.shape == (1, 1)
    assert all(len(a) == 0 for a in (batch.positions, batch.coefficients, batch.sequence_ids, batch.labels, batch.keys))


def test_a_key_tells_prompt_from_completion() -> None:
    one, other = Example((1, 2), (3,), True), Example((1,), (2, 3), True)
    assert one.key != other.key and one.key == Example((1, 2), (3,), False, group=5).key
    # Written down: reference caches made earlier must be found again.
    assert one.key == KEY


def scored(batches: list[Batch]) -> dict[tuple[int, int], float]:
    """Coefficient by row and target, whichever batch it is in; the target must be what its position predicts."""
    for b in batches:
        np.testing.assert_array_equal(b.input_ids.reshape(-1)[b.positions + 1], b.targets)
        np.testing.assert_array_equal(
            b.segment_ids.reshape(-1)[b.positions + 1], b.segment_ids.reshape(-1)[b.positions]
        )
    return {
        (int(b.keys[row]), int(target)): float(c)
        for b in batches
        for row, target, c in zip(b.sequence_ids, b.targets, b.coefficients, strict=True)
    }


CUTS = [
    MicroBatching(1),
    MicroBatching(2),
    MicroBatching(3),
    MicroBatching(4),
    MicroBatching(2, pack_to=8),
    MicroBatching(1, pack_to=11),
    MicroBatching(8, pack_to=1),
    MicroBatching(3, None, False),
]


@pytest.mark.parametrize("batching", [*CUTS, MicroBatching(2, multiple_of=3), MicroBatching(1, 8, multiple_of=2)])
def test_the_cut_into_micro_batches_changes_nothing(batching: MicroBatching) -> None:
    """Rejects a mean of micro-batch means, where the coefficients would depend on the cut, and a row lost in it."""
    order = [FOUR[i] for i in (2, 0, 3, 1)]
    parts = micro_batches(order, batching)
    assert scored(parts) == scored([collate(order, 4)])
    assert sorted(int(key) for b in parts for key in b.keys) == sorted(e.key for e in FOUR)
    assert len(parts) % batching.multiple_of == 0
    assert all(len(b.input_ids) <= batching.micro_batch_size for b in parts)
    if batching.pack_to:
        assert all(b.input_ids.shape[1] <= max(batching.pack_to, 6) for b in parts)


@given(rows, st.integers(1, 5), st.one_of(st.none(), st.integers(1, 30)), st.booleans(), st.integers(1, 4))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_cut_scores_every_token_once(
    examples: list[Example], size: int, pack_to: int | None, by_length: bool, processes: int
) -> None:
    parts = micro_batches(examples, MicroBatching(size, pack_to, by_length, processes))
    assert len(parts) % processes == 0
    assert sum(len(b.targets) for b in parts) == sum(len(e.completion_ids) for e in examples)
    assert sorted(int(key) for b in parts for key in b.keys) == sorted(e.key for e in examples)
    coefficients = np.concatenate([b.coefficients for b in parts]).astype(np.float64)
    np.testing.assert_allclose(coefficients.sum(), np.mean([1 if e.label else -1 for e in examples]), atol=1e-6)
    scored(parts)


def test_micro_batches_hold_rows_of_similar_length() -> None:
    parts = micro_batches([example(1, n, True) for n in (9, 1, 8, 2)], MicroBatching(2))
    assert [sorted(b.lengths.tolist()) for b in parts] == [[2, 3], [9, 10]]
    as_they_come = micro_batches([example(1, n, True) for n in (9, 1, 8, 2)], MicroBatching(2, group_by_length=False))
    assert [b.lengths.tolist() for b in as_they_come] == [[10, 2], [9, 3]]


def test_packing_fills_the_grid() -> None:
    parts = micro_batches([example(1, n, True) for n in (9, 1, 8, 2, 5, 4)], MicroBatching(8, pack_to=15))
    assert [sorted(np.bincount(row).tolist()) for row in parts[0].segment_ids] == [[5, 10], [6, 9], [2, 3, 10]]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_order(100, 0, seed=3)
    np.testing.assert_array_equal(first, epoch_order(100, 0, seed=3))
    assert not np.array_equal(first, epoch_order(100, 1, seed=3))
    assert not np.array_equal(first, epoch_order(100, 0, seed=4))
    # Written down, so that a change of generator cannot silently change every run made so far.
    assert epoch_order(8, 0, seed=0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


def alone(count: int) -> list[Example]:
    """Rows that share no prompt."""
    return [dataclasses.replace(example(1, 1, True, i), group=i) for i in range(count)]


def test_rows_without_company_come_in_the_seeded_order() -> None:
    rows = alone(8)
    (batch, _) = next(Rows(rows, seed=0).batches(8))
    assert batch == [rows[i] for i in epoch_order(8, 0, seed=0)]


def test_completions_of_one_prompt_come_together() -> None:
    rows = [dataclasses.replace(example(1, 1, True, i), group=i % 10) for i in range(20)]
    batches = [batch for batch, _ in itertools.islice(Rows(rows, seed=0).batches(4), 5)]
    for batch in batches:
        assert len(batch) == 4 and batch[0].group == batch[1].group and batch[2].group == batch[3].group
    assert sorted(e.key for batch in batches for e in batch) == sorted(e.key for e in rows)


def test_many_rows_of_one_prompt_do_not_fill_batch_after_batch() -> None:
    """A prompt of a thousand completions is met all through the epoch; without any other prompt, all is shuffled."""
    rows = [dataclasses.replace(example(1, 1, True, i), group=min(i, 50)) for i in range(100)]
    batches = [batch for batch, _ in itertools.islice(Rows(rows, seed=0).batches(5), 20)]
    full = [at for at, batch in enumerate(batches) if sum(e.group == 50 for e in batch) >= 3]
    assert full[0] < 5 and full[-1] > 10
    one_prompt = [example(1, 1, True, i) for i in range(50)]
    (batch, _) = next(Rows(one_prompt, seed=0).batches(50))
    assert batch == [one_prompt[i] for i in epoch_order(50, 0, seed=0)]


def lengths(rows: Rows, batch_size: int, count: int) -> list[int]:
    return [len(batch) for batch, _ in itertools.islice(rows.batches(batch_size), count)]


def test_each_epoch_visits_every_row_once_and_keeps_the_short_last_batch() -> None:
    ten = Rows(alone(10), seed=0)
    assert lengths(ten, 4, 6) == [4, 4, 2, 4, 4, 2]
    taken = [[e.key for e in batch] for batch, _ in itertools.islice(ten.batches(4), 6)]
    epochs = [list(itertools.chain(*part)) for part in (taken[:3], taken[3:])]
    assert [sorted(epoch) for epoch in epochs] == [sorted(e.key for e in ten.examples)] * 2
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("done", range(1, 9))
def test_a_resumed_run_goes_on_with_the_same_batches(done: int) -> None:
    ten = Rows(alone(10), seed=1)
    whole = list(itertools.islice(ten.batches(4), 9))
    assert list(itertools.islice(ten.batches(4, whole[done - 1][1]), 9 - done)) == whole[done:]


def test_a_short_batch_is_normalised_by_its_own_number_of_sequences() -> None:
    chosen, _ = list(itertools.islice(Rows(FOUR, 0).batches(3), 2))[-1]
    (batch,) = micro_batches(chosen, MicroBatching(3))
    assert len(chosen) == 1
    np.testing.assert_allclose(np.abs(batch.coefficients).sum(), 1.0, rtol=1e-6)


def graded(e: Example, weight: float) -> Example:
    return dataclasses.replace(e, weight=weight)


def test_a_graded_label_is_in_the_coefficient_whatever_the_micro_batch() -> None:
    """label / (|y| · rows), where the label of a rejected row is below 0."""
    examples = [graded(e, weight) for e, weight in zip(FOUR, (0.6, 0.25, 2.0, 0.0), strict=True)]
    expected = {0: 0.6 / (2 * 4), 1: -0.25 / (5 * 4), 2: 2.0 / (1 * 4), 3: 0.0}
    for batching in (MicroBatching(4), MicroBatching(1), MicroBatching(3, pack_to=12), MicroBatching(2, multiple_of=2)):
        found = {}
        for batch in micro_batches(examples, batching):
            for row, key in enumerate(batch.keys.tolist()):
                which = [e.key for e in examples].index(key)
                found[which] = set(batch.coefficients[batch.sequence_ids == row].tolist())
                assert batch.weights[row] == np.float32(examples[which].weight)
        assert found == {which: {float(np.float32(value))} for which, value in expected.items()}


def test_an_objective_that_knows_chosen_and_rejected_alone_refuses_weights() -> None:
    examples = [dataclasses.replace(FOUR[0], source="a.jsonl:1"), graded(FOUR[1], 0.5)]
    require_learnable(examples, parse("bnf + 0.2*kto"))
    require_learnable(examples[:1], parse("d2o"))
    for objective in ("d2o", "bnf + 0.5*d2o"):
        with pytest.raises(UserError, match="1 of 2 rows have a graded label or a weight"):
            require_learnable(examples, parse(objective))


def test_weights_are_in_the_rows_digest() -> None:
    assert rows_digest(FOUR) == rows_digest([graded(e, 1.0) for e in FOUR])
    assert rows_digest(FOUR) != rows_digest([graded(FOUR[0], 0.5), *FOUR[1:]])
    assert graded(FOUR[0], 0.5).key == FOUR[0].key  # the reference of both is the same
