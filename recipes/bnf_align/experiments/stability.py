"""Which methods keep a model whole on near-identical right and wrong answers."""

from matplotlib.figure import Figure

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


def result(outcome: Outcome) -> Figure:
    return pictures.panels(outcome, pictures.accuracy_of_methods, pictures.moved, pictures.surprise_of_methods)


def course(outcome: Outcome) -> Figure:
    return pictures.panels(
        outcome,
        pictures.path("log_p_chosen", "Chosen rows held out", "log-likelihood of a row, nats"),
        pictures.path("log_p_rejected", "Rejected rows held out", "log-likelihood of a row, nats"),
        pictures.path("perplexity", "Text never trained on", "perplexity"),
        pictures.gradient_norms,
    )


EXPERIMENT = Experiment(
    claim="BNF stays stable where the chosen and the rejected answer are nearly the same, as in arithmetic, while the "
    "likelihoods of pairwise methods such as DPO fall or collapse.",
    methods=METHODS,
    seen=seen,
    pictures={"result": result, "course": course},
)
