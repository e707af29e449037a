"""What a judge is, and what it says."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from bnf_core.data.messages import Text

Row = Mapping[str, Any]
Judge = Callable[[Text, str, Row], Any]


@dataclass(frozen=True)
class Judgement:
    """Of one completion."""

    score: float | None = None  # None: the judge has no opinion, or failed
    error: str | None = None  # why it failed

    @property
    def failed(self) -> bool:
        return self.error is not None


class NoAnswer(Exception):
    """A row has nothing to judge a completion by."""


def as_score(value: Any, name: str) -> float | None:
    """What a judge returned, as a number.

    Raises:
        TypeError: it is none.
    """
    if value is None:
        return None
    if hasattr(value, "item"):  # NumPy's numbers and those of frameworks
        value = value.item()
    if not isinstance(value, Real) or not math.isfinite(value):
        raise TypeError(f"judge {name} returned {value!r}: expected true or false, a finite number, or None")
    return float(value)


def answer_of(row: Row, column: str) -> Any:
    """
    Raises:
        NoAnswer: the row has none.
    """
    if row.get(column) is None:
        raise NoAnswer(f"the row has no column {column!r} to judge by: found {', '.join(row)}")
    return row[column]
