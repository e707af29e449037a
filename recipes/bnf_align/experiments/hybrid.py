"""BNF with a contrastive term, from none of it to nothing else."""

from bnf_align.experiments import pictures
from bnf_align.experiments.base import Experiment, Method
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.words import beside, share

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def mixed(weight: float) -> str:
    """BNF and DPO, which together weigh 1."""
    if weight in (0.0, 1.0):
        return "bnf" if weight == 0.0 else "dpo"
    return f"{1 - weight:g}*bnf + {weight:g}*dpo"


def seen(outcome: Outcome) -> str:
    best = max(outcome.lines, key=lambda line: line.numbers["accuracy"].mean)
    return (
        f"The most right answers were {share(best.numbers['accuracy'])}, with a weight of {best.method}; beside BNF "
        f"alone, {beside(outcome)}."
    )


EXPERIMENT = Experiment(
    claim="BNF needs no contrastive term; whether it would gain from one the paper leaves open.",
    methods={f"{weight:g}": Method(mixed(weight)) for weight in WEIGHTS},
    seen=seen,
    pictures={"result": (pictures.accuracy_of_methods, pictures.moved, pictures.surprise_of_methods)},
    seeds=5,
)
