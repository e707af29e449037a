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
        here = ops.stop_gradient(seen.log_odds)
        loss, slope = loss_and_slope(ops, here, seen.other_entropy, seen.ref_log_odds)
        return seen.structure.labels * mean_over_tokens(ops, linearised(ops, loss, slope, seen.log_odds), seen)

    def metrics(self, log_odds: Array, ref_log_odds: Array) -> dict[str, Array]:
        log_t = np.minimum(log_ratio(NumPyOps(), log_odds, ref_log_odds), 0.0)
        return {"target_weight": np.exp(log_t), "share_below_reference": log_t < 0}


def loss_and_slope(ops: Ops, log_odds: Any, other_entropy: Any, ref_log_odds: Any) -> tuple[Any, Any]:
    """ℓ and ∂ℓ/∂o of each token, (N,), neither of them differentiable.

    ℓ = −t log p − (1 − t) (log(1 − p) − H_q) and ∂ℓ/∂o = p − t = −σ(−o) min(1, exp(o − o_r)), which has no subtraction,
    so that no digit of a confident token is lost.
    """
    banned = log_odds < -1e30  # p = 0: t = 0, and nothing can be learned
    log_p, log_not_p = -ops.softplus(-log_odds), -ops.softplus(log_odds)
    log_t = ops.where(banned, -1e30, ops.minimum(log_p + ops.softplus(-ref_log_odds), 0.0))
    t, not_t = ops.exp(log_t), -ops.expm1(log_t)
    # 0 · ∞ is 0 here: a part without weight does not count.
    observed = ops.where(t == 0, 0.0, t * log_p)
    loss = -(observed + ops.where(not_t == 0, 0.0, not_t * (log_not_p - other_entropy)))
    ratio = ops.where(log_odds >= ref_log_odds, 1.0, ops.exp(log_odds - ref_log_odds))
    return loss, ops.where(banned, 0.0, -(ops.sigmoid(-log_odds) * ratio))
