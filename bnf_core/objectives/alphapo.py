"""AlphaPO: SimPO with a reward of another shape."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, log_sigmoid, pairs_of


@dataclass(frozen=True)
class AlphaPO(Objective):
    """The reward is β (1 − p̄^−α) / α, p̄ the geometric mean of a row's token probabilities; α → 0 is SimPO. The paper
    tunes all three settings for each model; these are its own for Mistral-7B-Instruct."""

    beta: float = 2.5
    """Scale of the reward."""
    gamma: float = 0.1
    """Margin to reach."""
    alpha: float = 0.25
    """Shape of the reward: above 0 it falls faster than log p̄ for unlikely rows, below 0 slower."""

    name = "alphapo"
    source = "arXiv 2501.03884"
    wants = "as simpo, and pulls more or less at unlikely rows"
    formula = "−log σ(β (1 − p̄⁻ᵅ)/α of chosen − the same of rejected − γ)"
    unit = "pair"
    needs_reference = False

    def __post_init__(self) -> None:
        self._require(self.beta > 0, "beta", "a number above 0")
        self._require(self.alpha != 0, "alpha", "another number than 0, which is simpo")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        chosen, rejected = pairs_of(ops, seen, units, reference=False)
        margin = self._reward(ops, chosen) - self._reward(ops, rejected)
        return -log_sigmoid(ops, self.beta * margin - self.gamma)

    def _reward(self, ops: Ops, rows: Rows) -> Any:
        """(1 − p̄^−α) / α; the exponent is held below 80, where float32 ends."""
        return -ops.expm1(ops.minimum(-self.alpha * rows.mean_log_p, 80.0)) / self.alpha

    def rewards(self, rows: Rows) -> Any:
        return self.beta * rows.mean_log_p
