"""A published form on PyTorch or MLX as a backend of losses: `bnf conformance --backend others.backends:oat_torch`.

Where the publications leave something open, the reading is the one that suits them best. The tokens that count are
those that the suite gives. A batch's loss is the mean over its sequences: oat takes the mean over pairs of a sum of
two, which is twice that. Several micro-batches are averaged, as trainers do that accumulate gradients.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from bnf_core import registry
from bnf_core.objectives.base import Ops
from bnf_core.protocol import Backend, BatchResult, DenseResult
from bnf_core.types import Array, Batch
from others.forms import OAT, PAPER, Form


class Arrays(Protocol):
    """What a form needs of a framework beside its array operations."""

    ops: Ops

    def floats(self, x: Array, dtype: str) -> Any: ...
    def ints(self, x: Array) -> Any: ...
    def log_softmax(self, z: Any) -> Any: ...

    def take_along(self, x: Any, index: Any) -> Any:
        """x (N, V) at index (N,): (N,)."""
        ...

    def value_and_grad(self, function: Callable[[Any], tuple[Any, ...]], z: Any) -> tuple[list[Array], Array]:
        """All results of function(z) as NumPy float32, and the gradient of the first one."""
        ...


class TorchArrays:
    def __init__(self) -> None:
        import torch

        from bnf_torch.ops import OPS

        self.torch = torch
        self.ops: Ops = OPS

    def floats(self, x: Array, dtype: str) -> Any:
        return self.torch.tensor(x, dtype=getattr(self.torch, dtype))

    def ints(self, x: Array) -> Any:
        return self.torch.tensor(x, dtype=self.torch.long)

    def log_softmax(self, z: Any) -> Any:
        return z.log_softmax(-1)

    def take_along(self, x: Any, index: Any) -> Any:
        return x.gather(-1, index[:, None])[:, 0]

    def value_and_grad(self, function: Callable[[Any], tuple[Any, ...]], z: Any) -> tuple[list[Array], Array]:
        results = function(z.requires_grad_())
        results[0].backward()
        return [x.detach().float().numpy() for x in results], z.grad.float().numpy()


class MLXArrays:
    def __init__(self) -> None:
        import mlx.core as mx

        from bnf_mlx.ops import OPS

        self.mx = mx
        self.ops: Ops = OPS

    def floats(self, x: Array, dtype: str) -> Any:
        return self.mx.array(x, dtype=getattr(self.mx, dtype))

    def ints(self, x: Array) -> Any:
        return self.mx.array(x)

    def log_softmax(self, z: Any) -> Any:
        return z - self.mx.logsumexp(z, axis=-1, keepdims=True)

    def take_along(self, x: Any, index: Any) -> Any:
        return self.mx.take_along_axis(x, index[:, None], axis=-1)[:, 0]

    def value_and_grad(self, function: Callable[[Any], tuple[Any, ...]], z: Any) -> tuple[list[Array], Array]:
        with self.mx.stream(self.mx.cpu):
            results, grad = self.mx.value_and_grad(function)(z)
            values = [np.array(x.astype(self.mx.float32)) for x in (*results, grad)]
        return values[:-1], values[-1]


FRAMEWORKS: dict[str, Callable[[], Arrays]] = {"torch": TorchArrays, "mlx": MLXArrays}


class FormLosses:
    """A form as the conformance suite sees it. Neither form has log-odds or H_q: what is reported for them is what
    log p and the other tokens' term amount to."""

    dtypes: Sequence[str] = ("float32", "bfloat16", "float16")
    lacks = ("fused", "train_head", "log_odds", "objective")

    def __init__(self, form: Form, framework: str):
        self.form, self.arrays = form, FRAMEWORKS[framework]()
        self.own = registry.get(framework).losses("cpu")

    def dense(self, logits: Array, targets: Array, ref_log_odds: Array, weights: Array, *, dtype: str) -> DenseResult:
        def weighted(z: Any) -> tuple[Any, ...]:
            loss, log_p, others = self._tokens(z, targets, ref_log_odds, dtype)
            return (self.arrays.floats(weights, dtype) * loss).sum(), log_p, others, loss

        z = self.arrays.floats(logits, dtype)
        (_, log_p, others, loss), grad = self.arrays.value_and_grad(weighted, z)
        return DenseResult(*_log_odds_and_entropy(log_p, others), loss, grad)

    def batch(self, micro_batches: Sequence[tuple[Array, Batch, Array]], *, dtype: str) -> BatchResult:
        total, sequence_loss, grads = 0.0, [], []
        for logits, batch, ref_log_odds in micro_batches:
            lengths = np.bincount(batch.sequence_ids)
            weights = batch.labels / self.form.divisors(lengths)
            scale = 1 / (len(lengths) * len(micro_batches))

            def summed(
                grid: Any, batch: Batch = batch, reference: Array = ref_log_odds, weights: Array = weights * scale
            ) -> tuple[Any, ...]:
                z = grid.reshape(-1, grid.shape[-1])[self.arrays.ints(batch.positions)]
                loss, _, _ = self._tokens(z, batch.targets, reference, dtype)
                return (self.arrays.floats(weights[batch.sequence_ids], dtype) * loss).sum(), loss

            (loss, token_loss), grad = self.arrays.value_and_grad(summed, self.arrays.floats(logits, dtype))
            total += float(loss)
            sequence_loss.append(weights * np.bincount(batch.sequence_ids, weights=token_loss))
            grads.append(grad)
        return BatchResult(total, np.concatenate(sequence_loss), grads)

    def cross_entropy(self, logits: Array, targets: Array, *, dtype: str) -> tuple[Array, Array]:
        return self.own.cross_entropy(logits, targets, dtype=dtype)

    def _tokens(self, z: Any, targets: Array, ref_log_odds: Array, dtype: str) -> tuple[Any, Any, Any]:
        """ℓ, log p and the other tokens' term, each (N,), of logits (N, V)."""
        ops = self.arrays.ops
        log_pi = self.arrays.log_softmax(z)
        log_p = self.arrays.take_along(log_pi, self.arrays.ints(targets))
        whole = (ops.exp(ops.stop_gradient(log_pi)) * log_pi).sum(-1)
        others = whole - ops.exp(ops.stop_gradient(log_p)) * log_p
        ref_log_p = self.arrays.floats(-np.logaddexp(0.0, -ref_log_odds.astype(np.float64)), dtype)
        return self.form.token_loss(ops, log_p, others, ref_log_p), log_p, others

    # What the two cannot have, `lacks` says.

    def fused(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    log_odds = objective = fused


def _log_odds_and_entropy(log_p: Array, others: Array) -> tuple[Array, Array]:
    """o = log p − log(1 − p) and H_q = log(1 − p) − Σ_{v≠y} π(v) log π(v) / (1 − p), in float64."""
    log_p, others = log_p.astype(np.float64), others.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        not_p = -np.expm1(log_p)
        return log_p - np.log(not_p), np.log(not_p) - others / not_p


class FormBackend(Backend):
    """Losses alone, on the CPU."""

    def __init__(self, form: Form, framework: str):
        self.name, self.form, self.framework = f"{form.name} ({framework})", form, framework

    def losses(self, device: str = "auto") -> FormLosses:
        return FormLosses(self.form, self.framework)

    def devices(self) -> list[str]:
        return ["cpu"]

    def describe(self) -> dict[str, str]:
        return registry.get(self.framework).describe()


paper_torch, paper_mlx = partial(FormBackend, PAPER, "torch"), partial(FormBackend, PAPER, "mlx")
oat_torch, oat_mlx = partial(FormBackend, OAT, "torch"), partial(FormBackend, OAT, "mlx")
