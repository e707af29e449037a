"""`bnf experiment`: a claim of the paper, run here: methods × settings × seeds, with intervals and pictures."""

import difflib
import json
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bnf_align.experiments import EXPERIMENTS, experiment, gsm8k
from bnf_align.experiments.base import Experiment
from bnf_align.experiments.outcome import NAME, Outcome, line_of, start_of
from bnf_align.experiments.pictures import panels
from bnf_align.experiments.runner import Plan, Runner, choose_rates
from bnf_align.experiments.scales import SCALES
from bnf_align.experiments.subjects import Solutions, Subject, WordProblems
from bnf_align.experiments.tables import markdown, table
from bnf_align.run.pictures import save
from bnf_core import registry
from bnf_core.config import HardwareConfig
from bnf_core.errors import UserError
from bnf_core.storage.files import replace_file

PACKAGES = ("bnf-align", "numpy", "transformers")


@dataclass
class ExperimentConfig:
    """Run one of the experiments, or list them."""

    name: str = ""
    """Which; none: list them."""
    scale: str | None = None
    """didactic: a transformer of a million parameters that is pre-trained here, minutes to an hour; smollm2:
    SmolLM2-135M, hours; gsm8k: the same model on real solutions, hours. Default: the first that an experiment has."""
    solutions: str = ""
    """For gsm8k: OpenAI's example_model_solutions.jsonl."""
    methods: list[str] = field(default_factory=list)
    """Those that are compared, by the names in the table; default: all of the experiment."""
    output: str = "runs/experiments"
    """Folder of all experiments, which share models and what they have in common; this one's is in it by its name."""
    resume: bool = False
    """Go on with the experiment that is there; what is done is kept."""
    seeds: int | None = None
    """Of each method in each setting; default: the experiment's, or the scale's."""
    sweep_seeds: int | None = None
    """Of each learning rate that is tried; default: the scale's."""
    learning_rates: list[str] = field(default_factory=list)
    """Those that are tried; default: the scale's."""
    steps: int | None = None
    """Of each alignment; default: the scale's."""
    jobs: int = 1
    """Processes at a time, each on a core of its own."""
    hardware: HardwareConfig = field(default_factory=lambda: HardwareConfig(device="cpu", dtype="float32"))

    def __post_init__(self) -> None:
        for name in ("seeds", "sweep_seeds", "steps", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: expected an integer of at least 1")
        if (self.hardware.device, self.hardware.dtype) != ("cpu", "float32"):
            raise ValueError("hardware.device: experiments are run in float32 on the CPU, expected cpu and float32")
        if self.scale is not None and self.scale not in SCALES:
            raise ValueError(f"scale is {self.scale!r}: expected {' or '.join(SCALES)}")
        for rate in self.learning_rates:
            if not _is_rate(rate):
                raise ValueError(f"learning_rates has {rate!r}: expected numbers above 0, as 1e-4,3e-4")


def run_experiment(config: ExperimentConfig, console: Console) -> Outcome:
    """Run what is not done yet, and write results.json, table.md and the pictures.

    Raises:
        UserError: no such experiment, one is there already, or it was begun with other settings.
        TrainingStopped: interrupted; what is done is kept.
    """
    if config.name not in EXPERIMENTS:
        near = difflib.get_close_matches(config.name, EXPERIMENTS, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(EXPERIMENTS)}"
        raise UserError(f"unknown experiment {config.name!r}: {hint}")
    found = _chosen(config, experiment(config.name))
    plan = _plan(config, found)
    subject = _subject(config, plan)
    folder = Path(config.output) / config.name
    settings = _settings(config, plan, subject)
    _begin(folder, settings, config)
    runner = Runner(Path(config.output), plan.scale, config.hardware.backend, config.jobs, console, subject)
    start, start_of_sweep = runner.run([plan.start(), plan.start_of_sweep()], "start")
    sweep, rates = choose_rates(runner.run(plan.sweep(), "sweep"), start_of_sweep)
    cells = runner.run(plan.cells(rates), config.name)
    by_line: dict[tuple[str, str], list[Any]] = {}
    for cell in cells:
        by_line.setdefault((cell["cell"]["setting"], cell["cell"]["method"]), []).append(cell)
    lines = [line_of(own, _beside(by_line, setting, found), start) for (setting, _), own in by_line.items()]
    facts = settings | {
        "model": runner.digest,
        "cpu_hours": round(runner.seconds / 3600, 2),
        "versions": {name: version(name) for name in (*PACKAGES, *registry.get(runner.backend).requires)},
    }
    outcome = Outcome(config.name, found.claim, facts, start_of(start), sweep, lines, found.axis)
    outcome = replace(outcome, seen=found.seen(outcome))
    _write(folder, outcome, found)
    return outcome


def _chosen(config: ExperimentConfig, found: Experiment) -> Experiment:
    """The experiment with the methods that were asked for."""
    if not config.methods:
        return found
    if unknown := [name for name in config.methods if name not in found.methods]:
        raise UserError(f"methods has {unknown[0]!r}: {config.name} compares {', '.join(found.methods)}")
    first = next(iter(found.methods))
    if first not in config.methods:
        raise UserError(f"methods lacks {first}, which {config.name} compares the others with: expected it among them")
    return found.of(config.methods)


def _plan(config: ExperimentConfig, found: Experiment) -> Plan:
    name = config.scale or found.scales[0]
    if name not in found.scales:
        raise UserError(f"scale is {name!r}: {config.name} is run at {' or '.join(found.scales)}")
    scale = SCALES[name]
    return Plan(
        config.name,
        found,
        name,
        seeds=config.seeds or min(found.seeds or scale.seeds, scale.seeds),
        sweep_seeds=config.sweep_seeds or scale.sweep_seeds,
        learning_rates=[float(rate) for rate in config.learning_rates] or scale.learning_rates,
        steps=config.steps or scale.steps,
        batch_size=scale.batch_size,
    )


def _subject(config: ExperimentConfig, plan: Plan) -> Subject:
    """What it is about, whose file is read here so that it is refused before anything is begun."""
    needed = SCALES[plan.scale].solutions
    if needed and not config.solutions:
        raise UserError(f"solutions: {config.name} needs the file of {gsm8k.SOURCE}: download it and name it here")
    if config.solutions and not needed:
        raise UserError(f"solutions is {config.solutions}: scale {plan.scale} has word problems, expected no file")
    return Solutions.read(config.solutions) if needed else WordProblems()


def _settings(config: ExperimentConfig, plan: Plan, subject: Subject) -> dict[str, Any]:
    """What decides the results."""
    return {
        "scale": plan.scale,
        "backend": config.hardware.backend,
        "seeds": plan.seeds,
        "sweep_seeds": plan.sweep_seeds,
        "learning_rates": list(plan.learning_rates),
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        **({"methods": list(plan.experiment.methods)} if config.methods else {}),
        **({"solutions": subject.digest} if subject.digest else {}),
    }


def _begin(folder: Path, settings: dict[str, Any], config: ExperimentConfig) -> None:
    """
    Raises:
        UserError: the folder cannot be made, or has an experiment that is not to be gone on with.
    """
    path = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if not config.resume:
                raise UserError(f"{folder} holds this experiment already: pass --resume, or choose another --output")
            _require_same(json.loads(path.read_text(encoding="utf-8")), settings, folder)
        replace_file(path, json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"output {folder}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not the settings of an experiment ({error}). Choose another --output") from error


def _require_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    names = [name for name in before | now if before.get(name) != now.get(name)]
    if names:
        changed = "\n  ".join(f"{name}: {before.get(name)} → {now.get(name)}" for name in names)
        raise UserError(
            f"{folder} was begun with other settings:\n  {changed}\nChange them back, or choose another --output"
        )


def _beside(by_line: dict[tuple[str, str], list[Any]], setting: str, found: Experiment) -> list[Any]:
    """The cells that a line is compared with: of the first method in its setting."""
    return by_line[setting, next(iter(found.methods))]


def _write(folder: Path, outcome: Outcome, found: Experiment) -> None:
    replace_file(folder / NAME, outcome.to_json())
    replace_file(folder / "table.md", markdown(outcome))
    for name, draw in found.pictures.items():
        save(panels(outcome, *draw), folder / f"{name}.png")


def overview() -> Table:
    listed = Table(box=None, padding=(0, 2, 0, 0))
    listed.add_column("experiment", no_wrap=True)
    listed.add_column("of what", overflow="fold")
    for name, text in EXPERIMENTS.items():
        listed.add_row(name, text)
    return listed


def _is_rate(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


Config = ExperimentConfig
POSITIONAL = ("--name",)


def run(config: ExperimentConfig, console: Console) -> int:
    if not config.name:
        console.print(overview())
        console.print("\nbnf experiment NAME; bnf report FOLDER makes a page of its results", highlight=False)
        return 0
    outcome = run_experiment(config, console)
    console.print(table(outcome))
    folder = Path(config.output) / config.name
    console.print(f"claimed  {outcome.claim}\nseen     {outcome.seen}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"results  {folder / NAME}\ntable    {folder}/table.md\npictures {folder}/*.png", highlight=False, markup=False
    )
    return 0
