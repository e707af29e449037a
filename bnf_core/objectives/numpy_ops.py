"""The operations of objectives in NumPy, float64: for metrics, and for looking at an objective without a framework."""

from typing import Any

import numpy as np

from bnf_core.objectives.base import mapped
from bnf_core.types import Array


class NumPyOps:
    """`bnf_core.objectives.base.Ops`."""

    exp = staticmethod(np.exp)
    expm1 = staticmethod(np.expm1)
    log1p = staticmethod(np.log1p)
    where = staticmethod(np.where)
    minimum = staticmethod(np.minimum)
    maximum = staticmethod(np.maximum)

    def log(self, x: Array) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(x)

    def softplus(self, x: Array) -> Array:
        # Not logaddexp: it warns of infinities, and they are ordinary here.
        return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))

    def sigmoid(self, x: Array) -> Array:
        small = np.exp(-np.abs(x))
        return np.where(x >= 0, 1.0, small) / (1.0 + small)

    def take(self, x: Array, index: Array) -> Array:
        return x[index]

    def row_sum(self, x: Array, grid: Array) -> Array:
        total: Array = np.append(x, 0.0)[grid].sum(axis=1)
        return total

    def stop_gradient(self, x: Array) -> Array:
        return x


def float64(tree: Any) -> Any:
    """The arrays of a structure, or of anything made of tuples, with their floats as float64."""

    def one(x: Any) -> Array:
        array = np.asarray(x)
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    return mapped(one, tree)
