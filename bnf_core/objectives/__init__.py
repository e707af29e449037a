"""Preference objectives: what training minimises. Each is one file; `table` has their names."""

from bnf_core.objectives.base import Objective, Ops, Rows, Seen, Structure, Sum, Units, batch_loss, structure
from bnf_core.objectives.table import OBJECTIVES, parse

__all__ = ["OBJECTIVES", "Objective", "Ops", "Rows", "Seen", "Structure", "Sum", "Units"]
__all__ += ["batch_loss", "parse", "structure"]
