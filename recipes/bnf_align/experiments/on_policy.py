"""The model's own answers, drawn as it learns, judged right or wrong: what is learned from as many of them."""

from bnf_align.experiments import pictures
from bnf_align.experiments.base import Experiment, Method
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.words import beside, drawn_right, share

METHODS = {
    "BNF": Method("bnf"),
    "NLL on right ones": Method("nll"),
    "BNF, drawn at the start": Method("bnf", {"answers": "start"}, swept="bnf, drawn at the start"),
    "KTO": Method("kto"),
    "GRPO": Method("grpo"),
}


def seen(outcome: Outcome) -> str:
    bnf = outcome.line("BNF")
    assert bnf is not None
    first, last = drawn_right(bnf)
    return (
        f"From {outcome.start['accuracy']:.0%} held-out questions right, BNF came to {share(bnf.numbers['accuracy'])}; "
        f"{beside(outcome)}. Of its own answers {first:.0%} were right in the first five steps and "
        f"{last:.0%} in the last."
    )


def of_task(task: str) -> Experiment:
    return Experiment(
        claim="On-policy data and a negative gradient together make feedback work (arXiv 2404.14367): BNF on its own "
        "answers does better than fine-tuning on the right ones, and than BNF on answers drawn beforehand.",
        methods=METHODS,
        common={"answers": "policy", "task": task},
        seen=seen,
        pictures={"result": (pictures.accuracy_of_methods, pictures.samples, pictures.moved)},
        seeds=5,
    )


EXPERIMENT = of_task("problems")
