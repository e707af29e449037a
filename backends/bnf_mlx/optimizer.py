"""AdamW and gradient clipping, as torch.optim.AdamW and torch.nn.utils.clip_grad_norm_ do them.

MLX's own AdamW computes 1 − β^t in float32, which is off by 5e-5 at the first step.
"""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from bnf_core.config import OptimizerConfig


class Optimizer:
    """One step: clip, then AdamW."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, compiled: bool = False):
        self.model = model
        self.config = config
        self.step = 0
        parameters = flat(model.trainable_parameters())
        self.first = {name: mx.zeros(p.shape) for name, p in parameters.items()}
        self.second = {name: mx.zeros(p.shape) for name, p in parameters.items()}
        self._adamw = mx.compile(self._update) if compiled else self._update  # one kernel for a dozen operations

    def update(self, gradients: dict[str, mx.array], learning_rate: float, max_grad_norm: float | None) -> float:
        """Apply the gradients, by parameter path; returns their norm before clipping. Where it is not finite the
        parameters and the optimizer's state stay as they are."""
        norms = [mx.linalg.norm(g) for g in gradients.values()]
        mx.eval(norms)
        norm = math.hypot(*(float(x) for x in norms))
        if not math.isfinite(norm):
            return norm

        # Everything that is one number for the whole step is computed in Python's float64.
        c = self.config
        self.step += 1
        scalars = [
            1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6)),
            learning_rate / (1.0 - c.beta1**self.step),
            math.sqrt(1.0 - c.beta2**self.step),
            1.0 - learning_rate * c.weight_decay,
        ]
        numbers = [mx.array(x) for x in scalars]
        parameters = flat(self.model.trainable_parameters())
        for name, gradient in gradients.items():
            new = self._adamw(parameters[name], gradient, self.first[name], self.second[name], *numbers)
            parameters[name], self.first[name], self.second[name] = new
        self.model.update(tree_unflatten(list(parameters.items())))
        mx.eval(parameters, self.first, self.second)
        return norm

    def _update(
        self,
        p: mx.array,
        gradient: mx.array,
        m: mx.array,
        v: mx.array,
        clip: mx.array,
        step_size: mx.array,
        root_correction: mx.array,
        decay: mx.array,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """A parameter and its moments after the step."""
        c, g = self.config, gradient * clip
        m = m + (1.0 - c.beta1) * (g - m)
        v = c.beta2 * v + (1.0 - c.beta2) * mx.square(g)
        return decay * p - step_size * m / (mx.sqrt(v) / root_correction + c.epsilon), m, v

    def state(self) -> dict[str, mx.array]:
        """The step count, and moments as `first/name` and `second/name`."""
        first = {f"first/{name}": value for name, value in self.first.items()}
        second = {f"second/{name}": value for name, value in self.second.items()}
        return {"step": mx.array(self.step), **first, **second}

    def load_state(self, state: Mapping[str, mx.array]) -> None:
        self.step = int(np.array(state["step"]))
        self.first = {name: state[f"first/{name}"] for name in self.first}
        self.second = {name: state[f"second/{name}"] for name in self.second}


def flat(tree: Any) -> dict[str, mx.array]:
    """Parameters or gradients by path."""
    return dict(tree_flatten(tree))
