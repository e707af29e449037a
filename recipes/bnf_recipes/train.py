"""`bnf train`: LoRA alignment with the BNF loss on either backend. One loop; the backend only computes."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self

from rich.console import Console
from rich.markup import escape

from bnf_core import registry
from bnf_core.batching import micro_batches, steps, steps_per_epoch
from bnf_core.checkpoints import Facts, changes, run_facts, under
from bnf_core.config import TrainConfig
from bnf_core.errors import TrainingStopped, UserError
from bnf_core.metrics import Meter, Metrics
from bnf_core.model_folder import resolve_model
from bnf_core.protocol import Engine
from bnf_core.reference import ReferenceCache
from bnf_core.schedule import learning_rate
from bnf_core.tokenization import load_tokenizer
from bnf_recipes.evaluate import score
from bnf_recipes.feedback import load_train_and_valid, pad_id
from bnf_recipes.pictures import run_picture
from bnf_recipes.progress import bar
from bnf_recipes.run_folder import RunFolder

# More to measure at each evaluation, such as the accuracy of generated answers.
Evaluator = Callable[[Engine], Metrics]


@dataclass(frozen=True)
class RunResult:
    folder: Path
    adapter: Path
    picture: Path
    before: Metrics | None  # held-out metrics before the first step
    after: Metrics | None  # and after the last


def train(config: TrainConfig, console: Console, evaluator: Evaluator | None = None) -> RunResult:
    """Train an adapter and leave it in the run folder with its checkpoints, config, metrics and picture.

    Raises:
        UserError: bad input; nothing has been written by then but an empty run folder.
        TrainingStopped: the loss or gradient is not finite (the last good adapter is saved), an interrupt (after
            a checkpoint), or nothing more can be written.
    """
    backend = registry.get(config.hardware.backend)
    checkpoint = resolve_model(config.model)
    tokenizer = load_tokenizer(checkpoint)
    data, held_out = load_train_and_valid(config, tokenizer, console)
    engine = backend.load(
        checkpoint,
        device=config.hardware.device,
        dtype=config.hardware.dtype,
        lora=config.lora,
        optimizer=config.optimizer,
        seed=config.seed,
    )
    run = RunFolder(config)
    facts = run_facts(config, checkpoint, data, held_out)
    pad = pad_id(tokenizer)
    reference = ReferenceCache(engine.reference_log_odds)
    held_out_reference = ReferenceCache(engine.reference_log_odds)
    num_steps = steps_per_epoch(len(data), config.batch_size) * config.epochs
    num_steps = min(num_steps, config.max_steps or num_steps)
    start, evaluations = _start(config, run, facts, engine, reference, console)
    saved_at = start if start else None
    console.print(f"{num_steps} steps of {config.batch_size} rows on {backend.name}; run folder {run.path}")

    def save(step: int) -> None:
        nonlocal saved_at
        if step != saved_at:
            known = {f"reference/{name}": array for name, array in reference.state().items()}
            run.save(step, engine, known, facts)
            saved_at = step

    def evaluation_due(step: int) -> bool:
        every = config.eval_every or num_steps
        return held_out is not None and step not in evaluations and (step >= num_steps or step % every == 0)

    def evaluate(step: int) -> None:
        if held_out is None or not evaluation_due(step):
            return
        try:
            with interrupts.at_once():
                metrics = score(engine, held_out_reference, held_out, config.micro_batch_size, pad, console)
                metrics |= evaluator(engine) if evaluator else {}
        except KeyboardInterrupt:
            stop(step)
        evaluations[step] = metrics
        run.log(kind="eval", step=step, **metrics)

    def stop(step: int) -> NoReturn:
        save(step)
        raise TrainingStopped(
            f"interrupted after step {step}; the adapter is in {run.adapter}. To go on: {run.how_to_go_on}"
        )

    with bar("train", num_steps - start, console) as progress, Interrupts() as interrupts:
        evaluate(start)
        for step, row_ids in steps(len(data), config.batch_size, num_steps, config.seed, start):
            started, meter = time.perf_counter(), Meter()
            for batch in micro_batches(data, row_ids, config.micro_batch_size, pad):
                ref_log_odds = reference(batch)
                meter.add(batch, engine.accumulate(batch, ref_log_odds), ref_log_odds)
            metrics = meter.result()
            rate = learning_rate(step, num_steps, config.optimizer)
            norm = engine.update(rate, config.optimizer.max_grad_norm) if math.isfinite(meter.loss) else math.nan
            if not math.isfinite(norm):
                with run.writing():
                    engine.save_adapter(run.adapter)
                rows = ", ".join(data[i].source for i in row_ids)
                raise TrainingStopped(
                    f"step {step + 1}: the {'gradient' if math.isfinite(meter.loss) else 'loss'} is not finite; "
                    f"the adapter as it was before this step is in {run.adapter}. Rows of the batch: {rows}"
                )
            seconds = time.perf_counter() - started
            speed = sum(len(data[i]) for i in row_ids) / seconds
            run.log(
                kind="train",
                step=step + 1,
                **metrics,
                learning_rate=rate,
                grad_norm=norm,
                tokens_per_second=speed,
                seconds=seconds,
            )
            progress.advance(
                loss=f"{meter.loss:+.3f}",
                good=_signed(metrics["log_odds_shift/good"]),
                bad=_signed(metrics["log_odds_shift/bad"]),
                **{"tok/s": f"{speed:,.0f}"},
            )
            last = step + 1 == num_steps
            if last or (config.save_every and (step + 1) % config.save_every == 0):
                save(step + 1)
            if interrupts.received and (not last or evaluation_due(step + 1)):
                stop(step + 1)
            evaluate(step + 1)
    after = evaluations[max(evaluations)] if evaluations else None
    with run.writing():
        picture = run_picture(run.path)
    return RunResult(run.path, run.adapter, picture, evaluations.get(0), after)


def _start(
    config: TrainConfig, run: RunFolder, facts: Facts, engine: Engine, reference: ReferenceCache, console: Console
) -> tuple[int, dict[int, Metrics]]:
    """Prepare the run folder, and with `resume` bring everything back to the newest whole checkpoint.

    Returns:
        How many steps are done, and the evaluations so far, by step.
    Raises:
        UserError: there is nothing to resume, or it is of another run.
    """
    found, refused = run.checkpoints.newest() if config.resume else (None, [])
    for message in refused:
        console.print(f"[yellow]{escape(message)}[/yellow]", highlight=False, soft_wrap=True)
    if found is None:
        if refused:
            raise UserError(f"no checkpoint of {run.path} can be used: pass --overwrite to start it anew")
        run.start()
        if config.resume:
            console.print(f"no checkpoint in {run.path}: starting from the beginning", highlight=False)
        return 0, {}
    changed = changes(found.facts, facts)
    if changed and not config.resume_anyway:
        raise UserError(
            f"{found.folder} is of another run than this:\n  "
            + "\n  ".join(changed)
            + "\nChange it back, or pass --resume-anyway to go on all the same"
        )
    engine.load_state(found.arrays)
    if not changed:
        reference.load_state(under("reference", found.arrays))
    console.print(f"going on after step {found.step}, from {found.folder}", highlight=False)
    for line in changed:
        console.print(f"[yellow]  changed: {escape(line)}[/yellow]", highlight=False, soft_wrap=True)
    return found.step, run.go_on(found.step, engine)


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


class Interrupts:
    """SIGINT and SIGTERM, noted until a step is complete, or raised `at_once` where that does no harm. A second
    one ends the run wherever it is."""

    def __init__(self) -> None:
        self.received = False
        self._at_once = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        end_now = self.received or self._at_once
        self.received = True
        if end_now:
            signal.default_int_handler(number, frame)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it an interrupt raises KeyboardInterrupt."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
