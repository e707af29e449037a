"""Real right and wrong solutions of GSM8K, in pairs and, as they are published, without."""

from bnf_align.experiments import pictures
from bnf_align.experiments.base import Experiment, Method, methods
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.rows import Mix
from bnf_align.experiments.words import beside, listed, share, which

PAIRS, UNPAIRED = "pairs", "no pairs, 62% wrong"
SINGLE = ("BNF", "balanced BNF", "KTO", "NLL")  # methods that need no pairs


def seen(outcome: Outcome) -> str:
    parts = [f"Of held-out pairs the right solution was the likelier one in {share(outcome.start['accuracy'])} before"]
    for setting in outcome.settings:
        bnf = outcome.line("BNF", setting)
        assert bnf is not None
        told = beside(outcome, setting, "preferred right solutions more often")
        parts += [f"with {setting} BNF came to {share(bnf.numbers['accuracy'])}", *filter(None, [told])]
    fallen = {m for setting in outcome.settings for m in which(outcome, lambda line: line.collapsed > 0, setting)}
    parts.append(f"{listed(sorted(fallen))} collapsed in some seed" if fallen else "no method collapsed")
    return f"{'; '.join(parts)}."


EXPERIMENT = Experiment(
    claim="BNF keeps training stable on mathematical data, where pairwise methods are not, and needs no pairs.",
    methods={
        "BNF": Method("bnf"),
        "balanced BNF": Method("bnf", {"balanced": True}),
        **methods("DPO", "KTO", "NLL", "SimPO"),
    },
    settings={PAIRS: {"mix": Mix()}, UNPAIRED: {"mix": Mix(paired=0.0, chosen=0.38)}},
    seen=seen,
    pictures={"result": pictures.BY_SETTING, "pairs": (pictures.moved, pictures.gradient_norms)},
    axis="rows",
    # Pairs are balanced as they are.
    applies=lambda method, setting: method in SINGLE if setting == UNPAIRED else method != "balanced BNF",
    scales=("gsm8k",),
)
