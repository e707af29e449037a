"""The BNF loss in NumPy float32, written from SPEC.md alone: the shortest backend that conforms."""

from collections.abc import Sequence

import numpy as np

from bnf_core.errors import UserError
from bnf_core.protocol import Backend, BatchResult, DenseResult, FusedResult
from bnf_core.types import Array, Batch

F = np.float32


class ExampleLosses:
    dtypes: Sequence[str] = ("float32",)
    lacks = ("log_odds", "objective")

    def dense(self, logits: Array, targets: Array, ref_log_odds: Array, weights: Array, *, dtype: str) -> DenseResult:
        log_odds, entropy, q = _others(logits, targets)
        loss, slope = _loss_and_slope(log_odds, entropy, ref_log_odds)
        return DenseResult(log_odds, entropy, loss, _grad_logits(weights * slope, q, targets))

    def fused(
        self,
        hidden: Array,
        head_weight: Array,
        targets: Array,
        ref_log_odds: Array,
        coefficients: Array,
        *,
        dtype: str,
        train_head: bool,
        chunk_tokens: int | None = None,
    ) -> FusedResult:
        n = len(hidden)
        if not len(targets) == len(ref_log_odds) == len(coefficients) == n:
            raise ValueError(f"{n} hidden states need as many targets, references and coefficients")
        grad_head = np.zeros_like(head_weight) if train_head else None
        parts = []
        for at in range(0, n, chunk_tokens or n):
            part = slice(at, at + (chunk_tokens or n))
            inputs = (x[part] for x in (targets, ref_log_odds, coefficients))
            r = self.dense(hidden[part] @ head_weight.T, *inputs, dtype=dtype)
            parts.append((r.log_odds, r.other_entropy, r.token_loss, r.grad_logits @ head_weight))
            if grad_head is not None:
                grad_head += r.grad_logits.T @ hidden[part]
        log_odds, entropy, loss, grad_hidden = (np.concatenate(x) for x in zip(*parts, strict=True))
        return FusedResult(float(coefficients @ loss), log_odds, entropy, loss, grad_hidden, grad_head)

    def batch(self, micro_batches: Sequence[tuple[Array, Batch, Array]], *, dtype: str) -> BatchResult:
        total, sequence_loss, grads = 0.0, [], []
        for logits, batch, ref_log_odds in micro_batches:
            flat = logits.reshape(-1, logits.shape[-1])
            r = self.dense(flat[batch.positions], batch.targets, ref_log_odds, batch.coefficients, dtype=dtype)
            total += float(batch.coefficients @ r.token_loss)
            sequence_loss.append(
                batch.labels * np.bincount(batch.sequence_ids, r.token_loss) / np.bincount(batch.sequence_ids)
            )
            grad = np.zeros_like(flat)
            grad[batch.positions] = r.grad_logits
            grads.append(grad.reshape(logits.shape))
        return BatchResult(total, np.concatenate(sequence_loss), grads)

    def cross_entropy(self, logits: Array, targets: Array, *, dtype: str) -> tuple[Array, Array]:
        rows = np.arange(len(targets))
        z = logits - logits.max(1, keepdims=True)
        log_pi = z - np.log(np.exp(z).sum(1, keepdims=True))
        grad = np.exp(log_pi)
        grad[rows, targets] -= 1
        return -log_pi[rows, targets], grad


def _others(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Log-odds and entropy (N,), and q (N, V), 0 at the observed token."""
    if logits.shape[1] < 2 or len(targets) != len(logits):
        raise ValueError(f"logits {logits.shape} need V ≥ 2 and one target a row, got {len(targets)} targets")
    at = np.arange(len(targets)), targets
    z = logits.copy()
    z[at] = -np.inf
    top = z.max(1)
    top = np.where(np.isneginf(top), F(0), top)  # every other token is banned
    z -= top[:, None]
    with np.errstate(divide="ignore"):
        log_sum = np.log(np.exp(z).sum(1))
    log_q = z - np.where(np.isneginf(log_sum), F(0), log_sum)[:, None]
    q = np.exp(log_q)
    entropy = -(q * np.where(q > 0, log_q, F(0))).sum(1)
    return logits[at] - top - log_sum, entropy, q


def _loss_and_slope(o: Array, entropy: Array, o_ref: Array) -> tuple[Array, Array]:
    """ℓ and ∂ℓ/∂o, each (N,)."""
    banned = np.isneginf(o)  # p = 0: t = 0, and nothing can be learned
    log_p, log_not_p = -np.logaddexp(F(0), -o), -np.logaddexp(F(0), o)
    with np.errstate(invalid="ignore", over="ignore"):
        log_t = np.where(banned, -np.inf, np.minimum(F(0), log_p + np.logaddexp(F(0), -o_ref)))
        t, not_t = np.exp(log_t), -np.expm1(log_t)
        loss = -(np.where(t > 0, t * log_p, F(0)) + np.where(not_t > 0, not_t * (log_not_p - entropy), F(0)))
        ratio = np.where(o >= o_ref, F(1), np.exp(o - o_ref))
    return loss, np.where(banned, F(0), -np.exp(log_not_p) * ratio)


def _grad_logits(slope: Array, q: Array, targets: Array) -> Array:
    grad = -slope[:, None] * q
    grad[np.arange(len(targets)), targets] = slope
    return grad


class ExampleBackend(Backend):
    name = "example"

    def losses(self, device: str = "auto") -> ExampleLosses:  # type: ignore[override]  # see `lacks`
        if device not in ("auto", "cpu"):
            raise UserError(f"device {device!r} is not present: NumPy offers cpu")
        return ExampleLosses()

    def devices(self) -> list[str]:
        return ["cpu"]

    def describe(self) -> dict[str, str]:
        return {"numpy": np.__version__}
