"""What a model is aligned on: questions, each with a right and a wrong answer, in parts that share none."""

import random
from collections.abc import Hashable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Protocol

from bnf_align.experiments import gsm8k, tasks
from bnf_align.word_problems import Problem, last_number
from bnf_core.errors import UserError
from bnf_core.storage.digests import json_digest


class Asked(Protocol):
    """A question and what may be answered."""

    @property
    def question(self) -> str: ...
    def right(self, rng: random.Random) -> str: ...
    def wrong(self, rng: random.Random) -> str: ...
    def grade(self, answer: str) -> float:
        """From −1, all wrong, to 1, right."""
        ...


class Subject(Hashable, Protocol):
    @property
    def digest(self) -> str:
        """Of what was read; none where nothing was."""
        ...

    def asked(self, count: int, rng: random.Random, part: tasks.Part) -> Sequence[Asked]:
        """So many of a part, no two alike."""
        ...


@dataclass(frozen=True)
class WordProblem:
    problem: Problem

    @property
    def question(self) -> str:
        return self.problem.question

    def right(self, rng: random.Random) -> str:
        return tasks.right(self.problem)

    def wrong(self, rng: random.Random) -> str:
        return tasks.wrong(self.problem, rng)

    def grade(self, answer: str) -> float:
        """By how far the number is off, as a share of the right one: 9 instead of 10 is 0.8, 15 is 0, 20 is −1."""
        said = last_number(answer)
        assert said is not None
        return 1 - 2 * min(abs(said - self.problem.answer) / self.problem.answer, 1.0)


@dataclass(frozen=True)
class WordProblems:
    digest: str = ""

    def asked(self, count: int, rng: random.Random, part: tasks.Part) -> list[WordProblem]:
        return [WordProblem(problem) for problem in tasks.problems(count, rng, part)]


@dataclass(frozen=True)
class Solutions:
    """Those of GSM8K in a file."""

    path: str
    questions: tuple[gsm8k.Solved, ...]

    @classmethod
    def read(cls, path: str) -> "Solutions":
        """
        Raises:
            UserError: the file is bad.
        """
        return cls(path, tuple(gsm8k.read(Path(path))))

    @property
    def digest(self) -> str:
        return json_digest([astuple(one) for one in self.questions])

    def asked(self, count: int, rng: random.Random, part: tasks.Part) -> list[gsm8k.Solved]:
        """
        Raises:
            UserError: there are fewer.
        """
        found = [one for one in self.questions if one.part == part]
        if len(found) < count:
            raise UserError(
                f"{self.path}: {len(found)} questions to {part} with a short right and a short wrong solution, "
                f"expected at least {count}. Expected the file of {gsm8k.SOURCE}"
            )
        return rng.sample(found, count)
