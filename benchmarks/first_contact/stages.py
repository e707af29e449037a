"""What is run on a machine, stage by stage: commands that anybody could type."""

import json
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from bnf_core import registry
from bnf_core.errors import UserError

Machine = Literal["gpu", "mac"]
Command = tuple[str, ...]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Sizes:
    """How much work the stages are."""

    loss: tuple[int, int, int] = (8192, 4096, 151936)  # tokens, hidden, vocabulary: that of trl#7244
    shrink: int = 1  # by what lengths of rows are divided
    rows: int = 64  # of each shape
    steps: int = 200  # on the same road
    few: int = 20  # steps, where that is enough
    rounds: int = 5
    minutes: float = 9.0  # of a benchmark


TINY = Sizes(loss=(32, 16, 200), shrink=40, rows=8, steps=3, few=2, rounds=1, minutes=5.0)


@dataclass(frozen=True)
class Stage:
    """
    Args:
        commands: one after another, until one fails.
        minutes: after which it is ended.
        environment: besides that of this process.
        absent: why it cannot be run here; None: it can.
    """

    name: str
    about: str
    commands: tuple[Command, ...]
    minutes: float = 15.0
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str | None = None


@dataclass(frozen=True)
class Place:
    """Where the stages work.

    Args:
        device: as the machine's own backend calls it; cpu: all of it tiny, to try the stages themselves.
        model: of whole steps; `small`: of trajectories.
        folder: for everything that they leave.
        count: devices that the processes of a run may have, one each.
    """

    machine: Machine
    device: str
    model: str
    small: str
    folder: Path
    count: int

    @property
    def sizes(self) -> Sizes:
        return TINY if self.device == "cpu" else Sizes()

    @property
    def backend(self) -> str:
        return "torch" if self.machine == "gpu" else "mlx"


def stages(place: Place) -> list[Stage]:
    """In the order in which they tell most; the first five take ten minutes on a GPU."""
    own = [
        Stage("doctor", "what is installed, and what works", (_python("bnf_align", "doctor"),)),
        _conformance(place, place.backend, place.device),
    ]
    if place.machine == "gpu":
        return own + list(_gpu(place))
    return own + list(_mac(place))


def _gpu(place: Place) -> Iterator[Stage]:
    cuda = place.device != "cpu"
    yield _conformance(
        place, "torch", place.device, "conformance-tf32", ("--tier", "tf32" if cuda else "cpu"), "TF32 products",
        {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
    )  # fmt: skip
    yield _kernels()
    yield _loss(place)
    for shape in SHAPES:
        yield _step(place, shape)
    yield _plan(place)
    yield _same_road(place, "torch", place.device)
    yield _same_bits(place)
    for name, replicas, least in (("fsdp", 1, 2), ("hsdp", 2, 4)):
        yield _sharded(place, name, replicas, least)
    without = "needs CUDA" if not cuda else None if find_spec("bitsandbytes") else "pip install bitsandbytes"
    train = _train(place, "torch", place.device, place.small, "4bit", place.sizes.few)
    yield Stage("4bit", "LoRA on a base of 4 bits", ((*train, "--load-in-4bit", "true"),), absent=without)
    devices = registry.get("mlx").devices() if not registry.missing("mlx") else []
    mlx = "cpu" if not cuda else "gpu"
    stage = _conformance(place, "mlx", mlx, "conformance-mlx")
    yield stage if mlx in devices else Stage(stage.name, stage.about, (), absent="pip install 'mlx[cuda13]' mlx-lm")


def _mac(place: Place) -> Iterator[Stage]:
    mps = "cpu" if place.device == "cpu" else "mps"
    yield _kernels()
    yield _loss(place)
    yield _step(place, "hh-rlhf")
    yield _plan(place)
    output = str(place.folder / "growth" / "growth.json")
    growth = _python(
        "benchmarks.growth", "--model", place.small, *_where("mlx", place.device), *_measure(place, output)
    )
    yield Stage("growth", "memory and time of longer and larger batches, beside `bnf plan`", (growth,))
    yield _same_road(place, "mlx", place.device)
    yield _conformance(place, "torch", mps, "conformance-mps")
    yield _step(place, "hh-rlhf", "torch", mps, "step-mps")


def _python(module: str, *words: str) -> Command:
    return (sys.executable, "-m", module, *words)


def _where(backend: str, device: str, dtype: str = "auto") -> tuple[str, ...]:
    return ("--backend", backend, "--device", device, "--dtype", dtype)


def _measure(place: Place, output: str) -> tuple[str, ...]:
    return ("--rounds", str(place.sizes.rounds), "--minutes", f"{place.sizes.minutes:g}", "--output", output)


def _conformance(
    place: Place, backend: str, device: str, name: str = "conformance", more: tuple[str, ...] = (), how: str = "",
    environment: Mapping[str, str] | None = None,
) -> Stage:  # fmt: skip
    report = str(place.folder / name / "conformance.html")
    words = ("conformance", "--backend", backend, "--device", device, "--report", report, *more)
    about = f"{backend} on {device} against the float64 oracle" + (f", {how}" if how else "")
    return Stage(name, about, (_python("bnf_align", *words),), environment=environment or {})


def _kernels() -> Stage:
    command = _python("pytest", "-q", str(ROOT / "tests/integration/test_kernels.py"))
    return Stage("kernels", "the fused loss's kernels against the oracle", (command,))


def _loss(place: Place) -> Stage:
    tokens, hidden, vocab = map(str, place.sizes.loss)
    words: Command = ("--tokens", tokens, "--hidden", hidden, "--vocab", vocab)
    words += _where(place.backend, place.device, "float32" if place.device == "cpu" else "bfloat16")
    output = _measure(place, str(place.folder / "loss" / "loss.json"))
    return Stage("loss", "the fused loss beside others", (_python("benchmarks.loss", *words, *output),))


def _step(place: Place, shape: str, backend: str = "", device: str = "", name: str = "") -> Stage:
    backend, device, name = backend or place.backend, device or place.device, name or f"step-{shape}"
    model = place.small if device in ("cpu", "mps") else place.model
    words = ("--model", model, "--data", str(place.folder / f"{shape}.jsonl"), *_where(backend, device))
    output = _measure(place, str(place.folder / name / "step.json"))
    about = f"a step beside other trainers', on rows as long as those of {shape}"
    return Stage(name, about, (_python("benchmarks.step", *words, *output),))


def _plan(place: Place) -> Stage:
    words = (
        "--model",
        place.small,
        "--data",
        str(place.folder / "hh-rlhf.jsonl"),
        *_where(place.backend, place.device),
    )
    return Stage("plan", "memory by formulae", (_python("bnf_align", "plan", *words),))


def _train(place: Place, backend: str, device: str, model: str, run: str, steps: int) -> Command:
    words = ("--model", model, "--data", str(place.folder / "hh-rlhf.jsonl"), *_where(backend, device))
    more = ("--max-steps", str(steps), "--epochs", str(steps), "--output", str(place.folder / "runs" / run))
    return _python("bnf_align", "train", *words, *more, "--overwrite", "true", "--batch-size", "8")


def _same_road(place: Place, backend: str, device: str) -> Stage:
    runs = [
        (*_train(place, backend, where, place.small, f"road-{where}-{i}", place.sizes.steps), "--dtype", "float32")
        for i, where in enumerate(("cpu", device))
    ]
    folders = [str(place.folder / "runs" / f"road-{where}-{i}") for i, where in enumerate(("cpu", device))]
    picture = str(place.folder / "same-road" / "runs.png")
    check = _python("bnf_align", "check-run", *folders, "--picture", picture)
    return Stage("same-road", f"{place.sizes.steps} steps on the CPU and on {device}", (*runs, check), minutes=40)


def _same_bits(place: Place) -> Stage:
    words = ("--model", place.small, "--data", str(place.folder / "hh-rlhf.jsonl"), *_where("torch", place.device))
    more = ("--steps", str(place.sizes.few), "--output", str(place.folder / "same-bits" / "same-bits.json"))
    return Stage(
        "same-bits",
        "whether the same steps end with the same bits, and what deterministic algorithms cost",
        (_python("benchmarks.same_bits", *words, *more),),
        environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    )


def _sharded(place: Place, name: str, replicas: int, least: int) -> Stage:
    sizes = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if replicas > 1:
        sizes |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
        sizes |= {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(replicas)}
        sizes |= {"PARALLELISM_CONFIG_DP_SHARD_SIZE": str(place.count // replicas)}
    train = _train(place, "torch", place.device, place.small, name, place.sizes.few)[2:]
    launch = _python("torch.distributed.run", "--nproc-per-node", str(place.count), "--master-port", "29517", "-m")
    full = ("--fine-tune-type", "full", "--optimizer.learning-rate", "1e-6")
    enough = place.count >= least and place.count % replicas == 0
    return Stage(
        name,
        f"all weights in shards over {place.count} devices" + (f", {replicas} replicas" if replicas > 1 else ""),
        ((*launch, *train, *full),),
        environment=sizes,
        absent=None if enough else f"needs {least} devices or more, and there are {place.count}",
    )


# Words of a prompt and of a completion: medians of the data sets, roughly, and how far they spread.
SHAPES = {"hh-rlhf": (90, 45), "ultrafeedback": (110, 230)}
SPREAD = 0.7  # of the logarithm of a length


def write_rows(place: Place) -> None:
    """Pairs in the shape of data sets, with nothing in them: words drawn by a seed.

    Raises:
        UserError: the folder cannot be written.
    """
    words = "the sum of two numbers is even if both are or neither is so we write it as a proof and check".split()
    for name, medians in SHAPES.items():
        draw = random.Random(name)

        def text(median: int, draw: random.Random = draw) -> str:
            count = round(median / place.sizes.shrink * draw.lognormvariate(0, SPREAD))
            return " ".join(draw.choices(words, k=max(1, count)))

        prompt, completion = (partial(text, median) for median in medians)
        rows = [
            {"prompt": f"{i} {prompt()}?", "chosen": f" {completion()}", "rejected": f" not {completion()}"}
            for i in range(place.sizes.rows)
        ]
        try:
            place.folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (place.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        except OSError as error:
            raise UserError(f"output {place.folder}: {error.strerror}") from error
