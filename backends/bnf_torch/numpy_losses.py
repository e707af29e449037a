"""The PyTorch losses in NumPy terms, for the conformance suite: bnf_core.protocol.Losses."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bnf_core.objectives import Objective, Seen, batch_loss, structure
from bnf_core.protocol import BatchResult, DenseResult, FusedResult, LogOddsResult
from bnf_core.types import Array, Batch
from bnf_torch.linear import linear_bnf_loss, linear_log_odds
from bnf_torch.losses import bnf_token_loss, token_log_odds
from bnf_torch.model import DTYPES
from bnf_torch.ops import OPS, tensors


class TorchLosses:
    dtypes: Sequence[str] = tuple(DTYPES)

    def __init__(self, device: torch.device):
        self.device = device

    def dense(self, logits: Array, targets: Array, ref_log_odds: Array, weights: Array, *, dtype: str) -> DenseResult:
        z = self._leaf(logits, dtype)
        log_odds, entropy = token_log_odds(z, self._ints(targets))
        loss = bnf_token_loss(log_odds, entropy, self._floats(ref_log_odds))
        (self._floats(weights) * loss).sum().backward()
        return DenseResult(_numpy(log_odds), _numpy(entropy), _numpy(loss), _grad(z))

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
        h, head = self._leaf(hidden, dtype), self._leaf(head_weight, dtype).requires_grad_(train_head)
        loss, stats = linear_bnf_loss(
            h,
            head,
            self._ints(targets),
            self._floats(ref_log_odds),
            self._floats(coefficients),
            chunk_tokens=chunk_tokens,
        )
        loss.backward()
        return FusedResult(
            loss=loss.item(),
            log_odds=_numpy(stats.log_odds),
            other_entropy=_numpy(stats.other_entropy),
            token_loss=_numpy(stats.token_loss),
            grad_hidden=_grad(h),
            grad_head=_grad(head) if train_head else None,
        )

    def batch(self, micro_batches: Sequence[tuple[Array, Batch, Array]], *, dtype: str) -> BatchResult:
        total, sequence_loss, grads = 0.0, [], []
        for logits, batch, ref_log_odds in micro_batches:
            grid = self._leaf(logits, dtype)
            z = grid.flatten(0, 1)[self._ints(batch.positions)]
            log_odds, entropy = token_log_odds(z, self._ints(batch.targets))
            token_loss = bnf_token_loss(log_odds, entropy, self._floats(ref_log_odds))
            loss = torch.dot(self._floats(batch.coefficients), token_loss)
            loss.backward()
            total += loss.item()
            grads.append(_grad(grid))
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
        h, head = self._leaf(hidden, dtype), self._leaf(head_weight, dtype).requires_grad_(train_head)
        log_odds, entropy = linear_log_odds(h, head, self._ints(targets), chunk_tokens=chunk_tokens)
        torch.dot(self._floats(cotangent), log_odds).backward()
        return LogOddsResult(_numpy(log_odds), _numpy(entropy), _grad(h), _grad(head) if train_head else None)

    def objective(
        self,
        objective: Objective,
        log_odds: Array,
        other_entropy: Array,
        ref_log_odds: Array,
        batch: Batch,
        baseline: float,
    ) -> tuple[float, Array]:
        o = self._floats(log_odds).requires_grad_()
        rows = tensors(structure(objective, batch, baseline), self.device)
        loss = batch_loss(objective, OPS, Seen(o, self._floats(other_entropy), self._floats(ref_log_odds), rows))
        loss.backward()
        return loss.item(), _grad(o)

    def cross_entropy(self, logits: Array, targets: Array, *, dtype: str) -> tuple[Array, Array]:
        z = self._leaf(logits, dtype)
        loss = F.cross_entropy(z, self._ints(targets), reduction="none")
        loss.sum().backward()
        return _numpy(loss), _grad(z)

    def _leaf(self, array: Array, dtype: str) -> Tensor:
        return torch.tensor(array, dtype=DTYPES[dtype], device=self.device, requires_grad=True)

    def _floats(self, array: Array) -> Tensor:
        return torch.tensor(array, dtype=torch.float32, device=self.device)

    def _ints(self, array: Array) -> Tensor:
        return torch.tensor(array, dtype=torch.long, device=self.device)


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().float().cpu().numpy()


def _grad(leaf: Tensor) -> Array:
    assert leaf.grad is not None
    return _numpy(leaf.grad)
