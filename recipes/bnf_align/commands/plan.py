"""`bnf plan`: what a run will take, before it is started: memory, the largest micro-batch that fits, tokens, steps
and time. Of the model only the configuration and tokenizer are read."""

import math
import time
from dataclasses import dataclass, fields, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from bnf_align.run.auto_batch import Planned, gib, largest, peak
from bnf_align.run.feedback import load_training_data
from bnf_core.config import TrainConfig
from bnf_core.data.table import column
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import UserError
from bnf_core.models.architecture import Architecture, Memory
from bnf_core.models.layers import Layers
from bnf_core.models.model_folder import resolve_model
from bnf_core.protocol import Measures
from bnf_core.steps.batching import Rows
from bnf_core.steps.steps import micro_batching_of


@dataclass(frozen=True)
class Plan:
    memory: Memory
    free: float  # bytes on the device; NaN where that cannot be told
    largest: int  # micro-batch size that fits; 0: not even one row
    rows: int  # of an epoch
    tokens: int
    completion_tokens: int  # that are trained
    steps: int
    seconds: float  # of all steps; NaN where matrix products do not tell
    how: str = ""  # what layers keep was found out; by formulae where it does not say


def plan(config: TrainConfig, console: Console) -> Plan:
    """Plan, and print it.

    Raises:
        UserError: bad input, or a kind of model that is neither known nor measured.
    """
    folder = resolve_model(config.model, weights=False)
    planned = Planned.of(config, folder)
    data = load_training_data(config, load_tokenizer(folder), console)
    if data.examples is None:
        raise UserError("streamed data cannot be planned: nobody knows how long the rows are. Leave out data.streaming")
    model, measures = planned.model, planned.measures
    runtime, free = measures.runtime_memory(), measures.free_memory()

    def needs(size: int) -> Memory:
        batching = replace(micro_batching_of(config), micro_batch_size=size)
        return peak(planned, data, config.batch_size, batching, runtime)

    assert isinstance(data.rows, Rows)
    order, _ = data.rows.epoch(0, config.batch_size)
    tokens = int(column(data.examples, "length")[order].sum())
    completions = int(np.array([len(row.trained_positions) for row in data.examples])[order].sum())
    steps = data.num_steps(config)
    epochs = steps * config.batch_size / len(order)
    passes = epochs + (0.0 if config.reference else min(epochs, 1.0) / 2)  # the reference has no backward pass
    result = Plan(
        memory=needs(config.micro_batch_size),
        free=free,
        largest=largest(lambda size: needs(size).total - runtime, config.batch_size, free),
        rows=len(order),
        tokens=tokens,
        completion_tokens=completions,
        steps=steps,
        seconds=math.nan
        if isinstance(model, Layers)
        else passes
        * products_seconds(model, tokens, completions, measures)
        * measures.over_products
        * (4 / 3 if config.gradient_checkpointing else 1),
        how=model.how if isinstance(model, Layers) else "",
    )
    console.print(table(result, config, measures.memory))
    return result


def products_seconds(model: Architecture, tokens: int, completion_tokens: int, measures: Measures) -> float:
    """Seconds of the bare matrix products of so many tokens, forward and backward, measured on a few."""
    few = 256
    share = completion_tokens / tokens

    def seconds(shapes: list[tuple[int, int, int]]) -> float:
        job = measures.products(shapes, train_weights=False)
        job()
        started = time.perf_counter()
        job()
        return time.perf_counter() - started

    layer = seconds(model.layer_products(few))
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
            made.add_row(part.name, f"{gib(value)} GiB", NOTES[part.name])
    made.add_row("peak", f"{gib(plan.memory.total)} GiB", f"{memory}, with micro_batch_size {config.micro_batch_size}")
    if not math.isnan(plan.free):
        fits = f"micro_batch_size {plan.largest} fits" if plan.largest else "not even one row fits"
        made.add_row("free", f"{gib(plan.free)} GiB", fits)
    made.add_row("tokens", f"{plan.tokens:,}", f"of {plan.rows:,} rows; {plan.completion_tokens:,} are trained on")
    made.add_row("steps", f"{plan.steps:,}", f"of {config.batch_size} rows")
    if plan.how:
        made.add_row("layers", "", f"{plan.how}: the formulae do not know them, and time is not planned")
    else:
        made.add_row("time", _duration(plan.seconds), "about: from the speed of matrix products here")
    return made


NOTES = {
    "runtime": "Python and the libraries",
    "weights": "of the model",
    "trained": "what is trained, gradients and moments",
    "activations": "kept for the backward pass",
    "working": "the loss, or a layer's backward pass",
    "masks": "of attention, for rows that hold more than one sequence",
    "fragments": "lost to the allocator; none with MALLOC_MMAP_THRESHOLD_=1048576, which is slower",
}


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


Config = TrainConfig
POSITIONAL = ("--data",)


def run(config: TrainConfig, console: Console) -> int:
    plan(config, console)
    return 0
