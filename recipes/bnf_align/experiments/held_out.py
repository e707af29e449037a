"""What no alignment trains on: problems, other tasks and text, the same for every method and seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from bnf_align.experiments import tasks
from bnf_align.experiments.rows import pair, tokenized, two_answers
from bnf_align.experiments.scales import SCALES, Scale
from bnf_align.experiments.subjects import Solutions, Subject, WordProblem
from bnf_align.word_problems import solve
from bnf_core.data.tokenization import load_tokenizer, pad_id, prompt_ids, stop_ids
from bnf_core.protocol import Engine
from bnf_core.steps.batching import MicroBatching, micro_batches
from bnf_core.types import Array, Batch, Example, TokenScores, Unit

SCORED_AT_ONCE = 64
LONG_AT_ONCE = 8  # of lengths that differ: less padding


@lru_cache(2)
def held_out(model: Path, scale: str, part: tasks.Part, task: str, subject: Subject) -> "HeldOut":
    if isinstance(subject, Solutions):
        return HeldOutSolutions(model, SCALES[scale], part, subject)
    return HeldOut(model, SCALES[scale], part) if task == "problems" else HeldOutTask(model, SCALES[scale], part, task)


@dataclass(frozen=True)
class Look:
    """What held-out rows and text are to a model."""

    scored: list[TokenScores]  # of the batches of pairs
    nats: Array  # a token, of each sentence

    def state(self, pairs: Sequence[Batch]) -> dict[str, Array]:
        """As a `ReferenceCache` takes it."""
        return {
            "keys": np.concatenate([batch.keys for batch in pairs]),
            "lengths": np.concatenate([np.bincount(batch.sequence_ids) for batch in pairs]),
            "log_odds": np.concatenate([scores.log_odds for scores in self.scored]),
        }


class HeldOut:
    """
    Args:
        model: the checkpoint, whose tokenizer it is.
        part: which problems: for choosing settings or for comparing.
    """

    at_once, share_prompts = SCORED_AT_ONCE, False

    def __init__(self, model: Path, scale: Scale, part: tasks.Part):
        self.scale, self.tokenizer = scale, load_tokenizer(model)
        self.pad, self.stops = pad_id(self.tokenizer), stop_ids(self.tokenizer, model)
        rng = random.Random(f"held out {part}")
        self.problems = tasks.problems(scale.items, rng, part)
        rows = [pair(scale, WordProblem(problem), rng) for problem in self.problems[: scale.scored_pairs]]
        self.pairs = self._batches(tokenized(rows, model))
        self.others: dict[str, Sequence[tasks.Task | tasks.Question]] = {
            name: tasks.others(name, scale.other_items, rng, held_out=True) for name in tasks.OTHERS
        }
        text = tasks.sentences(scale.sentences, rng, held_out=True) if scale.sentences else tasks.PROSE
        self.text = self._batches([scale.text(sentence, self.tokenizer) for sentence in text])
        self._before: dict[str, Look] = {}

    def _batches(self, rows: Sequence[Example]) -> list[Batch]:
        unit: Unit = "pair" if rows[0].pair else "row"
        batching = MicroBatching(self.at_once, share_prompts=self.share_prompts, unit=unit)
        return micro_batches(rows, batching, self.pad)

    def look(self, engine: Engine) -> Look:
        nats = [-row_means(batch, scores_of(engine, batch)) for batch in self.text]
        return Look([scores_of(engine, batch) for batch in self.pairs], np.concatenate(nats))

    def before(self, engine: Engine, backend: str) -> Look:
        """The same before any step, where every cell begins alike."""
        if backend not in self._before:
            self._before[backend] = self.look(engine)
        return self._before[backend]

    @property
    def groups(self) -> list[int]:
        """Of each problem the number of its calculation: those of one stand or fall together."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(solve(problem), len(numbers)) for problem in self.problems]

    def answered(self, engine: Engine, now: Look) -> list[int]:
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

    def answered(self, engine: Engine, now: Look) -> list[int]:
        texts = self._answers(engine, [task.question for task in self.asked])
        return [int(task.is_right(text)) for task, text in zip(self.asked, texts, strict=True)]

    @cached_property
    def _prompts(self) -> dict[str, list[int]]:
        asked = {task.question: prompt_ids(self.scale.prompt(task.question), self.tokenizer) for task in self.asked}
        return super()._prompts | asked


class HeldOutSolutions(HeldOut):
    """Solutions of GSM8K in place of the word problems, which are the other task here. A small model solves next to
    none itself, so that a question counts as answered right where its right solution is the likelier one."""

    at_once, share_prompts = LONG_AT_ONCE, True

    def __init__(self, model: Path, scale: Scale, part: tasks.Part, solutions: Solutions):
        super().__init__(model, scale, part)
        rng = random.Random(f"held out solutions {part}")
        rows = [pair(scale, one, rng) for one in solutions.asked(scale.items, rng, part)]
        self.pairs = self._batches(tokenized(rows, model))
        self.others = {"word problems": tasks.asked(self.problems[: scale.other_items])}

    @property
    def groups(self) -> list[int]:
        return list(range(self.scale.items))

    def answered(self, engine: Engine, now: Look) -> list[int]:
        """Where the right solution is likelier, a token, than the wrong one of the same question: 1, else 0."""
        found: list[int] = []
        for batch, said in zip(self.pairs, now.scored, strict=True):
            means = row_means(batch, said)
            found += [int(means[chosen] > means[rejected]) for chosen, rejected in batch.pairs]
        return found

    @cached_property
    def _prompts(self) -> dict[str, list[int]]:
        prompt = SCALES["smollm2"].prompt
        asked = [task.question for task in self.others["word problems"]]
        return {question: prompt_ids(prompt(question), self.tokenizer) for question in asked}


def scores_of(engine: Engine, batch: Batch) -> TokenScores:
    return engine.evaluate(batch, np.zeros(len(batch.targets), np.float32))


def row_means(batch: Batch, scores: TokenScores) -> Array:
    """Log-likelihood a token of each row."""
    return batch.row_sums(log_p(scores.log_odds)) / np.bincount(batch.sequence_ids)


def log_p(log_odds: Array) -> Array:
    """log σ(o), float64."""
    return -np.logaddexp(0.0, -log_odds.astype(np.float64))
