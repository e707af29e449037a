"""The array operations that objectives are written in: bnf_core.objectives.Ops on tensors."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bnf_core.objectives.base import mapped


class TorchOps:
    exp = staticmethod(torch.exp)
    expm1 = staticmethod(torch.expm1)
    log1p = staticmethod(torch.log1p)
    log = staticmethod(torch.log)
    softplus = staticmethod(F.softplus)
    sigmoid = staticmethod(torch.sigmoid)

    def where(self, condition: Tensor, a: Any, b: Any) -> Tensor:
        return torch.where(condition, a, b)

    def minimum(self, a: Tensor, b: Any) -> Tensor:
        return a.clamp(max=b)

    def maximum(self, a: Tensor, b: Any) -> Tensor:
        return a.clamp(min=b)

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        return x[index]

    def row_sum(self, x: Tensor, grid: Tensor) -> Tensor:
        exact = torch.float32 if x.device.type == "mps" else torch.float64  # which MPS lacks
        return F.pad(x, (0, 1))[grid].sum(1, dtype=exact).float()

    def stop_gradient(self, x: Tensor) -> Tensor:
        return x.detach()


OPS = TorchOps()


def tensors(tree: Any, device: torch.device) -> Any:
    """An array, or a tuple of arrays and tuples, as tensors; int32 as int64, which indexing takes."""

    def one(array: Any) -> Tensor:
        tensor = torch.from_numpy(np.asarray(array))
        tensor = tensor.long() if tensor.dtype == torch.int32 else tensor
        if device.type == "cuda":  # out of pinned memory it is copied while the device works
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)

    return mapped(one, tree)
