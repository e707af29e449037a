"""DPO under another divergence from the reference than the reverse Kullback-Leibler."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, log_sigmoid, pairs_of

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@dataclass(frozen=True)
class FDPO(Objective):
    """The reward is β f'(p / r), which reverse KL makes β log(p / r) and DPO. Constants of f' drop out of the pair."""

    beta: float = 0.1
    """How far the policy may leave the reference: less is farther."""
    divergence: Divergence = "forward_kl"
    """reverse_kl, forward_kl, js or alpha."""
    alpha: float = 0.5
    """Of the α-divergence, between forward (0) and reverse (1) KL, both excluded, as in TRL. The paper counts from the
    other end: its α is 1 less this one; it tries 0.3, 0.5 and 0.7."""

    name = "f_dpo"
    source = "arXiv 2309.16240, table 1"
    wants = "as dpo, with a pull back to the reference of another shape"
    formula = "−log σ(β (f'(p/r) of chosen − f'(p/r) of rejected))"
    unit = "pair"

    def __post_init__(self) -> None:
        self._require(self.beta > 0, "beta", "a number above 0")
        known = ("reverse_kl", "forward_kl", "js", "alpha")
        self._require(self.divergence in known, "divergence", f"one of {', '.join(known)}")
        self._require(0 < self.alpha < 1, "alpha", "a number between 0 and 1, both excluded")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        chosen, rejected = pairs_of(ops, seen, units, reference=True)
        return -log_sigmoid(ops, self.beta * (self._slope(ops, chosen) - self._slope(ops, rejected)))

    def _slope(self, ops: Ops, rows: Rows) -> Any:
        """f'(u) at u = p / r, but for a constant; exponents are held below 80, where float32 ends."""
        x = rows.log_ratio
        if self.divergence == "reverse_kl":  # f' = log u + 1
            return x
        if self.divergence == "forward_kl":  # f' = −1 / u
            return -ops.expm1(ops.minimum(-x, 80.0))
        if self.divergence == "js":  # f' = log(2u / (1 + u))
            return math.log(2.0) + log_sigmoid(ops, x)
        return -ops.expm1(ops.minimum(-(1 - self.alpha) * x, 80.0)) / (1 - self.alpha)  # (1 − u^(α − 1)) / (1 − α)

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.log_ratio
