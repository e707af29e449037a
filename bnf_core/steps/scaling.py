"""Loss scaling, for gradients that pass through float16.

A token's coefficient is 1 / (|y| · sequences), about 1e-3 to 1e-6, and gradients of that size lie below 6e-5, where
float16 has fewer and fewer digits. So the loss is multiplied by a power of two before the backward pass, and the
float32 gradients of what is trained are divided by it: both exact. The coefficients are known beforehand, so there is
nothing to search for.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from bnf_core.processes import Processes
from bnf_core.types import Array, Batch

SMALLER = 2.0**-6  # where a gradient left float16's range after all
TRIES = 3


def loss_scales(dtype: str, batches: Sequence[tuple[Batch, Array]], processes: Processes) -> Iterator[float]:
    """The powers of two to try, one after the other, until the gradient is finite; the same on every process.

    Args:
        dtype: that is computed in; but for float16 the only one is 1.
        batches: all micro-batches of the step that this process has.
    """
    if dtype != "float16":
        yield 1.0
        return
    mine = max((float(np.abs(batch.coefficients).max(initial=0)) for batch, _ in batches), default=0.0)
    largest = max(float(theirs[0]) for theirs in processes.gather(np.array([mine])))
    first = 2.0 ** -math.frexp(largest)[1]  # by which the largest coefficient comes to lie between 1/2 and 1
    yield from (first * SMALLER**i for i in range(TRIES))
