"""Small arithmetic word problems with right and wrong worked answers: feedback data that needs no download.

Every row is a prompt, a completion and a label, as chat messages:

    user:      Mia has 14 pens, buys 9 more and gives away 5. How many are left?
    assistant: 14 + 9 = 23
               23 - 5 = 18
               Answer: 18

A wrong answer differs by one slip of the kind a model makes: a result off by one or by ten, the wrong
operation, or the wrong number put in. The slip is carried through to the end, in the same style.
"""

import json
import random
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # {"prompt": messages, "completion": messages, "label": bool}

SYSTEM = "Reply with equations, then the answer."  # shorter than the default that many chat templates put in
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
OTHER_OPERATION = {"+": "-", "-": "+", "*": "+"}
LARGEST = 20
ANSWER = re.compile(r"^Answer: (-?\d+)$", re.MULTILINE)

NAMES = "Mia Tom Ana Ben Eva Sam Lea Max Zoe Leo Amy Dan".split()
THINGS = "pens apples books coins cards stamps shells eggs beads nuts".split()

# What is asked, and the operations that solve it from left to right.
TEMPLATES = (
    ("{name} has {a} {things} and buys {b} more. How many {things} now?", "+"),
    ("{a} {things} are in a box. {name} puts in {b}. How many are there now?", "+"),
    ("{name} had {a} {things} and lost {b}. How many are left?", "-"),
    ("{name} has {a} {things} and gives away {b}. How many are left?", "-"),
    ("{name} fills {a} bags with {b} {things} each. How many {things}?", "*"),
    ("{name} has {a} {things}, finds {b} and sells {c}. How many are left?", "+-"),
    ("{name} had {a} {things}, lost {b}, then got {c}. How many now?", "-+"),
    ("{name} has {a} {things}, uses {b}, then uses {c}. How many are left?", "--"),
    ("{name} buys {a} boxes of {b} {things} and gets {c} more. How many {things}?", "*+"),
)


@dataclass(frozen=True)
class Problem:
    """A question and the numbers and operations that answer it, taken from left to right."""

    question: str
    numbers: tuple[int, ...]
    operations: str  # one character fewer than numbers


def generate(num_prompts: int, seed: int) -> list[Row]:
    """Unpaired feedback: each prompt gets a right answer, a wrong one or both, in a mixed order.

    Args:
        num_prompts: how many different prompts.
        seed: the same seed gives the same rows everywhere.
    Returns:
        One to two rows a prompt, {"prompt": messages, "completion": messages, "label": bool}.
    Raises:
        ValueError: a negative number of prompts, or more than there are to tell apart.
    """
    rng = random.Random(seed)
    return _unpaired(_problems(num_prompts, rng), rng)


def write(folder: Path, train_prompts: int, valid_prompts: int, seed: int) -> Path:
    """Write train.jsonl, as `generate`, and valid.jsonl, in which each prompt has a right and a wrong answer.

    No calculation is in both files: held-out answers cannot be looked up among the training rows.

    Returns:
        `folder`.
    Raises:
        ValueError: as `generate`.
    """
    rng = random.Random(seed)
    held_out = _problems(valid_prompts, rng, distinct=True)
    valid = [_row(problem, label, rng) for problem in held_out for label in (True, False)]
    train = _unpaired(_problems(train_prompts, rng, banned={solve(problem) for problem in held_out}), rng)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("valid", valid)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def final_answer(text: str) -> int | None:
    """The number of the last line that reads exactly `Answer: N`, or None where there is none."""
    found = ANSWER.findall(text)
    return int(found[-1]) if found else None


def solve(problem: Problem) -> str:
    """The right worked answer: one equation a line, then `Answer: N`."""
    return _worked(list(_steps(problem)))


def slip(problem: Problem, rng: random.Random) -> str:
    """A wrong worked answer: `solve` with one slip, carried through."""
    right = list(_steps(problem))[-1][-1]
    while True:  # a slip can cancel out, or leave less than nothing
        wrong = list(_steps(problem, slip_at=rng.randrange(len(problem.operations)), rng=rng))
        if wrong[-1][-1] != right and all(step[-1] >= 0 for step in wrong):
            return _worked(wrong)


def _steps(
    problem: Problem, slip_at: int = -1, rng: random.Random | None = None
) -> Iterator[tuple[int, str, int, int]]:
    """(left, operation, right, result) of each step; the step `slip_at` gets one slip."""
    left = problem.numbers[0]
    for at, (operation, right) in enumerate(zip(problem.operations, problem.numbers[1:], strict=True)):
        off = 0
        if at == slip_at:
            assert rng is not None
            kind = rng.choice(("one", "ten", "operation", "operation", "number"))
            if kind == "one":
                off = rng.choice((-1, 1))
            elif kind == "ten":
                off = rng.choice((-10, 10))
            elif kind == "operation":
                operation = OTHER_OPERATION[operation]
            else:
                right = rng.choice(problem.numbers)
        result = OPERATIONS[operation](left, right) + off
        yield left, operation, right, result
        left = result


def _worked(steps: list[tuple[int, str, int, int]]) -> str:
    equations = [f"{left} {operation} {right} = {result}" for left, operation, right, result in steps]
    return "\n".join([*equations, f"Answer: {steps[-1][-1]}"])


def _problems(count: int, rng: random.Random, banned: Collection[str] = (), distinct: bool = False) -> list[Problem]:
    """`count` problems with different questions and none of the banned calculations; with `distinct`, no two
    with one calculation. A calculation is named by its right answer, `solve`."""
    if count < 0:
        raise ValueError(f"{count} prompts asked for: expected at least 0")
    problems: dict[str, Problem] = {}
    for _ in range(1000 + 20 * count):
        if len(problems) == count:
            return list(problems.values())
        problem = _draw(rng)
        if problem is not None and solve(problem) not in banned:
            problems.setdefault(solve(problem) if distinct else problem.question, problem)
    raise ValueError(f"{count} prompts asked for, but there are only about {len(problems)} to tell apart")


def _draw(rng: random.Random) -> Problem | None:
    """One random problem, or None where its results leave 1 to LARGEST."""
    text, operations = rng.choice(TEMPLATES)
    a = rng.randint(2, 6) if operations[0] == "*" else rng.randint(3, 15)
    b, c = rng.randint(2, 9), rng.randint(2, 9)
    question = text.format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b, c=c)
    problem = Problem(question, (a, b, c)[: len(operations) + 1], operations)
    return problem if all(1 <= step[-1] <= LARGEST for step in _steps(problem)) else None


def _unpaired(problems: list[Problem], rng: random.Random) -> list[Row]:
    # Right answers slightly outnumber wrong ones: what both share, the format, then still gains.
    rows = []
    for problem in problems:
        for label in rng.choice(((True,), (False,), (True, False), (True,), (True, False))):
            rows.append(_row(problem, label, rng))
    rng.shuffle(rows)
    return rows


def _row(problem: Problem, label: bool, rng: random.Random) -> Row:
    answer = solve(problem) if label else slip(problem, rng)
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem.question}],
        "completion": [{"role": "assistant", "content": answer}],
        "label": label,
    }
