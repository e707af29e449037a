"""The BNF loss on logits: pure, unreduced functions.

Everything happens in float32 log-odds. With o the policy's log-odds of an observed token, o_r the reference's
and σ the logistic function, p = σ(o) and (docs/math.md)

    ℓ = t softplus(−o) + (1 − t) (softplus(o) + H_q)        t = min(1, p / r)
    ∂ℓ/∂o = p − t = −σ(−o) min(1, exp(o − o_r))

The second line has no subtraction, so no digit of a confident token is lost.
"""

from typing import Any

import torch
from torch import Tensor

from bnf_core.objectives.bnf import loss_and_slope
from bnf_core.shapes import require_logits, require_one_shape
from bnf_torch.ops import OPS


def token_log_odds(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
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
        others = logits.float().scatter(-1, targets[..., None], -inf)
        log_odds = logits.gather(-1, targets[..., None])[..., 0] - others.logsumexp(-1)
        log_q = others - others.logsumexp(-1, keepdim=True)
        other_entropy = -(log_q.exp() * log_q).sum(-1)
    """
    require_logits(tuple(logits.shape), tuple(targets.shape))
    if not torch.compiler.is_compiling():  # which cannot branch on values
        check_targets(targets, logits.shape[-1])
    return _TokenLogOdds.apply(logits, targets.long())


def bnf_token_loss(log_odds: Tensor, other_entropy: Tensor, ref_log_odds: Tensor) -> Tensor:
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
        t = (p / r).clamp(max=1).detach()
        loss = -(t * log(p) + (1 - t) * (log(1 - p) - other_entropy.detach()))
    """
    require_one_shape(tuple(log_odds.shape), tuple(other_entropy.shape), tuple(ref_log_odds.shape))
    return _TokenLoss.apply(log_odds.float(), other_entropy.float(), ref_log_odds.float())


def check_targets(targets: Tensor, vocab: int) -> None:
    """Raises ValueError unless targets, (...) int, lie in [0, vocab). CUDA, which is not waited for, asserts it."""
    if targets.is_meta:
        return
    valid = ((targets >= 0) & (targets < vocab)).all()
    if targets.is_cuda:
        torch._assert_async(valid, f"targets must lie in [0, {vocab})")
    elif not valid:
        raise ValueError(f"targets must lie in [0, {vocab}), got {targets.min()} to {targets.max()}")


def _times(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * value)


class _TokenLogOdds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        index = targets.unsqueeze(-1)
        z = logits.float()
        others = z.scatter(-1, index, -torch.inf)
        # Shift by the largest other logit first: at logits of 1e4 the log-sum itself has only three decimals.
        top = others.amax(-1, keepdim=True)
        top = top.masked_fill(torch.isneginf(top), 0.0)
        log_sum = others.sub_(top).logsumexp(-1, keepdim=True)
        log_odds = z.gather(-1, index) - top - log_sum
        log_sum = log_sum.masked_fill(torch.isneginf(log_sum), 0.0)  # no other token is possible: q = 0
        log_q = others.sub_(log_sum)
        entropy = -_times(log_q.exp(), log_q).sum(-1)
        ctx.save_for_backward(logits, index, top, log_sum)
        ctx.mark_non_differentiable(entropy)
        return log_odds.squeeze(-1), entropy

    @staticmethod
    def backward(ctx: Any, grad_log_odds: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits, index, top, log_sum = ctx.saved_tensors
        slope = grad_log_odds.unsqueeze(-1)
        q = (logits.float() - top).sub_(log_sum).exp_()
        return q.mul_(-slope).scatter_(-1, index, slope).to(logits.dtype), None


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_odds: Tensor, other_entropy: Tensor, ref_log_odds: Tensor) -> Tensor:
        loss, slope = loss_and_slope(OPS, log_odds, other_entropy, ref_log_odds)
        ctx.save_for_backward(slope)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        return grad_loss * ctx.saved_tensors[0], None, None
