"""The BNF loss on logits: pure, unreduced functions.

Everything happens in float32 log-odds. With o the policy's log-odds of an observed token, o_r the reference's
and σ the logistic function, p = σ(o) and (docs/math.md)

    ℓ = t softplus(−o) + (1 − t) (softplus(o) + H_q)        t = min(1, p / r)
    ∂ℓ/∂o = p − t = −σ(−o) min(1, exp(o − o_r))

The second line has no subtraction, so no digit of a confident token is lost.
"""

from typing import Any, NamedTuple

import mlx.core as mx

from bnf_core.objectives.bnf import loss_and_slope
from bnf_core.shapes import require_logits, require_one_shape
from bnf_mlx.ops import OPS

custom_function: Any = mx.custom_function  # typed as returning object
NEVER = -200.0  # exp of it is exactly 0 in float32, and so is 0 times it


def token_log_odds(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Log-odds of the observed tokens, and the entropy of the others.

        o = z_y − log Σ_{v≠y} exp z_v        H_q = − Σ_{v≠y} q_v log q_v,  q = softmax over v ≠ y

    Args:
        logits: (..., V), any float dtype; −inf bans a token.
        targets: (...), any integer dtype, each in [0, V). Not checked by compiled functions. On CUDA the check is
            an assertion of the device; MLX checks on a CPU alone: it would have to wait for the values.
    Returns:
        log_odds (...) float32, differentiable in `logits`, and other_entropy (...) float32 in nats, detached.
    Raises:
        ValueError: on V < 2, mismatched shapes or targets outside the vocabulary.

    In plain code:
        others = mx.put_along_axis(logits.astype(mx.float32), targets[..., None], -inf, axis=-1)
        log_odds = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - mx.logsumexp(others, axis=-1)
        log_q = others - mx.logsumexp(others, axis=-1, keepdims=True)
        other_entropy = -(mx.exp(log_q) * log_q).sum(axis=-1)
    """
    require_logits(logits.shape, targets.shape)
    check_targets(targets, logits.shape[-1])
    log_odds, entropy, *_ = _token_log_odds(logits, targets)
    return log_odds, mx.stop_gradient(entropy)


def bnf_token_loss(log_odds: mx.array, other_entropy: mx.array, ref_log_odds: mx.array) -> mx.array:
    """The BNF loss of each token (arXiv 2410.04834, section 3).

    Args:
        log_odds: (...) of the policy, from `token_log_odds`.
        other_entropy: (...), from `token_log_odds`; enters the value, not the gradient.
        ref_log_odds: (...) of the reference.
    Returns:
        loss (...) float32, differentiable in `log_odds`.
    Raises:
        ValueError: on mismatched shapes.

    In plain code, with p = sigmoid(log_odds) and r = sigmoid(ref_log_odds):
        t = mx.stop_gradient(mx.minimum(1, p / r))
        loss = -(t * log(p) + (1 - t) * (log(1 - p) - mx.stop_gradient(other_entropy)))
    """
    require_one_shape(log_odds.shape, other_entropy.shape, ref_log_odds.shape)
    return _token_loss(*(x.astype(mx.float32) for x in (log_odds, other_entropy, ref_log_odds)))[0]


def check_targets(targets: mx.array, vocab: int) -> None:
    """Raises ValueError unless targets, (...) int, lie in [0, vocab), where looking at them means no wait for a GPU."""
    if mx.default_device() == mx.gpu or not targets.size:
        return
    try:
        mx.eval(targets)
    except ValueError:  # within mx.compile, which knows no values
        return
    least, most = int(targets.min()), int(targets.max())
    if least < 0 or most >= vocab:
        raise ValueError(f"targets must lie in [0, {vocab}), got {least} to {most}")


class Others(NamedTuple):
    """What is known of every token but the observed one, float32."""

    log_odds: mx.array  # (...) of the observed token against them
    entropy: mx.array  # (...)
    top: mx.array  # (..., 1) the largest logit
    weights: mx.array  # (..., V) exp(z − top), 0 at the observed token
    total: mx.array  # (..., 1) sum of the weights


def statistics(logits: mx.array, targets: mx.array) -> Others:
    """One pass over float32 logits (..., V), without autograd."""
    index = targets[..., None]
    others = mx.put_along_axis(logits, index, mx.array(-mx.inf), axis=-1)
    top = mx.max(others, axis=-1, keepdims=True)
    top = mx.where(top == -mx.inf, 0.0, top)
    # Shift by the largest other logit first: at logits of 1e4 the log-sum itself has only three decimals.
    shifted = mx.maximum(others - top, NEVER)
    weights = mx.exp(shifted)
    total = accurate_sum(weights)
    nothing = total == 0.0  # no other token is possible
    log_total = mx.log(total)
    entropy = mx.where(nothing, 0.0, log_total - accurate_sum(weights * shifted) / total)
    log_odds = mx.take_along_axis(logits, index, axis=-1) - top - log_total
    return Others(log_odds[..., 0], entropy[..., 0], top, weights, mx.where(nothing, 1.0, total))


def accurate_sum(x: mx.array) -> mx.array:
    """Sum over the last axis, kept, in blocks of blocks: mx.sum adds one after the other on the CPU, which in
    float32 over 150,000 terms has been seen to lose all but three digits."""
    width = 64
    while x.shape[-1] > width:
        whole = x.shape[-1] // width * width
        blocks = mx.sum(mx.unflatten(x[..., :whole], -1, (-1, width)), axis=-1)
        x = blocks if whole == x.shape[-1] else mx.concatenate([blocks, x[..., whole:]], axis=-1)
    return mx.sum(x, axis=-1, keepdims=True)


@custom_function
def _token_log_odds(logits: mx.array, targets: mx.array) -> tuple[mx.array, ...]:
    others = statistics(logits.astype(mx.float32), targets)
    return others.log_odds, others.entropy, others.top, others.total


@_token_log_odds.vjp
def _(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
    logits, targets = primals
    *_, top, total = outputs
    slope = cotangents[0][..., None]
    q = mx.exp(mx.maximum(logits.astype(mx.float32) - top, NEVER)) / total
    grad = mx.put_along_axis(-slope * q, targets[..., None], slope, axis=-1)
    return grad.astype(logits.dtype), mx.zeros_like(targets)


@custom_function
def _token_loss(log_odds: mx.array, other_entropy: mx.array, ref_log_odds: mx.array) -> tuple[mx.array, mx.array]:
    return loss_and_slope(OPS, log_odds, other_entropy, ref_log_odds)


@_token_loss.vjp
def _(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
    _, other_entropy, ref_log_odds = primals
    return cotangents[0] * outputs[1], mx.zeros_like(other_entropy), mx.zeros_like(ref_log_odds)
