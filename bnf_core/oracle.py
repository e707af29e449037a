"""The BNF loss, literally as defined, in NumPy float64: what every backend is measured against.

It materialises the full Dynamic Target Distribution over the vocabulary, where the backends keep two
numbers per token. Probabilities are held as logarithms, p and 1 − p separately, because float64 has no
e^-10000 and 1 − p loses every digit of a token the model is sure of.

Source: Bidirectional Negative Feedback, arXiv 2410.04834, section 3. With π the policy over the
vocabulary, y the observed token, p = π(y) and r the reference's probability of y:

    t(y) = min(1, p / r)        t(v) = π(v) (1 − t(y)) / (1 − p)  for v ≠ y
    ℓ = − Σ_v sg(t(v)) log π(v)         ∂ℓ/∂z_v = π(v) − t(v)

Limits: t(y) = 0 where p = 0 (a banned token stays banned), t(y) = 1 where r = 0 < p, 0 log 0 = 0.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]


class _Policy(NamedTuple):
    """Logarithms of the policy's probabilities."""

    log_pi: Float  # (N, V)
    log_p: Float  # (N,) of the observed token
    log_not_p: Float  # (N,) of all other tokens together
    at: tuple[NDArray[np.int64], NDArray[np.int64]]  # index of the observed tokens in an (N, V) array


def _policy(logits: ArrayLike, targets: ArrayLike) -> _Policy:
    z = np.asarray(logits, np.float64)
    y = np.asarray(targets, np.int64)
    if z.ndim != 2 or y.shape != z.shape[:1]:
        raise ValueError(f"expected logits (N, V) and targets (N,), got {z.shape} and {y.shape}")
    if z.shape[1] < 2:
        raise ValueError("a vocabulary of one token has no alternative: V must be at least 2")
    if y.size and (y.min() < 0 or y.max() >= z.shape[1]):
        raise ValueError(f"targets must lie in [0, {z.shape[1]})")
    at = (np.arange(len(y)), y)
    z = _centred(z)
    others = z.copy()
    others[at] = -np.inf
    total = _logsumexp(z)
    log_pi = z - total[:, None]
    # The likeliest token's logarithm comes from what it lacks, log(1 − rest), which keeps its digits near 0.
    likeliest = (at[0], z.argmax(axis=1))
    rest = np.exp(log_pi)
    rest[likeliest] = 0.0
    lack = rest.sum(axis=1)
    log_pi[likeliest] = np.where(lack < 0.5, np.log1p(-np.minimum(lack, 0.5)), log_pi[likeliest])
    return _Policy(log_pi, log_pi[at], _logsumexp(others) - total, at)


def _centred(z: Float) -> Float:
    """Rows shifted so that their largest logit is 0. The shift is exact for logits that are float32 values, and
    without it the rounding of 1e4 + log(…) alone would cost every gradient 1e-12."""
    top = z.max(axis=1, keepdims=True)
    return z - np.where(np.isneginf(top), 0.0, top)


def _logsumexp(z: Float) -> Float:
    top = z.max(axis=1)
    top = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        total: Float = top + np.log(np.exp(z - top[:, None]).sum(axis=1))
    return total


def _target_weight(log_p: Float, ref_log_odds: ArrayLike) -> tuple[Float, Float, Float, Float]:
    """log t(y), log(1 − t(y)), log r and log(1 − r), each (N,)."""
    o_ref = np.asarray(ref_log_odds, np.float64)
    log_r, log_not_r = -np.logaddexp(0.0, -o_ref), -np.logaddexp(0.0, o_ref)
    with np.errstate(invalid="ignore", divide="ignore"):
        log_t = np.where(np.isneginf(log_p), -np.inf, np.minimum(0.0, log_p - log_r))
        return log_t, np.log(-np.expm1(log_t)), log_r, log_not_r


def log_odds(logits: ArrayLike, targets: ArrayLike) -> Float:
    """log p − log(1 − p) of each observed token: z_y − log Σ_{v≠y} exp z_v.

    Args:
        logits: (N, V), any float; −inf bans a token.
        targets: (N,) int, the observed tokens.
    Returns:
        (N,) float64, +inf where no other token is possible, −inf where the observed one is banned.
    Raises:
        ValueError: on wrong shapes, V < 2 or a target outside the vocabulary.
    """
    at = _policy(logits, targets).at
    others = _centred(np.asarray(logits, np.float64))
    observed = others[at]
    others[at] = -np.inf
    return observed - _logsumexp(others)


def other_entropy(logits: ArrayLike, targets: ArrayLike) -> Float:
    """H_q, the entropy of the tokens other than the observed one, renormalised among themselves.

    By the definition itself: ban the observed token and t becomes what is left of the policy, ℓ its entropy.

    Args:
        logits: (N, V), any float; −inf bans a token.
        targets: (N,) int, the observed tokens.
    Returns:
        (N,) float64 in nats, 0 where at most one other token is possible.
    Raises:
        ValueError: as `log_odds`.
    """
    at = _policy(logits, targets).at
    others = np.array(logits, np.float64)
    others[at] = -np.inf
    none_left = np.isneginf(others).all(axis=1)
    others[none_left] = 0.0
    return np.where(none_left, 0.0, token_loss(others, targets, np.zeros(len(others)))[0])


def dynamic_target(logits: ArrayLike, targets: ArrayLike, ref_log_odds: ArrayLike) -> Float:
    """The Dynamic Target Distribution t.

    Args:
        logits: (N, V) of the policy.
        targets: (N,) int, the observed tokens.
        ref_log_odds: (N,), the reference's log-odds of the same tokens.
    Returns:
        (N, V) float64; every row sums to 1.
    Raises:
        ValueError: as `log_odds`.
    """
    log_pi, log_p, log_not_p, at = _policy(logits, targets)
    log_t, log_not_t, _, _ = _target_weight(log_p, ref_log_odds)
    share = np.where(np.isneginf(log_not_p), -np.inf, log_not_t - np.where(np.isneginf(log_not_p), 0.0, log_not_p))
    target = np.exp(log_pi + share[:, None])
    target[at] = np.exp(log_t)
    return target


def token_loss(logits: ArrayLike, targets: ArrayLike, ref_log_odds: ArrayLike) -> tuple[Float, Float]:
    """ℓ = − Σ_v sg(t(v)) log π(v) and its gradient π(v) − t(v) with respect to the logits.

    Args:
        logits: (N, V) of the policy.
        targets: (N,) int, the observed tokens.
        ref_log_odds: (N,), the reference's log-odds of the same tokens.
    Returns:
        loss (N,) and grad_logits (N, V), float64.
    Raises:
        ValueError: as `log_odds`.
    """
    log_pi, log_p, log_not_p, at = _policy(logits, targets)
    log_t, _, log_r, log_not_r = _target_weight(log_p, ref_log_odds)
    target = dynamic_target(logits, targets, ref_log_odds)
    loss = -np.sum(np.where(target > 0, target * np.where(target > 0, log_pi, 0.0), 0.0), axis=1)

    # p − t without subtracting them: p − 1 where t = 1, else p − p/r = −p (1 − r)/r.
    with np.errstate(invalid="ignore"):
        log_t_minus_p = np.where(log_t < 0, log_p + log_not_r - log_r, log_not_p)
        log_t_minus_p = np.where(np.isneginf(log_p), -np.inf, log_t_minus_p)
    # Every other token: π(v) − π(v) (1 − t)/(1 − p) = π(v) (t − p)/(1 − p).
    share = log_t_minus_p - np.where(np.isneginf(log_not_p), 0.0, log_not_p)
    grad = np.exp(log_pi + share[:, None])
    grad[at] = -np.exp(log_t_minus_p)
    return loss, grad
