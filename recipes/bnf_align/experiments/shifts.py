"""Which tokens move, how evenly, and where in the sequence the gradient goes."""

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


EXPERIMENT = Experiment(
    claim="The instability of other methods comes of gradients that grow as a rejected token gets less likely; those "
    "of BNF fade on both sides of the reference.",
    methods=METHODS,
    seen=seen,
    pictures={
        "result": (
            pictures.gini_of_methods,
            pictures.places(["shift_at"], "chosen", "Shift of chosen tokens", "log-odds, nats"),
            pictures.places(["shift_at"], "rejected", "Shift of rejected tokens", "log-odds, nats"),
        ),
        "gradient": tuple(
            pictures.places(["gradient_at", when], kind, f"Gradient on {kind} rows, {said}", "share of the whole")
            for when, said in (("start", "before"), ("end", "after"))
            for kind in ("chosen", "rejected")
        ),
    },
)
