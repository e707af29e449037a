"""The experiments of `bnf experiment`, a module each with `EXPERIMENT`, looked up when they are asked for."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnf_align.experiments.base import Experiment

# By name: one line of help.
EXPERIMENTS = {
    "stability": "which methods keep a model whole on near-identical right and wrong answers",
    "balance": "feedback of which 5 to 95% is chosen",
    "pairing": "all, half, a quarter or none of the rows with a partner; grades",
    "solutions": "real right and wrong solutions of GSM8K, in pairs and as they are",
    "noise": "labels that are wrong, and rows that contradict each other",
    "hybrid": "BNF with a contrastive term, from none of it to nothing else",
    "shifts": "which tokens move, how evenly, and where the gradient goes",
    "reference": "smaller, tempered, stale and further trained references",
    "tax": "what is lost on tasks that were not trained on",
    "on_policy": "the model's own answers to word problems, drawn as it learns",
    "on_policy_shares": "its own answers where 5, 50 or 95% of them are right",
    "on_policy_sorting": "the same where it sorts digits",
}


def experiment(name: str) -> "Experiment":
    """One of `EXPERIMENTS`."""
    found: Experiment = import_module(f"bnf_align.experiments.{name}").EXPERIMENT
    return found
