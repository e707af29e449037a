"""What a run reports, by name. Sums and counts of each row are carried and divided once, never means of means."""

from typing import Any

import numpy as np

from bnf_core.processes import Processes
from bnf_core.types import Array, Batch, TokenStats

Metrics = dict[str, float | None]

# Names that others show as well.
SHIFT_CHOSEN, SHIFT_REJECTED = "log_odds_shift/chosen", "log_odds_shift/rejected"

# Of each row: its label, prompt group, token count, and sums over its tokens.
COLUMNS = ("label", "tokens", "loss", "log_p", "log_r", "shift", "target", "below")


class Meter:
    """Collects token statistics over any number of batches and processes; what it reports does not depend on how
    the rows were cut into batches or dealt to processes.

    Names, all means over completion tokens unless said otherwise:
        loss                    Σ coefficients · ℓ: the mean over sequences of label · mean token loss
        log_odds_shift/chosen     policy minus reference log-odds, in nats, on chosen rows
        log_odds_shift/rejected      the same on rejected rows
        target_weight           t = min(1, p/r)
        share_below_reference   tokens with p < r
        tokens                  completion tokens, a count
        preference_accuracy     over all pairs of a chosen and a rejected completion of one prompt: the share in which
                                the chosen one has the higher mean log-probability per token, ties count half
    and, as TRL's trainers name them, means over sequences of the sum over a sequence's tokens:
        logps/chosen, logps/rejected        Σ log p of chosen and rejected rows
        rewards/chosen, rewards/rejected    Σ (log p − log r), a reward of scale β = 1
        rewards/margins                     their difference
        rewards/accuracies                  over the same pairs: the share in which the chosen one has the higher reward
    None where there is nothing to average: no such rows, no pairs.
    """

    def __init__(self) -> None:
        self._tables = [np.zeros((0, len(COLUMNS)))]
        self._groups = [np.zeros(0, np.int64)]
        self._keys = [np.zeros(0, np.uint64)]

    def add(self, batch: Batch, stats: TokenStats, ref_log_odds: Array) -> None:
        policy, reference = stats.log_odds.astype(np.float64), ref_log_odds.astype(np.float64)
        with np.errstate(invalid="ignore"):  # a loss that is not finite is told by the caller
            log_p, log_r = -np.logaddexp(0.0, -policy), -np.logaddexp(0.0, -reference)
            shift = np.where(policy == reference, 0.0, policy - reference)
            log_t = np.where(policy >= reference, 0.0, log_p - log_r)
        loss = batch.coefficients.astype(np.float64) * stats.token_loss.astype(np.float64)
        of_tokens = (np.ones_like(loss), loss, log_p, log_r, shift, np.exp(log_t), log_t < 0)
        sums = [np.bincount(batch.sequence_ids, weights=x, minlength=len(batch.labels)) for x in of_tokens]
        self._tables.append(np.stack([batch.labels, *sums], axis=1))
        self._groups.append(batch.groups)
        self._keys.append(batch.keys)

    def gather(self, processes: Processes) -> None:
        """Add what the other processes have; every process must call it."""
        table, groups, keys = np.concatenate(self._tables), np.concatenate(self._groups), np.concatenate(self._keys)
        self._tables = [part.reshape(-1, len(COLUMNS)) for part in processes.gather(table.ravel())]
        self._groups, self._keys = processes.gather(groups), processes.gather(keys)

    def result(self) -> Metrics:
        order = np.argsort(np.concatenate(self._keys), kind="stable")  # sums in an order that the rows decide
        rows = dict(zip(COLUMNS, np.concatenate(self._tables)[order].T, strict=True))
        groups = np.concatenate(self._groups)[order]
        is_chosen, is_rejected = rows["label"] > 0, rows["label"] < 0
        everything = is_chosen | is_rejected
        rewards = rows["log_p"] - rows["log_r"]
        chosen, rejected = _mean(rewards[is_chosen]), _mean(rewards[is_rejected])

        def over_tokens(name: str, of: Array) -> float | None:
            return float(rows[name][of].sum() / rows["tokens"][of].sum()) if of.any() else None

        return {
            "loss": float(rows["loss"].sum()),
            SHIFT_CHOSEN: over_tokens("shift", is_chosen),
            SHIFT_REJECTED: over_tokens("shift", is_rejected),
            "target_weight": over_tokens("target", everything),
            "share_below_reference": over_tokens("below", everything),
            "tokens": int(rows["tokens"].sum()),
            "preference_accuracy": _pair_accuracy(rows["log_p"] / np.maximum(rows["tokens"], 1), groups, is_chosen),
            "logps/chosen": _mean(rows["log_p"][is_chosen]),
            "logps/rejected": _mean(rows["log_p"][is_rejected]),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": None if chosen is None or rejected is None else chosen - rejected,
            "rewards/accuracies": _pair_accuracy(rewards, groups, is_chosen),
        }


def _pair_accuracy(values: Array, groups: Array, is_chosen: Array) -> float | None:
    """Over all pairs of a chosen and a rejected row of one group: the share in which the chosen one has more."""
    wins, pairs = 0.0, 0
    by_group = np.argsort(groups, kind="stable")
    for rows in np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1):
        a, b = values[rows][is_chosen[rows]], np.sort(values[rows][~is_chosen[rows]])
        below, up_to = np.searchsorted(b, a, "left"), np.searchsorted(b, a, "right")
        wins += float((below + up_to).sum()) / 2.0  # a tie counts half
        pairs += len(a) * len(b)
    return wins / pairs if pairs else None


def _mean(values: Array) -> float | None:
    return float(np.mean(values)) if len(values) else None


def with_present_names(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl of a run before 0.2, which called chosen rows good and rejected ones bad."""
    before = {"log_odds_shift/good": SHIFT_CHOSEN, "log_odds_shift/bad": SHIFT_REJECTED}
    return {before.get(name, name): value for name, value in line.items()}
