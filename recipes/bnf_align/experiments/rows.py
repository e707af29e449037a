"""The rows that cells are trained on: near-identical right and wrong answers, in every share that is asked for."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bnf_align.experiments import tasks
from bnf_align.experiments.scales import Scale
from bnf_align.word_problems import Problem
from bnf_core.data.records import parse_row
from bnf_core.data.tokenization import load_tokenizer, tokenize
from bnf_core.types import Example

Row = dict[str, Any]  # as a line of a file of feedback


@dataclass(frozen=True)
class Mix:
    """What kinds of rows there are, as exact shares."""

    paired: float = 1.0  # of all rows
    chosen: float = 0.5  # of rows without a partner
    flipped: float = 0.0  # of labels that say the opposite
    contradicted: float = 0.0  # of pairs that are there both ways round


@lru_cache(2)  # methods of one setting and seed come one after another
def training_rows(model: Path, scale: Scale, count: int, seed: int, mix: Mix) -> tuple[Example, ...]:
    """So many rows as tokens; the same for every method."""
    return tuple(tokenized(feedback(scale, count, random.Random(f"train {seed}"), mix), model))


def feedback(scale: Scale, count: int, rng: random.Random, mix: Mix) -> list[Row]:
    """So many completions: pairs, then rows by themselves."""
    pairs = round(count * mix.paired / 2)
    singles = count - 2 * pairs
    asked = tasks.problems(pairs + singles, rng, "train")
    rows = [pair(scale, problem, rng) for problem in asked[:pairs]]
    labels = [i < round(singles * mix.chosen) for i in range(singles)]
    rng.shuffle(labels)
    for problem, label in zip(asked[pairs:], labels, strict=True):
        answer = tasks.right(problem) if label else tasks.wrong(problem, rng)
        rows.append({"prompt": scale.prompt(problem.question), "completion": _said(answer), "label": label})
    for i in range(round(pairs * mix.contradicted / 2)):  # the last pairs say the opposite of the first ones
        rows[pairs - 1 - i] = _flipped(rows[i])
    for i in rng.sample(range(len(rows)), round(len(rows) * mix.flipped)):
        rows[i] = _flipped(rows[i])
    return rows


def pair(scale: Scale, problem: Problem, rng: random.Random) -> Row:
    return two_answers(scale, problem.question, tasks.right(problem), tasks.wrong(problem, rng))


def two_answers(scale: Scale, question: str, right: str, wrong: str) -> Row:
    return {"prompt": scale.prompt(question), "chosen": _said(right), "rejected": _said(wrong)}


def tokenized(rows: Sequence[Mapping[str, Any]], model: Path) -> list[Example]:
    """As any run has them."""
    parsed = [one for i, row in enumerate(rows, 1) for one in parse_row(row, f"rows:{i}")]
    return tokenize(parsed, load_tokenizer(model), max_length=512).examples


def _flipped(row: Row) -> Row:
    if "label" in row:
        return row | {"label": not row["label"]}
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
