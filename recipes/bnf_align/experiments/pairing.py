"""All, half, a quarter or none of the rows with a partner; as many rows each time."""

from bnf_align.experiments import pictures
from bnf_align.experiments.base import Experiment, methods
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.rows import Mix
from bnf_align.experiments.words import share

SHARES = (1.0, 0.5, 0.25, 0.0)


def seen(outcome: Outcome) -> str:
    first, last = (outcome.line("BNF", setting) for setting in (outcome.settings[0], outcome.settings[-1]))
    assert first is not None and last is not None
    a, b = first.numbers["accuracy"], last.numbers["accuracy"]
    overlap = "which their intervals do not tell apart" if a.low <= b.high and b.low <= a.high else "which differ"
    return f"BNF answered {share(a)} right with pairs alone and {share(b)} without any, {overlap}."


EXPERIMENT = Experiment(
    claim="BNF needs no pairwise preference data.",
    methods=methods("BNF", "KTO", "DPO"),
    settings={f"{share:.0%}": {"mix": Mix(paired=share)} for share in SHARES},
    seen=seen,
    pictures={
        "result": (
            pictures.accuracy_by_setting,
            pictures.chosen_by_setting,
            pictures.rejected_by_setting,
        )
    },
    axis="share of rows with a partner",
    seeds=5,
    applies=lambda method, setting: method != "DPO" or setting != "0%",
)
