"""Negative log-likelihood of the chosen rows: supervised fine-tuning on what was liked."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Seen, Units, log_sigmoid, mean_over_tokens


@dataclass(frozen=True)
class NLL(Objective):
    """Each chosen row divided by its own length; rejected rows are passed over."""

    name = "nll"
    source = "cross-entropy, the usual fine-tuning loss"
    wants = "raises chosen rows, whatever the rejected ones are"
    formula = "−mean log p of a chosen row"
    normaliser = "chosen"
    needs_reference = False

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        return -mean_over_tokens(ops, log_sigmoid(ops, seen.log_odds), seen)
