"""The BNF loss fused with the language-model head: hidden states in, loss and finished gradients out.

A token's gradient coefficient needs only its own log-odds and the reference's, so each chunk of tokens goes
through the head once and leaves with its gradient: two matrix products with a frozen head, three with a
trainable one, and never an (N, V) array.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from bnf_core.objectives.bnf import loss_and_slope
from bnf_core.shapes import require_linear, require_one_for_each
from bnf_core.types import TokenStats
from bnf_mlx.kernels import exponentials
from bnf_mlx.losses import accurate_sum, check_targets, custom_function
from bnf_mlx.ops import OPS

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
    train_head: bool | None = None,
    chunk_tokens: int | None = None,
) -> tuple[mx.array, TokenStats]:
    """Σ coefficients · ℓ over the tokens whose logits are hidden @ head_weight.T + bias, soft-capped.

    The gradients are finished with the loss. PyTorch computes those that are wanted; MLX, which cannot tell
    beforehand, always that of `hidden`.

    Args:
        hidden: (N, D) float32, bfloat16 or float16, the states that predict `targets`. N may be 0.
        head_weight: (V, D), any of the same dtypes.
        targets: (N,), any integer dtype, each in [0, V). Checked on a CPU and on CUDA, where it is an assertion of the
            device. MLX checks on a CPU alone, and not while it compiles: it would have to wait for the values.
        ref_log_odds: (N,) of the reference.
        coefficients: (N,), label / (|y| · sequences in the global batch).
        bias: (V,), any float dtype; −inf bans a token.
        soft_cap: logits z become soft_cap · tanh(z / soft_cap).
        train_head: whether to finish the gradients of `head_weight` and `bias` in the same pass. True: yes, on PyTorch
            of those that require one. False: no, they are constants. None: on PyTorch as True, on MLX in a second pass
            if they are asked for.
        chunk_tokens: tokens whose logits are alive at a time; default: what fits the device.
    Returns:
        loss, a float32 scalar differentiable once in `hidden`, `head_weight`, `bias` and `coefficients`, and the
        detached statistics of each token, (N,) float32. Logits, sums and the loss are float32 whatever the inputs.
        PyTorch scales the gradients in place: a second backward pass through the same loss is an error.
    Raises:
        ValueError: on V < 2, mismatched shapes, targets outside the vocabulary, or a soft_cap or chunk_tokens that is
            not positive.

    In plain code:
        logits = hidden.astype(mx.float32) @ head_weight.astype(mx.float32).T + bias
        logits = soft_cap * mx.tanh(logits / soft_cap)
        log_odds, other_entropy = token_log_odds(logits, targets)
        token_loss = bnf_token_loss(log_odds, other_entropy, ref_log_odds)
        loss = (coefficients * token_loss).sum()
    """
    _check(hidden, head_weight, targets, bias, soft_cap, chunk_tokens)
    require_one_for_each(len(hidden), targets.shape, ref_log_odds.shape, coefficients.shape)
    if train_head is False:
        head_weight, bias = mx.stop_gradient(head_weight), None if bias is None else mx.stop_gradient(bias)

    def one_pass(arguments: Sequence[mx.array], hidden_too: bool, head_too: bool) -> tuple[TokenStats, list[mx.array]]:
        hidden, head, targets, ref_log_odds, coefficients, *more = arguments
        losses = []

        def weigh(part: slice, log_odds: mx.array, entropy: mx.array) -> mx.array:
            token_loss, slope = loss_and_slope(OPS, log_odds, entropy, ref_log_odds[part])
            losses.append(token_loss)
            return coefficients[part] * slope

        log_odds, entropy, grads = _one_pass(
            hidden, head, more, targets, soft_cap, chunk_tokens, hidden_too, head_too, weigh
        )
        return TokenStats(log_odds, entropy, _concatenated(losses, hidden[:, 0])), grads

    @custom_function
    def fused(*arguments: mx.array) -> tuple[mx.array, ...]:
        stats, grads = one_pass(arguments, True, bool(train_head))
        return accurate_sum(arguments[4] * stats.token_loss)[0], *stats, *grads

    @fused.vjp
    def _(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        hidden, head, targets, ref_log_odds, _, *bias = primals
        _, _, _, token_loss, grad_hidden, *grads = outputs
        if not grads:  # lazy: costs nothing unless it is asked for
            _, grads = one_pass(primals, False, True)
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
    loss, *outputs = fused(*arguments, *_listed(bias))
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
    """`token_log_odds` of the logits of `linear_bnf_loss`, for a loss of one's own.

    ∂log_odds/∂hidden is finished with the log-odds and kept, (N, D) float32: with a frozen head two matrix products in
    all. What `head_weight` and `bias` get depends on the loss, and takes a second pass over the head.

    Args, errors: as `linear_bnf_loss`.
    Returns:
        log_odds (N,) float32, differentiable once in `hidden`, `head_weight` and `bias`, and other_entropy (N,) float32
        in nats, detached.

    In plain code:
        logits = hidden.astype(mx.float32) @ head_weight.astype(mx.float32).T + bias
        logits = soft_cap * mx.tanh(logits / soft_cap)
        log_odds, other_entropy = token_log_odds(logits, targets)
    """
    _check(hidden, head_weight, targets, bias, soft_cap, chunk_tokens)

    @custom_function
    def fused(*arguments: mx.array) -> tuple[mx.array, ...]:
        hidden, head, targets, *more = arguments
        log_odds, entropy, grads = _one_pass(hidden, head, more, targets, soft_cap, chunk_tokens, True, False, _ones)
        return log_odds, entropy, *grads

    @fused.vjp
    def _(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        hidden, head, targets, *bias = primals
        grad = cotangents[0]

        def weigh(part: slice, log_odds: mx.array, entropy: mx.array) -> mx.array:
            return grad[part]

        # Lazy: costs nothing unless it is asked for.
        *_, grads = _one_pass(hidden, head, bias, targets, soft_cap, chunk_tokens, False, True, weigh)
        return (
            (grad[:, None] * outputs[2]).astype(hidden.dtype),
            grads[0].astype(head.dtype),
            mx.zeros_like(targets),
            *(grads[1].astype(x.dtype) for x in bias),
        )

    log_odds, entropy, _ = fused(hidden, head_weight, targets, *_listed(bias))
    return log_odds, mx.stop_gradient(entropy)


def detached_log_odds(
    hidden: mx.array,
    head_weight: mx.array,
    targets: mx.array,
    *,
    bias: mx.array | None = None,
    soft_cap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[mx.array, mx.array]:
    """`linear_log_odds` at half its cost, without gradients: what PyTorch does under torch.no_grad().

    Args, errors: as `linear_bnf_loss`.
    Returns:
        log_odds and other_entropy, (N,) float32.
    """
    _check(hidden, head_weight, targets, bias, soft_cap, chunk_tokens)
    more = _listed(bias)
    log_odds, entropy, _ = _one_pass(hidden, head_weight, more, targets, soft_cap, chunk_tokens, False, False, _ones)
    return mx.stop_gradient(log_odds), mx.stop_gradient(entropy)


def _check(
    hidden: mx.array,
    head: mx.array,
    targets: mx.array,
    bias: mx.array | None,
    soft_cap: float | None,
    chunk_tokens: int | None,
) -> None:
    shape_of_bias = None if bias is None else bias.shape
    require_linear(hidden.shape, head.shape, targets.shape, shape_of_bias, soft_cap, chunk_tokens)
    check_targets(targets, len(head))


def _one_pass(
    hidden: mx.array,
    head: mx.array,
    more: Sequence[mx.array],
    targets: mx.array,
    soft_cap: float | None,
    chunk_tokens: int | None,
    train_hidden: bool,
    train_head: bool,
    weigh: Callable[[slice, mx.array, mx.array], mx.array],
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """log_odds and other_entropy, (N,), and those of the gradients of Σ w · log_odds that are wanted, all float32:
    (N, D); (V, D) and, with a bias, (V,).

    Args:
        more: the bias, if there is one.
        weigh: the w (C,) of a slice of the tokens, whose log_odds and other_entropy it is given.
    """
    bias = more[0] if more else None
    if chunk_tokens is None:
        chunks = math.ceil(len(hidden) / max(16, CHUNK_BYTES // (16 * len(head))))
        chunk_tokens = math.ceil(len(hidden) / max(1, chunks))  # as many chunks, all as large
    log_odds, entropy, grad_hidden = [], [], []
    grad_head = mx.zeros(head.shape) if train_head else None
    grad_bias = mx.zeros(bias.shape) if train_head and bias is not None else None
    finished: list[mx.array] = []
    for at in range(0, len(hidden), max(1, chunk_tokens)):
        part = slice(at, at + chunk_tokens)
        y, h = targets[part], hidden[part].astype(mx.float32)  # (C,), (C, D)
        if finished:  # MLX orders lazy work as it likes: one chunk's logits must not precede another's gradient
            h = mx.depends(h, finished)
        others = exponentials(_logits(h, head), y, bias, soft_cap)
        log_odds.append(others.log_odds)
        entropy.append(others.entropy)
        w = weigh(part, others.log_odds, others.entropy)[:, None]
        finished = [others.log_odds, others.entropy, w]

        # ∂/∂z_y = w, ∂/∂z_v = −w e_v / Σe: e itself goes through the product, its scale afterwards.
        scale, w = -w / others.total, w * others.observed_slope
        if train_hidden:
            grad_hidden.append(_times_head(others.weights, head) * scale + head[y].astype(mx.float32) * w)
            finished.append(grad_hidden[-1])
        if grad_head is not None:
            grad_head = mx.addmm(grad_head, others.weights.T, h * scale).at[y].add(h * w)
            finished.append(grad_head)
        if grad_bias is not None:
            grad_bias = (grad_bias + (scale.T @ others.weights)[0]).at[y].add(w[:, 0])
            finished.append(grad_bias)
    grads = [_concatenated(grad_hidden, hidden)] if train_hidden else []
    grads += [grad for grad in (grad_head, grad_bias) if grad is not None]
    return _concatenated(log_odds, hidden[:, 0]), _concatenated(entropy, hidden[:, 0]), grads


def _ones(part: slice, log_odds: mx.array, entropy: mx.array) -> mx.array:
    return mx.ones_like(log_odds)


def _concatenated(parts: list[mx.array], like: mx.array) -> mx.array:
    """The parts one after another; where there is none, nothing in the shape of `like`, which is as empty."""
    return mx.concatenate(parts) if parts else mx.zeros(like.shape)


def _listed(bias: mx.array | None) -> list[mx.array]:
    return [] if bias is None else [bias]


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
