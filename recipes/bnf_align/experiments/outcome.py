"""What an experiment came to: results.json, from the cells, with an interval for every number.

It holds no single answers, so that it stays small; the cells have them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnf_align.experiments.cells import Result, perplexity
from bnf_align.experiments.scales import SCALES, Scale
from bnf_align.experiments.statistics import Interval, interval, separation
from bnf_core.errors import UserError
from bnf_core.types import Array

FORMAT = 1
NAME = "results.json"

# When a model has collapsed, said before anything was run: a text that it never trained on is more than twice as
# surprising as at the start, or it answers less than half as many problems. So has one whose gradient is not finite.
PERPLEXITY_FACTOR, ACCURACY_FACTOR = 2.0, 0.5

Numbers = dict[str, Interval]


@dataclass(frozen=True)
class Line:
    """One method in one setting, over all seeds."""

    setting: str
    method: str
    learning_rate: float
    seeds: int
    collapsed: int  # seeds
    numbers: Numbers
    # Means over seeds: `path`, `grad_norms`, `shift_at`, `gradient_at`, `others`, `right`.
    curves: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """
    Args:
        facts: versions, settings and hours, by name.
        start: numbers of the model before any step.
        sweep: of each objective and learning rate, the share of right answers on problems of their own.
    """

    experiment: str
    claim: str
    facts: dict[str, Any]
    start: dict[str, float]
    sweep: list[dict[str, Any]]
    lines: list[Line]
    axis: str = ""
    seen: str = ""

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(line.method for line in self.lines))

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(line.setting for line in self.lines))

    @property
    def scale(self) -> Scale:
        return SCALES[self.facts.get("scale", "didactic")]

    @property
    def counted(self) -> str:
        """What accuracy is a share of."""
        return self.scale.counted

    def line(self, method: str, setting: str | None = None) -> Line | None:
        """None where the method cannot be trained in that setting; by default the first."""
        setting = self.settings[0] if setting is None else setting
        return next((x for x in self.lines if (x.method, x.setting) == (method, setting)), None)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


def read(path: Path) -> Outcome:
    """
    Raises:
        UserError: no results, or those of another version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found.pop("format")
        if version == FORMAT:
            lines = [_line(line) for line in found.pop("lines")]
            return Outcome(**found, lines=lines)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Expected the results of `bnf experiment`") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not the results of an experiment. Expected what `bnf experiment` writes") from error
    raise UserError(
        f"{path}: results of version {version}, expected {FORMAT}. Run the experiment again with --resume, which makes "
        "them anew from its cells"
    )


def _line(found: dict[str, Any]) -> Line:
    return Line(**found | {"numbers": {name: Interval(**number) for name, number in found["numbers"].items()}})


# From cells


def start_of(cell: Result) -> dict[str, float]:
    """Numbers of the model before any step, of a cell without steps."""
    others = [x for answers in cell["others"].values() for x in answers]
    return {
        "accuracy": float(np.mean(cell["correct"])),
        "others": float(np.mean(others)),
        "perplexity": perplexity(np.array(cell["text"])),
        "log_p_chosen": cell["path"][0]["log_p_chosen"],
        "log_p_rejected": cell["path"][0]["log_p_rejected"],
    }


def collapsed(cell: Result, start: Result) -> bool:
    """As defined above."""
    surprised = perplexity(np.array(cell["text"])) > PERPLEXITY_FACTOR * perplexity(np.array(start["text"]))
    astray = sum(cell["correct"]) < ACCURACY_FACTOR * sum(start["correct"])
    return cell["diverged"] is not None or surprised or astray


def line_of(cells: Sequence[Result], beside: Sequence[Result], start: Result) -> Line:
    """
    Args:
        cells: of one method in one setting, a seed each.
        beside: of the method that it is compared with, of the same seeds in the same order.
        start: the cell without steps.
    """
    cell = cells[0]["cell"]
    others, groups = _table(cells, _others), np.array(cells[0]["groups"])
    numbers = {
        "accuracy": interval(_table(cells, lambda c: c["correct"]), groups=groups),
        "gain": interval(_table(cells, lambda c: c["correct"]) - np.array(start["correct"]), groups=groups),
        "beside": interval(
            _table(cells, lambda c: c["correct"]) - _table(beside, lambda c: c["correct"]), groups=groups
        ),
        "others": interval(others),
        "tax": interval(others - np.array(_others(start))),
        "surprise": _exp(interval(_table(cells, lambda c: c["text"]) - np.array(start["text"]))),
        "moved_chosen": interval(_table(cells, lambda c: c["moved_chosen"])),
        "moved_rejected": interval(_table(cells, lambda c: c["moved_rejected"])),
        "largest_grad_norm": interval(_table(cells, lambda c: [max(c["grad_norms"], default=math.nan)])),
        "gini": interval(_table(cells, lambda c: [c["gini"]])),
    }
    if all("log_p_a_token" in c for c in cells):
        numbers["separated"] = interval(_table(cells, _separated))
    names = cells[0]["others"]
    curves = {
        "path": _mean_path(cells),
        "grad_norms": _mean_of([c["grad_norms"] for c in cells]),
        "shift_at": {kind: _mean_of([c["shift_at"][kind] for c in cells]) for kind in ("chosen", "rejected")},
        "gradient_at": {
            when: {k: _mean_of([c["gradient_at"][when][k] for c in cells]) for k in ("chosen", "rejected")}
            for when in ("start", "end")
        },
        "others": {name: float(np.mean([c["others"][name] for c in cells])) for name in names},
        "right": _mean_of([c.get("right", []) for c in cells]),
    }
    count = sum(collapsed(c, start) for c in cells)
    return Line(cell["setting"], cell["method"], cell["learning_rate"], len(cells), count, numbers, curves)


def _table(cells: Sequence[Result], values: Any) -> Array:
    """(seeds, items)"""
    return np.array([values(cell) for cell in cells], np.float64)


def _others(cell: Result) -> list[int]:
    return [x for answers in cell["others"].values() for x in answers]


def _separated(cell: Result) -> Array:
    return separation(*(np.array(cell["log_p_a_token"][kind]) for kind in ("chosen", "rejected")))


def _exp(x: Interval) -> Interval:
    return Interval(*(float(np.exp(min(v, 50.0))) for v in (x.mean, x.low, x.high)))


def _mean_of(rows: Sequence[Sequence[float]]) -> list[float]:
    """As long as the shortest."""
    length = min(map(len, rows))
    return [round(float(np.mean([row[i] for row in rows])), 5) for i in range(length)]


def _mean_path(cells: Sequence[Result]) -> dict[str, list[float]]:
    paths: Sequence[Sequence[Mapping[str, float]]] = [cell["path"] for cell in cells]
    return {name: _mean_of([[point[name] for point in path] for path in paths]) for name in paths[0][0]}
