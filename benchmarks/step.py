"""`python -m benchmarks.step`: a whole LoRA step of `bnf train` beside other trainers', on the same model and rows."""

import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.command import main
from benchmarks.figures import FLOOR, Case, MeasureConfig, Measurement, bars, page, table
from benchmarks.interleaved import Work, apart, repeated, rounds
from bnf_align.run.feedback import load_split
from bnf_core import registry
from bnf_core.config import DataConfig, HardwareConfig, LoraConfig, TrainConfig
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import UserError
from bnf_core.models.architecture import Architecture
from bnf_core.models.model_folder import resolve_model
from bnf_core.protocol import Engine
from bnf_core.steps import loop
from bnf_core.steps import steps as plan
from bnf_core.steps.baseline import Baseline
from bnf_core.steps.batching import Rows
from bnf_core.steps.reference import ReferenceCache
from bnf_core.types import Example

OURS, FIRST_EPOCH = "bnf", "bnf, reference computed in the step"
OBJECTIVES = ("dpo", "kto", "apo_zero_unpaired")  # beside BNF: those that peers have as well


@dataclass
class BenchStepConfig:
    """Time a whole optimizer step of `bnf train`, as it is by default, beside those of other trainers."""

    model: str
    """A checkpoint folder or a Hub model."""
    data: DataConfig
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    rows: int = 8
    """Sequences of a step, good and bad in equal parts: the same in every step and for every trainer."""
    contenders: list[str] = field(default_factory=list)
    """Only those whose names hold one of these; default: all."""
    seed: int = 0
    """Of the choice of rows."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self) -> None:
        if self.rows < 2 or self.rows % 2:
            raise ValueError(f"rows is {self.rows}: expected an even number of at least 2")


def bench_step(config: BenchStepConfig, console: Console) -> Measurement:
    """Measure, print, and write figures, page and picture.

    Raises:
        UserError: no such model, bad rows, too few of them, or the file of figures holds those of something else.
    """
    folder = resolve_model(config.model)
    rows = choose(load_split(config.data, "train", load_tokenizer(folder), console), config.rows, config.seed)
    settings = train_config(config, folder)
    measures = benchmark(config.hardware)
    tokens, trained = sum(map(len, rows)), sum(len(row.trained_positions) for row in rows)
    title = f"a step of {len(rows)} rows, {tokens:,} tokens, {trained:,} of them completions"
    facts = measures.facts() | {
        "model": str(config.model),
        "data": str(config.data.path),
        "lora": f"r={config.lora.rank}, {','.join(config.lora.targets)}",
        "step": title,
    }
    steps = config.measure.rounds + 2
    names = {
        name: work
        for name, work in contenders(settings, rows, steps).items()
        if not config.contenders or name == OURS or any(part in name for part in config.contenders)
    }
    floor = measures.products(Architecture.of(folder).products(tokens, trained), train_weights=False)
    case = Case(
        title,
        {FLOOR: repeated(floor), **names},
        lambda name: measures.extra_memory(floor) if name == FLOOR else peak_memory(settings, rows, name),
        OURS,
        beside={name: ours_like(name) for name in names},
    )
    measurement = Measurement(config.measure, f"step-{config.hardware.backend}", facts, console)
    whole = measurement.run(case)
    console.print(table(title, measurement.cases[title]))
    command = (
        f"python -m benchmarks.step --model {config.model} --data {config.data.path} "
        f"--backend {config.hardware.backend} --device {config.hardware.device}"
    )
    memory = f"at the peak of a process of its own, {measures.memory}"
    measurement.finish(
        whole,
        bars(measurement.cases, measures.memory),
        page(measurement.facts, measurement.cases, command, memory),
    )
    return measurement


def ours_like(contender: str) -> str:
    """Ours with the objective of a contender, which its name holds."""
    fitting = [name for name in OBJECTIVES if name in contender.lower()]
    return f"{OURS} --objective {fitting[-1]}" if fitting and not contender.startswith(OURS) else OURS


def train_config(config: BenchStepConfig, folder: Path) -> TrainConfig:
    """`bnf train` as it is by default, but for the rows of a step."""
    return TrainConfig(
        model=str(folder), data=config.data, hardware=config.hardware, lora=config.lora, batch_size=config.rows
    )


def choose(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """A good and a bad row of as many prompts as that takes, prompts drawn by the seed.

    Raises:
        UserError: there are not enough prompts with both.
    """
    groups: dict[int, dict[bool, Example]] = {}
    for row in rows:
        groups.setdefault(row.group, {}).setdefault(row.label, row)
    both = [group for _, group in sorted(groups.items()) if len(group) == 2]
    if len(both) < count // 2:
        raise UserError(
            f"a step of {count} rows needs {count // 2} prompts with a good and a bad completion, and the data have "
            f"{len(both)}: choose fewer --rows or other --data"
        )
    chosen = random.Random(seed).sample(both, count // 2)
    return [replace(group[label], pair=i) for i, group in enumerate(chosen, 1) for label in (True, False)]


def benchmark(hardware: HardwareConfig) -> Any:
    """What a backend measures: its Benchmark.

    Raises:
        UserError: the backend is missing, or brings no benchmark.
    """
    return _module(hardware.backend, "losses").Benchmark(hardware.device, hardware.dtype)


def contenders(config: TrainConfig, rows: Sequence[Example], steps: int) -> dict[str, Work | str]:
    """Ours, then the backend's peers; of one that cannot run, why."""
    hardware = config.hardware
    peers = _module(hardware.backend, "peers").peers(
        Path(config.model), rows, device=hardware.device, dtype=hardware.dtype, lora=config.lora, steps=steps
    )
    others = {
        f"{OURS} --objective {name}": ours(replace(config, objective={"name": name}), rows, steps)
        for name in OBJECTIVES
    }
    return {OURS: ours(config, rows, steps), FIRST_EPOCH: ours(config, rows, steps, forget=True), **others, **peers}


def ours(config: TrainConfig, rows: Sequence[Example], steps: int, *, forget: bool = False) -> Work:
    """The steps of `bnf train`; with `forget` the reference is computed in each, as in a first epoch."""

    def work(pause: Callable[[], None]) -> None:
        trained(config, rows, steps, pause, forget=forget)

    return work


def trained(
    config: TrainConfig, rows: Sequence[Example], steps: int, pause: Callable[[], None], *, forget: bool = False
) -> Engine:
    """The model after these steps of `bnf train`, between which `pause` is called."""
    measures, objective = benchmark(config.hardware), config.make_objective()
    engine = registry.get(config.hardware.backend).load(
        Path(config.model),
        device=config.hardware.device,
        dtype=config.hardware.dtype,
        load_in_4bit=config.hardware.load_in_4bit,
        objective=objective,
        fine_tune_type=config.fine_tune_type,
        lora=config.lora,
        optimizer=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        attention_masks=config.hardware.attention_masks,
        compile=config.hardware.compile,
        seed=config.seed,
    )
    reference = ReferenceCache(engine.reference_log_odds)
    batching = plan.micro_batching_of(config, engine)

    def done(*_: Any) -> None:
        if forget:
            reference.forget()
        measures.wait()
        pause()

    taken = plan.steps(
        Rows(rows, config.seed, objective.unit, mismatched=objective.baseline_from == "mismatched"),
        batch_size=config.batch_size,
        num_steps=steps,
        optimizer=config.optimizer,
        batching=batching,
        reference=reference,
        processes=engine.processes,
        baseline=Baseline(objective, engine, reference, batching),
    )
    loop.train(engine, taken, done, config.optimizer.max_grad_norm)
    return engine


def peak_memory(config: TrainConfig, rows: Sequence[Example], name: str) -> float:
    """Bytes at the peak of two steps in a process of their own.

    Raises:
        ContenderFailed: the steps failed, or the process was killed.
    """
    return apart(name, _peak_memory, config, rows, name)


def _peak_memory(config: TrainConfig, rows: Sequence[Example], name: str) -> float:
    work = contenders(config, rows, 4)[name]
    assert not isinstance(work, str)
    next(rounds({name: work}))
    return float(benchmark(config.hardware).peak_memory())


def _module(backend: str, name: str) -> Any:
    if find_spec(f"benchmarks.{backend}_{name}") is None:
        raise UserError(f"backend {backend!r} has no benchmarks: expected torch or mlx")
    if absent := registry.missing(backend):
        raise UserError(f"backend {backend} needs {', '.join(absent)}: pip install 'bnf-align[{backend}]'")
    return importlib.import_module(f"benchmarks.{backend}_{name}")


if __name__ == "__main__":
    main("step", BenchStepConfig, bench_step)
