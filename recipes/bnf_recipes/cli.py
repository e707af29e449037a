"""The command line `bnf`: one function a command. Exit codes: 0 done, 1 failed, 2 bad usage or bad input."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from bnf_core import registry
from bnf_core.config import (
    DataCheckConfig,
    DType,
    EvaluateConfig,
    GenerateConfig,
    HardwareConfig,
    ReferenceConfig,
    TrainConfig,
)
from bnf_core.errors import TrainingStopped, UserError
from bnf_recipes.arguments import parse
from bnf_recipes.blas import preload_openblas

console = Console()
errors = Console(stderr=True)


def train(argv: Sequence[str]) -> int:
    config = parse(TrainConfig, "train", argv)
    _prepare(config.hardware)
    from bnf_recipes.evaluate import table
    from bnf_recipes.train import train as run

    result = run(config, console)
    if not result.first:
        return 0
    if result.before is not None and result.after is not None:
        console.print(table({"before": result.before, "after": result.after}, "held-out rows"))
    console.print(f"trained  {result.trained}\npicture  {result.picture}", highlight=False, markup=False)
    return 0


def plan(argv: Sequence[str]) -> int:
    config = parse(TrainConfig, "plan", argv)
    _prepare(config.hardware)
    from bnf_recipes.plan_run import plan_run as run

    run(config, console)
    return 0


def evaluate(argv: Sequence[str]) -> int:
    config = parse(EvaluateConfig, "evaluate", argv)
    _prepare(config.hardware)
    from bnf_recipes.evaluate import evaluate as run
    from bnf_recipes.evaluate import table

    console.print(table({"value": run(config, console)}))
    return 0


def reference(argv: Sequence[str]) -> int:
    config = parse(ReferenceConfig, "reference", argv)
    _prepare(config.hardware)
    from bnf_recipes.reference import reference as run

    run(config, console)
    return 0


def generate(argv: Sequence[str]) -> int:
    config = parse(GenerateConfig, "generate", argv)
    _prepare(config.hardware)
    from bnf_recipes.generate import generate as run

    print(run(config))
    return 0


def data_check(argv: Sequence[str]) -> int:
    config = parse(DataCheckConfig, "data-check", argv, positional=["--data"])
    _quiet()
    from bnf_recipes.data_check import data_check as run

    return 2 if run(config, console).bad_rows else 0


def demo(argv: Sequence[str]) -> int:
    from bnf_recipes.demo import DemoConfig

    config = parse(DemoConfig, "demo", argv)
    _prepare(config.hardware)
    from bnf_recipes.demo import demo as run

    run(config, console)
    return 0


@dataclass
class ImportConfig:
    """Turn a GGUF file into a folder of safetensors, config and tokenizer."""

    source: str
    """A .gguf file, or an installed Python package that carries one."""
    output: str
    """The folder to write."""
    force: bool = False
    """Replace a folder that an earlier import made."""


def import_gguf(argv: Sequence[str]) -> int:
    config = parse(ImportConfig, "import-gguf", argv)
    _quiet()
    from bnf_recipes.import_gguf import import_gguf as run

    model = run(config.source, Path(config.output), force=config.force)
    console.print(f"model  {model}", highlight=False, markup=False)
    return 0


@dataclass
class DoctorConfig:
    """What is installed, what each backend can do here, and what to do about the rest."""


def doctor(argv: Sequence[str]) -> int:
    parse(DoctorConfig, "doctor", argv)
    if not registry.missing("mlx"):
        preload_openblas("mlx")  # what MLX's commands run with
    _quiet()
    from bnf_recipes.doctor import doctor as run

    return run(console)


def conformance(argv: Sequence[str]) -> int:
    from bnf_recipes.conformance import ConformanceConfig
    from bnf_recipes.conformance import conformance as run

    config = parse(ConformanceConfig, "conformance", argv)
    if config.all and not registry.missing("mlx"):
        preload_openblas("mlx")
    _prepare(config.hardware)

    return run(config, console)


@dataclass
class CheckModelConfig:
    """Compare one checkpoint between two backends: log-odds, loss and gradients; find the module that parts."""

    model: str
    """A folder with config.json and model*.safetensors, or a Hub id; may be given without its flag."""
    backends: list[str] = field(default_factory=lambda: ["torch", "mlx"])
    """The two to compare."""
    data: str | None = None
    """Compare on the first rows of this feedback instead of random tokens."""
    report: str | None = None
    """Write every result to this JSON file."""


def check_model(argv: Sequence[str]) -> int:
    config = parse(CheckModelConfig, "check-model", argv, positional=["--model"])
    for backend in config.backends:
        preload_openblas(backend)
    _quiet()
    from bnf_recipes.check_model import check_model as run

    return run(config.model, config.backends, config.data, config.report, console)


@dataclass
class ConvertAdapterConfig:
    """Turn an adapter of PEFT into one of mlx-lm, or the other way round."""

    adapter: str
    """A folder with adapter_config.json; its layout says which way to convert."""
    model: str
    """The model that it is for: a checkpoint folder or a Hub model."""
    output: str
    """The folder to write."""
    force: bool = False
    """Replace an adapter that is there."""


def convert_adapter(argv: Sequence[str]) -> int:
    config = parse(ConvertAdapterConfig, "convert-adapter", argv)
    _quiet()
    from bnf_recipes.convert_adapter import convert_adapter as run

    found = run(Path(config.adapter), config.model, Path(config.output), force=config.force)
    way = "PEFT → mlx-lm" if found.layout == "peft" else "mlx-lm → PEFT"
    console.print(
        f"{way}  {len(found.modules)} modules of rank {found.rank}\nadapter  {config.output}", highlight=False
    )
    return 0


@dataclass
class FuseConfig:
    """Make one model of a model and its adapter: PEFT's adapters by PyTorch, mlx-lm's by MLX."""

    model: str
    """A checkpoint folder or a Hub model."""
    adapter: str
    """An adapter folder."""
    output: str
    """The folder to write."""
    dequantize: bool = False
    """With MLX: write plain weights of a quantised model. PyTorch always does."""
    dtype: DType = "auto"
    """Of the weights written; `auto` is the checkpoint's own."""
    force: bool = False
    """Replace a model that is there."""


def fuse(argv: Sequence[str]) -> int:
    config = parse(FuseConfig, "fuse", argv)
    _quiet()
    from bnf_recipes.fuse import fuse as run

    run(
        config.model,
        Path(config.adapter),
        Path(config.output),
        dequantize=config.dequantize,
        dtype=config.dtype,
        force=config.force,
    )
    console.print(f"model  {config.output}", highlight=False, markup=False)
    return 0


def bench_loss(argv: Sequence[str]) -> int:
    from bnf_recipes.bench_loss import BenchLossConfig
    from bnf_recipes.bench_loss import bench_loss as run

    config = parse(BenchLossConfig, "bench-loss", argv)
    _prepare(config.hardware)
    run(config, console)
    return 0


def bench_step(argv: Sequence[str]) -> int:
    from bnf_recipes.bench_step import BenchStepConfig
    from bnf_recipes.bench_step import bench_step as run

    config = parse(BenchStepConfig, "bench-step", argv)
    _prepare(config.hardware)
    run(config, console)
    return 0


def bench_growth(argv: Sequence[str]) -> int:
    from bnf_recipes.bench_growth import BenchGrowthConfig
    from bnf_recipes.bench_growth import bench_growth as run

    config = parse(BenchGrowthConfig, "bench-growth", argv)
    _prepare(config.hardware)
    run(config, console)
    return 0


@dataclass
class CheckRunConfig:
    """Compare two finished runs, of either backend: settings, losses and what was trained."""

    run_a: str
    """A run folder; both may be given without their flags."""
    run_b: str
    """Another."""
    picture: str = "check-run.png"
    """Draw both losses and their difference in this .png or .svg file."""


def check_run(argv: Sequence[str]) -> int:
    config = parse(CheckRunConfig, "check-run", argv, positional=["--run-a", "--run-b"])
    from bnf_recipes.check_run import check_run as run

    return run(Path(config.run_a), Path(config.run_b), Path(config.picture), console)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, "align a model with LoRA on good and bad completions"),
    "plan": (plan, "say what a run would take: memory, largest batch, steps, time"),
    "evaluate": (evaluate, "score labelled completions under a model"),
    "reference": (reference, "compute the reference of feedback once, for any number of runs"),
    "generate": (generate, "complete a prompt"),
    "data-check": (data_check, "check every row of feedback before it is trained on"),
    "demo": (demo, "align a small model on word problems, show before and after"),
    "import-gguf": (import_gguf, "turn a GGUF file into safetensors"),
    "convert-adapter": (convert_adapter, "turn an adapter of PEFT into one of mlx-lm, or back"),
    "fuse": (fuse, "make one model of a model and its adapter"),
    "doctor": (doctor, "what is installed and what works here"),
    "check-model": (check_model, "compare one model between two backends"),
    "bench-loss": (bench_loss, "time the loss beside others, and measure its memory"),
    "bench-step": (bench_step, "time a training step beside those of other trainers"),
    "bench-growth": (bench_growth, "time a step as rows, completions and vocabulary grow"),
    "check-run": (check_run, "compare two finished runs, of either backend"),
    "conformance": (conformance, "check a backend against the float64 oracle"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `bnf`; exits with the command's code."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        console.print("usage: bnf COMMAND [--config FILE] [settings]   (bnf COMMAND --help)\n", markup=False)
        for name, (_, text) in COMMANDS.items():
            console.print(f"  {name:<17}{text}", highlight=False)
        return 0 if argv else 2
    if "-".join(argv[:2]) in COMMANDS:  # `bnf data check` is `bnf data-check`
        argv = ["-".join(argv[:2]), *argv[2:]]
    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]!r}: expected {', '.join(COMMANDS)}")
        return COMMANDS[argv[0]][0](argv[1:])
    except UserError as error:
        errors.print(f"bnf: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except TrainingStopped as error:
        errors.print(f"bnf: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        errors.print("bnf: interrupted", style="red")
        return 1


def _prepare(hardware: HardwareConfig) -> None:
    """Settle the backend before a framework is loaded."""
    hardware.backend = registry.choose(hardware.backend)
    preload_openblas(hardware.backend)
    _quiet()


def _quiet() -> None:
    """The libraries' own bars and advice would cut through ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
