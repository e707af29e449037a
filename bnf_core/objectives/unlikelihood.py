"""Unlikelihood: likelihood of the chosen rows, and of anything but each token of the rejected ones."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Seen, Units, log_not_p, log_sigmoid, mean_over_tokens


@dataclass(frozen=True)
class Unlikelihood(Objective):
    """As the paper's token-level form, with the rejected row's tokens as the negative candidates."""

    alpha: float = 1.0
    """Weight of rejected rows."""

    name = "unlikelihood"
    source = "arXiv 1908.04319"
    wants = "raises chosen tokens, and lowers rejected ones the harder the likelier they are"
    formula = "−mean log p of a chosen row, −α mean log(1 − p) of a rejected one"
    needs_reference = False

    def __post_init__(self) -> None:
        self._require(self.alpha >= 0, "alpha", "a number of at least 0")

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        liked = mean_over_tokens(ops, log_sigmoid(ops, seen.log_odds), seen)
        avoided = mean_over_tokens(ops, log_not_p(ops, seen.log_odds), seen)
        return -ops.where(seen.structure.labels > 0, liked, self.alpha * avoided)
