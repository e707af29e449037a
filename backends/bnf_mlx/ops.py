"""The array operations that objectives are written in: bnf_core.objectives.Ops on MLX arrays."""

import mlx.core as mx

from bnf_mlx.losses import accurate_sum


class MLXOps:
    exp = staticmethod(mx.exp)
    expm1 = staticmethod(mx.expm1)
    log1p = staticmethod(mx.log1p)
    log = staticmethod(mx.log)
    where = staticmethod(mx.where)
    minimum = staticmethod(mx.minimum)
    maximum = staticmethod(mx.maximum)
    stop_gradient = staticmethod(mx.stop_gradient)

    def softplus(self, x: mx.array) -> mx.array:
        return mx.logaddexp(x, 0.0)

    def sigmoid(self, x: mx.array) -> mx.array:
        small = mx.exp(-mx.abs(x))  # mx.sigmoid subtracts from 1
        return mx.where(x >= 0, 1.0, small) / (1.0 + small)

    def take(self, x: mx.array, index: mx.array) -> mx.array:
        return x[index]

    def row_sum(self, x: mx.array, grid: mx.array) -> mx.array:
        return accurate_sum(mx.pad(x, (0, 1))[grid])[..., 0]


OPS = MLXOps()
