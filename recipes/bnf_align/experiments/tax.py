"""What is lost on tasks that were not trained on."""

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


EXPERIMENT = Experiment(
    claim="Alignment by BNF costs significantly less on reasoning tasks than alignment by the best other methods.",
    methods=METHODS,
    seen=seen,
    pictures={"result": (pictures.tax_of_methods, pictures.accuracy_of_methods, pictures.surprise_of_methods)},
)
