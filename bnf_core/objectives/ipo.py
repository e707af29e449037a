"""Identity Preference Optimization."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, pairs_of


@dataclass(frozen=True)
class IPO(Objective):
    """Log-ratios are means over tokens, which the paper leaves open and its authors confirmed to TRL."""

    beta: float = 0.1
    """τ of the paper; the margin to reach is 1 / (2 β)."""

    name = "ipo"
    source = "arXiv 2310.12036, equation 17"
    wants = "puts the chosen row above the rejected one by a fixed margin, and no more"
    formula = "(mean log p/r of chosen − mean log p/r of rejected − 1/(2β))²"
    unit = "pair"

    def __post_init__(self) -> None:
        self._require(self.beta > 0, "beta", "a number above 0")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        chosen, rejected = pairs_of(ops, seen, units, reference=True)
        margin = chosen.log_ratio / chosen.tokens - rejected.log_ratio / rejected.tokens - 1 / (2 * self.beta)
        return margin * margin

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.log_ratio
