"""`bnf check-run`: two finished runs, of either backend: did they take the same road, and come to the same place?

Compared are the settings, the rows of each step as far as their tokens show, the learning rate, the loss of each step
and what was trained. Bounds are for float32 and a few dozen steps: longer runs part by and by, as any two orders of
summation do.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from bnf_align.run.pictures import AFTER, CHOSEN, PLAIN, REJECTED, label_axes, save
from bnf_align.run.results import result_file
from bnf_core.config import flat
from bnf_core.errors import UserError
from bnf_core.models.adapters import Adapter, LowRank, read_adapter
from bnf_core.steps.metrics import with_present_names
from bnf_core.storage.checkpoints import FREE
from bnf_core.storage.tensors import StoredTensor, float_tensors, weight_files
from bnf_core.types import Array

# Over 20 steps on a tiny model PyTorch and MLX come within 2e-5 of the loss, 3e-6 of an adapter's update and 2e-7 of a
# whole model. With a learning rate 1 % higher it is 4e-2, 1e-2 and 5e-4.
LOSS_BOUND, ADAPTER_BOUND, MODEL_BOUND = 1e-4, 1e-4, 1e-5

# Settings that are expected to differ.
EXPECTED = FREE | {"hardware.backend", "hardware.device"}

Line = dict[str, Any]
Tensors = Mapping[str, StoredTensor]


@dataclass
class CheckRunConfig:
    """Compare two finished runs, of either backend: settings, losses and what was trained."""

    run_a: str
    """A run folder; both may be given without their flags."""
    run_b: str
    """Another."""
    picture: str = "check-run.png"
    """Draw both losses and their difference in this .png or .svg file."""


@dataclass(frozen=True)
class Run:
    folder: Path
    settings: dict[str, Any]  # by dotted name
    steps: dict[int, Line]  # the training lines of metrics.jsonl
    trained: Adapter | Tensors


@dataclass(frozen=True)
class Comparison:
    quantity: str
    error: float  # the largest, relative; infinite where there is nothing to compare with
    bound: float
    at: str = ""

    @property
    def agrees(self) -> bool:
        return self.error <= self.bound  # NaN does not


@dataclass(frozen=True)
class Result:
    settings: list[str]  # that differ, as `name: a | b`
    comparisons: list[Comparison]
    losses: list[tuple[int, float, float, float]]  # step, loss of either run, relative difference

    @property
    def agree(self) -> bool:
        return all(comparison.agrees for comparison in self.comparisons)


def check_run(run_a: Path, run_b: Path, picture: Path, console: Console) -> int:
    """Compare, print and draw.

    Returns:
        The exit code: 0 where the runs agree, 1 where they differ.
    Raises:
        UserError: a folder that is no finished run, or the picture cannot be written.
    """
    picture = result_file(str(picture), "picture")
    a, b = read_run(run_a), read_run(run_b)
    result = compare(a, b)
    names = [str(run.folder) for run in (a, b)]
    if result.settings:
        console.print("settings that differ:", style="yellow")
        for line in result.settings:
            console.print(f"  {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(table(result))
    if result.agree:
        console.print("the runs agree", style="green")
    else:
        worst = next(comparison for comparison in result.comparisons if not comparison.agrees)
        where = f" ({worst.at})" if worst.at else ""
        console.print(f"the runs differ, first in: {worst.quantity}{where}", style="red", markup=False, soft_wrap=True)
    try:
        save(figure(result, names), picture)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture {picture} could not be written: {error}") from error
    console.print(f"picture  {picture}", highlight=False)
    return 0 if result.agree else 1


def read_run(folder: Path) -> Run:
    """What a finished run left.

    Raises:
        UserError: something of it is missing or damaged.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a run: it has no {name}")
    try:
        settings = dict(flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))))
        lines = [
            with_present_names(json.loads(text))
            for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        steps = {int(line["step"]): line for line in lines if line["kind"] == "train"}
        if not all(isinstance(line[key], int | float) for line in steps.values() for key in ("loss", "learning_rate")):
            raise ValueError("a training line of metrics.jsonl without a loss or learning rate")
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not a finished run of bnf train: {error!r}") from error
    if not steps:
        raise UserError(f"{folder} has taken no steps: metrics.jsonl holds no training line")
    return Run(folder, settings, steps, _trained(folder))


def compare(a: Run, b: Run) -> Result:
    different = sorted(
        n for n in a.settings | b.settings if n not in EXPECTED and a.settings.get(n) != b.settings.get(n)
    )
    shared = sorted(a.steps.keys() & b.steps.keys())
    losses = [(step, float(a.steps[step]["loss"]), float(b.steps[step]["loss"])) for step in shared]
    # Good and bad rows cancel in some batches: there the loss is measured against the run's own middle size.
    middle = float(np.median([abs(loss) for _, *both in losses for loss in both])) if losses else math.nan
    errors = [abs(x - y) / (max(abs(x), abs(y), middle) or 1.0) for _, x, y in losses]
    alone = sorted(a.steps.keys() ^ b.steps.keys())
    return Result(
        settings=[f"{name}: {a.settings.get(name)} | {b.settings.get(name)}" for name in different],
        comparisons=[
            Comparison(
                "steps",
                math.inf if alone else 0.0,
                0.0,
                f"step {alone[0]} is in one run only" if alone else f"{len(shared)} steps",
            ),
            _by_step("tokens", a, b, shared, "tokens", 0.0),
            _by_step("learning rate", a, b, shared, "learning_rate", 1e-9),
            Comparison("loss", _largest(errors), LOSS_BOUND, _worst(shared, errors)),
            *_trained_errors(a.trained, b.trained),
        ],
        losses=[(*values, error) for values, error in zip(losses, errors, strict=True)],
    )


def table(result: Result) -> Table:
    columns = Table("quantity", "relative error", "bound", Column("largest at", overflow="fold"))
    for comparison in result.comparisons:
        error = f"{comparison.error:.1e}"
        columns.add_row(
            comparison.quantity,
            error if comparison.agrees else f"[red]{error}[/red]",
            f"{comparison.bound:.0e}",
            comparison.at,
        )
    return columns


def figure(result: Result, names: list[str]) -> Figure:
    """Both losses by step; below, their difference and what is allowed."""
    drawing = Figure(figsize=(9, 7), layout="constrained")
    loss, difference = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 2)).flat
    if result.losses:
        steps, a, b, errors = zip(*result.losses, strict=True)
        marker = "o" if len(steps) == 1 else ""
        loss.plot(steps, a, color=CHOSEN, linewidth=3, alpha=0.5, marker=marker, label=names[0])
        loss.plot(steps, b, color=REJECTED, linewidth=1.2, linestyle="--", marker=marker, label=names[1])
        if exact := [(step, error) for step, error in zip(steps, errors, strict=True) if error > 0]:
            difference.plot(*zip(*exact, strict=True), color=AFTER, marker="o", markersize=4, label="difference")
            difference.axhline(LOSS_BOUND, color=PLAIN, linestyle=":", label="bound")
            difference.set_yscale("log")
            low, high = (bound(error for _, error in exact) for bound in (min, max))
            difference.set_ylim(min(1e-8, low / 2), max(1e-3, 2 * high))
        else:
            difference.plot(steps, errors, color=AFTER, marker="o", markersize=4, label="equal in every step")
    label_axes(loss, "Loss of each step", "label · token loss, mean over rows")
    label_axes(difference, "Difference", "relative; none where equal")
    return drawing


def update_error(a: LowRank, scale_a: float, b: LowRank, scale_b: float) -> float:
    """‖s B A − s' B' A'‖ over ‖s B A‖, Frobenius norms, float64, without ever making the (out, in) products; of DoRA
    also ‖m − m'‖ over ‖m‖, whichever is larger. Infinite where shapes differ."""
    if (a.a.shape, a.b.shape, a.m is None) != (b.a.shape, b.b.shape, b.m is None):
        return math.inf
    up_a, up_b = (scale * x.b.astype(np.float64) for scale, x in ((scale_a, a), (scale_b, b)))
    down_a, down_b = a.a.astype(np.float64), b.a.astype(np.float64)
    # s B A − s' B' A' = (s B − s' B') A + s' B' (A − A'): small numbers, not the difference of large ones.
    left, right = np.concatenate([up_a - up_b, up_b], axis=1), np.concatenate([down_a, down_a - down_b])
    error = _ratio(_norm(left, right), _norm(up_a, down_a))
    if a.m is not None and b.m is not None:
        error = max(error, _relative(a.m, b.m))
    return error


def _trained_errors(a: Adapter | Tensors, b: Adapter | Tensors) -> list[Comparison]:
    if isinstance(a, Adapter) and isinstance(b, Adapter):
        kind, bound, names = "adapter", ADAPTER_BOUND, (a.modules.keys(), b.modules.keys())
        error: Callable[[str], float] = lambda n: update_error(a.modules[n], a.scale, b.modules[n], b.scale)  # noqa: E731
    elif not isinstance(a, Adapter) and not isinstance(b, Adapter):
        kind, bound, names = "weights", MODEL_BOUND, (a.keys(), b.keys())
        error = lambda n: _relative(a[n].float32(), b[n].float32())  # noqa: E731
    else:
        return [Comparison("what was trained", math.inf, 0.0, "an adapter in one run, all weights in the other")]
    if alone := sorted(names[0] ^ names[1]):
        return [Comparison(kind, math.inf, bound, f"{alone[0]} is in one run only")]
    errors = {name: error(name) for name in sorted(names[0])}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return [Comparison(kind, errors[worst], bound, worst if errors[worst] else "")]


def _trained(folder: Path) -> Adapter | Tensors:
    if (folder / "adapter").is_dir():
        return read_adapter(folder / "adapter")
    files = weight_files(folder / "model")
    if not files:
        raise UserError(f"{folder} is not a finished run: it has neither an adapter nor a model")
    return {name: tensor for file in files for name, tensor in float_tensors(file).items()}


def _by_step(quantity: str, a: Run, b: Run, shared: list[int], key: str, bound: float) -> Comparison:
    pairs = [(a.steps[step].get(key), b.steps[step].get(key)) for step in shared]
    errors = [0.0 if x == y else abs(x - y) / max(abs(x), abs(y)) if x and y else math.inf for x, y in pairs]
    first = next((step for step, error in zip(shared, errors, strict=True) if not error <= bound), None)
    return Comparison(quantity, _largest(errors), bound, "" if first is None else f"from step {first}")


def _largest(errors: list[float]) -> float:
    return float(np.max(errors)) if errors else math.inf  # NaN wins, unlike in max()


def _worst(steps: list[int], errors: list[float]) -> str:
    if not errors:
        return "no step in common"
    return f"step {steps[int(np.argmax(errors))]}" if max(errors) != 0 else ""  # argmax finds NaN first


def _norm(left: Array, right: Array) -> float:
    """Frobenius norm of left (out, k) @ right (k, in)."""
    triangles: list[Array] = [np.asarray(np.linalg.qr(matrix, mode="r")) for matrix in (left, right.T)]
    return float(np.linalg.norm(triangles[0] @ triangles[1].T))


def _relative(a: Array, b: Array) -> float:
    if a.shape != b.shape:
        return math.inf
    return _ratio(float(np.linalg.norm(a.astype(np.float64) - b)), float(np.linalg.norm(a.astype(np.float64))))


def _ratio(difference: float, size: float) -> float:
    return difference / size if size else (0.0 if difference == 0 else math.inf)


Config = CheckRunConfig
POSITIONAL = ("--run-a", "--run-b")


def run(config: CheckRunConfig, console: Console) -> int:
    return check_run(Path(config.run_a), Path(config.run_b), Path(config.picture), console)
