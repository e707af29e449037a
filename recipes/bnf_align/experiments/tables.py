"""Results as tables: on the terminal and as Markdown."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.table import Table

from bnf_align.experiments.outcome import ACCURACY_FACTOR, PERPLEXITY_FACTOR, Line, Outcome
from bnf_align.experiments.statistics import Interval

# Heading, number, how it is written, after what is counted.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("beside the first", "beside", "points"),
    ("other tasks", "tax", "points"),
    ("perplexity ×", "surprise", "number"),
    ("chosen, nats", "moved_chosen", "signed"),
    ("rejected, nats", "moved_rejected", "signed"),
    ("largest gradient", "largest_grad_norm", "number"),
    ("Gini", "gini", "number"),
)

WIDE = ("learning rate", "beside any", *(heading for heading, _, _ in COLUMNS[2:]))  # in the Markdown alone


def _written(kind: str, x: Interval) -> str:
    write: Callable[[float], str] = {
        "share": lambda v: f"{100 * v:.0f}%",
        "points": lambda v: f"{100 * v:+.0f}",
        "number": lambda v: f"{v:.2f}" if v < 100 else f"{v:.1e}",
        "signed": lambda v: f"{v:+.1f}",
    }[kind]
    if x.low == x.high == 0:
        return "–"
    return f"{write(x.mean)} ({write(x.low)} to {write(x.high)})"


def _columns(outcome: Outcome) -> list[tuple[str, str, str]]:
    apart = [("beside any", "separated", "share")] if outcome.scale.solutions else []
    return [(outcome.counted, "accuracy", "share"), *apart, *COLUMNS]


def headings(outcome: Outcome) -> list[str]:
    first = ["setting"] if len(outcome.settings) > 1 else []
    return [*first, "method", "learning rate", *(heading for heading, _, _ in _columns(outcome)), "collapsed"]


def rows(outcome: Outcome) -> Iterator[list[str]]:
    for line in outcome.lines:
        first = [line.setting] if len(outcome.settings) > 1 else []
        yield [
            *first,
            line.method,
            f"{line.learning_rate:g}",
            *_cells(outcome, line),
            f"{line.collapsed} of {line.seeds}",
        ]


def _cells(outcome: Outcome, line: Line) -> list[str]:
    return [_written(kind, line.numbers[name]) for _, name, kind in _columns(outcome)]


def table(outcome: Outcome) -> Table:
    """What fits a terminal."""
    every = headings(outcome)
    shown = [name for name in every if name not in WIDE]
    found = Table(*shown, title=outcome.experiment)
    for row in rows(outcome):
        found.add_row(*(cell for name, cell in zip(every, row, strict=True) if name in shown))
    return found


def markdown(outcome: Outcome) -> str:
    """The table and the sweep, with what was claimed and what was seen."""
    lines = [
        f"**Claimed**: {outcome.claim}",
        "",
        f"**Seen**: {outcome.seen}",
        "",
        *_with_head([headings(outcome), *rows(outcome)]),
        "",
        explained(outcome),
        "",
        swept_by(outcome),
        "",
        *_with_head([[f"**{text}**" if taken else text for text, taken in row] for row in swept(outcome)]),
        "",
    ]
    return "\n".join(lines)


def explained(outcome: Outcome) -> str:
    start = outcome.start
    preferred = (
        "A right solution is preferred where it is likelier, a token, than the wrong one of its question: the model "
        "solves next to none itself. “Beside any”: the same of a wrong one of any question, which is the area under "
        "the ROC curve. "
    )
    return (
        f"Before alignment: {start['accuracy']:.0%} {outcome.counted}, {start['others']:.0%} right in the other tasks, "
        f"perplexity {start['perplexity']:.2f}. {preferred if outcome.scale.solutions else ''}"
        f"Means over {max(x.seeds for x in outcome.lines)} seeds with 95% intervals of a bootstrap over seeds and "
        "questions, those of one calculation together, paired where two are compared; “beside the first” and “other "
        f"tasks” are in points. Collapsed: a perplexity over {PERPLEXITY_FACTOR:g} times, or fewer than "
        f"{ACCURACY_FACTOR:g} times the {outcome.counted}, as before, or a gradient that is not finite."
    )


def swept_by(outcome: Outcome) -> str:
    return (
        f"{outcome.counted.capitalize()} by learning rate, on questions and seeds of their own; bold: the one taken; "
        "†: a seed collapsed."
    )


def swept(outcome: Outcome) -> Iterator[list[tuple[str, bool]]]:
    """An objective a line, a learning rate a column, each with whether it was taken."""
    rates = sorted({line["learning_rate"] for line in outcome.sweep})
    yield [("objective", False), *((f"{rate:g}", False) for rate in rates)]
    for objective in dict.fromkeys(line["objective"] for line in outcome.sweep):
        own = {line["learning_rate"]: line for line in outcome.sweep if line["objective"] == objective}
        yield [(objective, False), *(_swept(own.get(rate)) for rate in rates)]


def _swept(line: dict[str, Any] | None) -> tuple[str, bool]:
    if line is None:
        return "", False
    return f"{100 * line['accuracy']:.0f}%{'†' if line['collapsed'] else ''}", line["taken"]


def _with_head(found: list[list[str]]) -> list[str]:
    """As Markdown, the first row as the head."""
    head, *body = (f"| {' | '.join(row)} |" for row in found)
    return [head, f"|{'---|' * len(found[0])}", *body]
