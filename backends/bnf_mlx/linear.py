"""The BNF loss fused with the language-model head: hidden states in, loss and finished gradients out.

A token's gradient coefficient needs only its own log-odds and the reference's, so each chunk of tokens goes
through the head once and leaves with its gradient: two matrix products with a frozen head, three with a
trainable one, and never an (N, V) array.
"""

import math
from collections.abc import Iterator, Sequence

import mlx.core as mx

from bnf_core.types import TokenStats
from bnf_mlx.kernels import exponentials
from bnf_mlx.losses import accurate_sum, custom_function, loss_and_slope

CHUNK_BYTES = 128 * 2**20  # of one chunk: four float32 buffers as large as its logits, measured
UPCAST_BYTES = 8 * 2**20  # of one vocabulary block of a half-precision head; MLX runs some ten of them ahead


def linear_bnf_loss(
    hidden: mx.array,
    head_weight: mx.array,
    targets: mx.array,
    ref_log_odds: mx.array,
    coefficients: mx.array,
    *,
    bias: mx.array | None = None,
    soft_cap: float | None = None,
    train_head: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[mx.array, TokenStats]:
    """Σ coefficients · ℓ over the tokens whose logits are hidden @ head_weight.T + bias, soft-capped.

    The gradient of `hidden` is finished with the loss, whether it is asked for or not; where only statistics
    are wanted, `linear_log_odds` costs half.

    Args:
        hidden: (N, D) float32, bfloat16 or float16, the states that predict `targets`.
        head_weight: (V, D), any of the same dtypes.
        targets: (N,), any integer dtype, each in [0, V), which is not checked.
        ref_log_odds: (N,) of the reference.
        coefficients: (N,), label / (|y| · sequences in the global batch).
        bias: (V,), any float dtype; −inf bans a token.
        soft_cap: logits z become soft_cap · tanh(z / soft_cap).
        train_head: finish the gradients of `head_weight` and `bias` in the same pass. MLX cannot tell beforehand
            whether they will be asked for; where they are in spite of False, a second pass computes the same.
        chunk_tokens: tokens whose logits are alive at a time; default: what fits 128 MiB.
    Returns:
        loss, a float32 scalar differentiable in `hidden`, `head_weight`, `bias` and `coefficients`, and the detached
        statistics of each token, (N,) float32. Logits, sums and the loss are float32 whatever the inputs.
    Raises:
        ValueError: on N = 0, V < 2, a soft_cap that is not positive or mismatched shapes.

    In plain code:
        logits = hidden.astype(f32) @ head_weight.astype(f32).T + bias
        logits = soft_cap * mx.tanh(logits / soft_cap)
        log_odds, other_entropy = token_log_odds(logits, targets)
        token_loss = bnf_token_loss(log_odds, other_entropy, ref_log_odds)
        loss = (coefficients * token_loss).sum()
    """
    chunk_tokens = _check(hidden, head_weight, targets, bias, soft_cap, chunk_tokens)
    if not targets.shape == ref_log_odds.shape == coefficients.shape:
        raise ValueError(f"targets, ref_log_odds and coefficients must be ({len(hidden)},), one for each hidden state")

    @custom_function
    def fused(*arguments: mx.array) -> tuple[mx.array, ...]:
        stats, grads = _one_pass(arguments, soft_cap, chunk_tokens, want_hidden=True, want_head=train_head)
        return accurate_sum(arguments[4] * stats.token_loss)[0], *stats, *grads

    @fused.vjp
    def _(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        hidden, head, targets, ref_log_odds, _, *bias = primals
        _, _, _, token_loss, grad_hidden, *grads = outputs
        if not grads:  # lazy: costs nothing unless it is asked for
            _, grads = _one_pass(primals, soft_cap, chunk_tokens, want_hidden=False, want_head=True)
        grad_loss = cotangents[0]
        return (
            (grad_loss * grad_hidden).astype(hidden.dtype),
            (grad_loss * grads[0]).astype(head.dtype),
            mx.zeros_like(targets),
            mx.zeros_like(ref_log_odds),
            grad_loss * token_loss,
            *((grad_loss * grads[1]).astype(x.dtype) for x in bias),
        )

    arguments = [hidden, head_weight, targets, ref_log_odds.astype(mx.float32), coefficients.astype(mx.float32)]
    loss, *outputs = fused(*arguments, *([] if bias is None else [bias]))
    return loss, TokenStats(*(mx.stop_gradient(x) for x in outputs[:3]))


def linear_log_odds(
    hidden: mx.array,
    head_weight: mx.array,
    targets: mx.array,
    *,
    bias: mx.array | None = None,
    soft_cap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[mx.array, mx.array]:
    """`token_log_odds` of the logits of `linear_bnf_loss`, chunk by chunk, without gradients.

    Args, errors: as `linear_bnf_loss`.
    Returns:
        log_odds and other_entropy, (N,) float32.
    """
    chunk_tokens = _check(hidden, head_weight, targets, bias, soft_cap, chunk_tokens)
    zeros = mx.zeros(len(hidden))
    arguments = [hidden, head_weight, targets, zeros, zeros, *([] if bias is None else [bias])]
    stats, _ = _one_pass(arguments, soft_cap, chunk_tokens, want_hidden=False, want_head=False)
    return mx.stop_gradient(stats.log_odds), mx.stop_gradient(stats.other_entropy)


def _check(
    hidden: mx.array,
    head: mx.array,
    targets: mx.array,
    bias: mx.array | None,
    soft_cap: float | None,
    chunk_tokens: int | None,
) -> int:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"hidden {hidden.shape} does not fit head_weight {head.shape}")
    if len(head) < 2:
        raise ValueError(f"head_weight {head.shape}: a vocabulary needs at least 2 tokens")
    if len(hidden) == 0 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {targets.shape} do not fit hidden {hidden.shape}: one for each, and at least one")
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"bias {bias.shape} does not fit head_weight {head.shape}")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
    chunks = math.ceil(len(hidden) / max(16, CHUNK_BYTES // (16 * len(head))))
    return chunk_tokens or math.ceil(len(hidden) / chunks)  # as many chunks, all as large


def _one_pass(
    arguments: Sequence[mx.array],
    soft_cap: float | None,
    chunk_tokens: int,
    *,
    want_hidden: bool,
    want_head: bool,
) -> tuple[TokenStats, list[mx.array]]:
    """Statistics of each token, and those of the gradients that are wanted, float32: (N, D); (V, D) and, with a
    bias, (V,)."""
    hidden, head, targets, ref_log_odds, coefficients, *more = arguments
    bias = more[0] if more else None
    stats, grad_hidden = [], []
    grad_head = mx.zeros(head.shape) if want_head else None
    grad_bias = mx.zeros(bias.shape) if want_head and bias is not None else None
    finished: list[mx.array] = []
    for at in range(0, len(hidden), chunk_tokens):
        part = slice(at, at + chunk_tokens)
        y, h = targets[part], hidden[part].astype(mx.float32)  # (C,), (C, D)
        if finished:  # MLX orders lazy work as it likes: one chunk's logits must not precede another's gradient
            h = mx.depends(h, finished)
        others = exponentials(_logits(h, head), y, bias, soft_cap)
        token_loss, slope = loss_and_slope(others.log_odds, others.entropy, ref_log_odds[part])
        stats.append((others.log_odds, others.entropy, token_loss))
        finished = [token_loss]

        # ∂/∂z_y = w, ∂/∂z_v = −w e_v / Σe: e itself goes through the product, its scale afterwards.
        w = (coefficients[part] * slope)[:, None]
        scale, w = -w / others.total, w * others.observed_slope
        if want_hidden:
            grad_hidden.append(_times_head(others.weights, head) * scale + head[y].astype(mx.float32) * w)
            finished.append(grad_hidden[-1])
        if grad_head is not None:
            grad_head = mx.addmm(grad_head, others.weights.T, h * scale).at[y].add(h * w)
            finished.append(grad_head)
        if grad_bias is not None:
            grad_bias = (grad_bias + (scale.T @ others.weights)[0]).at[y].add(w[:, 0])
            finished.append(grad_bias)
    grads = [mx.concatenate(grad_hidden)] if want_hidden else []
    grads += [grad for grad in (grad_head, grad_bias) if grad is not None]
    return TokenStats(*(mx.concatenate(list(parts)) for parts in zip(*stats, strict=True))), grads


def _logits(h: mx.array, head: mx.array) -> mx.array:
    """h (C, D) float32 @ head.T, accumulated and kept in float32."""
    if head.dtype == mx.float32:
        return h @ head.T
    logits: list[mx.array] = []
    for rows in _blocks(head):
        logits.append(h @ _upcast(head, rows, logits[-1:]).T)
    return mx.concatenate(logits, axis=1)


def _times_head(e: mx.array, head: mx.array) -> mx.array:
    """e (C, V) float32 @ head (V, D), accumulated in float32."""
    if head.dtype == mx.float32:
        return e @ head
    result = mx.zeros((len(e), head.shape[1]))
    for rows in _blocks(head):
        result = mx.addmm(result, e[:, rows], _upcast(head, rows, [result]))
    return result


def _blocks(head: mx.array) -> Iterator[slice]:
    rows = max(1, UPCAST_BYTES // (4 * head.shape[1]))
    for at in range(0, len(head), rows):
        yield slice(at, at + rows)


def _upcast(head: mx.array, rows: slice, after: list[mx.array]) -> mx.array:
    """A float32 copy of some rows, not made before `after` is done with the previous one."""
    block = head[rows]
    return (mx.depends(block, after) if after else block).astype(mx.float32)
