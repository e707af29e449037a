"""Small arithmetic word problems, whose answers can be checked: prompts and feedback that need no download.

Prompts are chat messages, with one worked example:

    system:    Answer with one equation.
    user:      Sam has 4 hats and buys 3 more. How many hats now?
    assistant: 4 + 3 = 7
    user:      Mia had 14 pens and lost 5. How many are left?
    assistant: 14 - 5 = 9

A wrong answer makes a slip of the kind a model makes: the wrong operation, or a result that is off by one.
"""

import json
import random
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # JSON

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}

FACTORS, SECONDS = range(2, 7), range(2, 10)  # of products; of sums and differences

NAMES = "Mia Tom Ana Ben Eva Sam Lea Max Zoe Leo Amy Dan".split()
THINGS = "pens apples books coins cards stamps shells eggs beads nuts".split()
EXAMPLE = (
    {"role": "system", "content": "Answer with one equation."},
    {"role": "user", "content": "Sam has 4 hats and buys 3 more. How many hats now?"},
    {"role": "assistant", "content": "4 + 3 = 7"},
)

# What is asked, and the operation on a and b that answers it.
TEMPLATES = (
    ("{name} has {a} {things} and buys {b} more. How many {things} now?", "+"),
    ("{name} found {b} {things} and already had {a}. How many in all?", "+"),
    ("{a} {things} are in a box. {name} adds {b}. How many are there now?", "+"),
    ("{name} had {a} {things} and lost {b}. How many are left?", "-"),
    ("{name} has {a} {things} and gives away {b}. How many are left?", "-"),
    ("{name} had {a} {things}, then {b} broke. How many are left?", "-"),
    ("{name} fills {a} bags with {b} {things} each. How many {things}?", "*"),
    ("{name} sets out {a} rows of {b} {things}. How many {things}?", "*"),
)


@dataclass(frozen=True)
class Problem:
    """A question and the calculation that answers it."""

    question: str
    a: int
    operation: str
    b: int

    @property
    def answer(self) -> int:
        return OPERATIONS[self.operation](self.a, self.b)


@dataclass(frozen=True)
class Files:
    """Of one draw of problems. No calculation is in the held-out ones and in others as well: their answers cannot be
    looked up."""

    warm_up: Path  # rows of feedback: right answers
    prompts: Path  # a folder: {"prompt": messages, "answer": number} to sample from, in train.jsonl and valid.jsonl
    held_out: Path  # rows of feedback: a right and a wrong answer to each of those in valid.jsonl


def write(folder: Path, *, warm_up: int, prompts: int, held_out: int, seed: int) -> Files:
    """Write so many problems of each kind. The same seed gives the same rows everywhere.

    Raises:
        ValueError: a negative number, or more problems than there are to tell apart.
    """
    rng = random.Random(seed)
    valid = _problems(held_out, rng, distinct=True)
    others = _problems(warm_up + prompts, rng, banned={solve(problem) for problem in valid})
    files = Files(folder / "warm-up.jsonl", folder / "prompts", folder / "held-out.jsonl")
    files.prompts.mkdir(parents=True, exist_ok=True)
    for path, rows in (
        (files.warm_up, [_row(problem, True, rng) for problem in others[:warm_up]]),
        (files.prompts / "train.jsonl", map(_prompt, others[warm_up:])),
        (files.prompts / "valid.jsonl", map(_prompt, valid)),
        (files.held_out, [_row(problem, label, rng) for problem in valid for label in (True, False)]),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def last_number(text: str) -> int | None:
    """The last whole number anywhere in the text, however the answer is worded."""
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found else None


def solve(problem: Problem) -> str:
    """The right worked answer, one equation."""
    return _worked(problem.a, problem.operation, problem.b, problem.answer)


def slip(problem: Problem, rng: random.Random) -> str:
    """A wrong worked answer, in the same layout as `solve`."""
    a, b = problem.a, problem.b
    others = {op: f(a, b) for op, f in OPERATIONS.items() if f(a, b) >= 0 and f(a, b) != problem.answer}
    if rng.random() < 0.75:
        operation = rng.choice(sorted(others))
        return _worked(a, operation, b, others[operation])
    return _worked(a, problem.operation, b, problem.answer + rng.choice((-1, 1)))


def _worked(a: int, operation: str, b: int, result: int) -> str:
    return f"{a} {operation} {b} = {result}"


def _problems(count: int, rng: random.Random, banned: Collection[str] = (), distinct: bool = False) -> list[Problem]:
    """`count` problems with different questions and none of the banned calculations; with `distinct`, no two
    with one calculation. A calculation is named by its right answer, `solve`."""
    if count < 0:
        raise ValueError(f"{count} prompts asked for: expected at least 0")
    problems: dict[str, Problem] = {}
    for _ in range(1000 + 20 * count):
        if len(problems) == count:
            return list(problems.values())
        problem = draw(rng)
        if solve(problem) not in banned:
            problems.setdefault(solve(problem) if distinct else problem.question, problem)
    raise ValueError(f"{count} prompts asked for, but there are only about {len(problems)} to tell apart")


def calculations() -> list[str]:
    """The right answers that there are to all that `draw` can ask, as `solve` gives them."""
    return [
        _worked(a, operation, b, OPERATIONS[operation](a, b))
        for operation in OPERATIONS
        for b in (FACTORS if operation == "*" else SECONDS)
        for a in (FACTORS if operation == "*" else _larger(b))
    ]


def _larger(b: int) -> range:
    """The first numbers of the sums and differences with `b`."""
    return range(b + 1, 16)


def draw(rng: random.Random) -> Problem:
    """One random problem; its answer lies between 1 and 36."""
    text, operation = rng.choice(TEMPLATES)
    if operation == "*":
        a, b = rng.choice(FACTORS), rng.choice(FACTORS)
    else:
        b = rng.choice(SECONDS)
        a = rng.choice(_larger(b))
    question = text.format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b)
    return Problem(question, a, operation, b)


def _prompt(problem: Problem) -> Row:
    return {"prompt": [*EXAMPLE, {"role": "user", "content": problem.question}], "answer": problem.answer}


def _row(problem: Problem, label: bool, rng: random.Random) -> Row:
    answer = solve(problem) if label else slip(problem, rng)
    said = [{"role": "assistant", "content": answer}]
    return {"prompt": _prompt(problem)["prompt"], "completion": said, "label": label}
