"""The training loop of both backends: one optimizer step after another, whatever makes the rows."""

from collections.abc import Callable, Iterable

from bnf_core.protocol import Engine
from bnf_core.steps.steps import Step
from bnf_core.types import TokenScores

# Called after every step, by every process: the step, the policy's scores of its micro-batches' tokens, the global norm
# of the gradient before clipping. Where the norm is not finite the step was not taken.
OnStepEnd = Callable[[Step, list[TokenScores], float], None]


def train(engine: Engine, steps: Iterable[Step], on_step_end: OnStepEnd, max_grad_norm: float | None) -> None:
    """Take every step, each at its own learning rate.

    The next step is asked for when the last one is done and reported, so that `steps` may sample its rows from the
    model as it then is. Whatever `steps` or `on_step_end` raises ends the training, and the model is as the last step
    left it.
    """
    for step in steps:
        stats, grad_norm = engine.step(step.batches, step.learning_rate, max_grad_norm, step.baseline)
        on_step_end(step, stats, grad_norm)
