"""Which methods keep a model whole on near-identical right and wrong answers."""

from bnf_align.experiments import pictures
from bnf_align.experiments.base import METHODS, Experiment
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.words import beside, listed, share, which


def seen(outcome: Outcome) -> str:
    fallen = which(outcome, lambda line: line.collapsed > 0)
    bnf = outcome.line("BNF")
    assert bnf is not None
    collapse = f"{listed(fallen)} collapsed in some seed" if fallen else "no method collapsed at its best learning rate"
    chosen = which(outcome, lambda line: line.numbers["moved_chosen"].high < 0)
    sank = (
        f"the chosen rows of {listed(chosen)} became less likely" if chosen else "no method made chosen rows unlikelier"
    )
    return (
        f"BNF went from {share(outcome.start['accuracy'])} right answers to {share(bnf.numbers['accuracy'])}; "
        f"{beside(outcome)}; {collapse}; {sank}."
    )


EXPERIMENT = Experiment(
    claim="Pairwise methods such as DPO are prone to instability, above all on mathematical data; BNF's bidirectional "
    "negative feedback keeps training stable.",
    methods=METHODS,
    seen=seen,
    pictures={
        "result": (pictures.accuracy_of_methods, pictures.moved, pictures.surprise_of_methods),
        "course": (
            pictures.path("log_p_chosen", "Chosen rows held out", "log-likelihood of a row, nats"),
            pictures.path("log_p_rejected", "Rejected rows held out", "log-likelihood of a row, nats"),
            pictures.path("perplexity", "Text never trained on", "perplexity"),
            pictures.gradient_norms,
        ),
    },
)
