"""The MLX losses in NumPy terms, for the conformance suite: bnf_core.protocol.Losses."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from bnf_core.objectives import Objective, Seen, batch_loss, structure
from bnf_core.objectives.base import mapped
from bnf_core.protocol import BatchResult, DenseResult, FusedResult, LogOddsResult
from bnf_core.types import Array, Batch
from bnf_mlx.linear import linear_bnf_loss, linear_log_odds
from bnf_mlx.losses import bnf_token_loss, token_log_odds
from bnf_mlx.model import DTYPES
from bnf_mlx.ops import OPS


class MLXLosses:
    dtypes: Sequence[str] = tuple(DTYPES)

    def __init__(self, device: mx.Device):
        self.device = device

    def dense(self, logits: Array, targets: Array, ref_log_odds: Array, weights: Array, *, dtype: str) -> DenseResult:
        def weighted(z: mx.array) -> tuple[mx.array, ...]:
            log_odds, entropy = token_log_odds(z, mx.array(targets))
            loss = bnf_token_loss(log_odds, entropy, _floats(ref_log_odds))
            return (_floats(weights) * loss).sum(), log_odds, entropy, loss

        with mx.stream(self.device):
            (_, *values), grad = mx.value_and_grad(weighted)(_floats(logits, dtype))
            return DenseResult(*map(_numpy, (*values, grad)))

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
        with mx.stream(self.device):
            rest = mx.array(targets), _floats(ref_log_odds), _floats(coefficients)
            (loss, stats), (grad_hidden, grad_head) = mx.value_and_grad(
                lambda h, head: linear_bnf_loss(h, head, *rest, train_head=train_head, chunk_tokens=chunk_tokens),
                argnums=(0, 1),  # lazy: the head's gradient is not computed unless it is read
            )(_floats(hidden, dtype), _floats(head_weight, dtype))
            log_odds, entropy, token_loss = map(_numpy, stats)
            head_result = _numpy(grad_head) if train_head else None
            return FusedResult(float(loss), log_odds, entropy, token_loss, _numpy(grad_hidden), head_result)

    def batch(self, micro_batches: Sequence[tuple[Array, Batch, Array]], *, dtype: str) -> BatchResult:
        total, sequence_loss, grads = 0.0, [], []
        for logits, batch, ref_log_odds in micro_batches:
            with mx.stream(self.device):
                (loss, token_loss), grad = mx.value_and_grad(_batch_loss)(_floats(logits, dtype), batch, ref_log_odds)
                total += float(loss)
                grads.append(_numpy(grad))
                counts = np.bincount(batch.sequence_ids, minlength=len(batch.labels))
                sums = np.bincount(batch.sequence_ids, weights=_numpy(token_loss), minlength=len(batch.labels))
                sequence_loss.append(batch.labels * sums / counts)
        return BatchResult(total, np.concatenate(sequence_loss), grads)

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
        def weighted(h: mx.array, head: mx.array) -> tuple[mx.array, ...]:
            log_odds, entropy = linear_log_odds(h, head, mx.array(targets), chunk_tokens=chunk_tokens)
            return (_floats(cotangent) * log_odds).sum(), log_odds, entropy

        with mx.stream(self.device):
            inputs = _floats(hidden, dtype), _floats(head_weight, dtype)
            (_, *values), (grad_hidden, grad_head) = mx.value_and_grad(weighted, argnums=(0, 1))(*inputs)
            log_odds, entropy = map(_numpy, values)
            head_result = _numpy(grad_head) if train_head else None  # lazy: not computed unless it is read
            return LogOddsResult(log_odds, entropy, _numpy(grad_hidden), head_result)

    def objective(
        self,
        objective: Objective,
        log_odds: Array,
        other_entropy: Array,
        ref_log_odds: Array,
        batch: Batch,
        baseline: float,
    ) -> tuple[float, Array]:
        def total(o: mx.array) -> mx.array:
            rows = mapped(mx.array, structure(objective, batch, baseline))
            return batch_loss(objective, OPS, Seen(o, _floats(other_entropy), _floats(ref_log_odds), rows))

        with mx.stream(self.device):
            loss, grad = mx.value_and_grad(total)(_floats(log_odds))
            return float(loss), _numpy(grad)

    def cross_entropy(self, logits: Array, targets: Array, *, dtype: str) -> tuple[Array, Array]:
        def summed(z: mx.array) -> tuple[mx.array, mx.array]:
            loss = nn.losses.cross_entropy(z, mx.array(targets), reduction="none")
            return loss.sum(), loss

        with mx.stream(self.device):
            (_, loss), grad = mx.value_and_grad(summed)(_floats(logits, dtype))
            return _numpy(loss), _numpy(grad)


def _batch_loss(grid: mx.array, batch: Batch, ref_log_odds: Array) -> tuple[mx.array, mx.array]:
    z = grid.flatten(0, 1)[mx.array(batch.positions)]
    log_odds, entropy = token_log_odds(z, mx.array(batch.targets))
    token_loss = bnf_token_loss(log_odds, entropy, _floats(ref_log_odds))
    return (_floats(batch.coefficients) * token_loss).sum(), token_loss


def _floats(array: Array, dtype: str = "float32") -> mx.array:
    return mx.array(array, dtype=DTYPES[dtype])


def _numpy(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32))
