"""Results as tables: on the terminal and as Markdown."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.table import Table

from bnf_align.experiments.outcome import ACCURACY_FACTOR, PERPLEXITY_FACTOR, Line, Outcome
from bnf_align.experiments.statistics import Interval

# Heading, number, how it is written.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("right answers", "accuracy", "share"),
    ("beside the first", "beside", "points"),
    ("other tasks", "tax", "points"),
    ("perplexity ×", "surprise", "number"),
    ("chosen, nats", "moved_chosen", "signed"),
    ("rejected, nats", "moved_rejected", "signed"),
    ("largest gradient", "largest_grad_norm", "number"),
    ("Gini", "gini", "number"),
)


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


def headings(outcome: Outcome) -> list[str]:
    first = ["setting"] if len(outcome.settings) > 1 else []
    return [*first, "method", "learning rate", *(heading for heading, _, _ in COLUMNS), "collapsed"]


def rows(outcome: Outcome) -> Iterator[list[str]]:
    for line in outcome.lines:
        first = [line.setting] if len(outcome.settings) > 1 else []
        yield [*first, line.method, f"{line.learning_rate:g}", *cells(line), f"{line.collapsed} of {line.seeds}"]


def cells(line: Line) -> list[str]:
    return [_written(kind, line.numbers[name]) for _, name, kind in COLUMNS]


def table(outcome: Outcome) -> Table:
    found = Table(*headings(outcome), title=outcome.experiment)
    for row in rows(outcome):
        found.add_row(*row)
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
        "Right answers by learning rate, on problems and seeds of their own; bold: the one taken; †: a seed collapsed.",
        "",
        *_with_head([[f"**{text}**" if taken else text for text, taken in row] for row in swept(outcome)]),
        "",
    ]
    return "\n".join(lines)


def explained(outcome: Outcome) -> str:
    return (
        f"Before alignment: {outcome.start['accuracy']:.0%} right, {outcome.start['others']:.0%} in the other tasks, "
        f"perplexity {outcome.start['perplexity']:.2f}. Means over {max(x.seeds for x in outcome.lines)} seeds with "
        "95% intervals of a bootstrap over seeds and questions, those of one calculation together, paired where two "
        "are compared; “beside the first” and “other tasks” are in points. Collapsed: a perplexity over "
        f"{PERPLEXITY_FACTOR:g} times, or fewer than {ACCURACY_FACTOR:g} times the right answers, as before, or a "
        "gradient that is not finite."
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
