"""All, half, a quarter or none of the rows with a partner, and none with grades; as many rows each time."""

from bnf_align.experiments import pictures
from bnf_align.experiments.base import Experiment, methods
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.rows import Mix
from bnf_align.experiments.words import share

SHARES = (1.0, 0.5, 0.25, 0.0)
UNPAIRED, GRADED = "0%", "0%, graded"


def seen(outcome: Outcome) -> str:
    lines = [outcome.line("BNF", setting) for setting in (outcome.settings[0], UNPAIRED, GRADED)]
    paired, unpaired, graded = (line.numbers["accuracy"] for line in lines if line)
    apart = paired.low > unpaired.high or unpaired.low > paired.high
    told = "which differ" if apart else "which their intervals do not tell apart"
    return (
        f"BNF answered {share(paired)} right with pairs alone and {share(unpaired)} without any, {told}; with grades "
        f"in place of labels {share(graded)}."
    )


EXPERIMENT = Experiment(
    claim="BNF needs no pairwise preference data.",
    methods=methods("BNF", "KTO", "DPO"),
    settings={f"{share:.0%}": {"mix": Mix(paired=share)} for share in SHARES}
    | {GRADED: {"mix": Mix(paired=0.0, graded=True)}},
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
    applies=lambda method, setting: method != "DPO" or setting not in (UNPAIRED, GRADED),
)
