"""SimPER: perplexity itself as the objective."""

from dataclasses import dataclass
from typing import Any

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Units, rows_of


@dataclass(frozen=True)
class SimPER(Objective):
    """Inverse perplexities, without settings. Chosen and rejected rows are each divided by their own number, which on
    pairs is the paper's."""

    name = "simper"
    source = "arXiv 2502.00883"
    wants = "raises chosen and lowers rejected rows the harder the likelier they are"
    formula = "∓ exp(mean log p)"
    normaliser = "labels"
    needs_reference = False

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        rows = rows_of(ops, seen, reference=False)
        return -rows.labels * ops.exp(rows.mean_log_p)

    def rewards(self, rows: Rows) -> Any:
        return rows.mean_log_p
