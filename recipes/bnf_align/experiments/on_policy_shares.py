"""The model's own answers to questions of which it answers few, half or nearly all right."""

from bnf_align.experiments import pictures
from bnf_align.experiments.base import Experiment, Method
from bnf_align.experiments.outcome import Line, Outcome
from bnf_align.experiments.words import drawn_right, share

SHARES = (0.05, 0.5, 0.95)
METHODS = {"BNF": Method("bnf"), "NLL on right ones": Method("nll"), "KTO": Method("kto")}


def seen(outcome: Outcome) -> str:
    parts = [_of(outcome, setting) for setting in outcome.settings]
    return f"From {outcome.start['accuracy']:.0%} held-out questions right, BNF came to {'; to '.join(parts)}."


def _of(outcome: Outcome, setting: str) -> str:
    line = outcome.line("BNF", setting)
    assert line is not None
    first, last = drawn_right(line)
    return (
        f"{share(line.numbers['accuracy'])} where {first:.0%} of its answers were right in the first five steps and "
        f"{last:.0%} in the last, which moved right answers by {_nats(line, 'moved_chosen')} and wrong ones by "
        f"{_nats(line, 'moved_rejected')} nats"
    )


def _nats(line: Line, name: str) -> str:
    x = line.numbers[name]
    return f"{x.mean:+.1f} ({x.low:+.1f} to {x.high:+.1f})"


EXPERIMENT = Experiment(
    claim="The paper says nothing of samples that are mostly right or mostly wrong; BNF weighs neither label against "
    "the other.",
    methods=METHODS,
    settings={f"{share:.0%}": {"share": share} for share in SHARES},
    common={"answers": "policy"},
    seen=seen,
    pictures={"result": pictures.BY_SETTING},
    axis="share of right answers at the start",
    seeds=5,
)
