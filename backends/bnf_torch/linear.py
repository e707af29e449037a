"""The BNF loss fused with the language-model head: hidden states in, loss and finished gradients out.

A token's gradient coefficient needs only its own log-odds and the reference's, so each chunk of tokens goes
through the head once and leaves with its gradient: two matrix products with a frozen head, three with a
trainable one, and never an (N, V) array.

The head comes in blocks of the vocabulary. A block's logits z are read once and give way to e = exp(z − top_b),
relative to the block's own largest. How much a block counts is known after the last one, and is a factor of what
the products with it give. With q the softmax over all tokens but the observed one and W the head,

    Σ_v q_v W_v = Σ_b exp(top_b − top) / total · (e_b @ W_b)
"""

import math
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnf_core.objectives.bnf import loss_and_slope
from bnf_core.shapes import require_linear, require_one_for_each
from bnf_core.types import TokenStats
from bnf_torch.losses import check_targets
from bnf_torch.ops import OPS

CHUNK_BYTES = 48 * 2**20  # of one chunk's exponentials where there is no CUDA
UPCAST_BYTES = 16 * 2**20  # of one block of a half-precision head, upcast where there is no CUDA
CUDA_BYTES = 2**30  # of all that a call holds beyond inputs and outputs on CUDA, at most half of what is free
CUDA_BLOCK = 16_384  # columns, at most: what one program of the kernel takes
CACHED = 2**18  # elements of a block that a CPU takes at a time, so that they stay in its cache
NEVER = -200.0  # exp of it is exactly 0 in float32, and so is 0 times it


def linear_bnf_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    ref_log_odds: Tensor,
    coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    train_head: bool | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, TokenStats]:
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
        logits = hidden.float() @ head_weight.float().T + bias
        logits = soft_cap * (logits / soft_cap).tanh()
        log_odds, other_entropy = token_log_odds(logits, targets)
        token_loss = bnf_token_loss(log_odds, other_entropy, ref_log_odds)
        loss = (coefficients * token_loss).sum()
    """
    _check(hidden, head_weight, targets, bias, soft_cap, chunk_tokens)
    require_one_for_each(len(hidden), tuple(targets.shape), tuple(ref_log_odds.shape), tuple(coefficients.shape))
    if train_head is False:
        head_weight, bias = head_weight.detach(), None if bias is None else bias.detach()
    loss, *stats = _linear_loss(
        hidden,
        head_weight,
        bias,
        targets.long(),
        ref_log_odds.float(),
        coefficients.float(),
        soft_cap,
        chunk_tokens,
        *_wanted(hidden, head_weight, bias),
    )[:4]
    return loss, TokenStats(*(x.detach() for x in stats))


def linear_log_odds(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_log_odds` of the logits of `linear_bnf_loss`, for a loss of one's own.

    ∂log_odds/∂hidden is finished with the log-odds and kept, (N, D) float32: with a frozen head two matrix products in
    all. What `head_weight` and `bias` get depends on the loss, and takes a second pass over the head.

    Args, errors: as `linear_bnf_loss`.
    Returns:
        log_odds (N,) float32, differentiable once in `hidden`, `head_weight` and `bias`, and other_entropy (N,) float32
        in nats, detached.

    In plain code:
        logits = hidden.float() @ head_weight.float().T + bias
        logits = soft_cap * (logits / soft_cap).tanh()
        log_odds, other_entropy = token_log_odds(logits, targets)
    """
    _check(hidden, head_weight, targets, bias, soft_cap, chunk_tokens)
    train_hidden, train_head, train_bias = _wanted(hidden, head_weight, bias)
    # With a trained head the second pass has the gradient of the hidden states as well, and nothing is kept till then.
    keep = train_hidden and not (train_head or train_bias)
    log_odds, entropy, _ = _linear_log_odds(hidden, head_weight, bias, targets.long(), soft_cap, chunk_tokens, keep)
    return log_odds, entropy.detach()


def _check(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    soft_cap: float | None,
    chunk_tokens: int | None,
) -> None:
    shape_of_bias = None if bias is None else tuple(bias.shape)
    require_linear(tuple(hidden.shape), tuple(head.shape), tuple(targets.shape), shape_of_bias, soft_cap, chunk_tokens)


def _wanted(*leaves: Tensor | None) -> list[bool]:
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in leaves]


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# An operator of its own, because torch.compile is not to unroll the loops over chunks and blocks.
@torch.library.custom_op("bnf_torch::linear_loss", mutates_args=())
def _linear_loss(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_log_odds: Tensor,
    coefficients: Tensor,
    soft_cap: float | None,
    chunk_tokens: int | None,
    train_hidden: bool,
    train_head: bool,
    train_bias: bool,
) -> Results:
    """loss, log_odds, other_entropy, token_loss, then unit and the gradients of hidden, head and bias in that unit;
    those that are not wanted are empty."""
    unit = _unit(coefficients)
    stats = hidden.new_empty(3, len(hidden), dtype=torch.float32)

    def weigh(part: slice, log_odds: Tensor, entropy: Tensor) -> Tensor:
        stats[2, part], slope = loss_and_slope(OPS, log_odds, entropy, ref_log_odds[part])
        return coefficients[part] / unit * slope

    wanted = train_hidden, train_head, train_bias
    grads = _one_pass(stats, hidden, head, bias, targets, soft_cap, chunk_tokens, wanted, hidden.dtype, weigh)
    return torch.dot(coefficients, stats[2]), stats[0].clone(), stats[1].clone(), stats[2].clone(), unit, *grads


@_linear_loss.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_log_odds: Tensor,
    coefficients: Tensor,
    soft_cap: float | None,
    chunk_tokens: int | None,
    train_hidden: bool,
    train_head: bool,
    train_bias: bool,
) -> Results:
    def float32(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    n = len(hidden)
    gradients = _empty_gradients(hidden, head, bias, train_hidden, train_head, train_bias)
    return float32(), float32(n), float32(n), float32(n), float32(), *gradients


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.set_materialize_grads(False)  # no zeros as large as a head for outputs that nobody differentiates
    ctx.wanted = inputs[-3:]
    ctx.save_for_backward(*output[4:], output[3] if inputs[5].requires_grad else None)


@once_differentiable
def _loss_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    unit, *gradients, token_loss = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 3
    grad_coefficients = None
    if grad_loss is not None:
        factor = (grad_loss * unit).reshape(1)  # with a dimension it is not rounded to the gradient's dtype first
        grads = [g.mul_(factor) if wanted else None for g, wanted in zip(gradients, ctx.wanted, strict=True)]
        grad_coefficients = None if token_loss is None else grad_loss * token_loss
    return *grads, None, None, grad_coefficients, *[None] * 5


_linear_loss.register_autograd(_loss_backward, setup_context=_setup_loss)


@torch.library.custom_op("bnf_torch::linear_log_odds", mutates_args=())
def _linear_log_odds(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    soft_cap: float | None,
    chunk_tokens: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """log_odds, other_entropy and, if it is to be kept, ∂log_odds/∂hidden in float32, else an empty tensor."""

    def weigh(part: slice, log_odds: Tensor, entropy: Tensor) -> Tensor:
        return torch.ones_like(log_odds)

    wanted = keep, False, False
    stats = hidden.new_empty(2, len(hidden), dtype=torch.float32)
    grads = _one_pass(stats, hidden, head, bias, targets, soft_cap, chunk_tokens, wanted, torch.float32, weigh)
    return stats[0].clone(), stats[1].clone(), grads[0]


@_linear_log_odds.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    soft_cap: float | None,
    chunk_tokens: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    log_odds, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
    return log_odds, entropy, torch.empty_like(hidden if keep else hidden[:0], dtype=torch.float32)


@torch.library.custom_op("bnf_torch::linear_log_odds_backward", mutates_args=())
def _log_odds_gradients(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grad_log_odds: Tensor,
    soft_cap: float | None,
    chunk_tokens: int | None,
    train_hidden: bool,
    train_head: bool,
    train_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, head and bias in a second pass; those that are not wanted are empty."""
    unit = _unit(grad_log_odds)

    def weigh(part: slice, log_odds: Tensor, entropy: Tensor) -> Tensor:
        return grad_log_odds[part] / unit

    wanted = train_hidden, train_head, train_bias
    stats = hidden.new_empty(2, len(hidden), dtype=torch.float32)
    grads = _one_pass(stats, hidden, head, bias, targets, soft_cap, chunk_tokens, wanted, hidden.dtype, weigh)
    grad_hidden, grad_head, grad_bias = (g.mul_(unit.reshape(1)) for g in grads)
    return grad_hidden, grad_head, grad_bias


@_log_odds_gradients.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grad_log_odds: Tensor,
    soft_cap: float | None,
    chunk_tokens: int | None,
    train_hidden: bool,
    train_head: bool,
    train_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, head, bias, train_hidden, train_head, train_bias)


def _setup_log_odds(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, *more, ctx.soft_cap, ctx.chunk_tokens, ctx.kept = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype = hidden.dtype
    ctx.save_for_backward(*([output[2]] if ctx.kept else [hidden, *more]))


@once_differentiable
def _log_odds_backward(ctx: Any, grad_log_odds: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 3
    if grad_log_odds is not None and ctx.kept:
        grads[0] = (ctx.saved_tensors[0] * grad_log_odds.unsqueeze(1)).to(ctx.dtype)
    elif grad_log_odds is not None:
        wanted = ctx.needs_input_grad[:3]
        found = _log_odds_gradients(*ctx.saved_tensors, grad_log_odds, ctx.soft_cap, ctx.chunk_tokens, *wanted)
        grads = [g if w else None for g, w in zip(found, wanted, strict=True)]
    return *grads, *[None] * 4


_linear_log_odds.register_autograd(_log_odds_backward, setup_context=_setup_log_odds)


def _empty_gradients(
    hidden: Tensor, head: Tensor, bias: Tensor | None, train_hidden: bool, train_head: bool, train_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the shapes and dtypes of `_one_pass`."""
    grad_hidden = torch.empty_like(hidden if train_hidden else hidden[:0])
    grad_head = head.new_empty(head.shape if train_head else (0,))
    empty = hidden.new_empty(0, dtype=torch.float32)
    return grad_hidden, grad_head, empty if bias is None else bias.new_empty(bias.shape if train_bias else (0,))


def _unit(weights: Tensor) -> Tensor:
    """What gradients are kept in: a power of 2 near the largest weight. A long batch's own would leave float16's range
    before a loss scaler could lift them. Large ones stay: dividing would push them out below."""
    largest = weights.abs().amax() if len(weights) else weights.new_zeros(())
    return torch.exp2(largest.clamp(min=torch.finfo(torch.float32).tiny).log2().floor().clamp(max=0.0))


def _one_pass(
    stats: Tensor,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    soft_cap: float | None,
    chunk_tokens: int | None,
    wanted: tuple[bool, bool, bool],
    hidden_gradient: torch.dtype,
    weigh: Callable[[slice, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of Σ w · log_odds in hidden, head and bias; those that are not wanted are empty.

    Args:
        stats: (2 or more, N) float32; log_odds and other_entropy are written to its first rows.
        hidden_gradient: dtype of the gradient in hidden; the others have that of head and bias.
        weigh: the w (C,) of a slice of the tokens, whose log_odds and other_entropy it is given.
    """
    check_targets(targets, len(head))
    train_hidden, train_head, train_bias = wanted
    n, width = hidden.shape
    plan = _plan(hidden, head, train_head, chunk_tokens)

    def zeros(wanted: bool, *shape: int, dtype: torch.dtype) -> Tensor:
        return hidden.new_zeros(shape if wanted else (0,), dtype=dtype)

    grad_hidden = torch.empty_like(hidden if train_hidden else hidden[:0], dtype=hidden_gradient)
    grad_head = zeros(train_head, *head.shape, dtype=plan.head_gradient)
    grad_bias = zeros(train_bias, len(head), dtype=torch.float32)
    training = train_hidden or train_head or train_bias
    kept = len(plan.blocks) if training else 1
    buffer = hidden.new_empty(kept, plan.chunk, plan.width, dtype=plan.dtype)
    softmax = _softmax(plan.on_cuda)

    with torch.autocast(hidden.device.type, enabled=False):
        for at in range(0, n, plan.chunk):
            part = slice(at, at + plan.chunk)
            h, y = hidden[part], targets[part]  # (C, D), (C,)
            observed = h.new_zeros(len(h), dtype=torch.float32)
            top, total, moment, mass = h.new_empty(4, len(plan.blocks), len(h), dtype=torch.float32)
            for b, rows in enumerate(plan.blocks):
                e = buffer[b % kept, : len(h), : rows.stop - rows.start]
                z = _logits(h, head[rows], out=e)
                column = y - rows.start
                here = (column >= 0) & (column < z.shape[1])
                found = z.gather(1, column.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
                observed = torch.where(here, found, observed)
                block_bias = None if bias is None else bias[rows].contiguous()
                top[b], total[b], moment[b], mass[b] = softmax(z, e if training else None, block_bias, column, soft_cap)
                del z

            # What the blocks are to each other, and all that is to be known of a token.
            highest = top.amax(0)
            highest = highest.masked_fill(torch.isneginf(highest), 0.0)
            shift = (top - highest).clamp(min=NEVER)
            share = shift.exp()
            moment = (share * (moment + shift * total)).sum(0)
            total, mass = (share * total).sum(0), (share * mass).sum(0)
            nothing = total == 0  # no other token is possible
            if bias is not None:
                observed = observed + bias[y].float()
            observed, observed_slope = soft_capped(observed, soft_cap)
            log_odds = observed - highest - total.log()
            total = total.masked_fill(nothing, 1.0)
            entropy = (total.log() - moment / total).masked_fill(nothing, 0.0)
            stats[:2, part] = torch.stack([log_odds, entropy])
            w = weigh(part, log_odds, entropy)
            if not training:
                continue

            # ∂/∂z_y = w, ∂/∂z_v = −w q_v: e itself goes through the products, its scale before or afterwards.
            # Over the sum of e as it was rounded, so that what all tokens have in common cancels nevertheless.
            scale = (-w * share / mass.masked_fill(nothing, 1.0)).unsqueeze(2)  # (blocks, C, 1)
            w = (w * observed_slope).unsqueeze(1)
            grad = h.new_zeros(len(h), width if train_hidden else 0, dtype=torch.float32)
            for b, rows in enumerate(plan.blocks):
                e = buffer[b, : len(h), : rows.stop - rows.start]
                if train_hidden:
                    grad.addcmul_(_product(e, head[rows]), scale[b])
                if train_head:
                    _add_product(grad_head[rows], e, h.float() * scale[b])
                if train_bias:
                    grad_bias[rows] += (e.float().T @ scale[b]).squeeze(1)
            if train_hidden:
                grad_hidden[part] = grad.addcmul_(head[y].float(), w)
            if train_head:
                _add_rows(grad_head, y, h.float() * w)
            if train_bias:
                grad_bias.index_add_(0, y, w.squeeze(1))

    grad_bias = grad_bias if bias is None else grad_bias.to(bias.dtype)
    return grad_hidden, grad_head.to(head.dtype), grad_bias


class _Plan(NamedTuple):
    on_cuda: bool
    chunk: int  # tokens at a time
    blocks: list[slice]  # of the vocabulary
    width: int  # of the widest
    dtype: torch.dtype  # of the exponentials, as the products take them
    head_gradient: torch.dtype  # in which it is accumulated


def _plan(hidden: Tensor, head: Tensor, train_head: bool, chunk_tokens: int | None) -> _Plan:
    (vocab, dim), n = head.shape, len(hidden)
    on_cuda = hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    half = head.dtype != torch.float32
    accumulator, held = torch.float32, 0
    if on_cuda:
        width = math.ceil(vocab / math.ceil(vocab / CUDA_BLOCK))
        width = min(math.ceil(width / 64) * 64, CUDA_BLOCK)  # rows of exponentials begin where tensor cores like it
        # exponentials, one block's logits; gradients of hidden states, scaled states
        token_bytes = head.itemsize * vocab + 4 * width * half + 16 * dim
        budget = min(CUDA_BYTES, _free_bytes(hidden) // 2)
        if train_head:
            held = 4 * dim * (vocab + width) if half else 0
            # Then chunks are large and few, and each adds one rounding of at most 2^-9 to bfloat16. Float16 has no
            # room for the small sums.
            if head.dtype == torch.bfloat16 and held > budget // 2:
                accumulator, held = torch.bfloat16, 0
    else:
        width = min(vocab, max(1, UPCAST_BYTES // (4 * dim))) if half else vocab
        token_bytes, budget = 4 * vocab, CHUNK_BYTES
    if chunk_tokens is None:
        chunk_tokens = max(16, (budget - min(held, budget // 2)) // token_bytes)
        chunk_tokens = math.ceil(n / max(1, math.ceil(n / chunk_tokens)))  # as many chunks, all as large
    blocks = [slice(at, min(at + width, vocab)) for at in range(0, vocab, width)]
    dtype = head.dtype if on_cuda else torch.float32
    return _Plan(on_cuda, max(1, min(chunk_tokens, n)), blocks, width, dtype, accumulator)


def _free_bytes(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 2 * CUDA_BYTES
    cached = torch.cuda.memory_reserved(tensor.device) - torch.cuda.memory_allocated(tensor.device)
    return int(torch.cuda.mem_get_info(tensor.device)[0]) + cached


@cache
def _softmax(on_cuda: bool) -> Any:
    if on_cuda and find_spec("triton"):
        from bnf_torch import kernels

        return kernels.exponentials
    return exponentials


def exponentials(z: Tensor, e: Tensor | None, bias: Tensor | None, observed: Tensor, soft_cap: float | None) -> Tensor:
    """A block of logits as exponentials relative to its largest, the observed tokens left out.

    Args:
        z: (C, B) float32, before bias and soft cap; overwritten.
        e: (C, B), any float dtype; may be z. Gets exp(logit − top), 0 at the observed token, times the derivative
            of the soft cap. None: only the statistics are wanted.
        bias: (B,).
        observed: (C,) the column of the observed token, which may lie outside.
        soft_cap: as in `linear_bnf_loss`.
    Returns:
        (4, C) float32: top, the largest logit, −inf where there is none; total = Σ exp(logit − top);
        moment = Σ exp(logit − top) (logit − top); mass = total of terms rounded to e's dtype.
    """
    statistics = z.new_empty(4, len(z))
    step = max(1, CACHED // z.shape[1]) if z.device.type == "cpu" else max(1, len(z))
    for at in range(0, len(z), step):
        part = slice(at, at + step)
        logits, column = z[part], observed[part].unsqueeze(1)
        if bias is not None:
            logits += bias
        logits, slope = soft_capped(logits, soft_cap)
        here = (column >= 0) & (column < logits.shape[1])
        column = column.clamp(0, logits.shape[1] - 1)
        logits.scatter_(1, column, logits.gather(1, column).masked_fill(here, -torch.inf))
        top = logits.amax(1, keepdim=True)
        logits -= top.masked_fill(torch.isneginf(top), 0.0)
        logits.clamp_(min=NEVER)
        weights = logits.exp()
        total = mass = weights.sum(1)
        moment = logits.mul_(weights).sum(1)
        if e is not None:
            rounded = e[part].copy_(weights)
            if e.dtype != torch.float32:
                mass = rounded.float().sum(1)
            if soft_cap is not None:
                rounded.copy_(weights * slope)
        statistics[:, part] = torch.stack([top.squeeze(1), total, moment, mass])
    return statistics


def soft_capped(z: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    """Logits z, any shape, float32, and what their derivative is a factor of; without a soft cap, z itself and 1."""
    if soft_cap is None:
        return z, z.new_ones(())
    x = z / soft_cap
    a = torch.exp(-2 * x.abs())
    return soft_cap * x.tanh(), 4 * a / (1 + a).square()  # 1 − tanh², without subtracting


def _logits(h: Tensor, head: Tensor, *, out: Tensor) -> Tensor:
    """h (C, D) @ head.T (D, B) in float32, in `out` if that is float32."""
    if out.dtype != torch.float32:
        return _product(h, head.T)
    return torch.mm(h.float(), head.float().T, out=out)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and kept in float32."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(grad: Tensor, e: Tensor, h: Tensor) -> None:
    """grad (B, D) += eᵀ (B, C) @ h (C, D), h float32."""
    if grad.dtype == e.dtype:
        grad.addmm_(e.T, h.to(e.dtype))
        return
    unit = h.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)  # float16's range again
    h = h / unit
    # Tokens of both signs cancel. In float16, where another rounding follows close to its smallest numbers, the
    # states go through the product in two parts.
    for _ in range(2 if e.dtype == torch.float16 else 1):
        half = h.to(e.dtype)
        grad.addcmul_(_product(e.T, half), unit)
        h = h - half


def _add_rows(grad: Tensor, y: Tensor, rows: Tensor) -> None:
    """grad[y] += rows, float32, where one y may stand several times."""
    if grad.dtype == rows.dtype:
        grad.index_add_(0, y, rows)
    else:  # their sum first, or a frequent token's row would be rounded as often
        y, place = y.unique(return_inverse=True)
        rows = rows.new_zeros(len(y), rows.shape[1]).index_add_(0, place, rows)
        grad[y] = (grad[y] + rows).to(grad.dtype)
