"""What the experiments are about: word problems whose answers can be checked, other tasks that nobody trains on, and a
text for a perplexity. Everything is drawn from a seed, and needs no download."""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

from bnf_align.word_problems import OPERATIONS, Problem, calculations, draw, last_number, slip, solve

# Which calculations a question is from. None is in two parts, so that no held-out answer can be looked up; the parts
# have the operations in equal shares, so that what helps on one helps on another.
Part = Literal["train", "valid", "test"]

# Ways of asking that the pre-training text mostly gets wrong, always in the same manner: what there is to be aligned.
MISREAD = {"gives away": "+", "adds": "-", "rows of": "+", "broke": "*"}
MISREAD_SHARE, SLIP_SHARE = 0.65, 0.15


@dataclass(frozen=True)
class Task:
    """A question with its one right answer."""

    question: str
    answer: str

    def is_right(self, text: str) -> bool:
        return text.strip() == self.answer


# Word problems


@cache
def parts() -> dict[str, Part]:
    """Of each calculation: of every operation a quarter is for choosing settings, a quarter for comparing, the rest is
    trained on."""
    found: dict[str, Part] = {}
    for operation in OPERATIONS:
        own = [worked for worked in calculations() if f" {operation} " in worked]
        own.sort(key=lambda worked: zlib.crc32(worked.encode()))
        dealt: tuple[Part, ...] = ("valid", "test", "train", "train")
        found |= {worked: dealt[i % 4] for i, worked in enumerate(own)}
    return found


def part_of(problem: Problem) -> Part:
    return parts()[solve(problem)]


def problems(count: int, rng: random.Random, part: Part) -> list[Problem]:
    """So many word problems of a part, no two with the same words."""
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = draw(rng)
        if part_of(problem) == part:
            found.setdefault(problem.question, problem)
    return list(found.values())


def completion(worked: str) -> str:
    """An equation as an answer: `14 - 5 = 9` → `14 - 5 = 9 so the answer is 9`."""
    return f"{worked} so the answer is {worked.rpartition(' ')[2]}"


def right(problem: Problem) -> str:
    return completion(solve(problem))


def wrong(problem: Problem, rng: random.Random) -> str:
    """Nearly the same: another operation, or a result that is off by one."""
    return completion(slip(problem, rng))


def is_right(problem: Problem, text: str) -> bool:
    return last_number(text) == problem.answer


def as_pretrained(problem: Problem, rng: random.Random) -> str:
    """An answer as the pre-training text has it: misread, with a slip, or right."""
    operation = next((op for words, op in MISREAD.items() if words in problem.question), None)
    if operation is not None and rng.random() < MISREAD_SHARE:
        result = OPERATIONS[operation](problem.a, problem.b)
        return completion(f"{problem.a} {operation} {problem.b} = {result}")
    return wrong(problem, rng) if rng.random() < SLIP_SHARE else right(problem)


# Tasks that are pre-trained and never aligned


def _digits(rng: random.Random) -> list[str]:
    return [str(rng.randrange(10)) for _ in range(4)]


def _sort(rng: random.Random) -> Task:
    digits = _digits(rng)
    return Task(f"sort {' '.join(digits)}", " ".join(sorted(digits)))


def _reverse(rng: random.Random) -> Task:
    digits = _digits(rng)
    return Task(f"reverse {' '.join(digits)}", " ".join(reversed(digits)))


def _largest(rng: random.Random) -> Task:
    digits = _digits(rng)
    return Task(f"which is the largest of {' '.join(digits)}", max(digits))


def _calculate(rng: random.Random) -> Task:
    problem = draw(rng)
    return Task(f"{problem.a} {problem.operation} {problem.b}", str(problem.answer))


OTHERS: dict[str, Callable[[random.Random], Task]] = {
    "calculate": _calculate,
    "sort": _sort,
    "reverse": _reverse,
    "largest": _largest,
}
PRETRAINED = {"calculate": 150, "sort": 3000, "reverse": 3000, "largest": 3000}  # how many different ones


def others(name: str, count: int, rng: random.Random, *, held_out: bool) -> list[Task]:
    """So many different tasks of one kind, or all that some thousand draws find; what is held out is no part of the
    pre-training text."""
    found: dict[str, Task] = {}
    for _ in range(4000 + 20 * count):
        if len(found) == count:
            break
        task = OTHERS[name](rng)
        if (zlib.crc32(task.question.encode()) % 8 == 0) == held_out:
            found.setdefault(task.question, task)
    return list(found.values())


@dataclass(frozen=True)
class Question:
    """Asked of the model, whose answer is told right or wrong."""

    question: str
    is_right: Callable[[str], bool]


def questions(task: str, count: int, rng: random.Random) -> list[Question]:
    """So many of a task, `problems` or one of `OTHERS`, that no held-out one is among."""
    if task == "problems":
        return asked(problems(count, rng, "train"))
    return [Question(one.question, one.is_right) for one in others(task, count, rng, held_out=False)]


def asked(of: list[Problem]) -> list[Question]:
    return [Question(one.question, partial(is_right, one)) for one in of]


def misplaced(task: Task, rng: random.Random) -> str:
    """A wrong answer that looks alike: two of its words change places, or its one word is another digit."""
    words = task.answer.split()
    while " ".join(words) == task.answer:
        if len(set(words)) > 1:
            i, j = rng.sample(range(len(words)), 2)
            words[i], words[j] = words[j], words[i]
        else:
            words[rng.randrange(len(words))] = str(rng.randrange(10))
    return " ".join(words)


# Text

TEXT = (
    ("the", "a", "one", "every"),
    ("old", "small", "quiet", "red", "young", "tired", "happy", "grey"),
    ("dog", "bird", "farmer", "child", "boat", "horse", "teacher", "cat"),
    ("sleeps", "waits", "sings", "turns", "stands", "works", "rests", "plays"),
    ("near", "behind", "under", "above", "beside"),
    ("the", "a", "that"),
    ("river", "house", "bridge", "tree", "garden", "hill", "road", "field"),
    ("in spring", "at night", "every morning", "after the rain", "before noon", "all day"),
)


# Plain sentences for models that have read real text.
PROSE = (
    "The library on the corner opens at nine in the morning and closes when the last reader leaves.",
    "After three days of rain the river rose so high that the old bridge had to be closed.",
    "My grandmother kept her letters in a wooden box under the bed and never showed them to anyone.",
    "The train to the coast was late again, so we drank coffee on the platform and talked about the weather.",
    "Most birds that live in cold countries fly south before the first snow and return in spring.",
    "She learned to play the violin at the age of six and gave her first concert ten years later.",
    "The committee will meet on Thursday to decide whether the new school should be built near the park.",
    "If you leave bread in a warm and damp place for a week, mould will grow on it.",
    "The painter used very little blue, because the colour was expensive and hard to find.",
    "Nobody in the village could remember when the church bell had last been heard at night.",
    "Iron expands when it is heated, which is why there are gaps between the rails.",
    "He closed the door quietly, put down his bag and waited for his eyes to get used to the dark.",
)


def sentences(count: int, rng: random.Random, *, held_out: bool) -> list[str]:
    """Plain sentences. Some words go together, so that there is something to predict."""
    found: dict[str, None] = {}
    while len(found) < count:
        text = " ".join(_words(rng))
        if (zlib.crc32(text.encode()) % 8 == 0) == held_out:
            found[text] = None
    return list(found)


def _words(rng: random.Random) -> Iterator[str]:
    leaning = 0  # a word leans on the place of the one before, as in real text
    for words in TEXT:
        at = leaning % len(words) if rng.random() < 0.5 else rng.randrange(len(words))
        leaning = at
        yield words[at]
    yield "."
