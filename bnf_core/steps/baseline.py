"""What an objective's rewards are compared with at each step: one number of the whole step, without gradient, the same
on every process and however the step is cut.

KTO's z₀ is the mean reward of mismatched rows, and takes a forward pass of its own; BCO's δ lies between the mean
rewards of chosen and of rejected rows, over all steps so far.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from bnf_core.objectives import Objective
from bnf_core.objectives.base import log_ratio
from bnf_core.objectives.numpy_ops import NumPyOps
from bnf_core.protocol import Engine
from bnf_core.steps.batching import MicroBatching, micro_batches
from bnf_core.steps.mismatched import mismatched, once
from bnf_core.steps.reference import Reference, with_reference
from bnf_core.types import Array, Batch, Example, TokenScores


class Baseline:
    """
    Args:
        reference: that of the run. Mismatched rows are kept in it where they come again: not those of a stream, which
            are made of the rows that happen to share a step.
        batching: how mismatched rows are cut into micro-batches.
    """

    def __init__(
        self, objective: Objective, engine: Engine, reference: Reference, batching: MicroBatching, pad_id: int = 0
    ):
        self.kind = objective.baseline_from
        self.engine, self.reference, self.pad_id = engine, reference, pad_id
        self.batching = replace(batching, unit="row")
        self._sums = np.zeros((2, 2))  # of chosen and of rejected rows: their log-ratios, and how many

    def __call__(
        self,
        examples: Sequence[Example],
        batches: Sequence[tuple[Batch, Array]],
        scores: Sequence[TokenScores] | None = None,
    ) -> float:
        """Of a step, to be asked by every process in step.

        Args:
            examples: of the global batch.
            batches: this process's micro-batches of it, with their ref_log_odds.
            scores: what the policy says of these, where that is known already.
        """
        if self.kind == "mismatched":
            rows = mismatched(examples)
            if not rows:
                return 0.0
            # The rows of a pair have one mismatched completion: scored once, and counted as often as it is there.
            met_again = scores is not None or examples[0].mismatched is not None
            ratios, _ = self._log_ratios(self._with_reference(once(rows), met_again))
            counts = Counter(row.key for row in rows)
            return max(0.0, float(np.average(ratios, weights=[counts[key] for key in sorted(counts)])))
        if self.kind == "running":
            ratios, labels = self._log_ratios(batches, scores)
            for i, of in enumerate((labels > 0, labels < 0)):
                self._sums[i] += ratios[of].sum(), of.sum()
            means = [total / count for total, count in self._sums if count]
            return float(np.mean(means))
        return 0.0

    def state(self) -> dict[str, Array]:
        """What runs on from step to step."""
        return {"sums": self._sums.copy()} if self.kind == "running" else {}

    def load_state(self, state: Mapping[str, Array]) -> None:
        if self.kind == "running":
            self._sums = np.array(state["sums"], np.float64)

    def _with_reference(self, rows: Sequence[Example], met_again: bool) -> list[tuple[Batch, Array]]:
        processes = self.engine.processes
        batches = micro_batches(rows, self.batching, self.pad_id)
        reference = self.reference if met_again else self.reference.passing()
        return with_reference(batches[processes.share(batches)], reference, processes)

    def _log_ratios(
        self, batches: Sequence[tuple[Batch, Array]], scores: Sequence[TokenScores] | None = None
    ) -> tuple[Array, Array]:
        """Σ log(p / r) of each row of all processes, and its label, in the order of the rows' keys: (S,) float64."""
        found: list[list[Array]] = [[], [], []]
        if scores is None:
            scores = [self.engine.evaluate(batch, ref_log_odds) for batch, ref_log_odds in batches]
        for (batch, ref_log_odds), (policy, _) in zip(batches, scores, strict=True):
            with np.errstate(all="ignore"):
                ratio = log_ratio(NumPyOps(), policy.astype(np.float64), ref_log_odds.astype(np.float64))
            found[0].append(batch.row_sums(ratio))
            found[1].append(batch.labels.astype(np.float64))
            found[2].append(batch.keys)
        kinds = np.float64, np.float64, np.uint64
        mine = [np.concatenate([np.zeros(0, kind), *parts]) for kind, parts in zip(kinds, found, strict=True)]
        ratios, labels, keys = (np.concatenate(self.engine.processes.gather(part)) for part in mine)
        order = np.argsort(keys, kind="stable")
        return ratios[order], labels[order]
