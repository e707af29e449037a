"""What no alignment trains on: problems, other tasks and text, the same for every method and seed."""

import random
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from bnf_align.experiments import tasks
from bnf_align.experiments.rows import pair, tokenized, two_answers
from bnf_align.experiments.scales import SCALES, Scale
from bnf_align.word_problems import solve
from bnf_core.data.tokenization import load_tokenizer, pad_id, prompt_ids, stop_ids
from bnf_core.protocol import Engine
from bnf_core.steps.batching import MicroBatching, micro_batches
from bnf_core.types import Batch, Example

SCORED_AT_ONCE = 64


@lru_cache(2)
def held_out(model: Path, scale: str, part: tasks.Part, task: str = "problems") -> "HeldOut":
    return HeldOut(model, SCALES[scale], part) if task == "problems" else HeldOutTask(model, SCALES[scale], part, task)


class HeldOut:
    """
    Args:
        model: the checkpoint, whose tokenizer it is.
        part: which problems: for choosing settings or for comparing.
    """

    def __init__(self, model: Path, scale: Scale, part: tasks.Part):
        self.scale, self.tokenizer = scale, load_tokenizer(model)
        self.pad, self.stops = pad_id(self.tokenizer), stop_ids(self.tokenizer, model)
        rng = random.Random(f"held out {part}")
        self.problems = tasks.problems(scale.items, rng, part)
        rows = [pair(scale, problem, rng) for problem in self.problems[: scale.scored_pairs]]
        self.pairs = self._batches(tokenized(rows, model))
        self.others = {name: tasks.others(name, scale.other_items, rng, held_out=True) for name in tasks.OTHERS}
        text = tasks.sentences(scale.sentences, rng, held_out=True)
        self.text = self._batches([scale.text(sentence, self.tokenizer) for sentence in text])

    def _batches(self, rows: Sequence[Example]) -> list[Batch]:
        return micro_batches(rows, MicroBatching(SCORED_AT_ONCE, unit="pair" if rows[0].pair else "row"), self.pad)

    @property
    def groups(self) -> list[int]:
        """Of each problem the number of its calculation: those of one stand or fall together."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(solve(problem), len(numbers)) for problem in self.problems]

    def answered(self, engine: Engine) -> list[int]:
        """Which problems are answered right, greedily: 1 or 0 each."""
        texts = self._answers(engine, [problem.question for problem in self.problems])
        return [int(tasks.is_right(problem, text)) for problem, text in zip(self.problems, texts, strict=True)]

    def others_answered(self, engine: Engine, name: str) -> list[int]:
        """The same of one of the other tasks."""
        texts = self._answers(engine, [task.question for task in self.others[name]])
        return [int(task.is_right(text)) for task, text in zip(self.others[name], texts, strict=True)]

    def _answers(self, engine: Engine, questions: Sequence[str]) -> list[str]:
        drawn = engine.generate([self._prompts[question] for question in questions], self.scale.max_tokens, self.stops)
        return [str(self.tokenizer.decode(tokens)) for tokens in drawn]

    @cached_property
    def _prompts(self) -> dict[str, list[int]]:
        asked = [problem.question for problem in self.problems]
        asked += [task.question for of in self.others.values() for task in of]
        return {question: prompt_ids(self.scale.prompt(question), self.tokenizer) for question in asked}


class HeldOutTask(HeldOut):
    """Another task in place of the word problems."""

    def __init__(self, model: Path, scale: Scale, part: tasks.Part, task: str):
        super().__init__(model, scale, part)
        rng = random.Random(f"held out {task}")
        self.asked = tasks.others(task, 2 * scale.items, rng, held_out=True)[part == "test" :: 2]
        scored = self.asked[: scale.scored_pairs]
        rows = [two_answers(scale, one.question, one.answer, tasks.misplaced(one, rng)) for one in scored]
        self.pairs = self._batches(tokenized(rows, model))

    @property
    def groups(self) -> list[int]:
        return list(range(len(self.asked)))

    def answered(self, engine: Engine) -> list[int]:
        texts = self._answers(engine, [task.question for task in self.asked])
        return [int(task.is_right(text)) for task, text in zip(self.asked, texts, strict=True)]

    @cached_property
    def _prompts(self) -> dict[str, list[int]]:
        asked = {task.question: prompt_ids(self.scale.prompt(task.question), self.tokenizer) for task in self.asked}
        return super()._prompts | asked
