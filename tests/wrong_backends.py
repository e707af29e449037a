"""Backends for testing the conformance suite itself: the float64 oracle as a backend, which must pass, and small
subclasses with one mistake each, which must not.

Each mistake is one that implementations of preference losses have made, or that reading the paper invites.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from bnf_core import oracle
from bnf_core.batching import Batch
from bnf_core.protocol import Array, BatchResult, DenseResult, Engine, FusedResult, Losses


class OracleLosses:
    """`Losses` in NumPy float64."""

    dtypes: Sequence[str] = ("float32", "bfloat16", "float16")

    def dense(self, logits: Array, targets: Array, ref_log_odds: Array, weights: Array, *, dtype: str) -> DenseResult:
        loss, grad = self.token_loss(logits, targets, ref_log_odds)
        log_odds, entropy = oracle.log_odds(logits, targets), oracle.other_entropy(logits, targets)
        return DenseResult(log_odds, entropy, loss, grad * weights[:, None])

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
        h, head = hidden.astype(np.float64), head_weight.astype(np.float64)
        r = self.dense(self.head_logits(h, head, dtype), targets, ref_log_odds, coefficients, dtype=dtype)
        loss = float(coefficients.astype(np.float64) @ r.token_loss)
        grad_head = r.grad_logits.T @ h if train_head else None
        return FusedResult(loss, r.log_odds, r.other_entropy, r.token_loss, r.grad_logits @ head, grad_head)

    def batch(self, micro_batches: Sequence[tuple[Array, Batch, Array]], *, dtype: str) -> BatchResult:
        loss, sequence_loss, grads = 0.0, [], []
        for logits, batch, ref_log_odds in micro_batches:
            batch, ref_log_odds = self.scored(batch, ref_log_odds, len(micro_batches))
            flat = logits.reshape(-1, logits.shape[-1])
            r = self.dense(flat[batch.positions], batch.targets, ref_log_odds, batch.coefficients, dtype=dtype)
            grad = np.zeros(flat.shape)
            np.add.at(grad, batch.positions, r.grad_logits)
            grads.append(grad.reshape(logits.shape))
            loss += float(batch.coefficients.astype(np.float64) @ r.token_loss)
            counts = np.bincount(batch.rows)
            sequence_loss.append(batch.labels * np.bincount(batch.rows, weights=r.token_loss) / counts)
        return BatchResult(loss, np.concatenate(sequence_loss), grads)

    def cross_entropy(self, logits: Array, targets: Array, *, dtype: str) -> tuple[Array, Array]:
        return oracle.token_loss(logits, targets, np.full(len(targets), -np.inf))

    # What the wrong ones change.

    def token_loss(self, logits: Array, targets: Array, ref_log_odds: Array) -> tuple[Array, Array]:
        """ℓ (N,) and its gradient (N, V)."""
        return oracle.token_loss(logits, targets, ref_log_odds)

    def head_logits(self, hidden: Array, head: Array, dtype: str) -> Array:
        return hidden @ head.T

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        """Which tokens count, with which coefficients."""
        return batch, ref_log_odds


class ShiftedMask(OracleLosses):
    """The logits at a token's own position predict it, not those of the position before."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        return replace(batch, positions=batch.positions + 1), ref_log_odds


class FlippedLabel(OracleLosses):
    """Preferred rows are pushed down, dispreferred ones up."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        return replace(batch, labels=-batch.labels, coefficients=-batch.coefficients), ref_log_odds


class PromptTokensCounted(OracleLosses):
    """The tokens of the prompt are scored with those of the completion."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        width = batch.input_ids.shape[1]
        grid = [(row, at) for row, length in enumerate(batch.lengths) for at in range(length - 1)]
        rows, ats = np.asarray(grid).T
        positions = rows * width + ats
        reference = np.zeros(len(positions), np.float32)
        reference[np.isin(positions, batch.positions)] = ref_log_odds
        return _rescored(batch, positions, batch.input_ids[rows, ats + 1], rows), reference


class EosDropped(OracleLosses):
    """The last token of a completion, its end of turn, is not trained."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        counts = np.bincount(batch.rows)
        last = np.cumsum(counts) - 1
        keep = np.ones(len(batch.rows), bool)
        keep[last[counts > 1]] = False
        return _rescored(batch, batch.positions[keep], batch.targets[keep], batch.rows[keep]), ref_log_odds[keep]


def _rescored(batch: Batch, positions: Array, targets: Array, rows: Array) -> Batch:
    """Other tokens of the same sequences, each sequence still a mean over its tokens."""
    weight = np.bincount(batch.rows, weights=batch.coefficients)  # label / sequences in the global batch
    coefficients = (weight / np.bincount(rows))[rows].astype(np.float32)
    return replace(batch, positions=positions, targets=targets, rows=rows, coefficients=coefficients)


class MeanOfMeans(OracleLosses):
    """Each micro-batch is averaged over its own sequences, and then the micro-batches."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        counts = np.bincount(batch.rows)
        weight = batch.labels / (counts * len(counts) * num_micro_batches)
        return replace(batch, coefficients=weight[batch.rows].astype(np.float32)), ref_log_odds


class LiteralForm(OracleLosses):
    """The definition written down literally, in float64: right for ordinary tokens, but π − t and 1 − p have no
    digits left where the model is sure, and banned tokens divide 0 by 0."""

    epsilon = 0.0

    def target(self, p: Array, r: Array) -> Array:
        return np.minimum(1.0, p / (r + self.epsilon))

    def token_loss(self, logits: Array, targets: Array, ref_log_odds: Array) -> tuple[Array, Array]:
        at = np.arange(len(targets)), targets
        log_pi, log_p, log_not_p = _log_policy(logits, targets)
        r = np.exp(-np.logaddexp(0.0, -ref_log_odds.astype(np.float64)))
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.nan_to_num(self.target(np.exp(log_p), r), nan=1.0)
            share = (1.0 - t) / (np.exp(log_not_p) + self.epsilon)
        target = np.exp(log_pi) * np.nan_to_num(share, posinf=0.0)[:, None]
        target[at] = t
        loss = -np.where(target > 0, target * np.where(target > 0, log_pi, 0.0), 0.0).sum(1)
        return loss, np.exp(log_pi) * target.sum(1, keepdims=True) - target


class EpsilonForm(LiteralForm):
    """Denominators guarded by 1e-6, which a confident token's 1 − p falls below."""

    epsilon = 1e-6


class SwappedPolicyAndReference(LiteralForm):
    """t = min(1, r / p)."""

    def target(self, p: Array, r: Array) -> Array:
        return np.minimum(1.0, r / p)


class MissingStopGradient(OracleLosses):
    """The gradient also flows through t: through t(y), and through the other tokens' shares."""

    def token_loss(self, logits: Array, targets: Array, ref_log_odds: Array) -> tuple[Array, Array]:
        loss, grad = oracle.token_loss(logits, targets, ref_log_odds)
        at = np.arange(len(targets)), targets
        log_pi, log_p, log_not_p = _log_policy(logits, targets)
        entropy = oracle.other_entropy(logits, targets)
        t = oracle.dynamic_target(logits, targets, ref_log_odds)[at]
        log_q = log_pi - np.where(np.isneginf(log_not_p), 0.0, log_not_p)[:, None]  # (N, V)
        log_q[at] = -np.inf
        q = np.exp(log_q)
        with np.errstate(invalid="ignore"):
            # ∂ℓ/∂t · ∂t/∂o with ∂t/∂o = t (1 − p) below the reference, and (1 − t) ∂H_q/∂z.
            through_t = np.where(t < 1, t * np.exp(log_not_p) * (log_not_p - log_p - entropy), 0.0)
            through_q = -(1 - t)[:, None] * q * (np.where(q > 0, log_q, 0.0) + entropy[:, None])
        extra = -np.nan_to_num(through_t)[:, None] * q
        extra[at] = np.nan_to_num(through_t)
        return loss, grad + extra + through_q


class RoundedLogits(OracleLosses):
    """Logits of the fused head rounded to the dtype of the inputs, as a plain half-precision product gives them."""

    def head_logits(self, hidden: Array, head: Array, dtype: str) -> Array:
        logits = hidden @ head.T
        if dtype == "float16":
            return logits.astype(np.float16).astype(np.float64)
        if dtype == "bfloat16":  # 8 significant bits
            mantissa, exponent = np.frexp(logits)
            return np.ldexp(np.round(mantissa * 256) / 256, exponent)
        return logits


class Float32Only(OracleLosses):
    """Right, but without half precision."""

    dtypes = ("float32",)


class Raises(OracleLosses):
    """Cannot do batches."""

    def batch(self, micro_batches: Sequence[tuple[Array, Batch, Array]], *, dtype: str) -> BatchResult:
        raise NotImplementedError("no batches here")


class NotANumber(OracleLosses):
    """One NaN among many right numbers."""

    def token_loss(self, logits: Array, targets: Array, ref_log_odds: Array) -> tuple[Array, Array]:
        loss, grad = oracle.token_loss(logits, targets, ref_log_odds)
        loss[-1] = np.nan
        return loss, grad


def _log_policy(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """log π (N, V), log p and log(1 − p) (N,)."""
    o = oracle.log_odds(logits, targets)
    z = logits.astype(np.float64)
    return (
        z - np.logaddexp.reduce(z, axis=1, keepdims=True),
        -np.logaddexp(0.0, -o),
        -np.logaddexp(0.0, o),
    )


class NumpyBackend:
    """`Backend` of any of the above: losses alone, no models."""

    name = "numpy"

    def __init__(self, losses: Callable[[], Losses] = OracleLosses):
        self._losses = losses

    def losses(self, device: str = "auto") -> Losses:
        return self._losses()

    def devices(self) -> list[str]:
        return ["cpu"]

    def load(self, *_: object, **__: object) -> Engine:
        raise NotImplementedError

    def describe(self) -> dict[str, str]:
        return {"losses": self._losses.__name__ if isinstance(self._losses, type) else "custom"}
