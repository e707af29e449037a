"""The softmax part of the fused loss as one Triton kernel: for CUDA, and for a CPU that imitates it
(TRITON_INTERPRET=1). Importing this module needs Triton; `linear.exponentials` is the same in PyTorch's terms.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16_384  # columns of one row that a program holds in registers: the widest block


def exponentials(z: Tensor, e: Tensor | None, bias: Tensor | None, observed: Tensor, soft_cap: float | None) -> Tensor:
    """As `linear.exponentials`; z is read once, and left as it was unless e is z. At most TILE columns."""
    statistics = z.new_empty(4, len(z))
    tile: Any = triton.next_power_of_2(z.shape[1])
    assert tile <= TILE and z.stride(1) == 1 and (e is None or e.stride(1) == 1)
    if len(z):
        with torch.cuda.device_of(z):
            _exponentials[(len(z),)](
                z,
                z.stride(0),
                z if e is None else e,
                0 if e is None else e.stride(0),
                z if bias is None else bias,
                observed,
                statistics,
                z.shape[1],
                1.0 if soft_cap is None else soft_cap,
                BIASED=bias is not None,
                CAPPED=soft_cap is not None,
                STORED=e is not None,
                TILE=tile,
                num_warps=min(max(tile // 1024, 4), 16),
            )
    return statistics


@triton.jit
def _exponentials(  # type: ignore[no-untyped-def]
    z_at,
    z_stride,
    e_at,
    e_stride,
    bias_at,
    observed_at,
    statistics_at,
    width,
    soft_cap,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a row, which is in registers from its one read to its one write."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < width
    z = tl.load(z_at + row * z_stride + column, mask=inside, other=0.0)
    if BIASED:
        z += tl.load(bias_at + column, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        x = z / soft_cap
        a = tl.exp(-2.0 * tl.abs(x))
        slope = 4.0 * a / ((1.0 + a) * (1.0 + a))  # 1 − tanh², without subtracting
        xx = x * x
        # Below 1/4 the quotient would subtract equal numbers; the series is off by 1e-8.
        series = x * (1.0 + xx * (-1.0 / 3 + xx * (2.0 / 15 + xx * (-17.0 / 315 + xx * (62.0 / 2835)))))
        quotient = tl.where(x < 0, -1.0, 1.0) * (1.0 - a) / (1.0 + a)
        z = soft_cap * tl.where(tl.abs(x) < 0.25, series, quotient)
    z = tl.where(inside & (column != tl.load(observed_at + row)), z, -float("inf"))

    top = tl.max(z, 0)
    z -= tl.where(top == -float("inf"), 0.0, top)
    e = tl.exp(z)
    total = tl.sum(e, 0)
    moment = tl.sum(tl.where(e == 0.0, 0.0, e * z), 0)  # 0 · ∞ is 0
    mass = total
    if STORED:
        rounded = e.to(e_at.dtype.element_ty)
        mass = tl.sum(rounded.to(tl.float32), 0)
        if CAPPED:
            rounded = (e * slope).to(e_at.dtype.element_ty)
        tl.store(e_at + row * e_stride + column, rounded, mask=inside)
    rows = tl.num_programs(0)
    tl.store(statistics_at + row, top)
    tl.store(statistics_at + rows + row, total)
    tl.store(statistics_at + 2 * rows + row, moment)
    tl.store(statistics_at + 3 * rows + row, mass)
