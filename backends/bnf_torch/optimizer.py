"""AdamW and gradient clipping. PyTorch's own are the standard that bnf_mlx follows."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from bnf_core.config import OptimizerConfig


class Optimizer:
    """One step: clip, then AdamW."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig):
        self.parameters = list(parameters)
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )

    def update(self, learning_rate: float, max_grad_norm: float | None) -> float:
        """Apply and clear the gradients; returns their norm before clipping. Where it is not finite the
        parameters and the optimizer's state stay as they are."""
        norm = float(nn.utils.clip_grad_norm_(self.parameters, math.inf if max_grad_norm is None else max_grad_norm))
        if math.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = learning_rate
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm
