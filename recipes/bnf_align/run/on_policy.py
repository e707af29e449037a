"""Rows that a run makes itself: prompts completed by the policy as it then is, judged, and labelled.

Every completion is kept, in the run folder's `samples/`: those with a label in `train-000012.jsonl` of iteration 12,
rows of feedback as `bnf train` takes them, the others in `unlabelled-000012.jsonl`. Besides prompt, completion and
label a row has the judge's `score` or its `error`, the tokens (`prompt_ids`, `completion_ids`), their `log_probs` under
the policy that drew them, whether it was `cut` at the longest completion, and where it comes from: `iteration`,
`sample`, `round`, `seed` and `policy_step`, the optimizer steps that this policy had taken.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from bnf_align.judges.pool import Judges
from bnf_align.run.completions import completions, draw
from bnf_align.run.remote import RemoteSampler
from bnf_core.config import OnlineConfig, SamplingConfig
from bnf_core.data.labels import NEITHER, LabelRule
from bnf_core.data.prompts import Prompt
from bnf_core.data.records import USED
from bnf_core.data.sources import pair_number, prompt_group
from bnf_core.errors import TrainingStopped
from bnf_core.objectives import Objective
from bnf_core.processes import Processes
from bnf_core.protocol import Engine
from bnf_core.sampling import GREEDY
from bnf_core.steps import steps
from bnf_core.steps.balance import balanced
from bnf_core.steps.batching import MicroBatching, require_learnable, rows_alone
from bnf_core.steps.metrics import Metrics
from bnf_core.steps.mismatched import with_mismatched
from bnf_core.steps.mixing import epoch_order
from bnf_core.steps.reference import Reference
from bnf_core.storage.files import agreed, replace_file
from bnf_core.types import Drawn, Example, Position, Unit

BARREN = 20  # iterations in a row without a row to learn from end a run
Row = dict[str, Any]


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the model sees it."""

    prompt: Prompt
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """A completion of a prompt, judged."""

    place: int  # of its prompt among those that were asked for
    number: int  # among the prompt's samples
    text: str
    ids: list[int]
    log_probs: list[float]
    cut: bool
    score: float | None
    error: str | None


class OnPolicy:
    """The rows of a run, iteration by iteration: `steps.Data`, whose batches are all rows of an iteration, as often as
    it has updates. To be told of the engine by `begin` before it is asked for any.

    Args:
        prompts: to sample from.
        held_out: to evaluate on.
        judges: what scores completions, of which `config.label` makes labels.
    """

    ahead = False  # what is drawn depends on the steps before

    def __init__(
        self,
        config: OnlineConfig,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[TokenPrompt],
        held_out: Sequence[TokenPrompt],
        judges: Judges,
        console: Console,
    ):
        self.config, self.tokenizer, self.prompts, self.held_out = config, tokenizer, prompts, held_out
        self.judges, self.console = judges, console
        self.rule = LabelRule.parse(config.label)
        self.policy_step = 0  # optimizer steps taken
        self.sampled_log_p: dict[int, float] = {}  # by the keys of an iteration's rows: the sampler's Σ log p
        self._metrics: Metrics = {}
        self._barren = 0
        self._failures_shown = False

    def begin(
        self,
        engine: Engine,
        *,
        remote: RemoteSampler | None = None,
        objective: Objective,
        reference: Reference,
        batching: MicroBatching,
        folder: Path,
        stops: Sequence[int],
        pad: int,
    ) -> None:
        self.engine, self.remote, self.processes = engine, remote, engine.processes
        self.objective, self.reference, self.batching = objective, reference, batching
        self.folder, self.stops, self.pad = folder / "samples", stops, pad

    # Rows

    def drawn(self, batch_size: int, position: Position) -> dict[str, int]:
        """As `steps.Data`: there is one source, the policy."""
        return {}

    def batches(self, batch_size: int, position: Position | None = None) -> Iterator[tuple[list[Example], Position]]:
        """As `steps.Data`; the size follows from the settings."""
        iteration, updates = (position["iteration"], position["updates"]) if position else (0, 0)
        if updates == self.config.updates_per_batch:
            iteration, updates = iteration + 1, 0
        self._forget(iteration + bool(updates))
        while True:
            rows = self._stored(iteration) if updates else self._sample(iteration)
            self._barren = 0 if rows else self._barren + 1
            if self._barren == BARREN:
                raise TrainingStopped(
                    f"{BARREN} iterations in a row gave nothing to learn from: the label rule {self.rule} and this "
                    f"objective found no row of use among their completions, which are in {self.folder}"
                )
            for update in range(updates, self.config.updates_per_batch) if rows else ():
                yield rows, {"iteration": iteration, "updates": update + 1}
            iteration, updates = iteration + 1, 0

    def metrics(self) -> Metrics:
        """Of the iteration that was sampled last; once."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def evaluate(self) -> Metrics:
        """Of the held-out prompts, by the same judge."""
        samples = self.config.eval_samples
        sampling = self.config.sample if samples > 1 else replace(self.config.sample, temperature=GREEDY.temperature)
        found, _ = self._judged(self.held_out, samples, sampling, [0] * len(self.held_out))
        self._check_failures(found)
        return _metrics(found, self._labels(found))

    def _sample(self, iteration: int) -> list[Example]:
        config = self.config
        places = range(iteration * config.prompts_per_iteration, (iteration + 1) * config.prompts_per_iteration)
        rounds = [place // len(self.prompts) for place in places]
        orders = {round: epoch_order(len(self.prompts), round, config.seed) for round in rounds}
        prompts = [self.prompts[orders[r][p % len(self.prompts)]] for p, r in zip(places, rounds, strict=True)]
        self._refresh(config.reference_policy == "refreshed" and iteration % config.refresh_every == 0 < iteration)
        found, seconds = self._judged(prompts, config.samples_per_prompt, config.sample, rounds)
        labels = self._labels(found)
        about = {"iteration": iteration, "seed": config.seed, "policy_step": self.policy_step}
        rows = [
            _row(prompts[s.place].prompt, prompts[s.place].ids, s, label, rounds[s.place], about)
            for s, label in zip(found, labels, strict=True)
        ]
        self._write(iteration, rows)
        self._check_failures(found)
        self._metrics = _metrics(found, labels) | seconds
        examples = self._examples([row for row in rows if row["label"] is not None], iteration)
        self.reference.forget()  # rows of iterations before are not met again
        if config.reference_policy == "previous":
            self._compute_reference(examples)
            self._refresh(True)
        return examples

    def _refresh(self, now: bool) -> None:
        if now and self.objective.needs_reference:
            self.engine.refresh_reference()

    def _compute_reference(self, examples: list[Example]) -> None:
        """While the reference is still the one that it is for these rows."""
        rows = with_mismatched(examples, self.objective)
        for batch in steps.my_share(rows, replace(self.batching, unit="row"), self.processes, self.pad):
            steps.with_reference([batch], self.reference, self.processes)

    def _examples(self, rows: Sequence[Row], iteration: int) -> list[Example]:
        """What is learned from rows of the file of an iteration, in their order."""
        examples = [
            Example(
                tuple(row["prompt_ids"]),
                tuple(row["completion_ids"]),
                row["label"] > 0,
                group=prompt_group(row["prompt"], row.get("tools"), row.get("chat_template_kwargs")),
                source=f"{_file(iteration)}:{line}",
                weight=1.0 if isinstance(row["label"], bool) else abs(row["label"]),
            )
            for line, row in enumerate(rows, 1)
        ]
        self.sampled_log_p = {e.key: math.fsum(row["log_probs"]) for e, row in zip(examples, rows, strict=True)}
        examples = [replace(e, drawn=d) for e, d in zip(examples, self._drawn(examples, rows), strict=True)]
        require_learnable(examples, self.objective)
        unit: Unit = self.objective.unit
        examples = _paired(examples) if unit == "pair" else examples
        alone = set(rows_alone(examples, unit))
        kept = [e for i, e in enumerate(examples) if i not in alone]
        return balanced(kept) if self.config.balance_labels else kept

    def _drawn(self, examples: Sequence[Example], rows: Sequence[Row]) -> list[Drawn]:
        """What an objective may ask of samples: each beside those of its prompt."""
        groups = np.asarray([e.group for e in examples])
        scores = np.asarray([row["score"] for row in rows], np.float64)
        advantages = np.zeros(len(rows))
        for group in np.unique(groups):
            advantages[groups == group] = self.objective.advantages(scores[groups == group])
        return [Drawn(tuple(row["log_probs"]), float(a)) for row, a in zip(rows, advantages, strict=True)]

    # Completions

    def _judged(
        self, prompts: Sequence[TokenPrompt], samples: int, sampling: SamplingConfig, rounds: Sequence[int]
    ) -> tuple[list[Sample], Metrics]:
        """Completions of all prompts, in their order, drawn and judged by all processes together, and how long it took
        this one."""
        config, mine = self.config, range(len(prompts))[self.processes.share(prompts)]
        made: list[Sample] = []
        if self.remote is not None:
            self.remote.refresh(self.engine, self.policy_step)
        with agreed(self.processes):
            began = time.perf_counter()
            rows = completions(
                self.tokenizer,
                [prompts[i].ids for i in mine],
                samples,
                sampling,
                max_tokens=config.sample_tokens,
                stops=self.stops,
                seed=config.seed,
                rounds=[rounds[i] for i in mine],
            )
            draw(self.remote or self.engine, rows, config.sample_batch_size, self.processes)
            sampled = time.perf_counter()
            places = [i for i in mine for _ in range(samples)]
            judgements = self.judges(
                [(prompts[i].prompt.text, row.text, prompts[i].prompt.row) for i, row in zip(places, rows, strict=True)]
            )
            for n, (i, row, said) in enumerate(zip(places, rows, judgements, strict=True)):
                number = n % samples
                made.append(Sample(i, number, row.text, row.ids, row.log_probs, row.cut, said.score, said.error))
        seconds: Metrics = {"sampling_seconds": sampled - began, "judging_seconds": time.perf_counter() - sampled}
        return _gathered(made, self.processes), seconds

    def _labels(self, samples: Sequence[Sample]) -> list[float | None]:
        """Of samples in order of their prompts; None: none, because it was not judged or is neither."""
        labels: list[float | None] = [None] * len(samples)
        for place in dict.fromkeys(s.place for s in samples):
            known = [i for i, s in enumerate(samples) if s.place == place and s.score is not None]
            rows = [{"score": samples[i].score} for i in known]
            values = [
                self.rule.read(row, f"sample {samples[i].number + 1}") for row, i in zip(rows, known, strict=True)
            ]
            for i, label in zip(known, self.rule.labels(values), strict=True):
                labels[i] = None if label == NEITHER else label
        return labels

    def _check_failures(self, samples: Sequence[Sample]) -> None:
        errors = [s.error for s in samples if s.error is not None]
        if not errors:
            return
        what = f"the judge failed on {len(errors)} of {len(samples)} completions; the first: {errors[0]}"
        if len(errors) > self.config.max_failed * len(samples):
            raise TrainingStopped(
                f"{what}. Mend the judge, or allow more by max_failed, which is {self.config.max_failed:g}"
            )
        if not self._failures_shown:
            self.console.print(f"[yellow]{escape(what)}; `failed` counts the others[/yellow]", soft_wrap=True)
            self._failures_shown = True

    # Files

    def _write(self, iteration: int, rows: Sequence[Row]) -> None:
        try:
            with agreed(self.processes):
                for file, labelled in ((_file(iteration), True), (_file(iteration, "unlabelled"), False)):
                    lines = [json.dumps(row) + "\n" for row in rows if (row["label"] is not None) == labelled]
                    if lines and self.processes.rank == 0:
                        self.folder.mkdir(exist_ok=True)
                        replace_file(self.folder / file, "".join(lines))
        except OSError as error:
            raise TrainingStopped(
                f"{self.folder} could not be written: {error}; when there is room, resume with --resume"
            ) from error

    def _stored(self, iteration: int) -> list[Example]:
        """The rows of an iteration that was sampled before the run was stopped in its midst."""
        path = self.folder / _file(iteration)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise TrainingStopped(f"the run was stopped within iteration {iteration}, and {path} is missing") from error
        self.processes.barrier()
        return self._examples([json.loads(line) for line in lines], iteration)

    def _forget(self, iteration: int) -> None:
        """Files of iterations from this one on, which a run that was killed may have left: they come again."""
        if self.processes.rank == 0 and self.folder.is_dir():
            for path in self.folder.glob("*-*.jsonl"):
                if path.stem.rpartition("-")[2] >= f"{iteration:06d}":
                    path.unlink()


def _file(iteration: int, kind: str = "train") -> str:
    return f"{kind}-{iteration:06d}.jsonl"


def _row(
    prompt: Prompt, ids: Sequence[int], sample: Sample, label: float | None, round: int, about: Mapping[str, Any]
) -> Row:
    said = sample.text if isinstance(prompt.text, str) else [{"role": "assistant", "content": sample.text}]
    whole = None if label is None else bool(label > 0) if abs(label) == 1 else label
    return {
        **{column: value for column, value in prompt.row.items() if column not in USED},
        **{column: prompt.row[column] for column in ("tools", "chat_template_kwargs") if column in prompt.row},
        "prompt": prompt.text,
        "completion": said,
        "label": whole,
        "score": sample.score,
        "error": sample.error,
        "cut": sample.cut,
        **about,
        "round": round,
        "sample": sample.number,
        "prompt_ids": list(ids),
        "completion_ids": sample.ids,
        "log_probs": sample.log_probs,
    }


def _gathered(samples: Sequence[Sample], processes: Processes) -> list[Sample]:
    parts = processes.gather_bytes(json.dumps([asdict(s) for s in samples]).encode())[:: processes.together]
    everything = [Sample(**fields) for part in parts for fields in json.loads(part)]
    return sorted(everything, key=lambda s: (s.place, s.number))


def _paired(examples: Sequence[Example]) -> list[Example]:
    """Each prompt's chosen rows with as many rejected ones, in their order."""
    paired = []
    for group in dict.fromkeys(e.group for e in examples):
        chosen, rejected = ([e for e in examples if e.group == group and e.label == label] for label in (True, False))
        for pair in zip(chosen, rejected, strict=False):
            paired += [replace(e, pair=pair_number(pair[0].source)) for e in pair]
    return paired


def _metrics(samples: Sequence[Sample], labels: Sequence[float | None]) -> Metrics:
    """Of samples of all processes.

    pass_at_1: mean over prompts of the share of their judged samples that are chosen; pass_at_k: share of prompts with
    a chosen one; both_labels: share of prompts with a chosen and a rejected one; score: mean of the judge's;
    completion_tokens: mean length; cut, failed, unlabelled: shares of samples.
    """
    of_prompt: dict[int, list[float]] = {}
    for sample, label in zip(samples, labels, strict=True):
        if sample.score is not None:
            of_prompt.setdefault(sample.place, []).append(label or 0.0)
    shares = [sum(label > 0 for label in found) / len(found) for found in of_prompt.values()]
    scores = [s.score for s in samples if s.score is not None]
    return {
        "pass_at_1": _mean(shares),
        "pass_at_k": _mean([share > 0 for share in shares]),
        "both_labels": _mean([min(found) < 0 < max(found) for found in of_prompt.values()]),
        "score": _mean(scores),
        "completion_tokens": _mean([len(s.ids) for s in samples]),
        "cut": _mean([s.cut for s in samples]),
        "failed": _mean([s.error is not None for s in samples]),
        "unlabelled": _mean([label is None for label in labels]),
        "sampled_tokens": sum(len(s.ids) for s in samples),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
