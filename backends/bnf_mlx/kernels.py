"""The softmax part of the fused loss: elementwise work in as few passes as mx.compile makes of it."""

import math
from typing import NamedTuple

import mlx.core as mx

from bnf_mlx.losses import accurate_sum

CACHED = 2**19  # elements that a CPU takes at a time: small arrays stay in its cache, and are not new memory
LEAST = -87.0  # exp of less is no normal float32 number, and counts as 0 beside the largest's 1
LOG2 = math.log(2)
LOG2_HIGH = 355 / 512  # nine bits, so that whole multiples are exact
LOG2_LOW = LOG2 - LOG2_HIGH
ROUNDING = 1.5 * 2**23  # float32 has no fraction there: adding and subtracting it rounds


class Exponentials(NamedTuple):
    """A chunk's logits as exponentials relative to its largest, the observed tokens left out; float32."""

    log_odds: mx.array  # (C,) of the observed tokens
    entropy: mx.array  # (C,) of the others
    weights: mx.array  # (C, V) exp(z − top), 0 at the observed token, times the derivative of the soft cap
    total: mx.array  # (C, 1) sum of the exponentials, 1 where there are none
    observed_slope: mx.array  # (C, 1) the derivative of the soft cap at the observed token


def exponentials(
    logits: mx.array, observed: mx.array, bias: mx.array | None = None, soft_cap: float | None = None
) -> Exponentials:
    """Of logits (C, V) float32, before bias and soft cap, without autograd.

    Args:
        observed: (C,) the observed tokens.
        bias: (V,); −inf bans a token.
        soft_cap: z becomes soft_cap · tanh(z / soft_cap).
    """
    count, vocab = logits.shape
    rows = count if mx.default_device() == mx.gpu else max(1, CACHED // vocab)
    parts = [slice(at, at + rows) for at in range(0, count, rows)]
    results = [_exponentials(logits[part], observed[part], bias, soft_cap) for part in parts]
    return results[0] if len(parts) == 1 else Exponentials(*map(mx.concatenate, map(list, zip(*results, strict=True))))


def _exponentials(z: mx.array, observed: mx.array, bias: mx.array | None, soft_cap: float | None) -> Exponentials:
    index = observed[:, None]
    slope = None
    if bias is not None:
        z = z + bias.astype(mx.float32)
    if soft_cap is not None:
        z, slope = _soft_capped(z, mx.full(z.shape, soft_cap))
    others = mx.put_along_axis(z, index, mx.array(-mx.inf), axis=-1)
    top = mx.max(others, axis=-1, keepdims=True)
    top = mx.where(top == -mx.inf, 0.0, top)
    # Shift by the largest other logit first: at logits of 1e4 the log-sum itself has only three decimals.
    weights, moments = _exp(others - top)
    total = accurate_sum(weights)
    nothing = total == 0.0  # no other token is possible
    log_total = mx.log(total)
    entropy = mx.where(nothing, 0.0, log_total - accurate_sum(moments) / total)
    log_odds = mx.take_along_axis(z, index, axis=-1) - top - log_total
    total = mx.where(nothing, 1.0, total)
    if slope is None:
        return Exponentials(log_odds[:, 0], entropy[:, 0], weights, total, mx.ones_like(total))
    return Exponentials(
        log_odds[:, 0], entropy[:, 0], weights * slope, total, mx.take_along_axis(slope, index, axis=-1)
    )


def _exp(x: mx.array) -> tuple[mx.array, mx.array]:
    """exp(x) for x ≤ 0, and exp(x) · x."""
    if mx.default_device() == mx.gpu:
        return _exp_of(x)
    # MLX's own exp takes three times as long on a CPU, where it does not become vector instructions.
    return _exp_whole(_exp_series(x), mx.view(_exp_power(x), mx.float32), x)


@mx.compile
def _exp_of(x: mx.array) -> tuple[mx.array, mx.array]:
    e = mx.where(x < LEAST, 0.0, mx.exp(x))
    return e, e * mx.maximum(x, LEAST)


# exp(x) = exp(r) · 2^k with k = round(x / log 2), |r| ≤ log(2) / 2.


@mx.compile
def _exp_series(x: mx.array) -> mx.array:
    """exp(r): seven terms of Taylor's series are off by 5e-9."""
    x = mx.maximum(x, LEAST)
    k = (x * (1 / LOG2) + ROUNDING) - ROUNDING
    r = (x - k * LOG2_HIGH) - k * LOG2_LOW
    rr = r * r
    return (1 + r) + rr * ((1 / 2 + r * (1 / 6)) + rr * ((1 / 24 + r * (1 / 120)) + rr * (1 / 720 + r * (1 / 5040))))


@mx.compile
def _exp_power(x: mx.array) -> mx.array:
    """The bits of 2^k in float32."""
    k = (mx.maximum(x, LEAST) * (1 / LOG2) + ROUNDING) - ROUNDING
    return (k.astype(mx.int32) + 127) << 23


@mx.compile
def _exp_whole(series: mx.array, power: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    e = mx.where(x < LEAST, 0.0, series * power)
    return e, e * mx.maximum(x, LEAST)


@mx.compile
def _soft_capped(z: mx.array, soft_cap: mx.array) -> tuple[mx.array, mx.array]:
    """Capped logits and their derivative, 1 − tanh² without subtracting."""
    x = z / soft_cap
    a = mx.exp(-2 * mx.abs(x))
    return soft_cap * mx.tanh(x), 4 * a / mx.square(1 + a)
