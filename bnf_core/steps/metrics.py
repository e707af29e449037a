"""What a run reports, by name. Sums and counts of each row are carried and divided once, never means of means."""

from typing import Any

import numpy as np

from bnf_core.objectives import Objective, Rows, Seen, structure
from bnf_core.objectives.base import log_ratio, weighted_losses
from bnf_core.objectives.bnf import BNF
from bnf_core.objectives.numpy_ops import NumPyOps, float64
from bnf_core.processes import Processes
from bnf_core.types import Array, Batch, TokenScores

Metrics = dict[str, float | None]

# Names that others show as well.
SHIFT_CHOSEN, SHIFT_REJECTED = "log_odds_shift/chosen", "log_odds_shift/rejected"
REWARD_CHOSEN, REWARD_REJECTED = "rewards/chosen", "rewards/rejected"

# Of each row: its label, token count, part of the loss and reward, and sums over its tokens. What only its objective
# knows comes after these.
COLUMNS = ("label", "tokens", "loss", "reward", "log_p", "shift")


class Meter:
    """Collects what the policy says of tokens over any number of batches and processes, and computes the objective
    once more, in float64; what it reports does not depend on how the rows were cut into batches or dealt to processes.

    Args:
        objective: whose loss and rewards these are; default: BNF.

    Names, all means over completion tokens unless said otherwise:
        loss                    the objective's, a mean over its rows or pairs
        log_odds_shift/chosen     policy minus reference log-odds, in nats, on chosen rows
        log_odds_shift/rejected      the same on rejected rows
        target_weight           BNF alone: t = min(1, p/r)
        share_below_reference   BNF alone: tokens with p < r
        tokens                  completion tokens, a count
        preference_accuracy     over all pairs of a chosen and a rejected completion of one prompt: the share in which
                                the chosen one has the higher mean log-probability per token, ties count half
    and, as TRL's trainers name them, means over sequences of the sum over a sequence's tokens:
        logps/chosen, logps/rejected        Σ log p of chosen and rejected rows
        rewards/chosen, rewards/rejected    the objective's rewards: of BNF Σ (log p − log r), of DPO β times that
        rewards/margins                     their difference
        rewards/accuracies                  over the same pairs: the share in which the chosen one has the higher reward
    None where there is nothing to average: no such rows, no pairs, no reference.
    """

    def __init__(self, objective: Objective | None = None) -> None:
        self.objective = objective or BNF()
        nothing = np.zeros(0)
        self._own = tuple(self.objective.metrics(nothing, nothing))
        self._columns = COLUMNS + self._own
        self._tables = [np.zeros((0, len(self._columns)))]
        self._groups = [np.zeros(0, np.int64)]
        self._keys = [np.zeros(0, np.uint64)]

    def add(self, batch: Batch, scores: TokenScores, ref_log_odds: Array, baseline: float = 0.0) -> None:
        policy, reference = scores.log_odds.astype(np.float64), ref_log_odds.astype(np.float64)
        rows = structure(self.objective, batch, baseline)
        seen = Seen(policy, scores.other_entropy.astype(np.float64), reference, float64(rows))
        ops = NumPyOps()

        with np.errstate(all="ignore"):  # infinities are ordinary here, and what they spoil shows
            log_p = batch.row_sums(-ops.softplus(-policy))
            shift = batch.row_sums(np.where(policy == reference, 0.0, policy - reference))
            ratio = batch.row_sums(log_ratio(ops, policy, reference))
            tokens = batch.row_sums(np.ones_like(policy))
            loss = np.zeros(len(batch.labels))
            for units, parts in weighted_losses(self.objective, ops, seen):
                np.add.at(loss, units.rejected, parts)
            reward = self.objective.rewards(Rows(log_p, ratio, tokens, seen.structure.labels))
            own = [batch.row_sums(value) for value in self.objective.metrics(policy, reference).values()]
        self._tables.append(np.stack([batch.labels, tokens, loss, reward, log_p, shift, *own], axis=1))
        self._groups.append(batch.groups)
        self._keys.append(batch.keys)

    def gather(self, processes: Processes) -> None:
        """Add what the other processes have; every process must call it."""
        table, groups, keys = np.concatenate(self._tables), np.concatenate(self._groups), np.concatenate(self._keys)
        self._tables = [part.reshape(-1, len(self._columns)) for part in processes.gather(table.ravel())]
        self._groups, self._keys = processes.gather(groups), processes.gather(keys)

    def result(self) -> Metrics:
        order = np.argsort(np.concatenate(self._keys), kind="stable")  # sums in an order that the rows decide
        rows = dict(zip(self._columns, np.concatenate(self._tables)[order].T, strict=True))
        groups = np.concatenate(self._groups)[order]
        is_chosen, is_rejected = rows["label"] > 0, rows["label"] < 0
        everything = is_chosen | is_rejected
        rewards = rows["reward"]
        chosen, rejected = _mean(rewards[is_chosen]), _mean(rewards[is_rejected])

        def over_tokens(name: str, of: Array) -> float | None:
            return float(rows[name][of].sum() / rows["tokens"][of].sum()) if of.any() else None

        def shift(of: Array) -> float | None:
            return over_tokens("shift", of) if self.objective.needs_reference else None

        return {
            "loss": float(rows["loss"].sum()),
            SHIFT_CHOSEN: shift(is_chosen),
            SHIFT_REJECTED: shift(is_rejected),
            **{name: over_tokens(name, everything) for name in self._own},
            "tokens": int(rows["tokens"].sum()),
            "preference_accuracy": _pair_accuracy(rows["log_p"] / np.maximum(rows["tokens"], 1), groups, is_chosen),
            "logps/chosen": _mean(rows["log_p"][is_chosen]),
            "logps/rejected": _mean(rows["log_p"][is_rejected]),
            REWARD_CHOSEN: chosen,
            REWARD_REJECTED: rejected,
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
