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

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        self.model = model
        self.config = config
        self.step = 0
        parameters = flat(model.trainable_parameters())
        self.first = {name: mx.zeros(p.shape) for name, p in parameters.items()}
        self.second = {name: mx.zeros(p.shape) for name, p in parameters.items()}

    def update(self, gradients: dict[str, mx.array], learning_rate: float, max_grad_norm: float | None) -> float:
        """Apply the gradients, by parameter path; returns their norm before clipping. Where it is not finite the
        parameters and the optimizer's state stay as they are."""
        norms = [mx.linalg.norm(g) for g in gradients.values()]
        mx.eval(norms)
        norm = math.hypot(*(float(x) for x in norms))
        if not math.isfinite(norm):
            return norm
        factor = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))

        # Everything that is one number for the whole step is computed in Python's float64.
        c = self.config
        self.step += 1
        step_size = learning_rate / (1.0 - c.beta1**self.step)
        root_correction = math.sqrt(1.0 - c.beta2**self.step)
        decay = 1.0 - learning_rate * c.weight_decay
        parameters, updated = flat(self.model.trainable_parameters()), {}
        for name, gradient in gradients.items():
            p, g = parameters[name], gradient * factor
            m = self.first[name] = self.first[name] + (1.0 - c.beta1) * (g - self.first[name])
            v = self.second[name] = c.beta2 * self.second[name] + (1.0 - c.beta2) * mx.square(g)
            updated[name] = decay * p - step_size * m / (mx.sqrt(v) / root_correction + c.epsilon)
        self.model.update(tree_unflatten(list(updated.items())))
        mx.eval(updated, self.first, self.second)
        return norm

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
