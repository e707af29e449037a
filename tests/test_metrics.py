"""Metrics worked by hand: sums and counts, whatever the cut into batches."""

import math

import numpy as np
import pytest

from bnf_core.batching import Example, micro_batches
from bnf_core.metrics import Meter
from bnf_core.protocol import TokenStats

# Rows of 1, 3 and 2 completion tokens; the first two share a prompt.
EXAMPLES = [
    Example((1,), (2,), True, group=0),
    Example((1,), (3, 4, 5), False, group=0),
    Example((6,), (7, 8), True, group=1),
]
POLICY = {2: 1.0, 3: -1.0, 4: 0.0, 5: 2.0, 7: 0.5, 8: -3.0}  # log-odds by target
REFERENCE = {2: 0.0, 3: 1.0, 4: 0.0, 5: 1.0, 7: 2.0, 8: -3.0}
LOSS = {2: 0.3, 3: 0.6, 4: 0.9, 5: 1.2, 7: 0.1, 8: 0.7}


def log_p(log_odds: float) -> float:
    return -math.log1p(math.exp(-log_odds))


def measured(micro_batch_size: int) -> Meter:
    meter = Meter()
    for batch in micro_batches(EXAMPLES, [2, 0, 1], micro_batch_size):
        policy, reference, loss = (
            np.array([table[int(y)] for y in batch.targets], np.float32) for table in (POLICY, REFERENCE, LOSS)
        )
        meter.add(batch, TokenStats(policy, np.zeros_like(policy), loss), reference)
    return meter


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_every_metric_by_hand(micro_batch_size: int) -> None:
    result = measured(micro_batch_size).result()
    assert result["loss"] == pytest.approx((0.3 - (0.6 + 0.9 + 1.2) / 3 + (0.1 + 0.7) / 2) / 3, rel=1e-6)
    assert result["log_odds_shift/good"] == pytest.approx((1.0 - 1.5 + 0.0) / 3)  # three tokens, not two rows
    assert result["log_odds_shift/bad"] == pytest.approx((-2.0 + 0.0 + 1.0) / 3)
    below = [math.exp(log_p(-1.0) - log_p(1.0)), math.exp(log_p(0.5) - log_p(2.0))]
    assert result["target_weight"] == pytest.approx((4 + sum(below)) / 6)
    assert result["share_below_reference"] == pytest.approx(2 / 6)
    assert result["tokens"] == 6
    chosen = [log_p(1.0) - log_p(0.0), log_p(0.5) - log_p(2.0)]
    rejected = log_p(-1.0) - log_p(1.0) + log_p(2.0) - log_p(1.0)
    assert result["rewards/chosen"] == pytest.approx(sum(chosen) / 2)
    assert result["rewards/rejected"] == pytest.approx(rejected)
    assert result["rewards/margins"] == pytest.approx(sum(chosen) / 2 - rejected)
    assert result["logps/chosen"] == pytest.approx((log_p(1.0) + log_p(0.5) + log_p(-3.0)) / 2)
    assert result["logps/rejected"] == pytest.approx(log_p(-1.0) + log_p(0.0) + log_p(2.0))


def test_preference_accuracy_compares_means_within_a_prompt() -> None:
    # Row 0 has log p of −0.31 a token, row 1 a mean of −0.71 (a sum of −2.13); row 2 has no rival.
    assert measured(3).preference_accuracy(EXAMPLES) == 1.0
    assert measured(3).preference_accuracy([Example(e.prompt_ids, e.completion_ids, True) for e in EXAMPLES]) is None


def test_one_sided_batches_have_no_other_side() -> None:
    meter = Meter()
    batch = micro_batches(EXAMPLES, [0], 1)[0]
    one = np.ones(1, np.float32)
    meter.add(batch, TokenStats(one, one, one), one)
    result = meter.result()
    assert result["log_odds_shift/bad"] is result["rewards/rejected"] is result["rewards/margins"] is None
    assert result["log_odds_shift/good"] == 0.0 and result["target_weight"] == 1.0
