"""The published forms of the BNF loss, in our own words, over operations that PyTorch and MLX share.

Both compute the loss from log-probabilities, with p, r and 1 − p taken out of them:

    ℓ = −t log p − s Σ_{v≠y} sg(π(v)) log π(v)        t = min(1, p / (r + ε))    s = (1 − t + ε) / (1 − p + ε)

t and s without gradient, all in the dtype of the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnf_core.objectives.base import Ops
from bnf_core.types import Array


@dataclass(frozen=True)
class Form:
    """One published form."""

    name: str
    source: str
    epsilon: float
    divisors: Callable[[Array], Array]  # what completions of so many tokens (S,) are each divided by, (S,)

    def token_loss(self, ops: Ops, log_p: Any, others: Any, ref_log_p: Any) -> Any:
        """ℓ of each token, (N,).

        Args:
            log_p: (N,) log-probabilities of the observed tokens, differentiable.
            others: (N,) Σ_{v≠y} sg(π(v)) log π(v), differentiable.
            ref_log_p: (N,) the reference's log-probabilities of the same tokens.
        """
        p, r = ops.exp(ops.stop_gradient(log_p)), ops.exp(ref_log_p)
        t = ops.minimum(p / (r + self.epsilon), 1.0)
        share = (1 - t + self.epsilon) / (1 - p + self.epsilon)
        return -(t * log_p + share * others)


PAPER = Form(
    "paper",
    "arXiv 2410.04834, the code of appendix B up to the other tokens' term, as far as we found it public; from there "
    "on section 3: no ε, and each completion divided by its own length",
    epsilon=0.0,
    divisors=lambda lengths: lengths,
)
OAT = Form(
    "oat",
    "sail-sg/oat, `BNFLoss`, as it stands since its pull request 20 (30 November 2024): ε = 1e-6, and all completions "
    "of a device's batch divided by the length of the shortest one",
    epsilon=1e-6,
    divisors=lambda lengths: np.full_like(lengths, lengths.min()),
)
