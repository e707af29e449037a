"""The oracle, held against what does not come from it: cases worked by hand, the definition in 60 and more digits,
finite differences, and the identities of the method."""

from collections.abc import Sequence
from typing import Any

import mpmath as mp
import numpy as np
import pytest

from bnf_core import oracle
from conftest import slow

LOG2, LOG3 = np.log(2.0), np.log(3.0)
INF = np.inf

pytestmark = pytest.mark.filterwarnings("error")  # its limits are meant, not accidents


def draw(seed: int, n: int, vocab: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random logits (N, V), targets and reference log-odds (N,), the reference near for half of them."""
    rng = np.random.default_rng(seed)
    logits, targets = rng.normal(size=(n, vocab)) * scale, rng.integers(vocab, size=n)
    reference = rng.normal(size=n) * scale
    reference[::2] = oracle.log_odds(logits, targets)[::2] + rng.normal(size=len(reference[::2]))
    return logits, targets, reference


# By hand ------------------------------------------------------------------------------------------------------

# One token each: logits, observed, reference's odds; then log-odds, entropy of the others, t, loss, gradient.
BY_HAND = {
    # π = (1/2, 1/2), r = 3/4: t = 2/3, the other 1/3. ℓ = (2/3 + 1/3) log 2. Gradient π − t = (−1/6, 1/6).
    "v2_below": ([0, 0], 0, 3, 0, 0, [2 / 3, 1 / 3], LOG2, [-1 / 6, 1 / 6]),
    # The same policy, r = 1/4: p > r, t = 1. ℓ = log 2, gradient (1/2 − 1, 1/2).
    "v2_above": ([0, 0], 0, 1 / 3, 0, 0, [1, 0], LOG2, [-1 / 2, 1 / 2]),
    # p = r = 1/2: t = 1, the peak of the gradient, 1 − r.
    "v2_tie": ([0, 0], 1, 1, 0, 0, [0, 1], LOG2, [1 / 2, -1 / 2]),
    # π = (1/2, 1/4, 1/4) from logits (log 2, 0, 0), r = 3/4: t = 2/3, the others 1/4 · (1/3)/(1/2) = 1/6 each.
    # o = log 2 − log(1 + 1) = 0; H of (1/2, 1/2) = log 2; ℓ = 2/3 log 2 + 2 · 1/6 · log 4 = 4/3 log 2.
    "v3_below": ([LOG2, 0, 0], 0, 3, 0, LOG2, [2 / 3, 1 / 6, 1 / 6], 4 / 3 * LOG2, [-1 / 6, 1 / 12, 1 / 12]),
    # The same π, observed the second: p = 1/4, r = 1/2: t = 1/2, the others share 1/2 as (1/2, 1/4)/(3/4):
    # (1/3, 1/6). o = 0 − log 3; q = (2/3, 1/3): H = log 3 − 2/3 log 2.
    # ℓ = 1/3 log 2 + 1/2 log 4 + 1/6 log 4 = 5/3 log 2. π − t = (1/6, −1/4, 1/12).
    "v3_second": (
        [LOG2, 0, 0], 1, 1, -LOG3, LOG3 - 2 / 3 * LOG2, [1 / 3, 1 / 2, 1 / 6], 5 / 3 * LOG2, [1 / 6, -1 / 4, 1 / 12],
    ),
    # Others banned: p = 1, nothing to learn.
    "p1": ([5, -INF, -INF], 0, 3, INF, 0, [1, 0, 0], 0, [0, 0, 0]),
    # The observed one banned: p = 0, t = 0, the target is the policy and ℓ its entropy.
    "p0": ([-INF, 0, 0], 0, 3, -INF, LOG2, [0, 1 / 2, 1 / 2], LOG2, [0, 0, 0]),
    "p0_r0": ([-INF, 0, 0], 0, 0, -INF, LOG2, [0, 1 / 2, 1 / 2], LOG2, [0, 0, 0]),
    # r = 1: t = p, the target is the policy, ℓ the entropy of (1/2, 1/4, 1/4) = 3/2 log 2, no gradient.
    "r1": ([LOG2, 0, 0], 0, INF, 0, LOG2, [1 / 2, 1 / 4, 1 / 4], 3 / 2 * LOG2, [0, 0, 0]),
    # r = 0: t = 1, cross-entropy.
    "r0": ([LOG2, 0, 0], 0, 0, 0, LOG2, [1, 0, 0], LOG2, [-1 / 2, 1 / 4, 1 / 4]),
    # p = r = 1.
    "p1_r1": ([5, -INF], 0, INF, INF, 0, [1, 0], 0, [0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND.values(), ids=BY_HAND.keys())
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_by_hand(case: tuple[Any, ...], shift: float) -> None:
    logits, observed, odds, log_odds, entropy, target, loss, grad = case
    with np.errstate(divide="ignore"):
        reference = [np.log(odds)]
    z, y = np.asarray([logits], float) + shift, [observed]
    close = {"rtol": 1e-15, "atol": 3e-12 if shift else 4e-16}  # log 2 + 1e4 itself is rounded to 1e-12
    np.testing.assert_allclose(oracle.log_odds(z, y), [log_odds], **close)
    np.testing.assert_allclose(oracle.other_entropy(z, y), [entropy], **close)
    np.testing.assert_allclose(oracle.dynamic_target(z, y, reference), [target], **close)
    got_loss, got_grad = oracle.token_loss(z, y, reference)
    np.testing.assert_allclose(got_loss, [loss], **close)
    np.testing.assert_allclose(got_grad, [grad], **close)


# In 60 and more digits ----------------------------------------------------------------------------------------


def literal(logits: Sequence[float], y: int, ref_log_odds: float) -> tuple[Any, Any, Any, list[Any], list[Any]]:
    """The definition word for word in mpmath: log-odds, entropy of the others, ℓ, its gradient and t."""
    e = [mp.exp(mp.mpf(z) - mp.mpf(max(logits))) for z in logits]
    pi = [x / mp.fsum(e) for x in e]
    p, r = pi[y], 1 / (1 + mp.exp(-mp.mpf(ref_log_odds)))
    t = [min(mp.mpf(1), p / r) if v == y else None for v in range(len(pi))]
    t = [pi[v] * (1 - t[y]) / (1 - p) if v != y else t[y] for v in range(len(pi))]
    loss = -mp.fsum(tv * mp.log(pv) for tv, pv in zip(t, pi, strict=True))
    q = [pi[v] / (1 - p) for v in range(len(pi)) if v != y]
    entropy = -mp.fsum(x * mp.log(x) for x in q)
    return mp.log(p / (1 - p)), entropy, loss, [a - b for a, b in zip(pi, t, strict=True)], t


# 1 − p needs the digits of e^-range, and so does t − p: 60 beyond that.
@pytest.mark.parametrize(("scale", "digits"), [(1.0, 80), (8.0, 120), (60.0, 400), (400.0, 2500)], ids=lambda x: str(x))
@pytest.mark.parametrize("center", [0.0, slow(1e4)])
def test_against_the_definition_in_many_digits(scale: float, digits: int, center: float) -> None:
    logits, targets, reference = draw(int(scale), 12, 5, scale)
    logits = (logits + center).astype(np.float32).astype(float)
    log_odds, entropy = oracle.log_odds(logits, targets), oracle.other_entropy(logits, targets)
    t = oracle.dynamic_target(logits, targets, reference)
    loss, grad = oracle.token_loss(logits, targets, reference)
    with mp.workdps(digits):
        for i in range(len(targets)):
            expected = literal(logits[i].tolist(), int(targets[i]), float(reference[i]))
            got = [log_odds[i], entropy[i], loss[i], *grad[i]]
            for x, e in zip(got, [*expected[:3], *expected[3]], strict=True):
                # Element by element, down to where float64 itself turns subnormal.
                assert abs(mp.mpf(float(x)) - e) <= mp.mpf(1e-12) * abs(e) + mp.mpf("1e-300"), (i, x, mp.nstr(e, 20))
            for x, e in zip(t[i], expected[4], strict=True):
                assert abs(mp.mpf(float(x)) - e) <= 1e-13


# Finite differences -------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_loss_with_t_held_fixed() -> None:
    logits, targets, reference = draw(1, 20, 6, 2.0)
    t = oracle.dynamic_target(logits, targets, reference)
    _, grad = oracle.token_loss(logits, targets, reference)

    def loss_with_fixed_target(z: np.ndarray) -> np.ndarray:
        return -(t * (z - np.log(np.exp(z).sum(1, keepdims=True)))).sum(1)

    assert np.allclose(loss_with_fixed_target(logits), oracle.token_loss(logits, targets, reference)[0], rtol=1e-13)
    step, moves = 1e-5, 0
    for v in range(logits.shape[1]):
        bump = np.zeros(logits.shape[1])
        bump[v] = step
        slope = (loss_with_fixed_target(logits + bump) - loss_with_fixed_target(logits - bump)) / (2 * step)
        np.testing.assert_allclose(grad[:, v], slope, atol=2e-9)
        moving = oracle.token_loss(logits + bump, targets, reference)[0]
        moving = (moving - oracle.token_loss(logits - bump, targets, reference)[0]) / (2 * step)
        moves += (np.abs(moving - slope) > 1e-3).sum()
    assert moves > 20  # letting t move gives another slope: the stop-gradient is being tested


# Identities ---------------------------------------------------------------------------------------------------


def test_the_target_is_a_distribution_and_the_gradient_sums_to_zero() -> None:
    for scale in (1.0, 30.0, 400.0):
        logits, targets, reference = draw(2, 200, 9, scale)
        t = oracle.dynamic_target(logits, targets, reference)
        assert (t >= 0).all()
        np.testing.assert_allclose(t.sum(1), 1.0, rtol=1e-13)
        _, grad = oracle.token_loss(logits, targets, reference)
        assert (np.abs(grad.sum(1)) <= 1e-12 * np.abs(grad).max(1)).all()


def test_identity_binary_cross_entropy_in_log_odds_plus_entropy() -> None:
    """ℓ = BCE(o, t) + (1 − t) H_q and ∂ℓ/∂o = p − t, ∂o/∂z_y = 1, ∂o/∂z_v = −q_v."""
    logits, targets, reference = draw(3, 500, 7, 3.0)
    at = np.arange(500), targets
    o, entropy = oracle.log_odds(logits, targets), oracle.other_entropy(logits, targets)
    p, r = 1 / (1 + np.exp(-o)), 1 / (1 + np.exp(-reference))
    t = np.minimum(1, p / r)
    loss, grad = oracle.token_loss(logits, targets, reference)
    bce = t * np.logaddexp(0, -o) + (1 - t) * np.logaddexp(0, o)
    np.testing.assert_allclose(loss, bce + (1 - t) * entropy, rtol=1e-13, atol=1e-14)
    others = np.exp(logits)
    others[at] = 0
    do = -others / others.sum(1, keepdims=True)
    do[at] = 1
    np.testing.assert_allclose(grad, (p - t)[:, None] * do, rtol=0, atol=1e-14)


def test_identity_fine_tuning_gradient_times_clipped_odds_ratio() -> None:
    """∇ℓ = min(1, odds(p) / odds(r)) · ∇(−log p)."""
    logits, targets, reference = draw(4, 500, 7, 3.0)
    pi = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    fine_tuning = pi.copy()
    fine_tuning[np.arange(500), targets] -= 1
    ratio = np.minimum(1, np.exp(oracle.log_odds(logits, targets) - reference))
    assert (ratio < 1).sum() > 100 and (ratio == 1).sum() > 100
    _, grad = oracle.token_loss(logits, targets, reference)
    np.testing.assert_allclose(grad, ratio[:, None] * fine_tuning, rtol=0, atol=1e-14)


def test_the_gradient_peaks_where_policy_and_reference_agree() -> None:
    """t − p for V = 2 and r = 3/4: rises as p(1/r − 1), peaks at p = r with 1 − r, falls as 1 − p."""
    p = np.asarray([0.01, 0.3, 0.6, 0.75, 0.8, 0.9, 0.99])
    o = np.log(p) - np.log1p(-p)
    logits = np.stack([o, np.zeros_like(o)], axis=1)
    _, grad = oracle.token_loss(logits, np.zeros(7, int), np.full(7, np.log(3.0)))
    np.testing.assert_allclose(-grad[:, 0], [0.01 / 3, 0.1, 0.2, 0.25, 0.2, 0.1, 0.01], rtol=1e-13)


@pytest.mark.parametrize("o", [-700.0, -60.0, -1.0, 0.0, 1.0, 30.0, 60.0, 700.0])
def test_a_tie_is_t_equal_to_one_however_sure_the_model_is(o: float) -> None:
    """p = r: ℓ = −log p and gradient 1 − p, to all digits."""
    loss, grad = oracle.token_loss([[o, 0.0]], [0], [o])
    np.testing.assert_allclose(loss, [np.logaddexp(0, -o)], rtol=1e-13)
    np.testing.assert_allclose(grad, [[-np.exp(-np.logaddexp(0, o)), np.exp(-np.logaddexp(0, o))]], rtol=1e-12)


# Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        ([[1.0]], [0], "at least 2"),
        ([[1.0, 2.0]], [2], r"\[0, 2\)"),
        ([[1.0, 2.0]], [-1], r"\[0, 2\)"),
        ([[1.0, 2.0]], [0, 1], "expected logits"),
        ([1.0, 2.0], [0, 1], "expected logits"),
    ],
)
def test_wrong_inputs_are_errors(logits: list[Any], targets: list[int], message: str) -> None:
    for function in (oracle.log_odds, oracle.other_entropy):
        with pytest.raises(ValueError, match=message):
            function(logits, targets)
    for with_reference in (oracle.dynamic_target, oracle.token_loss):
        with pytest.raises(ValueError, match=message):
            with_reference(logits, targets, np.zeros(len(targets)))
