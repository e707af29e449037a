"""The rows that cells are trained on: right and wrong answers, in every share that is asked for."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bnf_align.experiments.scales import Scale
from bnf_align.experiments.subjects import Asked, Subject
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
    graded: bool = False  # labels of rows without a partner say how near the answer is, from −1 to 1


@lru_cache(2)  # methods of one setting and seed come one after another
def training_rows(model: Path, scale: Scale, subject: Subject, count: int, seed: int, mix: Mix) -> tuple[Example, ...]:
    """So many rows as tokens, less those whose grade says neither; the same for every method."""
    rows = tokenized(feedback(scale, subject, count, random.Random(f"train {seed}"), mix), model)
    return tuple(row for row in rows if row.weight)


def feedback(scale: Scale, subject: Subject, count: int, rng: random.Random, mix: Mix) -> list[Row]:
    """So many completions: pairs, then rows by themselves."""
    pairs = round(count * mix.paired / 2)
    singles = count - 2 * pairs
    asked = subject.asked(pairs + singles, rng, "train")
    rows = [pair(scale, one, rng) for one in asked[:pairs]]
    labels = [i < round(singles * mix.chosen) for i in range(singles)]
    rng.shuffle(labels)
    for one, label in zip(asked[pairs:], labels, strict=True):
        answer = one.right(rng) if label else one.wrong(rng)
        said = one.grade(answer) if mix.graded else label
        rows.append({"prompt": scale.prompt(one.question), "completion": _said(answer), "label": said})
    for i in range(round(pairs * mix.contradicted / 2)):  # the last pairs say the opposite of the first ones
        rows[pairs - 1 - i] = _flipped(rows[i])
    for i in rng.sample(range(len(rows)), round(len(rows) * mix.flipped)):
        rows[i] = _flipped(rows[i])
    return rows


def pair(scale: Scale, asked: Asked, rng: random.Random) -> Row:
    return two_answers(scale, asked.question, asked.right(rng), asked.wrong(rng))


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
