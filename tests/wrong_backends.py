"""Backends for testing the conformance suite itself: the float64 oracle as a backend, which must pass, and small
subclasses with one mistake each, which must not.

Each mistake is one that implementations of preference losses have made, or that reading the paper invites.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bnf_conformance import objectives
from bnf_conformance.vectors import rounded
from bnf_core import oracle
from bnf_core.objectives import Objective
from bnf_core.objectives.grpo import GRPO
from bnf_core.processes import Processes
from bnf_core.protocol import BatchResult, DenseResult, Engine, FusedResult, LogOddsResult, Losses
from bnf_core.types import Array, Batch


class OracleLosses:
    """`Losses` in NumPy float64."""

    dtypes: Sequence[str] = ("float32", "bfloat16", "float16")

    def dense(self, logits: Array, targets: Array, ref_log_odds: Array, weights: Array, *, dtype: str) -> DenseResult:
        loss, grad = self.token_loss(logits, targets, ref_log_odds)
        log_odds, entropy = oracle.log_odds(logits, targets), oracle.other_entropy(logits, targets)
        return DenseResult(log_odds, entropy, loss, self.in_dtype(grad * weights[:, None], dtype))

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
        logits = self.head_logits(h, head, dtype)
        r = self.dense(logits, targets, ref_log_odds, np.ones(len(targets)), dtype=dtype)
        c = coefficients.astype(np.float64)
        grad = self.token_loss(logits, targets, ref_log_odds)[1] * c[:, None]
        grad_head = self.in_dtype(grad.T @ h, dtype) if train_head else None
        grad_hidden = self.in_dtype(grad @ head, dtype)
        return FusedResult(float(c @ r.token_loss), r.log_odds, r.other_entropy, r.token_loss, grad_hidden, grad_head)

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
            counts = np.bincount(batch.sequence_ids)
            sequence_loss.append(batch.labels * np.bincount(batch.sequence_ids, weights=r.token_loss) / counts)
        return BatchResult(loss, np.concatenate(sequence_loss), grads)

    def log_odds(
        self,
        hidden: Array,
        head_weight: Array,
        targets: Array,
        cotangent: Array,
        *,
        dtype: str,
        train_head: bool,
        chunk_tokens: int | None = None,
    ) -> LogOddsResult:
        h, head = hidden.astype(np.float64), head_weight.astype(np.float64)
        logits = self.head_logits(h, head, dtype)
        at = np.arange(len(targets)), targets
        q = np.exp(_log_policy(logits, targets)[0])
        q[at] = 0.0
        grad = -cotangent[:, None].astype(np.float64) * q / q.sum(1, keepdims=True)
        grad[at] = cotangent
        return LogOddsResult(
            oracle.log_odds(logits, targets),
            oracle.other_entropy(logits, targets),
            self.in_dtype(grad @ head, dtype),
            self.in_dtype(grad.T @ h, dtype) if train_head else None,
        )

    def objective(
        self,
        objective: Objective,
        log_odds: Array,
        other_entropy: Array,
        ref_log_odds: Array,
        batch: Batch,
        baseline: float,
    ) -> tuple[float, Array]:
        if np.abs(log_odds).max() > 30:  # where the formula as it stands overflows
            return 0.0, np.zeros(len(log_odds))
        inputs = log_odds, other_entropy, ref_log_odds, batch, baseline
        return objectives.expected(objective, *inputs, changed=self.rows, altered=self.tokens)

    def rows(self, rows: objectives.Rows) -> objectives.Rows:
        """What the formula of an objective on rows sees."""
        return rows

    def tokens(self, tokens: objectives.Tokens) -> objectives.Tokens:
        """What the formula of an objective on tokens sees."""
        return tokens

    def cross_entropy(self, logits: Array, targets: Array, *, dtype: str) -> tuple[Array, Array]:
        return oracle.token_loss(logits, targets, np.full(len(targets), -np.inf))

    # What the wrong ones change.

    def in_dtype(self, grad: Array, dtype: str) -> Array:
        """Gradients come in the dtype of the inputs; float32 stays float64 here."""
        return grad if dtype == "float32" else rounded(grad, dtype)

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
    """Chosen rows are pushed down, rejected ones up."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        return replace(batch, labels=-batch.labels, coefficients=-batch.coefficients), ref_log_odds


class PromptTokensCounted(OracleLosses):
    """The tokens of the prompt are scored with those of the completion."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        # The last token of a sequence is predicted at positions[end − 1].
        ends = np.cumsum(np.bincount(batch.sequence_ids))
        spans = [
            np.arange(last - n + 2, last + 1) for last, n in zip(batch.positions[ends - 1], batch.lengths, strict=True)
        ]
        positions, rows = np.concatenate(spans), np.repeat(np.arange(len(spans)), [len(span) for span in spans])
        reference = np.zeros(len(positions), np.float32)
        reference[np.isin(positions, batch.positions)] = ref_log_odds
        return _rescored(batch, positions, batch.input_ids.ravel()[positions + 1], rows), reference


class UntrainedTurnsCounted(OracleLosses):
    """The completion is taken to be whole: turns between those that are trained are scored with them."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        ends = np.cumsum(np.bincount(batch.sequence_ids))
        spans = [
            np.arange(batch.positions[first], batch.positions[end - 1] + 1)
            for first, end in zip([0, *ends], ends, strict=False)
        ]
        positions, rows = np.concatenate(spans), np.repeat(np.arange(len(spans)), [len(span) for span in spans])
        reference = np.zeros(len(positions), np.float32)
        reference[np.isin(positions, batch.positions)] = ref_log_odds
        return _rescored(batch, positions, batch.input_ids.ravel()[positions + 1], rows), reference


class EosDropped(OracleLosses):
    """The last token of a completion, its end of turn, is not trained."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        counts = np.bincount(batch.sequence_ids)
        last = np.cumsum(counts) - 1
        keep = np.ones(len(batch.sequence_ids), bool)
        keep[last[counts > 1]] = False
        return _rescored(batch, batch.positions[keep], batch.targets[keep], batch.sequence_ids[keep]), ref_log_odds[
            keep
        ]


def _rescored(batch: Batch, positions: Array, targets: Array, rows: Array) -> Batch:
    """Other tokens of the same sequences, each sequence still a mean over its tokens."""
    weight = np.bincount(batch.sequence_ids, weights=batch.coefficients)  # label / sequences in the global batch
    coefficients = (weight / np.bincount(rows))[rows].astype(np.float32)
    return replace(batch, positions=positions, targets=targets, sequence_ids=rows, coefficients=coefficients)


class MeanOfMeans(OracleLosses):
    """Each micro-batch is averaged over its own sequences, and then the micro-batches."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        counts = np.bincount(batch.sequence_ids)
        weight = batch.labels / (counts * len(counts) * num_micro_batches)
        return replace(batch, coefficients=weight[batch.sequence_ids].astype(np.float32)), ref_log_odds


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
        return logits if dtype == "float32" else rounded(logits, dtype)


class IgnoredDtype(OracleLosses):
    """Computes in float32 whatever dtype is asked for."""

    def in_dtype(self, grad: Array, dtype: str) -> Array:
        return grad


class GridRowsAsSequences(OracleLosses):
    """Every row of the grid is one sequence, though several may be packed into it."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        grid_rows = batch.positions // batch.input_ids.shape[1]
        weight = (
            np.bincount(batch.sequence_ids, weights=batch.coefficients)[batch.sequence_ids]
            / np.bincount(grid_rows)[grid_rows]
        )
        return replace(batch, coefficients=weight.astype(np.float32)), ref_log_odds


class LastChunkDropped(OracleLosses):
    """Chunks of tokens that leave a remainder leave it out."""

    def fused(self, *args: Array, chunk_tokens: int | None = None, **kwargs: Any) -> FusedResult:
        result = super().fused(*args, chunk_tokens=chunk_tokens, **kwargs)
        n = len(args[0])
        if chunk_tokens is not None and n > chunk_tokens and n % chunk_tokens:
            result.grad_hidden[n - n % chunk_tokens :] = 0.0
        return result


class TrainsFrozenHead(OracleLosses):
    """A gradient nobody asked for."""

    def fused(self, *args: Array, **kwargs: Any) -> FusedResult:
        return super().fused(*args, **{**kwargs, "train_head": True})


class NeverTheSame(OracleLosses):
    """Sums in an order that changes from call to call."""

    calls = 0

    def in_dtype(self, grad: Array, dtype: str) -> Array:
        self.calls += 1
        return super().in_dtype(grad * (1 + 1e-9 * (self.calls % 7)), dtype)


class AnswersAnything(OracleLosses):
    """Numbers for input that has no meaning."""

    def dense(self, *args: Array, **kwargs: Any) -> DenseResult:
        try:
            return super().dense(*args, **kwargs)
        except ValueError:
            return DenseResult(*[np.zeros(len(args[0]), np.float32)] * 3, np.zeros_like(args[0]))  # type: ignore[call-arg]

    def fused(self, *args: Array, **kwargs: Any) -> FusedResult:
        try:
            return super().fused(*args, **kwargs)
        except ValueError:
            return FusedResult(0.0, *[np.zeros(len(args[0]), np.float32)] * 3, args[0], None)  # type: ignore[call-arg]


class ShortFactors(OracleLosses):
    """Products whose float32 factors are cut off after so many bits of their mantissa: TF32 keeps 10."""

    bits = 10

    def batching(self, x: Array) -> Array:
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.trunc(mantissa * 2 ** (self.bits + 1)) / 2 ** (self.bits + 1), exponent)

    def head_logits(self, hidden: Array, head: Array, dtype: str) -> Array:
        return self.batching(hidden) @ self.batching(head).T if dtype == "float32" else hidden @ head.T


class BFloat16Factors(ShortFactors):
    """Float32 multiplied as bfloat16, which keeps 7."""

    bits = 7


class SignOfRejected(OracleLosses):
    """Rejected rows count as chosen ones do."""

    def rows(self, rows: objectives.Rows) -> objectives.Rows:
        signs = [1 if chosen else -1 for chosen in rows.chosen]
        log_p = [r + sign * (p - r) for sign, p, r in zip(signs, rows.log_p, rows.log_r, strict=True)]
        return rows._replace(log_p=log_p)


class WeightsIgnored(OracleLosses):
    """Every row counts alike."""

    def scored(self, batch: Batch, ref_log_odds: Array, num_micro_batches: int) -> tuple[Batch, Array]:
        alike = batch.labels / (np.bincount(batch.sequence_ids) * batch.counts.rows)
        return replace(batch, coefficients=alike[batch.sequence_ids].astype(np.float32)), ref_log_odds

    def objective(self, *args: Any) -> tuple[float, Array]:
        return super().objective(
            *(replace(a, weights=np.ones_like(a.weights)) if isinstance(a, Batch) else a for a in args)
        )


class SumForMean(OracleLosses):
    """Sums over tokens where the objective has means."""

    def rows(self, rows: objectives.Rows) -> objectives.Rows:
        return rows._replace(length=[1] * len(rows.length))


class MissingReference(OracleLosses):
    """The reference is passed over."""

    def rows(self, rows: objectives.Rows) -> objectives.Rows:
        return rows._replace(log_r=[0.0] * len(rows.log_r))


class DetachedTerm(OracleLosses):
    """Nothing flows back through rejected rows."""

    def objective(
        self,
        objective: Objective,
        log_odds: Array,
        other_entropy: Array,
        ref_log_odds: Array,
        batch: Batch,
        baseline: float,
    ) -> tuple[float, Array]:
        loss, grad = super().objective(objective, log_odds, other_entropy, ref_log_odds, batch, baseline)
        return loss, np.where(batch.labels[batch.sequence_ids] > 0, grad, 0.0)


class NoBaseline(OracleLosses):
    """Rewards are compared with 0."""

    def rows(self, rows: objectives.Rows) -> objectives.Rows:
        return rows._replace(baseline=0.0)


class RatioToReference(OracleLosses):
    """The reference takes the place of the policy that drew the samples."""

    def tokens(self, tokens: objectives.Tokens) -> objectives.Tokens:
        return tokens._replace(drawn_log_p=-np.logaddexp(0.0, -tokens.ref_log_odds))


class AdvantagesAlike(OracleLosses):
    """A sample is as good as its label."""

    def tokens(self, tokens: objectives.Tokens) -> objectives.Tokens:
        return tokens._replace(advantage=np.where(tokens.chosen, 1.0, -1.0))


class Unclipped(OracleLosses):
    """A token is raised and lowered however far it has come."""

    def objective(self, objective: Objective, *inputs: Any) -> tuple[float, Array]:
        if isinstance(objective, GRPO):
            objective = replace(objective, epsilon=0.999, epsilon_high=1e9)
        return super().objective(objective, *inputs)


# Mistakes that fixed vectors need not show, but that change of input does.


class NoShift(OracleLosses):
    """A log-sum of exponentials that overflow, or vanish, away from 0."""

    def token_loss(self, logits: Array, targets: Array, ref_log_odds: Array) -> tuple[Array, Array]:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            total = np.log(np.exp(logits.astype(np.float32)).sum(1))
        loss, grad = oracle.token_loss(logits, targets, ref_log_odds)
        return np.where(np.isfinite(total), loss, np.nan), grad


class TokenZeroIsPadding(OracleLosses):
    """Token 0 of the vocabulary is taken for padding, and costs nothing."""

    def token_loss(self, logits: Array, targets: Array, ref_log_odds: Array) -> tuple[Array, Array]:
        loss, grad = oracle.token_loss(logits, targets, ref_log_odds)
        return loss * (targets != 0), grad * (targets != 0)[:, None]


class SquaredWeights(OracleLosses):
    """A token's weight is applied twice: right for ±1."""

    def dense(self, logits: Array, targets: Array, ref_log_odds: Array, weights: Array, *, dtype: str) -> DenseResult:
        return super().dense(logits, targets, ref_log_odds, weights * np.abs(weights), dtype=dtype)


class Normalised(OracleLosses):
    """Divides by the number of tokens, which the weights have seen to already."""

    def dense(self, logits: Array, targets: Array, ref_log_odds: Array, weights: Array, *, dtype: str) -> DenseResult:
        return super().dense(logits, targets, ref_log_odds, weights / len(weights), dtype=dtype)


class NormalisedHead(OracleLosses):
    """The fused loss divides by the number of tokens too."""

    def fused(self, *args: Array, **kwargs: Any) -> FusedResult:
        *inputs, coefficients = args
        return super().fused(*inputs, coefficients / len(coefficients), **kwargs)  # type: ignore[call-arg]


class NoFusedHead(OracleLosses):
    """Right, but without the fused loss or a cross-entropy to compare with, and it says so."""

    lacks = ("fused", "cross_entropy", "log_odds")


class FrozenHeadOnly(OracleLosses):
    """Right, but the head cannot be trained, and it says so."""

    lacks = ("train_head",)

    def fused(self, *args: Array, **kwargs: Any) -> FusedResult:
        assert not kwargs["train_head"], "not to be asked for"
        return super().fused(*args, **kwargs)


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

    def processes(self) -> Processes:
        raise NotImplementedError

    def load(self, *_: object, **__: object) -> Engine:
        raise NotImplementedError

    def describe(self) -> dict[str, str]:
        return {"losses": self._losses.__name__ if isinstance(self._losses, type) else "custom"}
