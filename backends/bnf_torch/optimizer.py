"""AdamW and gradient clipping. PyTorch's own are the standard that bnf_mlx follows."""

import math
from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bnf_core.config import OptimizerConfig
from bnf_core.storage.shards import shapes_of
from bnf_core.types import Array
from bnf_torch.processes import stored_like, whole


def adamw(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Those that lie on the same processes in a group of their own: one call of the framework takes no others."""
    groups: dict[object, list[nn.Parameter]] = {}
    for p in parameters.values():
        groups.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    return torch.optim.AdamW(
        [{"params": group} for group in groups.values()],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True if parameters and all(p.is_cuda for p in parameters.values()) else None,  # one kernel for all
    )


class Optimizer:
    """An optimizer of torch that knows its parameters by name, and takes no step that is not finite."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer):
        self.torch = optimizer
        names = {id(p): name for name, p in parameters.items()}
        self.names = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.torch.param_groups for p in group["params"]]

    def clip(self, max_grad_norm: float | None, scale: float = 1.0) -> Tensor:
        """Clip the gradients, which are `scale` times as large as they should be; returns their norm before, () on
        their device. Where it is not finite they are to be dropped."""
        if scale != 1:
            for p in self._parameters:
                if p.grad is not None:
                    p.grad.mul_(1 / scale)
        limit = math.inf if max_grad_norm is None else max_grad_norm
        groups = [group["params"] for group in self.torch.param_groups]
        if len(groups) == 1:
            return whole(nn.utils.clip_grad_norm_(groups[0], limit))
        gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
        norm = torch.linalg.vector_norm(torch.stack([whole(nn.utils.get_total_norm(group)) for group in gradients]))
        by = (limit / (norm + 1e-6)).clamp(max=1.0)  # as in PyTorch's own
        for gradient in chain.from_iterable(gradients):
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(by)
        return norm

    def drop(self) -> None:
        """Let go of the gradients: a step then changes neither the parameters nor the optimizer's state."""
        self.torch.zero_grad(set_to_none=True)

    def step(self, learning_rate: float) -> None:
        """Apply the gradients, and let go of them."""
        for group in self.torch.param_groups:
            group["lr"] = learning_rate
        self.torch.step()
        self.torch.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Step counts and moments as `name of the parameter/step`, /exp_avg and /exp_avg_sq; none before a step."""
        for i, state in self.torch.state_dict()["state"].items():
            for kind, value in state.items():
                yield f"{self.names[i]}/{kind}", value

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Each given whole. Moments lie, and are sharded, as their parameters do."""
        by_index: dict[int, dict[str, Tensor]] = {}
        index = {name: i for i, name in enumerate(self.names)}
        parameters = self._parameters
        for name, shape in shapes_of(state).items():
            parameter, _, kind = name.rpartition("/")
            i = index[parameter]
            is_moment = shape == tuple(parameters[i].shape) and shape
            value = stored_like(state, name, parameters[i]) if is_moment else torch.tensor(state[name])
            by_index.setdefault(i, {})[kind] = value
        self.torch.load_state_dict({"state": by_index, "param_groups": self.torch.state_dict()["param_groups"]})
