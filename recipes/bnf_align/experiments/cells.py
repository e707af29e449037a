"""One cell of an experiment: a method, a setting and a seed make one alignment, and everything that is measured of it.

Nothing is measured for one experiment alone, so that experiments which ask for the same alignment share it.
"""

import contextlib
import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from bnf_align.experiments.answers import Answers
from bnf_align.experiments.held_out import LONG_AT_ONCE, HeldOut, Look, held_out, log_p, row_means, scores_of
from bnf_align.experiments.references import reference_model
from bnf_align.experiments.rows import Mix, training_rows
from bnf_align.experiments.scales import SCALES, Scale
from bnf_align.experiments.statistics import gini
from bnf_align.experiments.subjects import Subject, WordProblems
from bnf_align.run.token_log import ByPlace, gradient_at
from bnf_core import registry
from bnf_core.config import OptimizerConfig
from bnf_core.objectives import Objective, parse
from bnf_core.protocol import Backend, Engine
from bnf_core.steps import loop, steps
from bnf_core.steps.balance import balanced
from bnf_core.steps.baseline import Baseline
from bnf_core.steps.batching import MicroBatching, Rows, micro_batches, rows_alone
from bnf_core.steps.reference import NoReference, Reference, ReferenceCache
from bnf_core.steps.steps import Step
from bnf_core.storage.digests import json_digest
from bnf_core.types import Array, Batch, Example, TokenScores

VERSION = 2  # of what is measured and how: cells of another are not used
# Fields that came later: results without them stay good.
LATER = {"answers": "given", "task": "problems", "share": None}
LATER_OF_MIX = {"graded": False}
WORD_PROBLEMS = WordProblems()

Result = dict[str, Any]  # JSON: what was measured, by name


@dataclass(frozen=True)
class Cell:
    """All that decides what one alignment comes to, beside the model that it starts from."""

    method: str  # its name in tables
    objective: str  # as `bnf_core.objectives.parse` reads it
    learning_rate: float
    seed: int
    steps: int
    batch_size: int
    scale: str = "didactic"
    setting: str = ""  # its name in tables
    mix: Mix = field(default_factory=Mix)
    balanced: bool = False  # rows weigh so that both labels count alike
    reference: str = "start"  # or a kind of `bnf_align.experiments.references`
    answers: Literal["given", "start", "policy"] = "given"  # or the model's own, drawn at the start or at each step
    share: float | None = None  # of answers of its own that are right at the start, to the questions that are asked
    task: str = "problems"  # or one of `tasks.OTHERS`, for answers of its own
    part: Literal["valid", "test"] = "test"  # which problems are asked

    @property
    def digest(self) -> str:
        """What its results are known by, whatever it is called."""
        facts = asdict(self) | {"version": VERSION, "mix": _without(asdict(self.mix), LATER_OF_MIX)}
        named = _without({k: v for k, v in facts.items() if k not in ("method", "setting")}, LATER)
        return json_digest(named)[-16:]


def _without(facts: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    return {name: fact for name, fact in facts.items() if name not in later or later[name] != fact}


def run(cell: Cell, model: Path, backend_name: str, subject: Subject = WORD_PROBLEMS) -> Result:
    """Align once, and measure before, on the way and after.

    Args:
        model: the checkpoint of the cell's scale.
        backend_name: of `bnf_core.registry`.
        subject: what it is about; that of the cell's scale.
    """
    return Alignment(cell, model, registry.get(backend_name), subject).run()


class Alignment:
    """The training of one cell. Its held-out rows are scored against the model that training starts from, whatever the
    reference of the objective is."""

    def __init__(self, cell: Cell, model: Path, backend: Backend, subject: Subject):
        self.cell, self.model, self.backend, self.subject = cell, model, backend, subject
        self.scale: Scale = SCALES[cell.scale]
        self.held_out: HeldOut = held_out(model, cell.scale, cell.part, cell.task, subject)
        self.objective: Objective = parse(cell.objective)
        self.optimizer = OptimizerConfig(learning_rate=cell.learning_rate, warmup_steps=max(1, cell.steps // 20))
        self.engine: Engine = backend.load(
            model,
            device="cpu",
            dtype="float32",
            fine_tune_type=self.scale.fine_tune_type,
            lora=self.scale.lora,
            optimizer=self.optimizer,
            objective=self.objective,
            seed=cell.seed,
        )
        if self.scale.fine_tune_type == "full":
            self.engine.refresh_reference()  # a copy, so that it can be asked at any time
        self.answers = self._answers()
        self.examples = self._examples()
        self.norms: list[float] = []
        self.path: list[Result] = []
        self.start = self.held_out.before(self.engine, backend.name)
        self._seen(0, self.start)
        self.reference = self._reference()
        self.diverged: int | None = None  # the step whose gradient was not finite

    def run(self) -> Result:
        """Train, and say what came of it."""
        count = self.cell.steps
        if self.cell.answers != "policy":
            count = min(count, -(-len(self.examples) // self.cell.batch_size))
        every = max(1, count // self.scale.checks)
        baseline = 0.0
        gradient = {"start": self._gradient(baseline)}

        def after(step: Step, scores: list[TokenScores], norm: float) -> None:
            nonlocal baseline
            baseline = step.baseline
            if not math.isfinite(norm):
                self.diverged = step.number + 1
                raise _Diverged
            self.norms.append(norm)
            if (step.number + 1) % every == 0 or step.number + 1 == count:
                self._seen(step.number + 1, self.held_out.look(self.engine))

        with contextlib.suppress(_Diverged):
            loop.train(self.engine, self._steps(count), after, self.optimizer.max_grad_norm)
        if self.diverged is not None:
            self._seen(self.diverged - 1, self.held_out.look(self.engine))
        gradient["end"] = self._gradient(baseline)
        return self._measured() | {"gradient_at": gradient}

    def _steps(self, count: int) -> Any:
        if not count:
            return ()
        share = self.engine.shares_prompts
        batching = MicroBatching(self.cell.batch_size, share_prompts=share, unit=self.objective.unit)
        mismatched = self.objective.baseline_from == "mismatched"
        rows = Rows(self.examples, self.cell.seed, self.objective.unit, mismatched=mismatched)
        return steps.steps(
            self.answers if self.cell.answers == "policy" else rows,
            batch_size=self.cell.batch_size,
            num_steps=count,
            optimizer=self.optimizer,
            batching=batching,
            reference=self.reference,
            processes=self.engine.processes,
            baseline=Baseline(self.objective, self.engine, self.reference, batching, self.held_out.pad),
            pad_id=self.held_out.pad,
        )

    def _answers(self) -> Answers:
        cell = self.cell
        return Answers(
            self.engine, self.objective, self.held_out, cell.task, cell.steps, cell.batch_size, cell.seed, cell.share
        )

    def _examples(self) -> list[Example]:
        """Those that are there before the first step. An objective of pairs has the pairs alone."""
        cell = self.cell
        if cell.answers != "given":
            steps_before = cell.steps if cell.answers == "start" else 0
            return [row for step in range(steps_before) for row in self.answers.draw(step)]
        rows = list(self._given())
        alone = set(rows_alone(rows, self.objective.unit).tolist())
        rows = [row for i, row in enumerate(rows) if i not in alone]
        return balanced(rows) if cell.balanced else rows

    def _given(self) -> tuple[Example, ...]:
        cell = self.cell
        count = cell.steps * cell.batch_size
        return training_rows(self.model, self.scale, self.subject, count, cell.seed, cell.mix)

    def _reference(self) -> Reference:
        if not self.objective.needs_reference:
            return NoReference()
        if self.cell.reference == "start":
            known = None
            if self.scale.lora and self.cell.answers == "given":  # a model that is large enough for this to matter
                known = before_training(self.model, self.backend.name, self._given(), self.held_out.pad)
            found = ReferenceCache(self.engine.reference_log_odds, known)
            found.merge(self.start.state(self.held_out.pairs))
            return found
        folder = reference_model(self.cell.reference, self.model, self.scale, self.backend, Console(quiet=True))
        other = self.backend.load(folder, device="cpu", dtype="float32")
        return ReferenceCache(lambda batch: scores_of(other, batch).log_odds)

    # What is measured

    def _seen(self, step: int, now: Look) -> None:
        self.now = now
        rows = [batch.row_sums(log_p(said.log_odds)) for batch, said in self._pairs()]
        sums, labels = np.concatenate(rows), np.concatenate([batch.labels for batch in self.held_out.pairs])
        self.path.append(
            {
                "step": step,
                "log_p_chosen": float(sums[labels > 0].mean()),
                "log_p_rejected": float(sums[labels < 0].mean()),
                "perplexity": perplexity(now.nats),
            }
        )

    def _pairs(self) -> list[tuple[Batch, TokenScores]]:
        return list(zip(self.held_out.pairs, self.now.scored, strict=True))

    def _gradient(self, baseline: float) -> dict[str, list[float]]:
        """Where in held-out completions the gradient of the objective is."""
        scored = [(batch, said, self.reference(batch)) for batch, said in self._pairs()]
        return gradient_at(self.backend.losses("cpu"), self.objective, scored, baseline)

    def _measured(self) -> Result:
        shift_at, tokens = ByPlace(), []
        rows: dict[str, list[float]] = {"chosen": [], "rejected": []}
        a_token: dict[str, list[float]] = {"chosen": [], "rejected": []}
        for (batch, said), before in zip(self._pairs(), self.start.scored, strict=True):
            shift = said.log_odds - before.log_odds
            tokens.append(np.abs(shift))
            shift_at.add(batch, shift)
            moved = batch.row_sums(log_p(said.log_odds) - log_p(before.log_odds))
            for label, value, mean in zip(batch.labels, moved, row_means(batch, said), strict=True):
                kind = "chosen" if label > 0 else "rejected"
                rows[kind].append(round(float(value), 4))
                a_token[kind].append(round(float(mean), 5))
        others = {name: self.held_out.others_answered(self.engine, name) for name in self.held_out.others}
        return {
            "version": VERSION,
            "cell": asdict(self.cell),
            "rows": len(self.examples),
            "diverged": self.diverged,
            "correct": self.held_out.answered(self.engine, self.now),
            "groups": self.held_out.groups,
            "others": others,
            "text": [round(float(x), 5) for x in self.now.nats],
            "moved_chosen": rows["chosen"],
            "moved_rejected": rows["rejected"],
            "log_p_a_token": a_token,
            "grad_norms": [round(x, 5) for x in self.norms],
            "path": self.path,
            "right": self.answers.right,
            "gini": gini(np.concatenate(tokens)),
            "shift_at": shift_at.means(),
        }


class _Diverged(Exception):
    pass


def perplexity(nats: Array) -> float:
    """Of sentences, by their mean nats a token; beyond e⁵⁰ it is that."""
    return float(np.exp(min(float(np.mean(nats)), 50.0)))


@lru_cache(2)
def before_training(model: Path, backend_name: str, rows: tuple[Example, ...], pad: int) -> ReferenceCache:
    """What the model says of rows, computed once for all methods that are trained on them."""
    engine = registry.get(backend_name).load(model, device="cpu", dtype="float32")
    found = ReferenceCache(lambda batch: scores_of(engine, batch).log_odds)
    for batch in micro_batches(rows, MicroBatching(LONG_AT_ONCE, share_prompts=engine.shares_prompts), pad):
        found(batch)
    return found
