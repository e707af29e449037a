"""Bidirectional Negative Feedback, the default."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bnf_core.objectives.base import Objective, Ops, Seen, Units, linearised, log_ratio, mean_over_tokens
from bnf_core.objectives.numpy_ops import NumPyOps
from bnf_core.types import Array


@dataclass(frozen=True)
class BNF(Objective):
    """Label · mean of the BNF token losses. The backends fuse it with the head in one pass (`linear_bnf_loss`); this is
    the same loss on log-odds, for sums with others and for metrics."""

    name = "bnf"
    source = "arXiv 2410.04834, section 3"
    wants = "raises chosen and lowers rejected tokens, and lets go of those that are far from the reference"
    formula = "± mean −Σᵥ sg(t(v)) log π(v), t = min(1, p/r) on the token"

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        return seen.structure.labels * mean_over_tokens(ops, token_loss(ops, seen), seen)

    def metrics(self, log_odds: Array, ref_log_odds: Array) -> dict[str, Array]:
        log_t = np.minimum(log_ratio(NumPyOps(), log_odds, ref_log_odds), 0.0)
        return {"target_weight": np.exp(log_t), "share_below_reference": log_t < 0}


def token_loss(ops: Ops, seen: Seen) -> Any:
    """ℓ (N,) = −t log p − (1 − t) (log(1 − p) − H_q), with slope p − t = −(1 − p) min(1, odds(p) / odds(r))."""
    o, r = ops.stop_gradient(seen.log_odds), seen.ref_log_odds
    banned = o < -1e30  # p = 0: t = 0, and nothing can be learned
    log_p, log_not_p = -ops.softplus(-o), -ops.softplus(o)
    log_t = ops.where(banned, -1e30, ops.minimum(log_p + ops.softplus(-r), 0.0))
    t, not_t = ops.exp(log_t), -ops.expm1(log_t)
    # 0 · ∞ is 0 here: a part without weight does not count.
    value = -ops.where(t == 0, 0.0, t * ops.where(t == 0, 0.0, log_p))
    value = value - ops.where(not_t == 0, 0.0, not_t * ops.where(not_t == 0, 0.0, log_not_p - seen.other_entropy))
    slope = ops.where(banned, 0.0, -ops.sigmoid(-o) * ops.exp(ops.minimum(o - r, 0.0)))
    return linearised(ops, value, slope, seen.log_odds)
