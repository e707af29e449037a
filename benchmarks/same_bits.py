"""`python -m benchmarks.same_bits`: whether the same steps, taken twice on one device, end with the same bits, with
PyTorch's deterministic algorithms and without, and what these cost."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import main
from benchmarks.step import benchmark, choose, trained
from bnf_align.run.feedback import load_split
from bnf_core.config import DataConfig, HardwareConfig, LoraConfig, TrainConfig
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import UserError
from bnf_core.models.model_folder import resolve_model
from bnf_core.protocol import Engine
from bnf_core.storage.files import replace_file
from bnf_core.storage.shards import Shard
from bnf_core.types import Example

AS_IT_IS = "as it is"


@dataclass
class SameBitsConfig:
    """Take the same LoRA steps twice, with PyTorch's deterministic algorithms and without, and compare the bits."""

    model: str
    """A checkpoint folder or a Hub model."""
    data: DataConfig
    hardware: HardwareConfig = field(default_factory=lambda: HardwareConfig("torch"))
    lora: LoraConfig = field(default_factory=LoraConfig)
    rows: int = 8
    """Sequences of a step."""
    steps: int = 20
    """Of each run."""
    output: str = "runs/bench/same-bits.json"
    """File of what was found."""

    def __post_init__(self) -> None:
        if self.rows < 2 or self.rows % 2:
            raise ValueError(f"rows is {self.rows}: expected an even number of at least 2")
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}: expected an integer of at least 2")


@dataclass(frozen=True)
class Found:
    """
    Args:
        same: both runs ended with the same bits; None: the steps could not be taken, `note` says why.
        seconds: a step, the median of both runs without the first of each.
    """

    same: bool | None
    seconds: float | None
    note: str = ""


def same_bits(config: SameBitsConfig, console: Console) -> dict[str, Found]:
    """Measure, print and write.

    Raises:
        UserError: no such model, bad rows, too few of them, or another backend than torch.
    """
    if config.hardware.backend != "torch":
        raise UserError(f"hardware.backend is {config.hardware.backend}: deterministic algorithms are PyTorch's alone")
    folder = resolve_model(config.model)
    rows = choose(load_split(config.data, "train", load_tokenizer(folder), console), config.rows, 0)
    settings = TrainConfig(str(folder), config.data, hardware=config.hardware, lora=config.lora, batch_size=config.rows)
    found = {}
    for name, deterministic in ((AS_IT_IS, False), ("deterministic algorithms", True)):
        with algorithms(deterministic):
            found[name] = twice(settings, rows, config.steps)
    facts = benchmark(config.hardware).facts()
    written = {"facts": facts, "steps": config.steps, "found": {name: asdict(one) for name, one in found.items()}}
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(written, indent=1) + "\n")
    console.print(shown(found))
    return found


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """PyTorch's own switch. cuBLAS needs CUBLAS_WORKSPACE_CONFIG=:4096:8 besides, before the process starts."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def twice(config: TrainConfig, rows: Sequence[Example], steps: int) -> Found:
    """The same run two times."""
    digests, seconds = [], []
    for _ in range(2):
        times = [time.perf_counter()]
        try:
            engine = trained(config, rows, steps, partial(_note, times))
        except RuntimeError as error:  # an operation that has no deterministic form, by name
            return Found(None, None, " ".join(str(error).split())[:300])
        digests.append(digest(engine))
        seconds += np.diff(times)[1:].tolist()
    return Found(digests[0] == digests[1], float(np.median(seconds)))


def _note(times: list[float]) -> None:
    times.append(time.perf_counter())


def digest(engine: Engine) -> str:
    """Of the bits of all that a run has changed: weights, moments, generators."""
    hashed = hashlib.sha256()
    for name, value in sorted(engine.state().items()):
        array = value.array if isinstance(value, Shard) else value
        hashed.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()


def shown(found: Mapping[str, Found]) -> Table:
    made = Table("", "same bits twice", "seconds a step", "× as it is", box=None)
    plain = found[AS_IT_IS].seconds
    for name, one in found.items():
        same = one.note if one.same is None else "yes" if one.same else "no"
        seconds = "" if one.seconds is None else f"{one.seconds:.4f}"
        made.add_row(name, same, seconds, f"{one.seconds / plain:.2f}" if one.seconds and plain else "")
    return made


if __name__ == "__main__":
    main("same_bits", SameBitsConfig, same_bits)
