"""Rows of both labels that count alike."""

from dataclasses import replace

import numpy as np
import pytest

from bnf_core.config import DataConfig, OnlineConfig, TrainConfig
from bnf_core.errors import UserError
from bnf_core.steps.balance import balanced, label_factors
from bnf_core.steps.batching import Rows, collate
from bnf_core.steps.mixing import Mixture
from bnf_core.types import Example


def rows(chosen: int, rejected: int, weight: float = 1.0) -> list[Example]:
    labels = [True] * chosen + [False] * rejected
    return [Example((i, 1), tuple(range(2, 4 + i % 3)), label, weight=weight) for i, label in enumerate(labels)]


def test_by_hand() -> None:
    """One of four is chosen: it counts twice, the others two thirds each."""
    assert [row.weight for row in balanced(rows(1, 3))] == [2.0, *[pytest.approx(2 / 3)] * 3]


@pytest.mark.parametrize(("chosen", "rejected"), [(1, 19), (3, 5), (4, 4), (19, 1)])
def test_coefficients_of_both_labels_cancel_and_keep_their_sum(chosen: int, rejected: int) -> None:
    """Whatever their lengths and their own weights are."""
    given = rows(chosen, rejected)
    given[0] = replace(given[0], weight=0.25)
    coefficients = collate(balanced(given), len(given)).coefficients
    before = collate(given, len(given)).coefficients
    assert coefficients.sum() == pytest.approx(0.0, abs=1e-6)
    assert np.abs(coefficients).sum() == pytest.approx(np.abs(before).sum())


@pytest.mark.parametrize(("chosen", "rejected"), [(3, 0), (0, 3), (0, 0)])
def test_rows_of_one_label_stay_as_they_are(chosen: int, rejected: int) -> None:
    assert balanced(rows(chosen, rejected)) == rows(chosen, rejected)


def test_batches_of_a_run_are_balanced_over_an_epoch_and_not_otherwise() -> None:
    given = rows(2, 6)
    epoch = [row for batch, _ in [next(Rows(given, 0, balance=True).batches(8))] for row in batch]
    assert sum(row.weight * (1 if row.label else -1) for row in epoch) == pytest.approx(0.0)
    assert {row.weight for batch, _ in [next(Rows(given, 0).batches(8))] for row in batch} == {1.0}


def test_what_a_source_gives_to_an_epoch_counts() -> None:
    """Two sources, of which an epoch takes one twice and half of the other."""
    mixture = Mixture(("a", "b"), sizes=(2, 4), takes=(4, 2))
    epoch = next(Rows(rows(2, 4), 0, mixture=mixture, balance=True).batches(6))[0]
    assert sum(row.weight * (1 if row.label else -1) for row in epoch) == pytest.approx(0.0)
    assert label_factors(rows(2, 4)) != label_factors(rows(2, 4), np.array([2, 2, 0.5, 0.5, 0.5, 0.5]))


def test_where_rows_cannot_be_weighed_it_is_refused() -> None:
    train = {"model": "m", "data": DataConfig("d"), "balance_labels": True}
    assert TrainConfig(**train).balance_labels
    with pytest.raises(UserError, match=r"balance_labels .* dpo"):
        TrainConfig(**train, objective="dpo")
    with pytest.raises(UserError, match=r"balance_labels .* streamed"):
        TrainConfig(**train | {"data": DataConfig("d", streaming=True)}, max_steps=1)
    with pytest.raises(UserError, match=r"balance_labels .* grpo"):
        OnlineConfig(**train, judge="number", objective="grpo")
