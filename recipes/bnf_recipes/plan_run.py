"""`bnf plan`: what a run will take, before it is started: memory, the largest micro-batch that fits, tokens, steps
and time. Of the model only the configuration and tokenizer are read."""

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from bnf_core.batching import Cut, Rows, micro_batches
from bnf_core.config import HardwareConfig, TrainConfig
from bnf_core.errors import UserError
from bnf_core.memory import Architecture, Grid, Memory, Training, memory
from bnf_core.model_folder import resolve_model
from bnf_core.plan import cut_of
from bnf_core.protocol import Engine
from bnf_core.tokenization import load_tokenizer
from bnf_recipes.bench_step import benchmark
from bnf_recipes.feedback import TrainingData, load_training_data

BATCHES = 500  # of which the largest micro-batch is found
MARGIN = 0.9  # of the free memory is used
# Seconds of a step beside those of its bare matrix products, as `bnf bench-step` measured them on a CPU
# (docs/performance.md).
OVER_PRODUCTS = {"torch": 1.4, "mlx": 2.6}


@dataclass(frozen=True)
class Plan:
    memory: Memory
    free: float  # bytes on the device; NaN where that cannot be told
    largest: int  # micro-batch size that fits; 0: not even one row
    rows: int  # of an epoch
    tokens: int
    completion_tokens: int
    steps: int
    seconds: float  # of all steps


def plan_run(config: TrainConfig, console: Console) -> Plan:
    """Plan, and print it.

    Raises:
        UserError: bad input, or a kind of model that the formulae do not know.
    """
    folder = resolve_model(config.model, weights=False)
    model = Architecture.of(folder)
    data = load_training_data(config, load_tokenizer(folder), console)
    if data.examples is None:
        raise UserError("streamed data cannot be planned: nobody knows how long the rows are. Leave out data.streaming")
    measures = measures_of(config.hardware, model)
    training = training_of(config, measures)
    runtime, free = measures.runtime_memory(), measures.free_memory()

    def needs(size: int) -> Memory:
        return peak(model, training, data, config.batch_size, replace(cut_of(config), micro_batch_size=size), runtime)

    tokens = sum(map(len, data.examples))
    completions = sum(len(row.completion_ids) for row in data.examples)
    steps = data.num_steps(config)
    epochs = steps * config.batch_size / len(data.examples)
    passes = epochs + (0.0 if config.reference else min(epochs, 1.0) / 2)  # the reference has no backward pass
    result = Plan(
        memory=needs(config.micro_batch_size),
        free=free,
        largest=largest(lambda size: needs(size).total - runtime, config.batch_size, free),
        rows=len(data.examples),
        tokens=tokens,
        completion_tokens=completions,
        steps=steps,
        seconds=passes
        * products_seconds(model, tokens, completions, measures)
        * OVER_PRODUCTS[config.hardware.backend]
        * (4 / 3 if config.gradient_checkpointing else 1),
    )
    console.print(table(result, config, measures.memory))
    return result


def measures_of(hardware: HardwareConfig, model: Architecture) -> Any:
    """The backend's Benchmark, in the precision of the run: `auto` is the checkpoint's own on MLX's GPU."""
    measures = benchmark(hardware)
    if hardware.backend == "mlx" and hardware.dtype == "auto" and "gpu" in str(measures.device):
        return benchmark(replace(hardware, dtype=cast(Any, model.dtype)))
    return measures


def training_of(config: TrainConfig, measures: Any) -> Training:
    """What the formulae need to know of a run on the device that is measured."""
    facts = measures.facts()
    device = str(measures.device)
    on_cpu = "cpu" in device.lower()
    glibc = platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ
    return Training(
        backend=config.hardware.backend,
        device=device,
        dtype=facts["dtype"],
        kind=config.fine_tune_type,
        lora=config.lora,
        load_in_4bit=config.hardware.load_in_4bit,
        gradient_checkpointing=config.gradient_checkpointing,
        fragmented=config.hardware.backend == "torch" and on_cpu and glibc,
    )


def peak(
    model: Architecture, training: Training, data: TrainingData, batch_size: int, cut: Cut, runtime: float = 0.0
) -> Memory:
    """Of the micro-batch that takes most, among those of the first epoch's first batches and of the longest rows."""
    assert isinstance(data.rows, Rows)
    longest = sorted(data.rows.examples, key=len)[-batch_size:]
    first = islice(data.rows.batches(batch_size), min(BATCHES, data.rows.steps_per_epoch(batch_size)))
    batches = [longest, *(chosen for chosen, _ in first)]
    grids = {Grid.of(part, training.backend) for chosen in batches for part in micro_batches(chosen, cut)}
    return max((memory(model, training, grid, runtime) for grid in grids), key=lambda found: found.total)


def largest(needs: Callable[[int], float], most: int, free: float) -> int:
    """The largest micro-batch size, up to `most`, that fits into so many free bytes; 0 if none does."""
    if math.isnan(free):
        return most
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= MARGIN * free else (low, middle - 1)
    return low


def auto_micro_batch(config: TrainConfig, folder: Path, data: TrainingData, engine: Engine) -> int:
    """The micro-batch size of `--auto-batch`, once the model is loaded: what fits on every process.

    Raises:
        UserError: not even one row fits, or the formulae do not know this kind of model or data.
    """
    model = Architecture.of(folder)
    measures = measures_of(config.hardware, model)
    training, cut, free = training_of(config, measures), cut_of(config, engine), measures.free_memory()
    if data.examples is None:
        raise UserError("auto_batch needs rows that are not streamed: set micro_batch_size instead")

    def needs(size: int) -> float:
        found = peak(model, training, data, config.batch_size, replace(cut, micro_batch_size=size))
        return found.total - found.weights

    mine = np.array([largest(needs, config.batch_size, free)])
    size = int(min(part[0] for part in engine.processes.gather(mine)))
    if size == 0:
        raise UserError(
            f"not even one row fits: it takes {_gib(needs(1))} GiB beside the model, and {_gib(free)} GiB are free. "
            "Lower data.max_length, or set gradient_checkpointing"
        )
    return size


def products_seconds(model: Architecture, tokens: int, completion_tokens: int, measures: Any) -> float:
    """Seconds of the bare matrix products of so many tokens, forward and backward, measured on a few."""
    few = 256
    share = completion_tokens / tokens

    def seconds(shapes: list[tuple[int, int, int]]) -> float:
        job = measures.products(shapes, train_weights=False)
        job()
        started = time.perf_counter()
        job()
        return time.perf_counter() - started

    layer = seconds([(few, i, o) for i, o in model.linear.values()])
    head = seconds([(few, model.hidden, model.vocab)])
    return (layer * model.layers + head * share) * tokens / few


def table(plan: Plan, config: TrainConfig, memory: str) -> Table:
    made = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    made.add_column()
    made.add_column(justify="right")
    made.add_column()
    for part in fields(plan.memory):
        value = getattr(plan.memory, part.name)
        if value:
            made.add_row(part.name, f"{_gib(value)} GiB", NOTES[part.name])
    made.add_row("peak", f"{_gib(plan.memory.total)} GiB", f"{memory}, with micro_batch_size {config.micro_batch_size}")
    if not math.isnan(plan.free):
        fits = f"micro_batch_size {plan.largest} fits" if plan.largest else "not even one row fits"
        made.add_row("free", f"{_gib(plan.free)} GiB", fits)
    made.add_row("tokens", f"{plan.tokens:,}", f"of {plan.rows:,} rows; {plan.completion_tokens:,} are trained on")
    made.add_row("steps", f"{plan.steps:,}", f"of {config.batch_size} rows")
    made.add_row("time", _duration(plan.seconds), "about: from the speed of matrix products here")
    return made


NOTES = {
    "runtime": "Python and the libraries",
    "weights": "of the model",
    "trained": "what is trained, gradients and moments",
    "activations": "kept for the backward pass",
    "working": "the loss, or a layer's backward pass",
    "fragments": "lost to the allocator; none with MALLOC_MMAP_THRESHOLD_=1048576, which is slower",
}


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"
