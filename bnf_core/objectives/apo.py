"""Anchored Preference Optimization, the unpaired form of its variant "zero"."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Ops, Seen, Units, rows_of
from bnf_core.objectives.kto import KTO


@dataclass(frozen=True)
class APOZeroUnpaired(KTO):
    """KTO anchored at the reference itself: for chosen rows that are better than what the model says."""

    name = "apo_zero_unpaired"
    source = "arXiv 2408.06266, equation 7, each row by itself"
    wants = "raises chosen rows above the reference and lowers rejected rows below it"
    formula = "λ (1 − σ(±β log p/r))"
    baseline_from = ""

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        return self._against(ops, rows_of(ops, seen, reference=True), 0.0)
