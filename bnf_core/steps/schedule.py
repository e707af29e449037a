"""The learning rate of each optimizer step, one function for every backend."""

import math

from bnf_core.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Linear warmup to the peak, then constant, or down to zero linearly or by cosine.

    Args:
        step: 0 for the first optimizer step. The warmup's first step already moves: (step + 1) / warmup_steps.
        num_steps: optimizer steps of the whole run.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    share = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * share
