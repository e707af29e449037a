"""What single tokens are to a policy as it is trained: `tokens.jsonl` in the run folder, a line for each evaluation.

step           optimizer steps done
target_weight  of BNF's t = min(1, p/r) of chosen and of rejected rows: how many tokens are in each tenth of 0 to 1
gradient_at    |∂L/∂o| by place in the completion, as shares of the whole, of chosen and of rejected rows
rows           some held-out rows: label, tokens as text, their log_odds under the policy
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bnf_core.objectives import Objective
from bnf_core.objectives.base import log_ratio
from bnf_core.objectives.numpy_ops import NumPyOps
from bnf_core.protocol import Engine, Losses
from bnf_core.steps.batching import MicroBatching, micro_batches
from bnf_core.steps.reference import Reference
from bnf_core.types import Array, Batch, Example, TokenScores

NAME = "tokens.jsonl"
ROWS, TOKENS, BINS = 16, 400, 10  # rows that are looked at, tokens of each that are kept, bars of a histogram

Line = dict[str, Any]


class ByPlace:
    """Numbers of tokens by their place in the completion, of chosen and of rejected rows."""

    def __init__(self) -> None:
        self._found: dict[str, dict[int, list[float]]] = {"chosen": {}, "rejected": {}}

    def add(self, batch: Batch, tokens: Array) -> None:
        """tokens (N,)"""
        counts = np.bincount(batch.sequence_ids, minlength=len(batch.labels))
        places = np.arange(len(tokens)) - np.repeat(np.cumsum(counts) - counts, counts)
        for place, row, value in zip(places.tolist(), batch.sequence_ids.tolist(), tokens.tolist(), strict=True):
            self._found[_kind(batch.labels[row])].setdefault(place, []).append(value)

    def means(self) -> dict[str, list[float]]:
        return self._each(lambda values: sum(values) / len(values))

    def shares(self) -> dict[str, list[float]]:
        """Of the sum over all."""
        whole = sum(sum(values) for places in self._found.values() for values in places.values()) or 1.0
        return self._each(lambda values: sum(values) / whole)

    def _each(self, value: Callable[[list[float]], float]) -> dict[str, list[float]]:
        return {
            name: [round(value(places[place]), 5) for place in sorted(places)] for name, places in self._found.items()
        }


def gradient_at(
    losses: Losses,
    objective: Objective,
    scored: Sequence[tuple[Batch, TokenScores, Array]],
    baseline: float = 0.0,
) -> dict[str, list[float]]:
    """Where in completions the gradient of an objective is: |∂L/∂o| by place, as shares of its sum.

    Args:
        scored: batches, what the policy says of their tokens, and their ref_log_odds.
    """
    found = ByPlace()
    for batch, scores, reference in scored:
        _, slope = losses.objective(objective, *scores, reference, batch, baseline)
        found.add(batch, np.abs(slope))
    return found.shares()


class TokenLog:
    """The first held-out rows of a run, looked at token by token.

    Args:
        run_folder: None to compute and write nothing, in processes besides the first.
        examples: the held-out rows.
        start: steps done; lines of later ones go, and at 0 all that an earlier run left.
    """

    def __init__(
        self,
        run_folder: Path | None,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        objective: Objective,
        losses: Losses,
        pad: int,
        start: int,
    ):
        self._path = None if run_folder is None else run_folder / NAME
        self._tokenizer, self._objective, self._losses = tokenizer, objective, losses
        batching = MicroBatching(8, group_by_length=False, unit=objective.unit)
        self._batches = micro_batches(list(examples[:ROWS]), batching, pad)
        if self._path is not None:
            kept = [line for line in read(self._path) if line["step"] <= start] if start else []
            self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, engine: Engine, reference: Reference) -> None:
        """Look at the rows after `step` optimizer steps, by all processes; the first one adds a line."""
        scored = []
        for batch in self._batches:
            ref_log_odds = reference(batch)
            scored.append((batch, engine.evaluate(batch, ref_log_odds), ref_log_odds))
        if self._path is None:
            return
        line: Line = {"step": step, "gradient_at": gradient_at(self._losses, self._objective, scored)}
        if self._objective.needs_reference:
            line["target_weight"] = _histograms(scored)
        line["rows"] = [row for batch, scores, _ in scored for row in self._rows(batch, scores)]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _rows(self, batch: Batch, scores: TokenScores) -> list[Line]:
        found = []
        for row, label in enumerate(batch.labels):
            of_row = batch.sequence_ids == row
            ids, log_odds = batch.targets[of_row][:TOKENS].tolist(), scores.log_odds[of_row][:TOKENS]
            tokens = [str(self._tokenizer.decode([token])) for token in ids]
            found.append({"label": _kind(label), "tokens": tokens, "log_odds": [round(float(o), 3) for o in log_odds]})
        return found


def _histograms(scored: Sequence[tuple[Batch, TokenScores, Array]]) -> dict[str, list[int]]:
    counts = {"chosen": np.zeros(BINS, int), "rejected": np.zeros(BINS, int)}
    for batch, scores, reference in scored:
        policy, start = scores.log_odds.astype(np.float64), reference.astype(np.float64)
        t = np.exp(np.minimum(log_ratio(NumPyOps(), policy, start), 0.0))
        at = np.minimum((t * BINS).astype(int), BINS - 1)
        for name, label in (("chosen", 1), ("rejected", -1)):
            counts[name] += np.bincount(at[batch.labels[batch.sequence_ids] == label], minlength=BINS)
    return {name: count.tolist() for name, count in counts.items()}


def _kind(label: int) -> str:
    return "chosen" if label > 0 else "rejected"


def read(path: Path) -> list[Line]:
    """Every whole line; none where the run has kept none."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:  # the last one, cut short
            break
    return lines
