"""How many rows of which label and length a run has: `rows.json` in its folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnf_core.data.table import column
from bnf_core.storage.files import replace_file
from bnf_core.types import Example

NAME = "rows.json"
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)

Counts = dict[str, dict[str, Any]]


def write(run_folder: Path, sets: Mapping[str, Sequence[Example]]) -> None:
    """Of each set of rows by its name, of its chosen and rejected ones: their number, and quantiles of their tokens."""
    replace_file(run_folder / NAME, json.dumps({name: _counts(rows) for name, rows in sets.items()}) + "\n")


def _counts(rows: Sequence[Example]) -> Counts:
    labels, lengths = column(rows, "label") > 0, column(rows, "length")
    return {
        name: {
            "rows": int(of.sum()),
            "tokens": np.quantile(lengths[of], QUANTILES).round().tolist() if of.any() else [],
        }
        for name, of in (("chosen", labels), ("rejected", ~labels))
    }


def read(run_folder: Path) -> dict[str, Counts]:
    """Nothing where the run has not counted."""
    path = run_folder / NAME
    found: dict[str, Counts] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
