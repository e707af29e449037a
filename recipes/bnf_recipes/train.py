"""`bnf train`: LoRA alignment with the BNF loss on either backend. One loop; the backend only computes."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from bnf_core import registry
from bnf_core.batching import micro_batches, steps, steps_per_epoch
from bnf_core.checkpoint import resolve_model
from bnf_core.config import TrainConfig
from bnf_core.errors import TrainingStopped
from bnf_core.metrics import Meter, Metrics
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
    """Train an adapter and leave it in the run folder with its config, metrics and picture.

    Raises:
        UserError: bad input; nothing has been written by then but an empty run folder.
        TrainingStopped: the loss or gradient is not finite (the last good adapter is saved), or an interrupt.
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
    pad = pad_id(tokenizer)
    reference = ReferenceCache(engine.reference_log_odds)
    held_out_reference = ReferenceCache(engine.reference_log_odds)
    num_steps = steps_per_epoch(len(data), config.batch_size) * config.epochs
    num_steps = min(num_steps, config.max_steps or num_steps)
    console.print(f"{num_steps} steps of {config.batch_size} rows on {backend.name}; run folder {run.path}")

    def evaluate(step: int) -> Metrics | None:
        if held_out is None:
            return None
        metrics = score(engine, held_out_reference, held_out, config.micro_batch_size, pad, console)
        metrics |= evaluator(engine) if evaluator else {}
        run.log(kind="eval", step=step, **metrics)
        return metrics

    before = after = evaluate(0)
    with bar("train", num_steps, console) as progress, _interrupts() as interrupted:
        for step, row_ids in steps(len(data), config.batch_size, num_steps, config.seed):
            started, meter = time.perf_counter(), Meter()
            for batch in micro_batches(data, row_ids, config.micro_batch_size, pad):
                ref_log_odds = reference(batch)
                meter.add(batch, engine.accumulate(batch, ref_log_odds), ref_log_odds)
            metrics = meter.result()
            rate = learning_rate(step, num_steps, config.optimizer)
            norm = engine.update(rate, config.optimizer.max_grad_norm) if math.isfinite(meter.loss) else math.nan
            if not math.isfinite(norm):
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
            if not last and interrupted():
                engine.save_adapter(run.adapter)
                raise TrainingStopped(f"interrupted after step {step + 1}; the adapter is in {run.adapter}")
            if last or (config.save_every and (step + 1) % config.save_every == 0):
                engine.save_adapter(run.adapter)
            if last or (config.eval_every and (step + 1) % config.eval_every == 0):
                after = evaluate(step + 1)
    return RunResult(run.path, run.adapter, run_picture(run.path), before, after)


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a question asked after each step; a second one ends at once."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
