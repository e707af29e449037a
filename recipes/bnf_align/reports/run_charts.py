"""What is drawn of runs, side by side in each panel."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bnf_align.experiments.pictures import COLOURS, PANEL
from bnf_align.reports.runs import Run
from bnf_align.run.pictures import CHOSEN, PLAIN, REJECTED, points
from bnf_core.steps.metrics import SHIFT_CHOSEN, SHIFT_REJECTED


@dataclass(frozen=True)
class Chart:
    title: str
    says: str  # a sentence below it
    figure: Figure


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Those for which any run has numbers."""
    found = [
        _over_steps(runs, "Loss", "The objective's own loss of each step; dots are held-out rows.", {"loss": "-"}),
        _over_steps(
            runs,
            "Shift of log-odds",
            "How far tokens are from the reference, in nats: chosen rows as lines, rejected ones dashed.",
            {SHIFT_CHOSEN: "-", SHIFT_REJECTED: "--"},
        ),
        _over_steps(
            runs,
            "Target weight t",
            "Mean of t = min(1, p/r), and dashed the share of tokens below the reference.",
            {"target_weight": "-", "share_below_reference": "--"},
        ),
        _over_steps(runs, "Gradient norm", "Of each step before clipping.", {"grad_norm": "-"}, log=True),
        _over_steps(
            runs,
            "Preference accuracy",
            "Share of held-out pairs whose chosen row is the likelier one, per token.",
            {"preference_accuracy": "-"},
            held_out=True,
        ),
        *(_histogram(run, len(runs)) for run in runs),
        *(_along(run, len(runs)) for run in runs),
    ]
    return [chart for chart in found if chart is not None]


def _over_steps(
    runs: Sequence[Run], title: str, says: str, names: dict[str, str], *, log: bool = False, held_out: bool = False
) -> Chart | None:
    figure, axes = _panel()
    drawn = False
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        for i, (name, style) in enumerate(names.items()):
            label = run.name if i == 0 and len(runs) > 1 else None
            line, dots = ([] if held_out else points(run.train, name)), points(run.evaluations, name)
            if line:
                axes.plot(*zip(*line, strict=True), linestyle=style, color=colour, linewidth=1.2, label=label)
            if dots:
                joined = style if held_out else "none"
                axes.plot(*zip(*dots, strict=True), linestyle=joined, marker="o", markersize=4, color=colour)
            drawn = drawn or bool(line or dots)
    if log:
        axes.set_yscale("log")
    _label(axes, "optimizer step")
    return Chart(title, says, figure) if drawn else None


def _histogram(run: Run, of: int) -> Chart | None:
    """Over time: a column for each evaluation."""
    lines = [line for line in run.tokens if "target_weight" in line]
    if not lines:
        return None
    figure, axes = _panel()
    counts = np.array([np.add(line["target_weight"]["chosen"], line["target_weight"]["rejected"]) for line in lines])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    below = np.zeros(len(lines))
    for i in range(shares.shape[1]):
        strength = 0.15 + 0.75 * i / (shares.shape[1] - 1)
        axes.bar(range(len(lines)), shares[:, i], 0.8, below, color=CHOSEN, alpha=strength)
        below += shares[:, i]
    _label(axes, "optimizer step")
    axes.set_xticks(range(len(lines)), [str(line["step"]) for line in lines])
    says = "Shares of held-out tokens by their t, in tenths: the strongest are above 0.9."
    return Chart(_of("Target weights over time", run, of), says, figure)


def _along(run: Run, of: int) -> Chart | None:
    """Where the gradient goes, at the first and the last evaluation."""
    lines = [line for line in run.tokens if "gradient_at" in line]
    if not lines:
        return None
    figure, axes = _panel()
    for line, style in dict(zip((0, -1), (":", "-"), strict=True)).items():
        for kind, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            values = lines[line]["gradient_at"][kind]
            label = f"{kind}, step {lines[line]['step']}"
            axes.plot(range(1, len(values) + 1), values, linestyle=style, color=colour, linewidth=1.2, label=label)
    _label(axes, "token of the completion")
    says = "Share of the objective's gradient that each place of held-out completions has."
    return Chart(_of("Gradient along the sequence", run, of), says, figure)


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=PANEL, layout="constrained")
    return figure, figure.subplots()


def _label(axes: Axes, x: str) -> None:
    """The title is the page's."""
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    if axes.get_ylim()[0] < 0 < axes.get_ylim()[1]:
        axes.axhline(0, color=PLAIN, linewidth=0.8)


def _of(title: str, run: Run, of: int) -> str:
    return title if of == 1 else f"{title}, {run.name}"
