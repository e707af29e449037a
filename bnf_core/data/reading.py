"""From a row as it stands in a file to feedback: its columns by the names that the settings give them, its shape, its
labels; and what was found on the way.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from bnf_core.config import DataConfig
from bnf_core.data.labels import LabelRule, Labels, look_up
from bnf_core.data.messages import RowError, plain
from bnf_core.data.records import BESIDE, COLUMN_SETS, USED, Feedback, parse_row
from bnf_core.data.shapes import Shape, shapes_of, used_columns
from bnf_core.errors import UserError


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read."""

    columns: Mapping[str, str] = field(default_factory=dict)  # ours, by their names there
    label: LabelRule | None = None

    @classmethod
    def of(cls, config: DataConfig) -> "Reading":
        """As the settings say.

        Raises:
            UserError: `data.label` is no rule, or `data.columns` names a column that is none of ours.
        """
        for ours in config.columns:
            if ours not in USED:
                near = difflib.get_close_matches(ours, USED, 1)
                expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(USED))}"
                raise UserError(f"data.columns has {ours!r}, which is no column of ours: {expected}")
        return cls(config.columns, None if config.label is None else LabelRule.parse(config.label))


class RowReader:
    """Reads the rows of one source.

    Args:
        reading: how.
        alone: whether rows are read one by one and never beside each other, so that those of a prompt cannot be
            compared unless they stand in one row.
    """

    def __init__(self, reading: Reading | None = None, *, alone: bool = False):
        self._reading = reading or Reading()
        self._labels = Labels(self._reading.label)
        self._alone = alone
        self.shapes: Counter[str] = Counter()  # rows of each, by what it is called and has
        self.unused: set[str] = set()  # columns that hold something and are passed over
        self.neither = 0  # completions whose label or weight is 0, which are left out

    def __call__(self, row: Any, source: str) -> list[Feedback]:
        """The completions of a row that say something.

        Raises:
            RowError: it is no feedback.
        """
        if not isinstance(row, Mapping):
            return parse_row(row, source)
        given = row = {str(column): plain(value) for column, value in row.items()}
        called: Mapping[str, str] = self._reading.columns
        used = USED | {theirs.partition(".")[0] for theirs in self._reading.columns.values()}
        name = ""
        if self._reading.columns:
            name = f"rows whose columns are called {', '.join(self._reading.columns.values())}"
            row = self._renamed(row, source)
        elif (shape := self._shape(row, source)) is not None:
            used, called, name = used_columns(shape), shape.called, _described(shape, row)
            row = self._converted(shape, row, source)
        try:
            found = parse_row(row, source, self._labels, is_plain=True)
        except RowError as error:
            head, dot, rest = error.field.partition(".")
            head, bracket, at = head.partition("[")
            if head not in called or called[head].partition(".")[0] not in given:
                raise
            place = f"{called[head]}{bracket}{at}{dot}{rest}"
            raise RowError(source, place, error.problem, error.remedy) from error
        if self._alone and any(feedback.score is not None for feedback in found):
            raise UserError(
                f"{source}: {self._reading.label} compares the completions of a prompt, which stand in rows of their "
                "own here, and streamed rows are not read beside each other. Leave out data.streaming, or give "
                "data.label a rule that judges each by itself"
            )
        self.shapes[name] += 1
        others = (
            c for c, v in row.items() if v is not None and c not in used and c not in USED and not self._judged(c)
        )
        self.unused |= {c.encode(errors="backslashreplace").decode() for c in others}
        return self._kept(found)

    def described(self) -> str:
        """The shapes of the rows so far, in words."""
        if len(self.shapes) == 1:
            return next(iter(self.shapes))
        return ", ".join(f"{count:,} {name}" for name, count in self.shapes.most_common())

    def finish(self, rows: Iterable[Feedback], groups: Iterable[int]) -> list[Feedback]:
        """All rows, where they are read beside each other: those to be compared have their labels now.

        Args:
            groups: of each row a number that equal prompts share.
        Raises:
            UserError: the labels do not say what they mean.
        """
        self._labels.check()
        rows = list(rows)
        if not any(row.score is not None for row in rows):
            return rows
        members: dict[int, list[int]] = {}
        for i, group in enumerate(groups):
            members.setdefault(group, []).append(i)
        for same in members.values():
            for i, label in zip(same, self._labels.of([rows[i].score or 0.0 for i in same]), strict=True):
                rows[i] = rows[i].labelled(label)
        return self._kept(rows)

    def _kept(self, rows: list[Feedback]) -> list[Feedback]:
        kept = [row for row in rows if row.weight]
        self.neither += len(rows) - len(kept)
        return kept

    def _renamed(self, row: Mapping[str, Any], source: str) -> dict[str, Any]:
        """With our names for the columns that the settings name; where those are all that a row needs, no others."""
        columns = self._reading.columns
        for ours, theirs in columns.items():
            if theirs not in row and look_up(row, theirs) is None:
                near = difflib.get_close_matches(theirs, row, 1)
                raise RowError(
                    source,
                    theirs,
                    f"no such column: found {', '.join(row) or 'none'}, expected what data.columns calls {ours}",
                    f"Set data.columns.{ours} to {near[0]!r}" if near else "Mend data.columns, or the row",
                )
        ruled = self._reading.label is not None
        whole = any(set(columns).issuperset(set(needed) - ({"label"} if ruled else set())) for needed in COLUMN_SETS)
        others = {
            c: v
            for c, v in row.items()
            if c not in columns.values() and not (whole and c in USED - BESIDE - set(columns))
        }
        if ruled:
            others |= {c: v for c, v in row.items() if self._judged(c)}
        return others | {ours: look_up(row, theirs) for ours, theirs in columns.items()}

    def _shape(self, row: Mapping[str, Any], source: str) -> Shape | None:
        found = shapes_of(row, self._reading.label is not None)
        if len(found) > 1 and not all(shape.own for shape in found):  # of ours parse_row says more
            both = " and ".join(f"{shape.name} ({', '.join(shape.columns)})" for shape in found)
            raise RowError(
                source,
                "",
                f"may be {both}, expected one shape",
                "Name the columns that are meant with data.columns, or drop the others",
            )
        return found[0] if len(found) == 1 else None

    def _converted(self, shape: Shape, row: Mapping[str, Any], source: str) -> dict[str, Any]:
        if shape.scored and self._reading.label is None:
            scores = [c for c, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)]
            example = scores[0] if scores else "overall_score" if shape.name.startswith("Ultra") else "score"
            raise RowError(
                source,
                "",
                f"{shape.name} have scores and no labels, expected a rule that makes labels of them",
                f'Set data.label, such as --data.label "{example} >= 4" or "{example} > mean"',
            )
        return shape.convert(row, source)

    def _judged(self, column: str) -> bool:
        """Whether the label rule looks there."""
        rule = self._reading.label
        return rule is not None and (column in (rule.field, rule.field + "s") or rule.field.startswith(column + "."))


def _described(shape: Shape, row: Mapping[str, Any]) -> str:
    return _in_words(shape, tuple(c for c in (*shape.uses, "weight", "tools") if row.get(c) is not None))


@lru_cache(1000)
def _in_words(shape: Shape, others: tuple[str, ...]) -> str:
    columns = dict.fromkeys((*shape.columns, *others))
    return f"{shape.name} ({', '.join(columns)})" if columns else shape.name
