"""`bnf train`: alignment with the BNF loss on either backend, on one process or many. The engine takes the steps;
here is all that happens around them."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import numpy as np
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from bnf_align.commands.push import push_run, require_hub
from bnf_align.commands.reference import open_reference
from bnf_align.run import row_counts
from bnf_align.run.auto_batch import auto_micro_batch, out_of_memory
from bnf_align.run.card import card
from bnf_align.run.feedback import TrainingData, load_training_data, tell, with_date
from bnf_align.run.interrupts import Interrupts
from bnf_align.run.pictures import run_picture
from bnf_align.run.profile import TRACE, profiled
from bnf_align.run.progress import bar
from bnf_align.run.run_folder import RunFolder, recorded_setting
from bnf_align.run.samples import Samples
from bnf_align.run.scoring import score_sets, table
from bnf_align.run.token_log import TokenLog
from bnf_align.run.tracking import check_trackers, open_trackers
from bnf_core import registry
from bnf_core.config import TrainConfig
from bnf_core.data.rendering import chat_of
from bnf_core.data.table import ExampleTable
from bnf_core.data.tokenization import load_tokenizer, pad_id, stop_ids
from bnf_core.errors import TrainingStopped, UserError
from bnf_core.models.model_folder import resolve_model
from bnf_core.protocol import Engine
from bnf_core.steps import loop, steps
from bnf_core.steps.baseline import Baseline
from bnf_core.steps.batching import collate
from bnf_core.steps.metrics import SHIFT_CHOSEN, SHIFT_REJECTED, Meter, Metrics
from bnf_core.steps.mismatched import mismatched, once, unknown_before, with_mismatched
from bnf_core.steps.reference import NoReference, Reference, ReferenceCache
from bnf_core.steps.steps import Step
from bnf_core.storage.checkpoints import MODEL_WEIGHTS, Change, Facts, changes, run_facts
from bnf_core.storage.files import replace_file
from bnf_core.storage.reference_folder import recorded_date
from bnf_core.storage.shards import BASELINE, REFERENCE, put_under, under
from bnf_core.types import Position, TokenScores

# More to measure at each evaluation, such as the accuracy of generated answers.
Evaluator = Callable[[Engine], Metrics]
C = TypeVar("C", bound=TrainConfig)


@dataclass(frozen=True)
class RunResult:
    folder: Path
    trained: Path  # the adapter, or after full fine-tuning the model
    picture: Path
    before: Metrics | None  # held-out metrics before the first step
    after: Metrics | None  # and after the last
    first: bool = True  # of the processes of the run, the one that talks


def train(config: TrainConfig, console: Console, evaluator: Evaluator | None = None) -> RunResult:
    """Train, and leave an adapter or model in the run folder with its checkpoints, config, metrics and picture.

    Raises:
        As `run_training`.
    """

    def load(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, console: Console) -> TrainingData:
        data = load_training_data(config, tokenizer, console)
        if config.sample_every and not data.held_out:
            raise UserError("sample_every needs held-out rows, whose prompts it completes: give some with --valid")
        return data

    return run_training(config, console, load, partial(Training, evaluator=evaluator))


def run_training(
    config: C,
    console: Console,
    load: Callable[[C, PreTrainedTokenizerBase, Console], TrainingData],
    training: Callable[..., "Training"],
) -> RunResult:
    """What every kind of training begins with: the processes, the model's folder, its tokenizer, the data and the
    engine, in this order, so that what is wrong is found early.

    Args:
        load: the data, by the settings as they then are.
        training: `Training`, or what is made of it.
    Raises:
        UserError: bad input; nothing has been written by then but an empty run folder.
        TrainingStopped: the loss or gradient is not finite (the last good weights are saved), an interrupt (after
            a checkpoint), or nothing more can be written.
    """
    check_trackers(config.report_to)
    backend = registry.get(config.hardware.backend)
    processes = backend.processes()
    if processes.rank > 0:
        console = Console(quiet=True)
    checkpoint = resolve_model(config.model)
    for note in backend.notes(checkpoint):
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
    tokenizer = load_tokenizer(checkpoint)
    begun = recorded_setting(Path(config.output), "data.date") if config.resume else None
    referred = recorded_date(config.reference) if config.reference else None
    config = replace(config, data=with_date(config.data, tokenizer, begun, referred))
    data = load(config, tokenizer, console)
    facts = run_facts(config, checkpoint, data.digest, data.held_out_digest)
    for name, value in (config.flat() | facts).items():
        processes.require_same(name, str(value))
    with RunFolder(config, processes).held():
        engine = backend.load(
            checkpoint,
            device=config.hardware.device,
            dtype=config.hardware.dtype,
            load_in_4bit=config.hardware.load_in_4bit,
            adapter=Path(config.adapter) if config.adapter else None,
            fine_tune_type=config.fine_tune_type,
            lora=config.lora,
            optimizer=config.optimizer,
            objective=config.make_objective(),
            gradient_checkpointing=config.gradient_checkpointing,
            router_aux_loss=config.router_aux_loss,
            attention_masks=config.hardware.attention_masks,
            compile=config.hardware.compile,
            deterministic=config.deterministic,
            seed=config.seed,
        )
        if config.deterministic:
            console.print(
                f"deterministic: each {config.make_objective().unit} is computed alone; micro_batch_size, auto_batch, "
                "packing, group_by_length and share_prompts are set aside",
                highlight=False,
                soft_wrap=True,
            )
        if config.auto_batch:
            config = replace(config, micro_batch_size=auto_micro_batch(config, checkpoint, data, engine))
            console.print(f"{config.micro_batch_size} rows at a time fit into the free memory", highlight=False)
        job = training(config, engine, data, facts, checkpoint, tokenizer, console)
        try:
            return job.run()
        except MemoryError as error:
            reason = out_of_memory(config, checkpoint, data, engine, str(error))
            raise TrainingStopped(f"{reason}. {job.folder.how_to_go_on}") from error


class Training:
    """One run: the steps it still has to take, and what is done after each. Every process runs the same code; only
    the first one writes."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        data: TrainingData,
        facts: Facts,
        checkpoint: Path,
        tokenizer: PreTrainedTokenizerBase,
        console: Console,
        evaluator: Evaluator | None = None,
    ):
        self.config, self.engine, self.data, self.facts = config, engine, data, facts
        self.console, self.evaluator, self.tokenizer = console, evaluator, tokenizer
        of_sources = (stop_ids(tokenizer, checkpoint, chat=chat_of(of)) for of in config.data.each().values())
        self.stops = list(dict.fromkeys(chain.from_iterable(of_sources)))
        self.pad = pad_id(tokenizer)
        self.processes = engine.processes
        self.first = self.processes.rank == 0
        known = stop_ids(tokenizer, checkpoint, of_template=False)
        self.folder = RunFolder(config, self.processes, self.stops if set(self.stops) > set(known) else ())
        self.batching = steps.micro_batching_of(config, engine)
        stored = open_reference(config, checkpoint, tokenizer, engine, data.tables)
        # Streamed rows that are not stored can be computed only as long as the model's own weights stay.
        computes = data.examples is not None or stored is None or config.fine_tune_type != "full"
        self.objective = config.make_objective()
        self.reference: Reference = NoReference()
        if self.objective.needs_reference:
            self.reference = ReferenceCache(engine.reference_log_odds if computes else None, stored)
        # Streamed rows may be more than memory holds: their reference is kept for a step.
        self.trained_on = self.reference.passing() if config.data.streaming else self.reference
        self.baseline = Baseline(self.objective, engine, self.reference, self.batching, self.pad)
        self.num_steps = data.num_steps(config)
        self.position: Position | None = None
        self.evaluations: dict[int, Metrics] = {}
        self.saved_at: int | None = None

    def run(self) -> RunResult:
        trace = None
        if self.config.profile and self.first:
            trace = registry.get(self.config.hardware.backend).tracing(self.folder.path / TRACE)
        self._try()
        start = self._start()
        self.console.print(
            f"{self.num_steps} steps of {self.config.batch_size} rows on {self.processes.count} process"
            f"{'es' if self.processes.count > 1 else ''}; run folder {self.folder.path}",
            highlight=False,
        )
        names = self.config.report_to if self.first else []
        with (
            open_trackers(names, self.folder.path, self.config.flat(), start, self.console) as self.trackers,
            bar("train", self.num_steps - start, self.console) as self.progress,
            Interrupts() as self.interrupts,
        ):
            if start == 0 and self.objective.needs_reference and self._loses_reference:
                self._keep_reference()
            self.samples = self._samples(start)
            self.token_log = self._token_log(start)
            self._watch(start)
            self.started = time.perf_counter()
            taken = self._steps(start) if trace is None else profiled(self._steps(start), trace)
            loop.train(self.engine, taken, self._after, self.config.optimizer.max_grad_norm)
        for tally in self.data.tallies:
            tell(tally, self.console)
        if said := self.data.drawn(self.config.batch_size, self.position):
            self.console.print(said, highlight=False, markup=False, soft_wrap=True)
        after = self.evaluations[max(self.evaluations)] if self.evaluations else None
        picture = self.folder.path / "run.png"
        if self.first:
            with self.folder.writing():
                text = card(self.config, self.facts, self.evaluations.get(0), after)
                replace_file(self.folder.trained / "README.md", text)
                picture = run_picture(self.folder.path)
        return RunResult(self.folder.path, self.folder.trained, picture, self.evaluations.get(0), after, self.first)

    def _try(self) -> None:
        """Score the row with the highest token id, beside padding, and the longest: what the model refuses it refuses
        now, before anything that is there is touched."""
        if tables := self.data.tables:
            rows = ExampleTable.joined(tables)
            lengths = rows.column("lengths")
            highest = rows[int(np.argmax(rows.column("highest")))]
            tried = [highest, highest, rows[int(np.argmin(lengths))]]
            beside = collate(tried, len(tried), self.pad, bins=[[0, 1], [2]] if self.config.packing else None)
            for batch in (beside, collate([rows[int(np.argmax(lengths))]], 1, self.pad)):
                self.engine.evaluate(batch, np.zeros(len(batch.targets), np.float32))

    def _steps(self, start: int) -> Iterator[Step]:
        return steps.steps(
            self.data.rows,
            batch_size=self.config.batch_size,
            num_steps=self.num_steps,
            optimizer=self.config.optimizer,
            batching=self.batching,
            reference=self.trained_on,
            processes=self.processes,
            baseline=self.baseline,
            pad_id=self.pad,
            start=start,
            position=self.position,
        )

    def _after(self, step: Step, scores: list[TokenScores], norm: float) -> None:
        if self.trained_on is not self.reference:
            self.trained_on.forget()
        meter = Meter(self.objective)
        for (batch, ref_log_odds), measured in zip(step.batches, scores, strict=True):
            meter.add(batch, measured, ref_log_odds, step.baseline)
        meter.gather(self.processes)
        metrics, done, more = meter.result(), step.number + 1, self._more(step, scores)
        if not math.isfinite(norm):
            self._not_finite(step, metrics)
        self.position = step.position
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        speed = sum(map(len, step.examples)) / seconds
        self._log(
            "train",
            done,
            metrics
            | {
                "learning_rate": step.learning_rate,
                "grad_norm": norm,
                "tokens_per_second": speed,
                "seconds": seconds,
            }
            | more,
        )
        self.progress.advance(
            loss=f"{metrics['loss']:+.3f}",
            chosen=_signed(metrics[SHIFT_CHOSEN]),
            rejected=_signed(metrics[SHIFT_REJECTED]),
            **{"tok/s": f"{speed:,.0f}"},
            **self._watched(more),
        )
        last = done == self.num_steps
        if last or _due(done, self.config.save_every):
            self._save(done)
        if self.processes.any(self.interrupts.received) and (not last or self._evaluation_due(done)):
            self._stop(done)
        self._watch(done)
        self.started = time.perf_counter()

    def _more(self, step: Step, scores: list[TokenScores]) -> Metrics:
        """What a kind of training reports besides."""
        return {}

    def _watched(self, more: Metrics) -> dict[str, str]:
        """Which of it the live line shows."""
        return {}

    def _watch(self, step: int) -> None:
        """What users watch: held-out metrics and samples, where they are due."""
        if self._evaluation_due(step):
            try:
                with self.interrupts.at_once(allowed=self.processes.count == 1):
                    metrics = self._evaluate()
            except KeyboardInterrupt:
                self._stop(step)
            self.evaluations[step] = metrics
            self._log("eval", step, metrics)
            if self.token_log:
                with self.folder.writing():
                    self.token_log.write(step, self.engine, self.reference)
        if self.samples and _due(step, self.config.sample_every):
            with self.folder.writing():
                self.samples.write(step, self.engine)

    def _evaluate(self) -> Metrics:
        """Of what is held out."""
        metrics = score_sets(
            self.engine, self.reference, self.data.held_out, self.batching, self.pad, self.console, self.objective
        )
        return metrics | (self.evaluator(self.engine) if self.evaluator else {})

    @property
    def _holds_out(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.data.held_out)

    def _samples(self, start: int) -> Samples | None:
        if self.config.sample_every is None or not self.data.held_out:
            return None
        with self.folder.writing():
            return Samples(
                self.folder.path if self.first else None,
                ExampleTable.joined(self.data.held_out.values()),
                self.tokenizer,
                self.stops,
                count=self.config.sample_count,
                max_tokens=self.config.sample_tokens,
                sampling=self.config.sample,
                seed=self.config.seed,
                start=start,
            )

    def _token_log(self, start: int) -> TokenLog | None:
        """What a report shows of single tokens and of the rows."""
        losses = registry.get(self.config.hardware.backend).losses("cpu")
        if not self.data.held_out or "objective" in getattr(losses, "lacks", ()):
            return None
        with self.folder.writing():
            if self.first:
                known = {} if self.data.examples is None else {"training": self.data.examples}
                row_counts.write(
                    self.folder.path, known | {name or "held out": t for name, t in self.data.held_out.items()}
                )
            return TokenLog(
                self.folder.path if self.first else None,
                ExampleTable.joined(self.data.held_out.values()),
                self.tokenizer,
                self.objective,
                losses,
                self.pad,
                start,
            )

    def _evaluation_due(self, step: int) -> bool:
        if not self._holds_out or step in self.evaluations:
            return False
        return step in (0, self.num_steps) or _due(step, self.config.eval_every)

    def _log(self, kind: Literal["train", "eval"], step: int, metrics: Mapping[str, float | None]) -> None:
        if self.first:
            self.folder.log(kind=kind, step=step, **metrics)
            self.trackers.log(kind, step, metrics)

    def _save(self, step: int) -> None:
        if step == self.saved_at:
            return
        known, growing = {}, {}
        if self.first:
            known, growing = put_under(BASELINE, self.baseline.state()), put_under(REFERENCE, self.reference.state())
        self.folder.save(step, self.engine, known, growing, self.reference.generation, self.facts, self.position)
        self.saved_at = step

    def _stop(self, step: int) -> NoReturn:
        self._save(step)
        raise TrainingStopped(
            f"interrupted after step {step}; what is trained so far is in {self.folder.trained}. "
            f"To resume: {self.folder.how_to_resume}"
        )

    def _not_finite(self, step: Step, metrics: Metrics) -> NoReturn:
        with self.folder.writing():
            self.folder.save_trained(self.engine)
        what = "gradient" if math.isfinite(metrics["loss"] or 0.0) else "loss"
        raise TrainingStopped(
            f"step {step.number + 1}: the {what} is not finite; the weights as they were before this step are in "
            f"{self.folder.trained}. Rows of the batch: {', '.join(e.source for e in step.examples)}"
        )

    @property
    def _loses_reference(self) -> bool:
        """Whether the model cannot go back to its reference once it is trained: it has no adapter to switch off."""
        return self.config.fine_tune_type == "full"

    def _keep_reference(self) -> None:
        """The reference is computed beforehand."""
        examples = self.data.examples
        if examples is None:
            if self.objective.baseline_from == "mismatched":
                raise UserError(unknown_before(self.objective.name))
            if self.config.reference is None:
                raise UserError(
                    "full fine-tuning on streamed data needs the reference beforehand: make it with `bnf reference`, "
                    "then pass --reference"
                )
            return
        rows = with_mismatched(examples, self.objective)
        if self.objective.baseline_from == "mismatched":
            rows += [row for table in self.data.held_out.values() for row in once(mismatched(table))]
        mine = steps.my_share(rows, replace(self.batching, unit="row"), self.processes, self.pad)
        with bar("reference", len(mine), self.console) as progress:
            for batch in mine:
                steps.with_reference([batch], self.reference, self.processes)
                progress.advance()

    def _start(self) -> int:
        """Prepare the run folder, and with `resume` bring everything back to the newest whole checkpoint; returns how
        many steps are done.

        Raises:
            UserError: there is nothing to resume, or it is of another run.
        """
        found, refused = self.folder.checkpoints.newest(self.processes) if self.config.resume else (None, [])
        for message in refused:
            self.console.print(f"[yellow]{escape(message)}[/yellow]", highlight=False, soft_wrap=True)
        if found is None:
            if refused:
                raise UserError(f"no checkpoint of {self.folder.path} can be used: pass --overwrite to start it anew")
            self.folder.start()
            if self.config.resume:
                self.console.print(f"no checkpoint in {self.folder.path}: starting from the beginning", highlight=False)
            return 0
        changed = changes(found.facts, self.facts)
        if changed and not self.config.resume_anyway:
            raise UserError(
                f"{found.folder} is of another run than this:\n  "
                + "\n  ".join(map(_in_words, changed))
                + "\nChange it back, or pass --resume-anyway to resume all the same"
            )
        self.engine.load_state(found.arrays)
        self.position = found.position
        self.baseline.load_state(under(BASELINE, found.arrays))
        # The reference is known by the rows' tokens, and holds as long as the weights it was computed with.
        if not any(change.name == MODEL_WEIGHTS for change in changed):
            self.reference.load_state(under(REFERENCE, found.arrays))
        self.console.print(f"resuming after step {found.step}, from {found.folder}", highlight=False)
        for change in changed:
            self.console.print(
                f"[yellow]  changed: {escape(_in_words(change))}[/yellow]", highlight=False, soft_wrap=True
            )
        self.evaluations = self.folder.resume(found.step, self.engine)
        self.saved_at = found.step
        return found.step


def _in_words(change: Change) -> str:
    return f"{change.name}: {change.before} → {change.now}"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


Config = TrainConfig
POSITIONAL = ("--data",)


def run(config: TrainConfig, console: Console) -> int:
    require_hub(config)
    result = train(config, console)
    tell_result(result, console, "held-out rows", {"trained": result.trained, "picture": result.picture})
    if result.first:
        push_run(config, console)
    return 0


def tell_result(result: RunResult, console: Console, title: str, places: Mapping[str, Path]) -> None:
    """By the first process: metrics before and after, and where what the run leaves is."""
    if not result.first:
        return
    if result.before is not None and result.after is not None:
        console.print(table({"before": result.before, "after": result.after}, title))
    for name, path in places.items():
        console.print(f"{name:<9}{path}", highlight=False, markup=False)
