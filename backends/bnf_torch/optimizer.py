"""AdamW and gradient clipping. PyTorch's own are the standard that bnf_mlx follows."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bnf_core.config import OptimizerConfig


class Optimizer:
    """One step: clip, then AdamW."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig):
        self.names = list(parameters)
        self.parameters = list(parameters.values())
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

    def state(self) -> dict[str, Tensor]:
        """Step counts and moments as `name of the parameter/step`, /exp_avg and /exp_avg_sq; none before a step."""
        by_index = self.adamw.state_dict()["state"]
        return {f"{self.names[i]}/{kind}": value for i, state in by_index.items() for kind, value in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        by_index: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            parameter, _, kind = name.rpartition("/")
            by_index.setdefault(self.names.index(parameter), {})[kind] = value
        self.adamw.load_state_dict({"state": by_index, "param_groups": self.adamw.state_dict()["param_groups"]})
