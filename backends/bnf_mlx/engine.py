"""A loaded MLX model that scores, trains and generates: bnf_core.protocol.Engine."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from bnf_core.config import OptimizerConfig
from bnf_core.errors import memory_errors
from bnf_core.objectives import Objective
from bnf_core.objectives.bnf import BNF
from bnf_core.processes import ALONE, Processes
from bnf_core.sampling import Completion, greedy
from bnf_core.steps.scaling import loss_scales
from bnf_core.storage.files import agreed
from bnf_core.storage.shards import OPTIMIZER, REFERENCE_WEIGHTS, WEIGHTS, Shard, put_under, require_same_shapes, under
from bnf_core.types import Array, Batch, TokenScores
from bnf_mlx import adapter
from bnf_mlx.errors import FULL
from bnf_mlx.model import Checkpoint
from bnf_mlx.optimizer import Optimizer, flat
from bnf_mlx.processes import in_order, sum_over
from bnf_mlx.sampling import sample
from bnf_mlx.scored import Gradients, MicroStep, ScoredModel


class MLXEngine:
    """
    Args:
        model: with an adapter, with all weights trainable, or frozen.
        objective: what the loss is; default: BNF.
        whole: where to save all weights, and under which names; None where an adapter is trained.
        gradient_checkpointing: keep only each layer's input for the backward pass.
        compiled: train with `mx.compile`; default: on a GPU, where it saves launches of small kernels. On a CPU
            MLX would call a C++ compiler for every shape.
        deterministic: add each micro-batch's gradient by itself, in the order of the step's micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        device: mx.Device,
        optimizer: OptimizerConfig | None = None,
        *,
        objective: Objective | None = None,
        whole: Checkpoint | None = None,
        gradient_checkpointing: bool = False,
        compiled: bool | None = None,
        deterministic: bool = False,
        processes: Processes = ALONE,
    ):
        self.model = model
        self.device = device
        self.whole = whole
        self.compiled = device == mx.Device(mx.gpu) if compiled is None else compiled
        self.deterministic = deterministic
        self.processes = processes
        self.dtype = _dtype(model)
        self.reference_weights: dict[str, mx.array] = {}  # by name; empty: those that training starts from
        self.scored = ScoredModel(
            model,
            device,
            objective or BNF(),
            gradient_checkpointing=gradient_checkpointing,
            compiled=self.compiled,
        )
        with mx.stream(device):
            trainable = flat(model.trainable_parameters())
            self.optimizer = Optimizer(model, optimizer, self.compiled) if optimizer and trainable else None

    @property
    def shares_prompts(self) -> bool:
        return self.scored.shares_prompts

    def reference_log_odds(self, batch: Batch) -> Array:
        if self.reference_weights:
            policy = flat(self.model.trainable_parameters())
            self.model.update(tree_unflatten(list(self.reference_weights.items())))
            try:
                return self.evaluate(batch, np.zeros(len(batch.targets), np.float32)).log_odds
            finally:
                self.model.update(tree_unflatten(list(policy.items())))
        if self.whole and self.optimizer and self.optimizer.step:
            raise RuntimeError("all weights are trained, so the reference had to be computed before the first step")
        with adapter.adapter_off(self.model):
            return self.evaluate(batch, np.zeros(len(batch.targets), np.float32)).log_odds

    def refresh_reference(self) -> None:
        self.reference_weights = flat(self.model.trainable_parameters())  # training makes others, and leaves these

    @memory_errors(FULL)
    def evaluate(self, batch: Batch, ref_log_odds: Array) -> TokenScores:
        if len(batch.targets) == 0:
            return TokenScores(*(np.zeros(0, np.float32) for _ in range(2)))
        self.model.eval()
        with mx.stream(self.device):
            return TokenScores(*map(np.array, self.scored.scores(self.scored.inputs(batch, ref_log_odds))))

    @memory_errors(FULL)
    def step(
        self,
        batches: Sequence[tuple[Batch, Array]],
        learning_rate: float,
        max_grad_norm: float | None,
        baseline: float = 0.0,
    ) -> tuple[list[TokenScores], float]:
        if self.optimizer is None:
            raise RuntimeError("this engine was loaded without anything to train and an optimizer")
        with mx.stream(self.device):
            for scale in loss_scales(self.dtype, batches, self.processes):
                loss, scores, gradients = 0.0, [], self._zeros() if self.deterministic else Gradients()
                for batch, ref_log_odds in batches:
                    micro_loss, micro_scores, added = self.micro_step(batch, ref_log_odds, baseline, scale)
                    loss += micro_loss
                    scores.append(micro_scores)
                    for part in in_order(self.processes, added) if self.deterministic else [added]:
                        gradients = {name: gradients[name] + g if gradients else g for name, g in part.items()}
                        mx.eval(gradients)
                norm = math.nan
                if not math.isfinite(self.processes.sum(np.array([loss]))[0]):  # on every process, or on none
                    break
                if not self.deterministic:
                    gradients = sum_over(self.processes, gradients)
                norm = self.optimizer.update(gradients, learning_rate, max_grad_norm)
                if math.isfinite(norm):
                    break
            mx.clear_cache()  # shapes vary: what is kept for one is rarely of use to the next
        return scores, norm

    def _zeros(self) -> Gradients:
        """What an ordered sum begins with, or the sign of a zero would depend on who comes first."""
        return {name: mx.zeros(p.shape) for name, p in flat(self.model.trainable_parameters()).items()}

    @cached_property
    def micro_step(self) -> MicroStep:
        from mlx_lm.utils import maybe_set_recommended_wired_limit

        # On Metal, as much memory stays resident as Apple recommends, from the first step on: set anew at each, it
        # would have to wait for the device.
        maybe_set_recommended_wired_limit()
        return MicroStep(self.scored)

    def state(self) -> dict[str, Array | Shard]:
        with mx.stream(self.device):
            key = np.array(cast(Any, mx.random.state)[0])
            state: dict[str, Array | Shard] = {
                "random/key": Shard(key[None], self.processes.rank, (self.processes.count, *key.shape))
            }
            if self.processes.rank == 0:  # what all have alike
                state |= put_under(WEIGHTS, _to_numpy(flat(self.model.trainable_parameters())))
                state |= put_under(REFERENCE_WEIGHTS, _to_numpy(self.reference_weights))
                if self.optimizer is not None:
                    state |= put_under(OPTIMIZER, _to_numpy(self.optimizer.state()))
            return state

    def load_state(self, state: Mapping[str, Array]) -> None:
        weights, trainable = under(WEIGHTS, state), flat(self.model.trainable_parameters())
        require_same_shapes(weights, {name: p.shape for name, p in trainable.items()})
        with mx.stream(self.device):
            self.model.update(tree_unflatten([(name, mx.array(weights[name])) for name in trainable]))
            if self.optimizer is not None:
                self.optimizer.load_state({name: mx.array(a) for name, a in under(OPTIMIZER, state).items()})
            reference = under(REFERENCE_WEIGHTS, state)
            self.reference_weights = {name: mx.array(reference[name]) for name in reference}
            keys = state["random/key"]  # (processes, 2)
            high, low = (int(half) for half in keys[self.processes.rank % len(keys)])
            mx.random.seed(high << 32 | low)  # a key is its seed's two halves

    @memory_errors(FULL)
    def sample(self, rows: Sequence[Completion]) -> None:
        self.scored.limits.require_rows(rows)
        self.model.eval()
        with mx.stream(self.device):
            sample(self.model, rows, self.device)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        return greedy(self, prompts, max_tokens, stop_ids)

    def adapter_off(self) -> AbstractContextManager[None]:
        return adapter.adapter_off(self.model)

    def save(self, folder: Path) -> None:
        with agreed(self.processes):
            if self.processes.rank > 0:
                return
            if self.whole is not None:
                self.whole.save(self.model, folder)
            else:
                adapter.save_adapter(self.model, folder)


def _to_numpy(arrays: Mapping[str, mx.array]) -> dict[str, Array]:
    return {name: np.array(array) for name, array in arrays.items()}


def _dtype(model: nn.Module) -> str:
    """Of the largest frozen weights, or of all where all are trained; of quantised ones, that of their scales."""
    trained, weights = flat(model.trainable_parameters()), flat(model.parameters())
    frozen = {name: w for name, w in weights.items() if name not in trained} or weights
    floating = [w for w in frozen.values() if mx.issubdtype(w.dtype, mx.floating)]
    return str(max(floating, key=lambda w: w.size).dtype).removeprefix("mlx.core.")
