"""Numbers as words, for the sentence that says what was seen."""

from collections.abc import Callable, Sequence

from bnf_align.experiments.outcome import Line, Outcome
from bnf_align.experiments.statistics import Interval


def share(x: Interval | float) -> str:
    """63%, with its interval where it has one."""
    if isinstance(x, float):
        return f"{x:.0%}"
    return f"{x.mean:.0%} ({x.low:.0%} to {x.high:.0%})"


def change(x: Interval) -> str:
    """As points of a share: +3 points (1 to 5)."""
    return f"{100 * x.mean:+.0f} points ({100 * x.low:+.0f} to {100 * x.high:+.0f})"


def listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def which(outcome: Outcome, holds: Callable[[Line], bool], setting: str | None = None) -> list[str]:
    """Methods of which something holds."""
    return [m for m in outcome.methods if (line := outcome.line(m, setting)) and holds(line)]


def beside(outcome: Outcome, setting: str | None = None, did: str = "answered more often right") -> str:
    """Which methods did so more or less often than the first one, beyond their intervals."""
    others = outcome.methods[1:]
    better = which(outcome, lambda line: line.method in others and line.numbers["beside"].low > 0, setting)
    worse = which(outcome, lambda line: line.method in others and line.numbers["beside"].high < 0, setting)
    rest = [m for m in others if m not in better + worse and outcome.line(m, setting)]
    parts = [f"{listed(better)} {did} than it"] if better else []
    parts += [f"{listed(worse)} less often"] if worse else []
    parts += [f"{listed(rest)} could not be told from it"] if rest else []
    return "; ".join(parts)


def drawn_right(line: Line) -> tuple[float, float]:
    """Of the answers that a method drew, which share was right in the first five steps and in the last five."""
    right = line.curves["right"]
    return sum(right[:5]) / len(right[:5]), sum(right[-5:]) / len(right[-5:])
