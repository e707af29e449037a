"""Labels that are wrong, and pairs that are there both ways round."""

from bnf_align.experiments import pictures
from bnf_align.experiments.base import Experiment, Method, methods
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.rows import Mix
from bnf_align.experiments.words import beside, share

CONTRADICTED = "40% both ways"


def seen(outcome: Outcome) -> str:
    clean, noisy = (outcome.line("BNF", setting) for setting in ("0%", "40%"))
    assert clean is not None and noisy is not None
    return (
        f"BNF answered {share(clean.numbers['accuracy'])} right with clean labels and "
        f"{share(noisy.numbers['accuracy'])} with 40% flipped; there, {beside(outcome, '40%')}."
    )


EXPERIMENT = Experiment(
    claim="The paper claims nothing of wrong labels; that BNF's gradients are bounded suggests that they do less harm.",
    methods={
        **methods("BNF", "DPO"),
        "cDPO": Method("dpo(label_smoothing=0.2)"),
        "rDPO": Method("dpo(label_smoothing=0.2, robust=True)"),
    },
    settings={f"{share:.0%}": {"mix": Mix(flipped=share)} for share in (0.0, 0.2, 0.4)}
    | {CONTRADICTED: {"mix": Mix(contradicted=0.4)}},
    seen=seen,
    pictures={
        "result": (
            pictures.accuracy_by_setting,
            pictures.chosen_by_setting,
            pictures.surprise_by_setting,
        )
    },
    axis="share of wrong labels",
    seeds=5,
)
