"""The BNF loss fused with the language-model head: hidden states in, loss and finished gradients out.

A token's gradient coefficient needs only its own log-odds and the reference's, so each chunk of tokens goes
through the head once and leaves with its gradient: two matrix products with a frozen head, three with a
trainable one, and never an (N, V) array.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bnf_core.protocol import TokenStats
from bnf_torch.losses import loss_and_slope

CHUNK_BYTES = 48 * 2**20  # of one chunk's two float32 buffers; measured best on CPUs at V = 49,152
UPCAST_BYTES = 16 * 2**20  # of one vocabulary block of a half-precision head, upcast on the CPU


def linear_bnf_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    ref_log_odds: Tensor,
    coefficients: Tensor,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, TokenStats]:
    """Σ coefficients · ℓ over the tokens whose logits are hidden @ head_weight.T.

    Args:
        hidden: (N, D) float32, bfloat16 or float16, the states that predict `targets`.
        head_weight: (V, D), the same dtype. Its gradient is computed if it requires one.
        targets: (N,) int.
        ref_log_odds: (N,) of the reference.
        coefficients: (N,), label / (|y| · sequences in the global batch).
        chunk_tokens: tokens whose logits are alive at a time; default: what fits 48 MiB.
    Returns:
        loss, a float32 scalar differentiable in `hidden` and `head_weight`, and the detached statistics of each
        token, (N,) float32. Logits, sums and the loss are float32 whatever the inputs.
    Raises:
        ValueError: on V < 2 or mismatched shapes.

    In plain code:
        log_odds, other_entropy = token_log_odds(hidden.float() @ head_weight.float().T, targets)
        token_loss = bnf_token_loss(log_odds, other_entropy, ref_log_odds)
        loss = (coefficients * token_loss).sum()
    """
    n, vocab = len(hidden), len(head_weight)
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} does not fit head_weight {tuple(head_weight.shape)}")
    if vocab < 2:
        raise ValueError(f"head_weight {tuple(head_weight.shape)}: a vocabulary needs at least 2 tokens")
    if not targets.shape == ref_log_odds.shape == coefficients.shape == (n,):
        raise ValueError(f"targets, ref_log_odds and coefficients must be ({n},) as hidden is {tuple(hidden.shape)}")
    if chunk_tokens is None:
        chunk_tokens = max(16, CHUNK_BYTES // (8 * vocab))
    loss, *stats = _LinearLoss.apply(
        hidden, head_weight, targets.long(), ref_log_odds.float(), coefficients.float(), chunk_tokens
    )
    return loss, TokenStats(*stats)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        ref_log_odds: Tensor,
        coefficients: Tensor,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, vocab = len(hidden), len(head)
        train_hidden, train_head = ctx.needs_input_grad[:2]
        log_odds, entropy, token_loss = (hidden.new_empty(n, dtype=torch.float32) for _ in range(3))
        grad_hidden = torch.empty_like(hidden) if train_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if train_head else None
        chunk_tokens = min(chunk_tokens, max(n, 1))
        buffers = hidden.new_empty(2, chunk_tokens, vocab, dtype=torch.float32)

        for at in range(0, n, chunk_tokens):
            part = slice(at, at + chunk_tokens)
            h, y = hidden[part], targets[part]  # (C, D), (C,)
            z, log_q = buffers[:, : len(h)]  # (C, V)
            index = y.unsqueeze(1)

            # q, the softmax over all tokens but the observed one. The log-sum is read off the likeliest token's
            # log q: shifted by the largest logit, it keeps its digits however large the logits are.
            _logits(h, head, out=z)
            observed = z.gather(1, index)
            z.scatter_(1, index, -torch.inf)
            log_odds[part] = (observed - z.amax(1, keepdim=True)).squeeze(1)
            torch.log_softmax(z, 1, out=log_q)
            log_odds[part] += log_q.amax(1)
            q = torch.exp(log_q, out=z)
            log_q.scatter_(1, index, 0.0)
            entropy[part] = -log_q.mul_(q).sum(1)
            token_loss[part], slope = loss_and_slope(log_odds[part], entropy[part], ref_log_odds[part])

            # ∂/∂z_y = w, ∂/∂z_v = −w q_v: q itself goes through the product, its scale afterwards.
            w = (coefficients[part] * slope).unsqueeze(1)
            if grad_hidden is not None:
                grad_hidden[part] = (head[y] - _times_head(q, head)) * w
            if grad_head is not None:
                _add_head_gradient(grad_head, q, h.float() * -w, head.dtype)
                grad_head.index_add_(0, y, h.float() * w)

        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        ctx.mark_non_differentiable(log_odds, entropy, token_loss)
        return torch.dot(coefficients, token_loss), log_odds, entropy, token_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scaled = [None if g is None else g * grad_loss.to(g.dtype) for g in (grad_hidden, grad_head)]
        return *scaled, None, None, None, None


def _logits(h: Tensor, head: Tensor, *, out: Tensor) -> Tensor:
    """h @ head.T accumulated and kept in float32."""
    if head.dtype == torch.float32:
        return torch.mm(h, head.T, out=out)
    if head.is_cuda:
        return out.copy_(torch.mm(h, head.T, out_dtype=torch.float32))
    for part, block in _upcast_blocks(head):
        torch.mm(h.float(), block.T, out=out[:, part])
    return out


def _times_head(q: Tensor, head: Tensor) -> Tensor:
    """q (C, V) float32 @ head (V, D), accumulated in float32."""
    if head.dtype == torch.float32:
        return q @ head
    if head.is_cuda:
        half, scale = _to_half(q, head.dtype)
        return torch.mm(half, head, out_dtype=torch.float32) * scale
    result = q.new_zeros(len(q), head.shape[1])
    for part, block in _upcast_blocks(head):
        result.addmm_(q[:, part], block)
    return result


def _add_head_gradient(grad_head: Tensor, q: Tensor, scaled: Tensor, dtype: torch.dtype) -> None:
    """grad_head (V, D) += qᵀ (V, C) @ scaled (C, D), in float32 but for CUDA's half-precision products."""
    if q.is_cuda and dtype != torch.float32:
        half, scale = _to_half(q, dtype)
        grad_head += torch.mm(half.T, (scaled * scale).to(dtype), out_dtype=torch.float32)
    else:
        grad_head.addmm_(q.T, scaled)


def _to_half(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q (C, V) relative to its largest, and that: float16 has no room for a large vocabulary's probabilities."""
    top = q.amax(1, keepdim=True)
    return (q / top).to(dtype), top


def _upcast_blocks(head: Tensor) -> Iterator[tuple[slice, Tensor]]:
    rows = max(1, UPCAST_BYTES // (4 * head.shape[1]))
    for at in range(0, len(head), rows):
        yield slice(at, at + rows), head[at : at + rows].float()
