"""Group Relative Policy Optimization."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Seen, Units, linearised, log_ratio, mean_over_tokens
from bnf_core.objectives.numpy_ops import NumPyOps
from bnf_core.types import Array

MOST = 80.0  # nats: float32 holds e⁸⁰


@dataclass(frozen=True)
class GRPO(Objective):
    """A clipped policy gradient. A sample's advantage A is its score beside those of the prompt's other samples, ρ a
    token's probability divided by that under the policy which drew it; of each of DeepSeekMath, Dr. GRPO and DAPO what
    the settings say."""

    beta: float = 0.04
    """Of the estimate of KL(π‖reference), r/p − log r/p − 1 of each token. 0: no reference is needed."""
    epsilon: float = 0.2
    """A token that a bad sample has, and that is less likely than 1 − ε times what it was, is lowered no further. The
    paper names no value; this is PPO's and TRL's."""
    epsilon_high: float = 0.2
    """A token that a good sample has is raised to 1 + ε times what it was; DAPO (arXiv 2503.14476): 0.28."""
    scale: bool = True
    """Divide advantages by the standard deviation of the prompt's scores. False: Dr. GRPO's (arXiv 2503.20783)."""

    name = "grpo"
    source = "arXiv 2402.03300, equations 3 and 4"
    wants = "raises samples that are better than the prompt's others and lowers worse ones, a step at a time"
    formula = "−mean min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) + β KL"
    on_policy = True
    takes_weights = False  # an advantage says how much a row counts

    def __post_init__(self) -> None:
        for name in ("beta", "epsilon_high"):
            self._require(getattr(self, name) >= 0, name, "a number of at least 0")
        self._require(0 <= self.epsilon < 1, "epsilon", "a share from 0 up to 1")

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.beta > 0

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        here, (old_log_p, advantages) = ops.stop_gradient(seen.log_odds), seen.structure.drawn
        ratio = ops.exp(ops.minimum(-ops.softplus(-here) - old_log_p, MOST))
        low, high = 1 - self.epsilon, 1 + self.epsilon_high
        clipped = ops.where(advantages > 0, ratio > high, ratio < low)
        loss = -advantages * ops.where(clipped, ops.minimum(ops.maximum(ratio, low), high), ratio)
        slope = ops.where(clipped, 0.0, -advantages * ratio)  # ∂/∂ log p
        if self.beta > 0:
            kl, kl_slope = kl_and_slope(ops, here, seen.ref_log_odds)
            loss, slope = loss + self.beta * kl, slope + self.beta * kl_slope
        # ∂ log p / ∂o = 1 − p
        return mean_over_tokens(ops, linearised(ops, loss, slope * ops.sigmoid(-here), seen.log_odds), seen)

    def advantages(self, scores: Array) -> Array:
        """As TRL has them: the standard deviation is that of a sample of scores, and never quite 0."""
        beside: Array = scores - scores.mean()
        return beside / (scores.std(ddof=1) + 1e-4) if self.scale and len(scores) > 1 else beside

    def metrics(self, log_odds: Array, ref_log_odds: Array) -> dict[str, Array]:
        return {"kl": kl_and_slope(NumPyOps(), log_odds, ref_log_odds)[0]} if self.beta > 0 else {}


def kl_and_slope(ops: Ops, log_odds: Any, ref_log_odds: Any) -> tuple[Any, Any]:
    """r/p − log r/p − 1 of each token, (N,), and its derivative in log p."""
    down = ops.minimum(-log_ratio(ops, log_odds, ref_log_odds), MOST)
    return ops.expm1(down) - down, -ops.expm1(down)
