"""A loaded MLX model that scores, trains and generates: bnf_core.protocol.Engine."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from bnf_core.batching import Batch
from bnf_core.config import OptimizerConfig
from bnf_core.pieces import require_same_shapes, under
from bnf_core.processes import ALONE, Processes
from bnf_core.protocol import Array, Done, Step, TokenStats
from bnf_mlx import adapter
from bnf_mlx.linear import linear_bnf_loss, linear_log_odds
from bnf_mlx.losses import bnf_token_loss, token_log_odds
from bnf_mlx.model import completion_hidden, completion_logits, head_is_linear, head_weight
from bnf_mlx.optimizer import Optimizer, flat


class MLXEngine:
    processes: Processes = ALONE

    def __init__(self, model: nn.Module, device: mx.Device, optimizer: OptimizerConfig | None = None):
        self.model = model
        self.device = device
        self.dtype = _dtype(model)
        with mx.stream(device):
            # The head's weights, dequantised once; None where logits are more than hidden @ head.T.
            self.head = head_weight(model) if head_is_linear(model) else None
        self.optimizer = Optimizer(model, optimizer) if optimizer and flat(model.trainable_parameters()) else None

    def reference_log_odds(self, batch: Batch) -> Array:
        with adapter.adapter_off(self.model):
            return self.evaluate(batch, np.zeros(len(batch.targets), np.float32)).log_odds

    def evaluate(self, batch: Batch, ref_log_odds: Array) -> TokenStats:
        self.model.eval()
        with mx.stream(self.device):
            return _to_numpy(self._stats(*_arrays(batch, ref_log_odds)))

    def fit(self, steps: Iterator[Step], done: Done, max_grad_norm: float | None) -> None:
        if self.optimizer is None:
            raise RuntimeError("this engine was loaded without anything to train and an optimizer")
        for step in steps:
            self.model.train()
            stats, loss = [], 0.0
            gradients: dict[str, mx.array] = {}
            with mx.stream(self.device):
                for batch, ref_log_odds in step.batches:
                    micro_loss, micro_stats, micro_gradients = self._gradients(batch, ref_log_odds)
                    loss += float(micro_loss)
                    stats.append(_to_numpy(micro_stats))
                    gradients = {name: gradients[name] + g if gradients else g for name, g in micro_gradients.items()}
                    mx.eval(gradients)
                norm = math.nan
                if math.isfinite(loss):
                    norm = self.optimizer.update(gradients, step.learning_rate, max_grad_norm)
            done(step, stats, norm)

    def _gradients(self, batch: Batch, ref_log_odds: Array) -> tuple[mx.array, TokenStats, dict[str, mx.array]]:
        """The loss of a micro-batch, its token statistics and the gradients by parameter path."""
        loss_and_gradients = nn.value_and_grad(self.model, self._loss)
        (loss, stats), tree = loss_and_gradients(*_arrays(batch, ref_log_odds), mx.array(batch.coefficients))
        gradients = flat(tree)
        mx.eval(loss, stats, gradients)
        return loss, stats, gradients

    def state(self) -> dict[str, Array]:
        with mx.stream(self.device):
            state = {f"weights/{name}": p for name, p in flat(self.model.trainable_parameters()).items()}
            if self.optimizer is not None:
                state |= {f"optimizer/{name}": value for name, value in self.optimizer.state().items()}
            state["random/key"] = cast(Any, mx.random.state)[0]
            return {name: np.array(value) for name, value in state.items()}

    def load_state(self, state: Mapping[str, Array]) -> None:
        weights, trainable = under("weights", state), flat(self.model.trainable_parameters())
        require_same_shapes(weights, {name: p.shape for name, p in trainable.items()})
        with mx.stream(self.device):
            self.model.update(tree_unflatten([(name, mx.array(weights[name])) for name in trainable]))
            if self.optimizer is not None:
                self.optimizer.load_state({name: mx.array(a) for name, a in under("optimizer", state).items()})
            high, low = (int(half) for half in state["random/key"])
            mx.random.seed(high << 32 | low)  # a key is its seed's two halves

    def _loss(
        self, ids: mx.array, positions: mx.array, targets: mx.array, reference: mx.array, coefficients: mx.array
    ) -> tuple[mx.array, TokenStats]:
        """Σ coefficients · ℓ of the batch, and its token statistics."""
        if self.head is not None:
            hidden = completion_hidden(self.model, ids, positions)  # (N, D)
            return linear_bnf_loss(hidden, self.head, targets, reference, coefficients)
        stats = self._stats(ids, positions, targets, reference)
        return (coefficients * stats.token_loss).sum(), TokenStats(*map(mx.stop_gradient, stats))

    def _stats(self, ids: mx.array, positions: mx.array, targets: mx.array, reference: mx.array) -> TokenStats:
        if self.head is not None:
            log_odds, entropy = linear_log_odds(completion_hidden(self.model, ids, positions), self.head, targets)
        else:
            log_odds, entropy = token_log_odds(completion_logits(self.model, ids, positions), targets)
        return TokenStats(log_odds, entropy, bnf_token_loss(log_odds, entropy, reference))

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        from mlx_lm.generate import BatchGenerator

        self.model.eval()
        with mx.stream(self.device):
            generator = BatchGenerator(
                self.model, stop_tokens=[[token] for token in stop_ids], stream=mx.default_stream(self.device)
            )
            rows = generator.insert([list(prompt) for prompt in prompts], [max_tokens] * len(prompts))
            completions: dict[int, list[int]] = {row: [] for row in rows}
            while responses := generator.next_generated():
                for response in responses:
                    if response.finish_reason != "stop":
                        completions[response.uid].append(response.token)
            generator.close()
        return [completions[row] for row in rows]

    def save(self, folder: Path) -> None:
        adapter.save_adapter(self.model, folder)


def _dtype(model: nn.Module) -> str:
    """Of the largest frozen weights, or of all where all are trained; of quantised ones, that of their scales."""
    trained, weights = flat(model.trainable_parameters()), flat(model.parameters())
    frozen = {name: w for name, w in weights.items() if name not in trained} or weights
    floating = [w for w in frozen.values() if mx.issubdtype(w.dtype, mx.floating)]
    return str(max(floating, key=lambda w: w.size).dtype).removeprefix("mlx.core.")


def _arrays(batch: Batch, ref_log_odds: Array) -> tuple[mx.array, ...]:
    """Token ids (B, T), positions, targets and reference (N,)."""
    return tuple(map(mx.array, (batch.input_ids, batch.positions, batch.targets, ref_log_odds)))


def _to_numpy(stats: TokenStats) -> TokenStats:
    return TokenStats(*map(np.array, stats))
