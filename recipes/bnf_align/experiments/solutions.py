"""Real right and wrong solutions of GSM8K, in pairs and, as they are published, without."""

from bnf_align.experiments import pictures
from bnf_align.experiments.base import Experiment, Method, methods
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.rows import Mix
from bnf_align.experiments.words import beside, listed, share, which

PAIRS, UNPAIRED = "pairs", "no pairs, 62% wrong"
SINGLE = ("BNF", "balanced BNF", "KTO", "NLL")  # methods that need no pairs


def seen(outcome: Outcome) -> str:
    parts = []
    for setting in outcome.settings:
        bnf = outcome.line("BNF", setting)
        assert bnf is not None
        told = beside(outcome, setting, "preferred right solutions more often")
        parts.append(f"with {setting} {share(bnf.numbers['accuracy'])}" + (f" ({told})" if told else ""))
    fallen = [m for s in outcome.settings for m in which(outcome, lambda line: line.collapsed > 0, s)]
    return (
        f"The right solution was the likelier one of {outcome.start['accuracy']:.0%} of held-out pairs before, and "
        f"after BNF, {'; '.join(parts)}; "
        + (f"{listed(sorted(set(fallen)))} collapsed in some seed." if fallen else "no method collapsed.")
    )


EXPERIMENT = Experiment(
    claim="BNF keeps training stable on mathematical data, where pairwise methods are not, and needs no pairs.",
    methods={
        "BNF": Method("bnf"),
        "balanced BNF": Method("bnf", {"balanced": True}),
        **methods("DPO", "KTO", "NLL", "SimPO"),
    },
    settings={PAIRS: {"mix": Mix()}, UNPAIRED: {"mix": Mix(paired=0.0, chosen=0.38)}},
    seen=seen,
    pictures={
        "result": (
            pictures.accuracy_by_setting,
            pictures.surprise_by_setting,
            pictures.chosen_by_setting,
            pictures.rejected_by_setting,
        ),
        "course": (
            pictures.path("log_p_chosen", "Right solutions held out", "log-likelihood, nats"),
            pictures.path("log_p_rejected", "Wrong solutions held out", "log-likelihood, nats"),
            pictures.path("perplexity", "Text never trained on", "perplexity"),
            pictures.gradient_norms,
        ),
    },
    axis="rows",
    # Pairs are balanced as they are.
    applies=lambda method, setting: method in SINGLE if setting == UNPAIRED else method != "balanced BNF",
    scales=("gsm8k",),
)
