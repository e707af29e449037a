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
from collections.abc import Callable, Iterator
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
LARGEST = 99
ANSWER = re.compile(r"^Answer: (-?\d+)$", re.MULTILINE)

NAMES = "Mia Tom Ana Ben Eva Sam Lea Max Zoe Leo Amy Dan".split()
THINGS = "pens apples books coins cards stamps shells eggs beads nuts".split()

# What is asked, and the operations that solve it from left to right.
TEMPLATES = (
    ("{name} has {a} {things} and buys {b} more. How many {things} now?", "+"),
    ("{name} had {a} {things} and lost {b}. How many are left?", "-"),
    ("{name} fills {a} bags with {b} {things} each. How many {things}?", "*"),
    ("{name} has {a} {things}, finds {b} and sells {c}. How many are left?", "+-"),
    ("{name} had {a} {things}, gave away {b}, then got {c}. How many now?", "-+"),
    ("{name} has {a} {things}, uses {b}, then {c} more. How many are left?", "--"),
    ("{name} has {a} {things}. Two friends bring {b} and {c}. How many in all?", "++"),
    ("{name} buys {a} boxes of {b} {things} and gets {c} extra. How many {things}?", "*+"),
    ("{name} packs {a} rows of {b} {things} and {c} break. How many are left?", "*-"),
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
        num_prompts: different prompts; no two ask for the same calculation.
        seed: the same seed gives the same rows everywhere.
    Returns:
        One to two rows a prompt, {"prompt": messages, "completion": messages, "label": bool}.
    Raises:
        ValueError: fewer prompts than one, or more than there are calculations to tell apart.
    """
    rng = random.Random(seed)
    return _unpaired(_problems(num_prompts, rng), rng)


def write(folder: Path, train_prompts: int, valid_prompts: int, seed: int) -> Path:
    """Write train.jsonl, as `generate`, and valid.jsonl, in which each prompt has a right and a wrong answer.

    No calculation is in both files.

    Returns:
        `folder`.
    Raises:
        ValueError: as `generate`.
    """
    rng = random.Random(seed)
    problems = _problems(train_prompts + valid_prompts, rng)
    train = _unpaired(problems[:train_prompts], rng)
    valid = [_row(problem, label, rng) for problem in problems[train_prompts:] for label in (True, False)]
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
    right = final_answer(solve(problem))
    while True:
        wrong = _worked(list(_steps(problem, slip_at=rng.randrange(len(problem.operations)), rng=rng)))
        answer = final_answer(wrong)
        if answer != right and answer is not None and answer >= 0:
            return wrong


def _steps(
    problem: Problem, slip_at: int = -1, rng: random.Random | None = None
) -> Iterator[tuple[int, str, int, int]]:
    """(left, operation, right, result) of each step; the step `slip_at` gets one slip."""
    left = problem.numbers[0]
    for at, (operation, right) in enumerate(zip(problem.operations, problem.numbers[1:], strict=True)):
        off = 0
        if at == slip_at:
            assert rng is not None
            kind = rng.choice(("one", "ten", "operation", "number"))
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


def _problems(count: int, rng: random.Random) -> list[Problem]:
    """`count` problems, no two with the same calculation."""
    if count < 1:
        raise ValueError(f"{count} prompts asked for: expected at least 1")
    problems: dict[str, Problem] = {}
    misses = 0
    while len(problems) < count:
        problem = _draw(rng)
        if problem is None or solve(problem) in problems:
            misses += 1
            if misses > 1000 + 100 * count:
                raise ValueError(f"{count} prompts asked for, but there are only about {len(problems)} calculations")
            continue
        problems[solve(problem)] = problem
    return list(problems.values())


def _draw(rng: random.Random) -> Problem | None:
    """One random problem, or None where its results leave 1 to LARGEST."""
    text, operations = rng.choice(TEMPLATES)
    small = operations[0] == "*"
    a, b = (rng.randint(2, 9), rng.randint(2, 9)) if small else (rng.randint(4, 30), rng.randint(2, 15))
    c = rng.randint(2, 9)
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
