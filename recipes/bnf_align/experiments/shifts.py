"""Which tokens move, how evenly, and where in the sequence the gradient goes."""

from matplotlib.figure import Figure

from bnf_align.experiments import pictures
from bnf_align.experiments.base import METHODS, Experiment
from bnf_align.experiments.outcome import Outcome


def seen(outcome: Outcome) -> str:
    order = sorted(
        (line for m in outcome.methods if (line := outcome.line(m))), key=lambda line: line.numbers["gini"].mean
    )
    bnf = outcome.line("BNF")
    assert bnf is not None
    place = [line.method for line in order].index("BNF") + 1
    return (
        f"The Gini coefficient of BNF's shifts was {bnf.numbers['gini'].mean:.2f}, number {place} of {len(order)} from "
        f"the most even ({order[0].method}, {order[0].numbers['gini'].mean:.2f}) to the least ({order[-1].method}, "
        f"{order[-1].numbers['gini'].mean:.2f})."
    )


def result(outcome: Outcome) -> Figure:
    return pictures.panels(
        outcome,
        pictures.gini_of_methods,
        pictures.places(["shift_at"], "chosen", "Shift of chosen tokens", "log-odds, nats"),
        pictures.places(["shift_at"], "rejected", "Shift of rejected tokens", "log-odds, nats"),
    )


def gradient(outcome: Outcome) -> Figure:
    return pictures.panels(
        outcome,
        pictures.places(["gradient_at", "start"], "chosen", "Gradient on chosen rows, before", "share of the whole"),
        pictures.places(
            ["gradient_at", "start"], "rejected", "Gradient on rejected rows, before", "share of the whole"
        ),
        pictures.places(["gradient_at", "end"], "chosen", "… and after", "share of the whole"),
        pictures.places(["gradient_at", "end"], "rejected", "… and after", "share of the whole"),
    )


EXPERIMENT = Experiment(
    claim="BNF moves few tokens, those that matter, and leaves the others near the reference, where pairwise methods "
    "move many.",
    methods=METHODS,
    seen=seen,
    pictures={"result": result, "gradient": gradient},
)
