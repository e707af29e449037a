"""Pictures of what experiments came to, a panel for each question."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bnf_align.experiments.outcome import Line, Outcome
from bnf_align.experiments.statistics import Interval
from bnf_align.run.pictures import CHOSEN, PLAIN, REJECTED, label_axes

# Okabe and Ito's palette, told apart by colour-blind readers, and marks for those who see no colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#777777", PLAIN)
MARKS = "osD^vP*Xh"

PANEL = (4.6, 3.2)  # inches: as wide as a phone's screen can show
Draw = Callable[[Axes, Outcome], None]
Style = dict[str, Any]


def panels(outcome: Outcome, *draw: Draw) -> Figure:
    """Two side by side, as many as there are, with one legend of the methods for all."""
    columns = min(2, len(draw))
    rows = -(-len(draw) // columns)
    figure = Figure(figsize=(columns * PANEL[0], rows * PANEL[1] + 0.5), layout="constrained")
    methods: dict[str, Any] = {}
    every = figure.subplots(rows, columns, squeeze=False).flat
    for axes, one in zip(every, draw, strict=False):
        one(axes, outcome)
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        if handles.keys() <= set(outcome.methods) and (legend := axes.get_legend()):
            legend.remove()
            methods = handles | methods
    for axes in every[len(draw) :]:
        axes.remove()
    if methods:
        figure.legend(
            methods.values(),
            methods.keys(),
            loc="outside lower center",
            ncols=3 if columns == 1 else 5,
            frameon=False,
            fontsize=8,
        )
    return figure


def styles(outcome: Outcome) -> dict[str, Style]:
    """Of each method its colour and mark, the same in every panel."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)]}
        for i, name in enumerate(outcome.methods)
    }


def accuracy_of_methods(axes: Axes, outcome: Outcome) -> None:
    """Right answers, a method a line, beside the model before alignment."""
    _dots(axes, outcome, "accuracy", outcome.counted.capitalize(), outcome.start["accuracy"])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def surprise_of_methods(axes: Axes, outcome: Outcome) -> None:
    _dots(axes, outcome, "surprise", "Perplexity of a text never trained on", 1.0)
    axes.set_xlabel("times that before; beyond 2 is a collapse")
    axes.xaxis.set_major_locator(MaxNLocator(4))


def tax_of_methods(axes: Axes, outcome: Outcome) -> None:
    _dots(axes, outcome, "tax", "Right answers in tasks not trained on", 0.0)
    axes.set_xlabel("change, as a share of all questions")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def gini_of_methods(axes: Axes, outcome: Outcome) -> None:
    _dots(axes, outcome, "gini", "How unevenly tokens move (Gini)")
    axes.set_xlabel("0: all alike, 1: one token alone")


def by_setting(name: str, title: str, quantity: str, start: Callable[[Outcome], float] | None = None) -> Draw:
    """A number over the settings, a line for each method, with intervals; without a title, what is counted."""

    def draw(axes: Axes, outcome: Outcome) -> None:
        settings, style = outcome.settings, styles(outcome)
        for i, method in enumerate(outcome.methods):
            found = [(x, line.numbers[name]) for x, s in enumerate(settings) if (line := outcome.line(method, s))]
            at = [x + 0.06 * (i - (len(style) - 1) / 2) for x, _ in found]
            _bars(axes, at, [n for _, n in found], method, style[method])
        if start is not None:
            axes.axhline(start(outcome), color=PLAIN, linestyle=":", linewidth=1)
        if not title:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        label_axes(axes, title or outcome.counted.capitalize(), quantity)
        axes.set_xticks(range(len(settings)), settings)
        axes.set_xlim(-0.5, len(settings) - 0.5)
        axes.set_xlabel(outcome.axis)

    return draw


accuracy_by_setting = by_setting("accuracy", "", "", lambda outcome: outcome.start["accuracy"])
chosen_by_setting = by_setting("moved_chosen", "Chosen rows held out", "log-likelihood, change in nats", lambda _: 0.0)
rejected_by_setting = by_setting(
    "moved_rejected", "Rejected rows held out", "log-likelihood, change in nats", lambda _: 0.0
)
surprise_by_setting = by_setting("surprise", "Text never trained on", "perplexity, times that before", lambda _: 1.0)
BY_SETTING = (accuracy_by_setting, chosen_by_setting, rejected_by_setting, surprise_by_setting)


def path(name: str, title: str, quantity: str) -> Draw:
    """A number of held-out rows over the steps, a line for each method, in the first setting."""

    def draw(axes: Axes, outcome: Outcome) -> None:
        style = styles(outcome)
        for method in outcome.methods:
            if line := outcome.line(method):
                curve = line.curves["path"]
                axes.plot(curve["step"], curve[name], label=method, markersize=3.5, linewidth=1.2, **style[method])
        label_axes(axes, title, quantity)
        low, high = axes.get_ylim()
        if name == "perplexity" and high > 10 * low:
            axes.set_yscale("log")

    return draw


def samples(axes: Axes, outcome: Outcome) -> None:
    """How many of the answers of a step are right, a line for each method that draws them as it learns."""
    style = styles(outcome)
    for method in outcome.methods:
        line = outcome.line(method)
        if line and (right := line.curves.get("right")):
            axes.plot(range(1, len(right) + 1), right, label=method, color=style[method]["color"], linewidth=1.2)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    label_axes(axes, "Right among the answers drawn", "")


def gradient_norms(axes: Axes, outcome: Outcome) -> None:
    style = styles(outcome)
    for method in outcome.methods:
        if line := outcome.line(method):
            norms = line.curves["grad_norms"]
            axes.plot(range(1, len(norms) + 1), norms, label=method, color=style[method]["color"], linewidth=1.2)
    axes.set_yscale("log")
    label_axes(axes, "Gradient norm before clipping", "")


def moved(axes: Axes, outcome: Outcome) -> None:
    """How far chosen and rejected rows went, a method a line."""
    names = outcome.methods[::-1]
    for name, colour, offset in (("moved_chosen", CHOSEN, 0.14), ("moved_rejected", REJECTED, -0.14)):
        lines = [outcome.line(method) for method in names]
        at = [i + offset for i, line in enumerate(lines) if line]
        _bars(axes, at, [line.numbers[name] for line in lines if line], name[6:], {"color": colour}, across=True)
    axes.axvline(0, color=PLAIN, linewidth=0.8)
    label_axes(axes, "How far held-out rows moved", "")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("change of the log-likelihood of a row, nats")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if max(map(abs, axes.get_xlim())) > 20:  # a collapse: small changes shall still be seen
        axes.set_xscale("symlog", linthresh=5)
        edge = max(map(abs, axes.get_xlim()))
        decades = [10.0**k for k in range(1, 7) if 10.0**k <= edge]
        axes.set_xticks([-x for x in decades[::-1]] + [0.0, *decades])
        axes.xaxis.set_major_formatter("{x:g}")


def places(curve: Sequence[str], kind: str, title: str, quantity: str) -> Draw:
    """A number of tokens by their place in the completion, of chosen or rejected rows."""

    def draw(axes: Axes, outcome: Outcome) -> None:
        style = styles(outcome)
        for method in outcome.methods:
            if line := outcome.line(method):
                values: Any = line.curves
                for name in (*curve, kind):
                    values = values[name]
                axes.plot(
                    range(1, len(values) + 1), values, label=method, markersize=3.5, linewidth=1.2, **style[method]
                )
        label_axes(axes, title, quantity)
        axes.set_xlabel("token of the completion")

    return draw


def _dots(axes: Axes, outcome: Outcome, name: str, title: str, start: float | None = None) -> None:
    """A method a line, in the first setting."""
    names, style = outcome.methods[::-1], styles(outcome)
    for i, method in enumerate(names):
        if line := outcome.line(method):
            _bars(axes, [i], [line.numbers[name]], "", style[method], across=True)
            _collapsed(axes, line, i)
    if start is not None:
        axes.axvline(start, color=PLAIN, linestyle=":", linewidth=1)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(alpha=0.25, axis="x")


def _collapsed(axes: Axes, line: Line, at: float) -> None:
    if line.collapsed:
        text = f"{line.collapsed}/{line.seeds} collapsed"
        axes.annotate(text, (1, at), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)


def _bars(
    axes: Axes,
    at: Sequence[float],
    numbers: Sequence[Interval],
    label: str,
    style: Style,
    across: bool = False,
) -> None:
    means = [x.mean for x in numbers]
    ends = [[max(x.mean - x.low, 0) for x in numbers], [max(x.high - x.mean, 0) for x in numbers]]
    look: Style = {"marker": "o", "markersize": 4, "linewidth": 1, "capsize": 2, "label": label or None, **style}
    if across:
        axes.errorbar(means, at, xerr=ends, linestyle="none", **look)
    else:
        axes.errorbar(at, means, yerr=ends, **look)
