"""Metrics worked by hand: sums and counts, whatever the cut into batches."""

import dataclasses
import math

import numpy as np
import pytest

from bnf_core.processes import Processes
from bnf_core.steps.batching import MicroBatching, micro_batches
from bnf_core.steps.metrics import Meter, with_present_names
from bnf_core.types import Example, TokenScores

# Rows of 1, 3 and 2 completion tokens; the first two share a prompt.
EXAMPLES = [
    Example((1,), (2,), True, group=0),
    Example((1,), (3, 4, 5), False, group=0),
    Example((6,), (7, 8), True, group=1),
]
POLICY = {2: 1.0, 3: -1.0, 4: 0.0, 5: 2.0, 7: 0.5, 8: -3.0}  # log-odds by target
REFERENCE = {2: 0.0, 3: 1.0, 4: 0.0, 5: 1.0, 7: 2.0, 8: -3.0}


def log_p(log_odds: float) -> float:
    return -math.log1p(math.exp(-log_odds))


def loss(target: int) -> float:
    """The BNF loss of a token as defined, of a policy whose other tokens have no entropy."""
    p, r = math.exp(log_p(POLICY[target])), math.exp(log_p(REFERENCE[target]))
    t = min(1.0, p / r)
    return -t * math.log(p) - (1 - t) * math.log(1 - p)


def measured(micro_batch_size: int) -> Meter:
    meter = Meter()
    for batch in micro_batches([EXAMPLES[i] for i in (2, 0, 1)], MicroBatching(micro_batch_size)):
        policy, reference = (
            np.array([table[int(y)] for y in batch.targets], np.float32) for table in (POLICY, REFERENCE)
        )
        meter.add(batch, TokenScores(policy, np.zeros_like(policy)), reference)
    return meter


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_every_metric_by_hand(micro_batch_size: int) -> None:
    result = measured(micro_batch_size).result()
    assert result["loss"] == pytest.approx((loss(2) - (loss(3) + loss(4) + loss(5)) / 3 + (loss(7) + loss(8)) / 2) / 3)
    assert result["log_odds_shift/chosen"] == pytest.approx((1.0 - 1.5 + 0.0) / 3)  # three tokens, not two rows
    assert result["log_odds_shift/rejected"] == pytest.approx((-2.0 + 0.0 + 1.0) / 3)
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


def test_accuracies_compare_within_a_prompt() -> None:
    # Row 0 has log p of −0.31 a token, row 1 a mean of −0.71 (a sum of −2.13); row 2 has no rival.
    result = measured(3).result()
    assert result["preference_accuracy"] == 1.0
    assert result["rewards/accuracies"] == 1.0  # 0.38 against −0.82
    pairs = pair_accuracies([(1, -1.0, True), (1, -2.0, False), (1, -0.5, False), (1, -1.0, False), (2, -9.0, False)])
    assert pairs == pytest.approx((1.5 / 3, 1.5 / 3))  # one won, one lost, one tie; group 2 has no good row


def pair_accuracies(rows: list[tuple[int, float, bool]]) -> tuple[float | None, float | None]:
    """Of one-token rows (group, log-odds, label); the reference's log-odds are 0."""
    meter = Meter()
    examples = [Example((1,), (i,), label, group=group) for i, (group, _, label) in enumerate(rows)]
    (batch,) = micro_batches(examples, MicroBatching(9, group_by_length=False))
    policy = np.array([value for _, value, _ in rows], np.float32)
    meter.add(batch, TokenScores(policy, policy * 0), policy * 0)
    result = meter.result()
    return result["preference_accuracy"], result["rewards/accuracies"]


def test_without_pairs_there_is_no_accuracy() -> None:
    assert pair_accuracies([(1, 1.0, True), (2, 2.0, False)]) == (None, None)


class FirstOfTwo(Processes):
    """Process 0 of two, with what the other one gives at each turn."""

    count = 2

    def __init__(self, other: list[bytes]):
        self.other = other

    def gather_bytes(self, data: bytes) -> list[bytes]:
        return [data, self.other.pop(0)]


class Recorder(Processes):
    def __init__(self) -> None:
        self.given: list[bytes] = []

    def gather_bytes(self, data: bytes) -> list[bytes]:
        self.given.append(data)
        return [data]


def test_metrics_do_not_depend_on_who_measured_what() -> None:
    """Rejects a mean of the processes' means: one has one row, the other two."""
    whole, parts = measured(3).result(), []
    for chosen in ([2], [0, 1]):
        meter = Meter()
        (batch,) = micro_batches([EXAMPLES[i] for i in chosen], MicroBatching(3))
        policy, reference = (
            np.array([table[int(y)] for y in batch.targets], np.float32) for table in (POLICY, REFERENCE)
        )
        batch = dataclasses.replace(batch, counts=batch.counts._replace(rows=3))
        meter.add(batch, TokenScores(policy, np.zeros_like(policy)), reference)
        parts.append(meter)
    other = Recorder()
    parts[1].gather(other)
    parts[0].gather(FirstOfTwo(other.given))
    result = parts[0].result()
    assert result == {name: value and pytest.approx(value, rel=1e-6) for name, value in whole.items()}


def test_one_sided_batches_have_no_other_side() -> None:
    meter = Meter()
    batch = micro_batches(EXAMPLES[:1], MicroBatching(1))[0]
    one = np.ones(1, np.float32)
    meter.add(batch, TokenScores(one, one), one)
    result = meter.result()
    assert result["log_odds_shift/rejected"] is result["rewards/rejected"] is result["rewards/margins"] is None
    assert result["log_odds_shift/chosen"] == 0.0 and result["target_weight"] == 1.0


def test_lines_of_older_runs_are_read_by_their_present_names() -> None:
    line = {"kind": "train", "step": 3, "log_odds_shift/good": 0.5, "log_odds_shift/bad": None, "loss": 1.0}
    now = {"kind": "train", "step": 3, "log_odds_shift/chosen": 0.5, "log_odds_shift/rejected": None, "loss": 1.0}
    assert with_present_names(line) == now == with_present_names(now)
