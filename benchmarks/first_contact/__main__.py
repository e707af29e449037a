"""`python -m benchmarks.first_contact gpu`: every stage on this machine, and a folder to send back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.command import main
from benchmarks.figures import here
from benchmarks.first_contact.report import write_report
from benchmarks.first_contact.running import Outcome, run
from benchmarks.first_contact.stages import Machine, Place, stages, write_rows
from bnf_core import registry
from bnf_core.errors import TrainingStopped, UserError

DEVICES: dict[Machine, str] = {"gpu": "cuda", "mac": "gpu"}
MODELS: dict[Machine, str] = {"gpu": "Qwen/Qwen3-8B", "mac": "Qwen/Qwen3-0.6B"}


@dataclass
class FirstContactConfig:
    """Run everything that says how bnf-align does on a machine. What is done is not done again: run it anew to go on.
    The folder OUTPUT/report is to be sent back; there is no personal data in it."""

    machine: Machine = "gpu"
    """gpu: Linux with CUDA; mac: Apple silicon."""
    device: str = "auto"
    """As the backend calls it; cpu runs every stage on tiny sizes, to try the stages."""
    model: str = "auto"
    """Of the steps that are timed; default: Qwen/Qwen3-8B on a GPU, Qwen/Qwen3-0.6B on a Mac."""
    small: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Of trajectories, which the CPU takes as well."""
    output: str = "runs/first-contact"
    """Where everything goes."""
    only: list[str] = field(default_factory=list)
    """Stages, by name; default: all."""
    processes: int = 0
    """Devices for FSDP2 and HSDP; default: all there are; on a CPU, 4 processes."""


def first_contact(config: FirstContactConfig, console: Console) -> list[Outcome]:
    """Run what has not been done, and write the report after every stage.

    Raises:
        UserError: no such stage, or the device is not there.
    """
    device = DEVICES[config.machine] if config.device == "auto" else config.device
    backend = "torch" if config.machine == "gpu" else "mlx"
    found = registry.get(backend).devices()
    if device not in found:
        raise UserError(f"device {device!r}: {backend} has {', '.join(found)} here. --device cpu tries the stages")
    count = config.processes or (4 if device == "cpu" else sum(name.startswith("cuda") for name in found))
    model = MODELS[config.machine] if config.model == "auto" else config.model
    place = Place(config.machine, device, model, config.small, Path(config.output).resolve(), count)
    chosen = stages(place)
    if unknown := set(config.only) - {stage.name for stage in chosen}:
        raise UserError(f"only is {sorted(unknown)}: expected {', '.join(stage.name for stage in chosen)}")
    write_rows(place)
    facts = here() | registry.get(backend).describe()
    environment = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    outcomes: list[Outcome] = []
    for stage in chosen:
        if config.only and stage.name not in config.only:
            continue
        console.print(f"[bold]{stage.name}[/bold]  {stage.about}", highlight=False)
        outcome = run(stage, place.folder / stage.name, facts, environment)
        outcomes.append(outcome)
        ended = "done" if outcome.code == 0 else outcome.note or f"failed ({outcome.code})"
        console.print(f"  {ended}, {outcome.seconds:.0f} s", highlight=False, markup=False)
        page = write_report(place.folder, config.machine, model, facts, outcomes)
    console.print(f"send back the folder {page.parent}", highlight=False, markup=False)
    return outcomes


def command(config: FirstContactConfig, console: Console) -> Any:
    failed = [outcome.name for outcome in first_contact(config, console) if outcome.code not in (0, None)]
    if failed:
        raise TrainingStopped(f"failed: {', '.join(failed)}; their output.txt says why. The same command tries again")


if __name__ == "__main__":
    main("first_contact", FirstContactConfig, command)
