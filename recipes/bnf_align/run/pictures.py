"""Pictures of a run, from its metrics.jsonl; drawn off screen, without touching matplotlib's global state."""

import json
import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bnf_core.steps.metrics import REWARD_CHOSEN, REWARD_REJECTED, with_present_names

Line = dict[str, Any]

# Okabe and Ito's palette, told apart by colour-blind readers.
CHOSEN, REJECTED, PLAIN, BEFORE, AFTER = "#0072B2", "#D55E00", "#444444", "#BBBBBB", "#009E73"


def run_picture(run_folder: Path) -> Path:
    """Draw `run.png` in the folder of a run, from its metrics.jsonl.

    Returns:
        The picture's path.
    Raises:
        FileNotFoundError: no metrics.jsonl.
    """
    return save(run_figure(read_metrics(run_folder / "metrics.jsonl")), run_folder / "run.png")


def run_figure(lines: Sequence[Line]) -> Figure:
    """Loss (of samples how many are right), rewards and target weight by step, and held-out results before and after.

    Args:
        lines: what metrics.jsonl holds; `kind` is "train" or "eval", a metric may be null or absent.
    """
    train = [line for line in lines if line.get("kind") == "train"]
    evals = [line for line in lines if line.get("kind") == "eval"]

    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, reward, weight, held_out = figure.subplots(2, 2).flat

    sets = _sets(evals)
    if points(train, "pass_at_1"):  # whose loss falls and rises with the share of its rows that are chosen
        _curve(loss, train, "pass_at_1", PLAIN, "samples of each iteration")
        _curve(loss, evals, "pass_at_1", AFTER, "held-out prompts", marker="o")
        loss.set_ylim(-0.03, 1.03)
        label_axes(loss, "Completions that are right, as the judge sees it", "share")
    else:
        _curve(loss, train, "loss", PLAIN, "training batches")
        for marker, (prefix, name) in zip(cycle("osD^v"), sets.items()):
            _curve(loss, evals, f"{prefix}loss", AFTER, name or "held-out rows", marker=marker)
        label_axes(loss, "Loss", "label · token loss, mean over rows")

    _curve(reward, train, REWARD_CHOSEN, CHOSEN, "chosen rows, training")
    _curve(reward, train, REWARD_REJECTED, REJECTED, "rejected rows, training", style="--")
    for prefix, name in sets.items():
        _curve(
            reward, evals, prefix + REWARD_CHOSEN, CHOSEN, f"chosen rows, {name or 'held out'}", style="", marker="o"
        )
        _curve(
            reward,
            evals,
            prefix + REWARD_REJECTED,
            REJECTED,
            f"rejected rows, {name or 'held out'}",
            style="",
            marker="s",
        )
    reward.axhline(0, color=PLAIN, linewidth=0.8)
    label_axes(reward, "Rewards", "of BNF: log-probability of a completion\nbeside the reference, nats")

    _curve(weight, train, "target_weight", CHOSEN, "mean target weight t = min(1, p/r)")
    _curve(weight, train, "share_below_reference", REJECTED, "share of tokens with p < r", style="--")
    weight.set_ylim(-0.03, 1.03)
    label_axes(weight, "Where tokens stand against the reference", "")

    last = max([line["step"] for line in train + evals if "step" in line], default=1)
    for axes in (loss, reward, weight):
        axes.set_xlim(-0.03 * max(last, 1), 1.03 * max(last, 1))

    _before_and_after(held_out, evals)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG or SVG, by the name's ending, on a white ground."""
    FigureCanvasAgg(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def read_metrics(path: Path) -> list[Line]:
    """Every whole line; one that the end of the run cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = with_present_names(json.loads(text))
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _sets(evals: list[Line]) -> dict[str, str]:
    """What the metrics of each held-out set begin with, and its name; one set alone has neither."""
    names = {name.removesuffix("loss"): None for line in evals for name in line if name.endswith("/loss")}
    return {prefix: prefix.rstrip("/") for prefix in names} or {"": ""}


def points(lines: list[Line], name: str) -> list[tuple[int, float]]:
    """(step, value) of every line that has a finite value of that name."""
    found = [(line["step"], line.get(name)) for line in lines if "step" in line]
    return [(step, value) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def _curve(
    axes: Axes, lines: list[Line], name: str, colour: str, label: str, style: str = "-", marker: str = ""
) -> None:
    found = points(lines, name)
    if not found:
        return
    if len(found) == 1 or not style:
        style, marker = "", marker or "o"  # a line through one point would not be seen
    line = axes.plot(*zip(*found, strict=True), color=colour, linestyle=style or "none", marker=marker, label=label)
    if marker == "s":  # hollow and larger, so that a dot in the same place still shows
        line[0].set(markerfacecolor="none", markersize=9)


def label_axes(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(quantity)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    else:
        _nothing(axes)


def _before_and_after(axes: Axes, evals: list[Line]) -> None:
    """Bars of the first and the last evaluation, of each accuracy that was measured."""
    axes.set_title("Held-out prompts, before and after", fontsize=11, loc="left")
    likelier = "chosen answer likelier\nthan the rejected one"
    names = {
        f"{prefix}preference_accuracy": f"{name}:\n{likelier}" if name else likelier
        for prefix, name in _sets(evals).items()
    }
    names |= {
        "answer_accuracy": "generated answer\nright",
        "pass_at_1": "completion right,\nas the judge sees it",
    }
    ticks: list[str] = []
    for name, text in names.items():
        found = points(evals, name)
        if not found:
            continue
        at = len(ticks)
        ends = (
            [(at, found[0], BEFORE)]
            if len(found) == 1
            else [(at - 0.2, found[0], BEFORE), (at + 0.2, found[-1], AFTER)]
        )
        for x, (step, value), colour in ends:
            bar = axes.bar(x, value, width=0.36, color=colour)
            axes.bar_label(bar, [f"{value:.0%}\nstep {step}"], fontsize=9, padding=2)
        ticks.append(text)
    if not ticks:
        _nothing(axes)
        return
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.6, max(1, len(ticks) - 1) + 0.6)
    axes.set_ylim(0, 1.18)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured in this run", ha="center", va="center", color=PLAIN, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
