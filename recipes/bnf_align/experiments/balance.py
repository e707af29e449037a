"""Feedback of which 5 to 95% is chosen, no row with a partner."""

from bnf_align.experiments import pictures
from bnf_align.experiments.base import Experiment, Method, methods
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.rows import Mix
from bnf_align.experiments.words import change, share

SHARES = (0.05, 0.2, 0.5, 0.8, 0.95)


def seen(outcome: Outcome) -> str:
    parts = []
    for setting in (outcome.settings[0], outcome.settings[-1]):
        bnf, weighed = outcome.line("BNF", setting), outcome.line("BNF, balanced", setting)
        assert bnf is not None
        parts.append(f"with {setting} of the rows chosen BNF answered {share(bnf.numbers['accuracy'])} right")
        if weighed:
            parts.append(f"weighing both labels alike changed that by {change(weighed.numbers['beside'])}")
    return f"From {share(outcome.start['accuracy'])} right answers: {'; '.join(parts)}."


EXPERIMENT = Experiment(
    claim="BNF needs neither pairs nor extra hyper-parameters, and so no weighing of chosen against rejected rows.",
    methods={
        "BNF": Method("bnf"),
        "BNF, balanced": Method("bnf", {"balanced": True}),
        **methods("KTO", "NLL + unlikelihood"),
    },
    settings={f"{share:.0%}": {"mix": Mix(paired=0.0, chosen=share)} for share in SHARES},
    seen=seen,
    pictures={"result": pictures.BY_SETTING},
    axis="share of chosen rows",
    seeds=5,
)
