"""The model's own answers, which it is then aligned on: drawn at temperature 1 and told right or wrong."""

import random
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from bnf_align.experiments import tasks
from bnf_align.experiments.held_out import HeldOut
from bnf_align.run.completions import Completion, completions, draw
from bnf_core.config import SamplingConfig
from bnf_core.data.tokenization import prompt_ids
from bnf_core.objectives import Objective
from bnf_core.protocol import Engine
from bnf_core.types import Array, Drawn, Example, Position

EACH = 4  # answers to a question
AT_ONCE = 64  # answers drawn together
CANDIDATES = 3  # questions for each that is asked, where those are chosen by how well they are answered


class Answers:
    """`steps.Data`, drawn by the policy as it is when a step asks for them. Every method has the same questions and as
    many answers; which of these it learns from is its own."""

    ahead = False  # what is drawn depends on the steps before

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        held_out: HeldOut,
        task: str,
        steps: int,
        batch_size: int,
        seed: int,
        share: float | None = None,
    ):
        """
        Args:
            share: ask those questions of which about so many answers are right before the first step; default: any.
        """
        self.share = share
        self.engine, self.objective, self.held_out, self.task = engine, objective, held_out, task
        self.steps, self.questions, self.seed = steps, max(batch_size // EACH, 1), seed
        self.right: list[float] = []  # of what was drawn each time, the share

    @cached_property
    def asked(self) -> list[tasks.Question]:
        """Of all steps; none that is held out is among them."""
        rng, count = random.Random(f"train {self.seed}"), self.steps * self.questions
        if self.share is None:
            return tasks.questions(self.task, count, rng)
        candidates = tasks.questions(self.task, CANDIDATES * count, rng)
        right = self._judged(candidates, self._drawn(candidates)).reshape(-1, EACH).mean(axis=1)
        nearest = np.argsort(np.abs(right - self.share), kind="stable")[:count]
        return [candidates[i] for i in sorted(nearest)]

    def _drawn(self, asked: Sequence[tasks.Question]) -> list[Completion]:
        """`EACH` answers to each question, side by side."""
        tokenizer, scale = self.held_out.tokenizer, self.held_out.scale
        rows = completions(
            tokenizer,
            [prompt_ids(scale.prompt(one.question), tokenizer) for one in asked],
            EACH,
            SamplingConfig(temperature=1.0),
            max_tokens=scale.max_tokens,
            stops=self.held_out.stops,
            seed=self.seed,
        )
        draw(self.engine, rows, AT_ONCE)
        return rows

    def _judged(self, asked: Sequence[tasks.Question], rows: Sequence[Completion]) -> Array:
        """1 where an answer is right, else 0. (rows,)"""
        return np.array([asked[i // EACH].is_right(row.text) for i, row in enumerate(rows)], np.float64)

    def draw(self, step: int) -> list[Example]:
        """The answers of a step, judged."""
        asked = self.asked[step * self.questions : (step + 1) * self.questions]
        rows = self._drawn(asked)
        right = self._judged(asked, rows)
        advantages = np.concatenate([self.objective.advantages(some) for some in right.reshape(-1, EACH)])
        self.right.append(float(right.mean()))
        return [
            Example(
                row.prompt_ids,
                tuple(row.ids),
                bool(right[i]),
                group=step * self.questions + i // EACH,
                drawn=Drawn(tuple(row.log_probs), float(advantages[i])),
            )
            for i, row in enumerate(rows)
        ]

    def batches(self, batch_size: int, position: Position | None = None) -> Iterator[tuple[list[Example], Position]]:
        for step in range(position["step"] if position else 0, self.steps):
            yield self.draw(step), {"step": step + 1}

    def drawn(self, batch_size: int, position: Position) -> dict[str, int]:
        return {}
