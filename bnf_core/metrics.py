"""What a run reports, by name. Sums and counts are carried and divided once, never means of means."""

from collections.abc import Sequence

import numpy as np

from bnf_core.batching import Array, Batch, Example
from bnf_core.protocol import TokenStats

Metrics = dict[str, float | None]


class Meter:
    """Collects token statistics over any number of batches.

    Names, all means over completion tokens unless said otherwise:
        loss                    Σ coefficients · ℓ: the mean over sequences of label · mean token loss
        log_odds_shift/good     policy minus reference log-odds, in nats, on preferred rows
        log_odds_shift/bad      the same on dispreferred rows
        target_weight           t = min(1, p/r)
        share_below_reference   tokens with p < r
        tokens                  completion tokens, a count
    and, as TRL's trainers name them, means over sequences of the sum over a sequence's tokens:
        logps/chosen, logps/rejected        Σ log p of preferred and dispreferred rows
        rewards/chosen, rewards/rejected    Σ (log p − log r), a reward of scale β = 1
        rewards/margins                     their difference
    """

    def __init__(self) -> None:
        self.loss = 0.0
        self._labels: list[Array] = []
        self._shift: list[Array] = []
        self._log_t: list[Array] = []
        self._row_log_prob: dict[int, float] = {}  # mean log p of each row's tokens
        self._rows: list[Array] = []  # of each row: label, Σ log p, Σ log r

    def add(self, batch: Batch, stats: TokenStats, ref_log_odds: Array) -> None:
        policy, reference = stats.log_odds.astype(np.float64), ref_log_odds.astype(np.float64)
        log_p, log_r = -np.logaddexp(0.0, -policy), -np.logaddexp(0.0, -reference)
        with np.errstate(invalid="ignore"):
            shift = np.where(policy == reference, 0.0, policy - reference)
            log_t = np.where(policy >= reference, 0.0, log_p - log_r)
        self.loss += float(batch.coefficients.astype(np.float64) @ stats.token_loss.astype(np.float64))
        self._labels.append(batch.labels[batch.rows])
        self._shift.append(shift)
        self._log_t.append(log_t)
        sums, ref_sums = (np.bincount(batch.rows, weights=x, minlength=len(batch.labels)) for x in (log_p, log_r))
        counts = np.bincount(batch.rows, minlength=len(batch.labels))
        self._rows.append(np.stack([batch.labels, sums, ref_sums], axis=1))
        for row_id, mean in zip(batch.row_ids, sums / counts, strict=True):
            self._row_log_prob[int(row_id)] = float(mean)

    def result(self) -> Metrics:
        labels, shift, log_t = (np.concatenate(x) for x in (self._labels, self._shift, self._log_t))
        row_labels, logps, ref_logps = np.concatenate(self._rows).T
        rewards = logps - ref_logps
        chosen, rejected = (_mean(rewards[sign * row_labels > 0]) for sign in (1, -1))
        return {
            "loss": self.loss,
            "log_odds_shift/good": _mean(shift[labels > 0]),
            "log_odds_shift/bad": _mean(shift[labels < 0]),
            "target_weight": _mean(np.exp(log_t)),
            "share_below_reference": _mean(log_t < 0),
            "tokens": len(labels),
            "logps/chosen": _mean(logps[row_labels > 0]),
            "logps/rejected": _mean(logps[row_labels < 0]),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": None if chosen is None or rejected is None else chosen - rejected,
        }

    def preference_accuracy(self, examples: Sequence[Example]) -> float | None:
        """Over all pairs of a good and a bad completion of one prompt: the share in which the good one has the
        higher mean log-probability per token (ties count half). None without such pairs."""
        groups: dict[int, tuple[list[float], list[float]]] = {}
        for row_id, value in self._row_log_prob.items():
            good, bad = groups.setdefault(examples[row_id].group, ([], []))
            (good if examples[row_id].label else bad).append(value)
        wins = [(g > b) + 0.5 * (g == b) for good, bad in groups.values() for g in good for b in bad]
        return _mean(np.asarray(wins))


def _mean(values: Array) -> float | None:
    return float(np.mean(values)) if len(values) else None
