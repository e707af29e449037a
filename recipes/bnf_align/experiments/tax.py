"""What is lost on tasks that were not trained on."""

from matplotlib.figure import Figure

from bnf_align.experiments import pictures
from bnf_align.experiments.base import METHODS, Experiment
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.words import change, listed, which


def seen(outcome: Outcome) -> str:
    bnf = outcome.line("BNF")
    assert bnf is not None
    losers = which(outcome, lambda line: line.numbers["tax"].high < 0)
    return f"On tasks that it was not trained on BNF changed by {change(bnf.numbers['tax'])}; " + (
        f"{listed(losers)} lost beyond their intervals." if losers else "no method lost beyond its interval."
    )


def result(outcome: Outcome) -> Figure:
    return pictures.panels(outcome, pictures.tax_of_methods, pictures.accuracy_of_methods, pictures.surprise_of_methods)


EXPERIMENT = Experiment(
    claim="BNF pays the least alignment tax: it keeps what the model could do before, reasoning above all.",
    methods=METHODS,
    seen=seen,
    pictures={"result": result},
)
