"""Rules that make labels of numbers and words: `score >= 4`, `rank <= 1`, `score > mean`, `score in top 1`.

A label is a number from −1 to 1: above 0 chosen, below 0 rejected, 0 neither; its size is how strong the preference is.
"""

import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnf_core.data.messages import NUMBER, Cell, RowError, named
from bnf_core.errors import UserError

Value = float | bool | str  # what a row holds for a rule to judge

GRADED = "a number from -1 to 1"
CHOSEN, REJECTED, NEITHER = 1.0, -1.0, 0.0

COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
ORDERS = (">=", "<=", ">", "<")
MEAN = "mean"
LARGEST = 1e300  # so that sums are finite
RULE = re.compile(
    r"""\s*(?P<field>"[^"]+"|'[^']+'|[^"'\s<>=!][^"'<>=!]*?)\s*
        (?:(?P<compare>>=|<=|==|!=|>|<)\s*(?P<value>[^\s<>=!].*?) | \sin\s+(?P<end>top|bottom)\s+(?P<count>\d+))?\s*""",
    re.VERBOSE,
)
EXAMPLES = '"score >= 4", "rank <= 1", "score > mean", "score in top 1", "verdict == good", or a column of labels alone'


@dataclass(frozen=True)
class LabelRule:
    """Which completions are chosen, by a field of theirs; the others are rejected.

    - `score >= 4` (or > < <= == !=): each completion by itself, by a number, `true`, `false` or a word;
    - `score > mean` (or >= < <=): beside the mean of the prompt's completions;
    - `score in top 2`, `rank in bottom 1`: that many of the prompt's completions. Those that tie with one on the other
      side are neither chosen nor rejected;
    - `label` alone: it holds labels.

    Where all completions of a prompt have the same number, comparing them gives neither. The field is a column, or a
    path into one, such as `scores.helpful`.
    """

    field: str
    comparison: str = ""  # one of COMPARISONS, top, bottom, or nothing
    value: Value = ""  # what to compare with; MEAN; how many

    @classmethod
    def parse(cls, text: str) -> "LabelRule":
        """
        Raises:
            UserError: it is no rule.
        """
        match = RULE.fullmatch(text)
        if match is None:
            raise _no_rule(text, "it cannot be read")
        field = match["field"].strip("\"'")
        if match["end"]:
            if int(match["count"]) < 1:
                raise _no_rule(text, f"{match['end']} {match['count']} is no completion")
            return cls(field, match["end"], float(match["count"]))
        if not match["compare"]:
            return cls(field)
        value = _literal(match["value"])
        if match["compare"] in ORDERS and value != MEAN and not _is_number(value):
            raise _no_rule(text, f"{match['value']} is no number, which {match['compare']} compares with")
        if match["compare"] not in ORDERS and match["value"] == MEAN:
            raise _no_rule(text, "a number is hardly ever the mean")
        return cls(field, match["compare"], value)

    def __str__(self) -> str:
        if self.comparison in ("top", "bottom"):
            return f"{self.field} in {self.comparison} {self.value:g}"
        value = self.value if isinstance(self.value, str) else json.dumps(self.value)
        return f"{self.field} {self.comparison} {value}" if self.comparison else self.field

    @property
    def compares(self) -> bool:
        """Whether it judges the completions of a prompt beside each other."""
        return self.comparison in ("top", "bottom") or (self.comparison in ORDERS and self.value == MEAN)

    def read(self, row: Mapping[str, Any], source: str, within: str = "") -> Value:
        """What a row, or one completion of it, holds for this rule.

        Args:
            within: where in the row this is, for messages, such as completions[2].
        Raises:
            RowError: there is no such field, or it holds nothing that can be compared.
        """
        field = f"{within}.{self.field}" if within else self.field
        value = look_up(row, self.field)
        if value is None:
            near = difflib.get_close_matches(self.field, [str(key) for key in row], 1)
            raise RowError(
                source,
                field,
                f"no such column, or none with a value: found {', '.join(map(str, row)) or 'none'}, expected what the "
                f"label rule {self} compares",
                f"Set data.label to a rule for {near[0]!r}" if near else "Set data.label, or drop the row",
            )
        if not self.comparison:
            return _as_label(value, field, source)
        if isinstance(self.value, bool):
            return _truth(value, field, source)
        if _is_number(self.value) or self.compares:
            return _number(value, field, source)
        if isinstance(value, str):
            return value.strip()
        raise RowError(
            source, field, f"is {named(value)}, expected text, which {self} compares", "Mend it, or set data.label"
        )

    def labels(self, values: Sequence[Value]) -> list[float]:
        """The labels of values that were read: of all completions of one prompt, where the rule compares them."""
        if not self.comparison:
            return [_label(value) for value in values]
        if not self.compares:
            return [CHOSEN if COMPARISONS[self.comparison](value, self.value) else REJECTED for value in values]
        numbers = [float(value) for value in values]
        if len(set(numbers)) < 2:
            return [NEITHER for _ in numbers]
        if self.comparison in ORDERS:
            mean = math.fsum(numbers) / len(numbers)
            return [CHOSEN if COMPARISONS[self.comparison](number, mean) else REJECTED for number in numbers]
        return _best(numbers if self.comparison == "top" else [-number for number in numbers], int(self.value))


class Labels:
    """How the labels of one source are read: by a rule, or from the column `label`.

    Without a rule a label is true or false, or a number with a point from −1.0 to 1.0. A rule that names a column of
    labels takes 0 and 1 and text as well, where all rows of a file are of one kind.
    """

    def __init__(self, rule: LabelRule | None = None):
        self.rule = rule
        self._kinds: dict[str, tuple[str, str]] = {}  # by file: the kind of its first row, and where that is
        self._first: dict[float, str] = {}  # graded labels by themselves: where 0 and 1 are first, and one between

    @property
    def compares(self) -> bool:
        return self.rule is not None and self.rule.compares

    def read(self, fields: Mapping[str, Any], source: str, within: str = "") -> Value:
        """As `LabelRule.read`."""
        if self.rule is None:
            label = _unambiguous(fields.get("label"), f"{within}.label" if within else "label", source)
            self._first.setdefault(label if isinstance(label, float) and label in (0.0, 1.0) else 0.5, source)
            return label
        value = self.rule.read(fields, source, within)
        if not self.rule.comparison:
            kind, first = self._kinds.setdefault(source.rpartition(":")[0], (kind_of_label(value), source))
            if kind != kind_of_label(value):
                raise RowError(
                    source,
                    f"{within}.{self.rule.field}" if within else self.rule.field,
                    f"is {named(value)} where {first} has {kind}, expected one kind in all rows",
                    f'Write all alike, or set data.label to a rule, such as "{self.rule.field} > 0"',
                )
        return value

    def check(self) -> None:
        """When all rows have been read.

        Raises:
            UserError: all labels are 0.0 and 1.0, which says neither that 0.0 is rejected nor that it is neither.
        """
        if self._first.keys() == {0.0, 1.0}:
            raise UserError(
                f"{self._first[0.0]}: label is 0.0, and all labels are 0.0 or 1.0: expected true and false, or graded "
                'labels. Set data.label to "label == 1" if 0.0 is rejected, or to "label" if it is neither chosen nor '
                "rejected"
            )

    def of(self, values: Sequence[Value]) -> list[float]:
        """As `LabelRule.labels`."""
        return (self.rule or LabelRule("label")).labels(values)


def _unambiguous(value: Any, field: str, source: str) -> Value:
    """A label that means one thing whoever wrote it."""
    meant = value.meant() if isinstance(value, Cell) else value
    if isinstance(meant, bool) or (isinstance(meant, float) and -1 <= meant <= 1):
        return meant
    if isinstance(value, str) or not _is_number(value):
        raise RowError(
            source,
            field,
            f"is {named(value)}, expected true or false",
            "Write true (chosen) or false (rejected) without quotes, or set data.label to a rule",
        )
    if isinstance(value, float):
        problem = f"is {named(value)}, expected true or false, or a number from -1.0 to 1.0"
        raise RowError(source, field, problem, f'Set data.label to a rule, such as "{field} >= 4"')
    raise RowError(
        source,
        field,
        f"is {named(value)}, expected true or false",
        "Write true for a chosen completion and false for a rejected one, as in 1 -> true, 0 -> false, or set "
        f'data.label to a rule, such as "{field} == 1"',
    )


def look_up(row: Mapping[str, Any], path: str) -> Any:
    """What stands under a name, or under a path of names with dots between them; None: nothing."""
    if row.get(path) is not None:
        return row[path]
    parts = path.split(".")
    for at in range(len(parts) - 1, 0, -1):
        inner = row.get(".".join(parts[:at]))
        if isinstance(inner, Mapping) and (found := look_up(inner, ".".join(parts[at:]))) is not None:
            return found
    return None


def kind_of_label(value: Any) -> str:
    """Which of the ways to write a label a value is, in words; nothing: it is no label."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return '"true" or "false"' if value.strip().casefold() in ("true", "false") else ""
    if isinstance(value, int):
        return "0 or 1" if value in (0, 1) else ""
    return GRADED if isinstance(value, float) and -1 <= value <= 1 else ""


def _as_label(value: Any, field: str, source: str) -> Value:
    value = value.meant() if isinstance(value, Cell) else value
    if not kind_of_label(value):
        raise RowError(
            source,
            field,
            f"is {named(value)}, expected a label: true or false, 0 or 1, or a number with a point from -1.0 to 1.0",
            f'Mend it, or set data.label to a rule, such as "{field} > 0"',
        )
    return value.strip().casefold() if isinstance(value, str) else value


def _label(value: Value) -> float:
    if isinstance(value, float):
        return value
    return CHOSEN if value in (True, 1, "true") else REJECTED


def _best(numbers: Sequence[float], count: int) -> list[float]:
    """The largest are chosen; of those that are as large as the last of them all or none."""
    ordered = sorted(numbers, reverse=True)
    if count >= len(ordered):
        return [CHOSEN for _ in numbers]
    last, next_one = ordered[count - 1], ordered[count]
    tied = last if last == next_one else None
    return [NEITHER if number == tied else CHOSEN if number >= last else REJECTED for number in numbers]


def _literal(text: str) -> Value:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if text in ("true", "false"):
        return text == "true"
    number = _finite(text)
    return text if number is None else number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> float | None:
    """A number, or text that is one; None: it is neither, or too large."""
    if isinstance(value, str) and not re.fullmatch(NUMBER, value.strip()):
        return None
    if not isinstance(value, str) and not _is_number(value):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < LARGEST else None


def _number(value: Any, field: str, source: str) -> float:
    number = _finite(value)
    if number is None:
        raise RowError(source, field, f"is {named(value)}, expected a number", "Mend it, or drop the row")
    return number


def _truth(value: Any, field: str, source: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().casefold() in ("true", "false"):
        return value.strip().casefold() == "true"
    raise RowError(source, field, f"is {named(value)}, expected true or false", "Mend it, or drop the row")


def _no_rule(text: str, why: str) -> UserError:
    return UserError(f"data.label is {text!r}: {why}. Expected a rule such as {EXAMPLES}")
