"""The array operations that objectives are written in: bnf_core.objectives.Ops on MLX arrays."""

import mlx.core as mx


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
        terms = mx.pad(x, (0, 1))[grid]
        terms = mx.pad(terms, [(0, 0), (0, 2 ** max(terms.shape[1] - 1, 0).bit_length() - terms.shape[1])])
        lost = mx.zeros(terms.shape)
        while terms.shape[1] > 1:  # halves added to halves, with what each addition rounds off (Knuth's two-sum)
            (a, b), (lost_a, lost_b) = mx.split(terms, 2, axis=1), mx.split(lost, 2, axis=1)
            terms = a + b
            of_b = terms - a
            lost = mx.stop_gradient(lost_a + lost_b + (a - (terms - of_b)) + (b - of_b))
        return (terms + lost).sum(axis=1)


OPS = MLXOps()
