"""Other references than the model that training starts from."""

from bnf_align.experiments import pictures
from bnf_align.experiments.base import Experiment, methods
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.words import listed, share

KINDS = ("start", "smaller", "cold", "hot", "stale", "trained")


def seen(outcome: Outcome) -> str:
    own = outcome.line("BNF", "start")
    assert own is not None
    found = {kind: line for kind in outcome.settings[1:] if (line := outcome.line("BNF", kind))}
    apart = [
        f"{kind} {share(line.numbers['accuracy'])}"
        for kind, line in found.items()
        if line.numbers["accuracy"].high < own.numbers["accuracy"].low
        or line.numbers["accuracy"].low > own.numbers["accuracy"].high
    ]
    rest = listed(apart) + " differed" if apart else "no other reference could be told from it"
    return f"With the model itself as the reference BNF answered {share(own.numbers['accuracy'])} right; {rest}."


EXPERIMENT = Experiment(
    claim="The reference is the model that training starts from; of others the paper says nothing.",
    methods=methods("BNF", "DPO"),
    settings={kind: {"reference": kind} for kind in KINDS},
    seen=seen,
    pictures={
        "result": (
            pictures.accuracy_by_setting,
            pictures.chosen_by_setting,
            pictures.surprise_by_setting,
        )
    },
    axis="reference",
    seeds=5,
    scales=("didactic",),
)
