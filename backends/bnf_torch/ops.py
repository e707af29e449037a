"""The array operations that objectives are written in: bnf_core.objectives.Ops on tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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
        return F.pad(x, (0, 1))[grid].sum(1)

    def stop_gradient(self, x: Tensor) -> Tensor:
        return x.detach()


OPS = TorchOps()
