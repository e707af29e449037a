"""How many rows at a time fit into the memory of a device, by the formulae of `bnf_core.models.architecture` or what
`bnf_core.models.layers` makes of layers that these do not know."""

import math
from collections.abc import Callable, Collection
from dataclasses import astuple, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from bnf_align.run.feedback import TrainingData
from bnf_core import registry
from bnf_core.config import TrainConfig
from bnf_core.data.table import column
from bnf_core.errors import UserError
from bnf_core.models.architecture import Architecture, Grid, Memory, Training, UnknownLayers, dtype_of, memory
from bnf_core.models.layers import Layers
from bnf_core.protocol import Engine, Measures
from bnf_core.steps.batching import MicroBatching, Rows, micro_batches
from bnf_core.steps.steps import micro_batching_of

BATCHES = 500  # of which the largest micro-batch is found
MARGIN = 0.9  # of the free memory is used


@dataclass(frozen=True)
class Planned:
    """A model, what is trained of it, and the device that is planned for."""

    model: Architecture | Layers
    training: Training
    measures: Measures

    @classmethod
    def of(cls, config: TrainConfig, folder: Path) -> "Planned":
        """By the formulae, or where they do not know the layers as the backend measures them.

        Raises:
            UserError: neither can tell.
        """
        hardware = config.hardware
        measures = registry.get(hardware.backend).measures(hardware.device, hardware.dtype, dtype_of(folder))
        training = training_of(config, measures)
        try:
            return cls(Architecture.of(folder), training, measures)
        except UnknownLayers:
            return cls(measures.layers(folder, training), training, measures)


def training_of(config: TrainConfig, measures: Measures) -> Training:
    """What the formulae need to know of a run on the device that is measured."""
    return Training(
        dtype=measures.facts()["dtype"],
        kind=config.fine_tune_type,
        lora=config.lora,
        load_in_4bit=config.hardware.load_in_4bit,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def peak(
    planned: Planned,
    data: TrainingData,
    batch_size: int,
    batching: MicroBatching,
    runtime: float = 0.0,
) -> Memory:
    """Of the micro-batch that takes most, among those of the first epoch's first batches and of the longest rows."""
    assert isinstance(data.rows, Rows)
    by_length = np.argsort(column(data.rows.examples, "length"), kind="stable")
    longest = [data.rows.examples[i] for i in by_length[-batch_size:].tolist()]
    first = islice(data.rows.batches(batch_size), min(BATCHES, data.rows.steps_per_epoch(batch_size)))
    batches = [longest, *(chosen for chosen, _ in first)]
    model, training, measures = planned.model, planned.training, planned.measures
    if isinstance(model, Layers):  # states do not begin anew for a completion
        batching = replace(batching, share_prompts=False)
    grids = {measures.grid(part) for chosen in batches for part in micro_batches(chosen, batching)}
    if isinstance(model, Layers):  # each takes seconds
        grids = largest_of(grids)
    found = (memory(model, training, measures.kept(model, training, grid), runtime) for grid in grids)
    return max(found, key=lambda memory: memory.total)


def largest_of(grids: Collection[Grid]) -> set[Grid]:
    """Without those that take no more than another in anything."""

    def fits(small: Grid, large: Grid) -> bool:
        return all(a <= b for a, b in zip(astuple(small), astuple(large), strict=True))

    return {grid for grid in grids if not any(fits(grid, other) for other in grids if other != grid)}


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
    planned = Planned.of(config, folder)
    batching, free = micro_batching_of(config, engine), planned.measures.free_memory()
    if data.examples is None:
        raise UserError("auto_batch needs rows that are not streamed: set micro_batch_size instead")

    def needs(size: int) -> float:
        found = peak(planned, data, config.batch_size, replace(batching, micro_batch_size=size))
        return found.total - found.weights

    mine = np.array([largest(needs, config.batch_size, free)])
    size = int(min(part[0] for part in engine.processes.gather(mine)))
    if size == 0:
        raise UserError(
            f"not even one row fits: it takes {gib(needs(1))} GiB beside the model, and {gib(free)} GiB are free. "
            "Lower data.max_length, or set gradient_checkpointing"
        )
    return size


def out_of_memory(config: TrainConfig, folder: Path, data: TrainingData, engine: Engine, said: str) -> str:
    """What to tell whose device's memory was full: what a step takes by the formulae, and the next thing to try.

    Args:
        said: by the framework.
    """
    tries = []
    if config.micro_batch_size > 1:
        tries.append(f"--micro-batch-size {config.micro_batch_size // 2}")
    if not config.gradient_checkpointing:
        tries.append("--gradient-checkpointing true")
    if config.fine_tune_type == "full":
        tries.append("--fine-tune-type lora, or FSDP2 on more GPUs")
    tries.append(f"--data.max-length {max(2, config.data.max_length // 2)}")
    return (
        f"the memory of {config.hardware.device} is full ({' '.join(said.split())[:200]}). "
        f"{_figures(config, folder, data, engine)}Try {tries[0]}, then {', then '.join(tries[1:])}"
    )


def _figures(config: TrainConfig, folder: Path, data: TrainingData, engine: Engine) -> str:
    """Of `bnf plan`, where its formulae know this kind of model and data."""
    try:
        if data.examples is None:
            return ""
        Architecture.of(folder)  # nothing is to be measured where memory is full
        needed = peak(Planned.of(config, folder), data, config.batch_size, micro_batching_of(config, engine))
    except UserError:
        return ""
    parts = ", ".join(f"{name} {gib(value)}" for name, value in vars(needed).items() if value)
    return (
        f"By `bnf plan` a step of this run takes {gib(needed.total)} GiB with micro_batch_size "
        f"{config.micro_batch_size} on one process: {parts}. "
    )


def gib(value: float) -> str:
    return f"{value / 2**30:.2f}"
