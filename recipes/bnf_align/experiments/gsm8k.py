"""Solutions of GSM8K's test questions by four models, which OpenAI published: real right and wrong answers, of which
nobody made pairs.

A line of `example_model_solutions.jsonl` is a question; each of its values that is an object is a model's solution:

    {"question": …, "ground_truth": …, "6b_finetuning": {"is_correct": false, "solution": …}, "6b_verification": …}
"""

import random
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnf_align.experiments.tasks import Part
from bnf_core.data.messages import RowError, named
from bnf_core.data.sources import read_rows
from bnf_core.errors import UserError

SOURCE = "https://github.com/openai/grade-school-math/blob/master/grade_school_math/data/example_model_solutions.jsonl"
LONGEST = 200  # characters of a question or solution, so that a step stays small
CALCULATOR = re.compile(r"<<.*?(>>|$)", re.DOTALL)  # `<<16-3=13>>`: a call of the calculator that the models had
REMEDY = f"Expected a line of {SOURCE}"


@dataclass(frozen=True)
class Solved:
    """A question with its right and wrong solutions, at least one of each."""

    question: str
    rights: tuple[str, ...]
    wrongs: tuple[str, ...]

    @property
    def part(self) -> Part:
        """By the question: half is trained on, a quarter is for choosing settings, a quarter for comparing."""
        dealt: tuple[Part, ...] = ("valid", "test", "train", "train")
        return dealt[zlib.crc32(self.question.encode()) % 4]

    def right(self, rng: random.Random) -> str:
        return rng.choice(self.rights)

    def wrong(self, rng: random.Random) -> str:
        return rng.choice(self.wrongs)

    def grade(self, answer: str) -> float:
        return 1.0 if answer in self.rights else -1.0


def read(path: Path) -> Iterator[Solved]:
    """The questions that have a right and a wrong solution, without those that are too long.

    Raises:
        UserError: no such file, or a line of another layout, named with its number and field.
    """
    if not path.is_file():
        raise UserError(f"solutions {path}: no such file. Expected that of {SOURCE}")
    for source, row in read_rows(str(path), "train"):
        question, solutions = _question(row, source)
        short = {text: right for text, right in solutions.items() if len(text) <= LONGEST}
        rights, wrongs = (tuple(text for text in short if short[text] is label) for label in (True, False))
        if rights and wrongs and len(question) <= LONGEST:
            yield Solved(question, rights, wrongs)


def _question(row: Any, source: str) -> tuple[str, dict[str, bool]]:
    """What is asked, and of each solution whether it is right."""
    if not isinstance(row, Mapping) or not isinstance(row.get("question"), str):
        what = named(row.get("question") if isinstance(row, Mapping) else row)
        raise RowError(source, "question", f"found {what}, expected text", REMEDY)
    found = [_solution(value, name, source) for name, value in row.items() if isinstance(value, Mapping)]
    if not found:
        raise RowError(source, "", "no solutions, expected objects with is_correct and solution", REMEDY)
    return row["question"], dict(found)


def _solution(value: Mapping[str, Any], name: str, source: str) -> tuple[str, bool]:
    text, right = value.get("solution"), value.get("is_correct")
    if not isinstance(text, str) or not text.strip():
        raise RowError(source, f"{name}.solution", f"found {named(text)}, expected text", REMEDY)
    if not isinstance(right, bool):
        raise RowError(source, f"{name}.is_correct", f"found {named(right)}, expected true or false", REMEDY)
    return CALCULATOR.sub("", text).strip(), right
