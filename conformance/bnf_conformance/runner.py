"""Runs every check on a backend and reports what passed, what failed and what is not supported."""

import json
import math
import platform
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from rich.table import Table

from bnf_conformance import vectors
from bnf_conformance.checks import Check, suite
from bnf_conformance.vectors import Case
from bnf_core.protocol import Backend, Losses

KNOWN_FAILURES = Path(__file__).parent / "known_failures.toml"

Status = Literal["pass", "fail", "known failure", "not supported"]


@dataclass(frozen=True)
class Result:
    """One quantity of one check on one case in one dtype."""

    check: str
    case: str
    dtype: str
    quantity: str  # "all" where the check could not measure any
    status: Status
    error: float | None = None  # worst element, relative as tolerances.toml says; None where there is no number
    tolerance: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Report:
    """The outcome of one run; `ok` decides the exit code."""

    backend: str
    device: str
    environment: dict[str, str]
    results: list[Result]
    vectors_version: int = vectors.VERSION

    @property
    def ok(self) -> bool:
        """Nothing failed, and something passed: a backend without dtypes proves nothing."""
        statuses = {result.status for result in self.results}
        return "fail" not in statuses and "pass" in statuses

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if result.status == "fail"]

    def counts(self) -> dict[str, int]:
        """Results by status."""
        return dict(Counter(result.status for result in self.results))

    def write(self, path: Path) -> None:
        """Write the whole report as JSON."""
        report = {
            "suite": "bnf-conformance",
            "vectors_version": self.vectors_version,
            "backend": self.backend,
            "device": self.device,
            "ok": self.ok,
            "counts": self.counts(),
            "environment": self.environment,
            "results": [asdict(result) for result in self.results],
        }
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")

    def table(self) -> Table:
        """One line per check, quantity and dtype with its worst case, then one per failure."""
        verdict = "conforms" if self.ok else "does not conform"
        table = Table(title=f"{self.backend} on {self.device} {verdict} (vectors {self.vectors_version})")
        for name in ("check", "quantity", "dtype", "passed", "worst error", "tolerance", "worst case"):
            table.add_column(name, justify="right" if name in ("passed", "worst error", "tolerance") else "left")
        groups: dict[tuple[str, str, str], list[Result]] = {}
        for result in self.results:
            groups.setdefault((result.check, result.quantity, result.dtype), []).append(result)
        for (check, quantity, dtype), group in groups.items():
            if all(result.status == "not supported" for result in group):
                table.add_row(check, quantity, dtype, "not supported", style="dim")
                continue
            passed = sum(result.status == "pass" for result in group)
            worst = max(group, key=_badness)
            style = "red" if any(result.status == "fail" for result in group) else ""
            cells = [check, quantity, dtype, f"{passed}/{len(group)}", _number(worst.error), _number(worst.tolerance)]
            table.add_row(*cells, worst.case, style=style)
        for result in self.failures:
            where = f"{result.case}: {result.message}" if result.message else result.case
            cells = [result.check, result.quantity, result.dtype, "FAIL"]
            table.add_row(*cells, _number(result.error), _number(result.tolerance), where, style="red")
        return table


def run(backend: Backend, device: str = "auto", *, known_failures: Path = KNOWN_FAILURES) -> Report:
    """Run the whole suite.

    Args:
        backend: what `bnf_core.registry.get` returned.
        device: one of `backend.devices()`, or `auto`.
        known_failures: the file of accepted failures.
    Returns:
        A report of every result. A check that raises fails with the message, and the others go on.
    Raises:
        UserError: the backend has no such device.
    """
    losses = backend.losses(device)
    results = [
        result
        for name, check, cases in suite()
        for case in cases
        for dtype in case.dtypes
        for result in _run_one(losses, name, check, case, dtype)
    ]
    environment = {
        "bnf-align": version("bnf-align"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        **backend.describe(),
    }
    resolved = (backend.devices() or [device])[0] if device == "auto" else device
    return Report(backend.name, resolved, environment, _apply_known(backend.name, results, known_failures))


def _run_one(losses: Losses, name: str, check: Check, case: Case, dtype: str) -> Iterator[Result]:
    if dtype not in losses.dtypes:
        yield Result(name, case.name, dtype, "all", "not supported")
        return
    try:
        for m in check(losses, case, dtype):
            passed = m.error <= m.tolerance
            finite = math.isfinite(m.error) and math.isfinite(m.tolerance)
            message = m.note if finite else f"NaN or a wrong infinity {m.note}".strip()
            error = m.error if math.isfinite(m.error) else None
            limit = m.tolerance if math.isfinite(m.tolerance) else None
            yield Result(name, case.name, dtype, m.quantity, "pass" if passed else "fail", error, limit, message)
    except Exception as error:  # whatever a backend raises is its failure, not the suite's
        yield Result(name, case.name, dtype, "all", "fail", message=f"{type(error).__name__}: {error}")


def _apply_known(backend: str, results: Sequence[Result], path: Path) -> list[Result]:
    entries = [entry for entry in tomllib.loads(path.read_text("utf-8"))["failure"] if entry["backend"] == backend]
    marked = list(results)
    for entry in entries:
        keys = ("check", "case", "dtype", "quantity")
        hits = [i for i, r in enumerate(results) if all(fnmatchcase(getattr(r, key), entry[key]) for key in keys)]
        for i in hits:
            if results[i].status == "fail":
                marked[i] = replace(results[i], status="known failure", message=entry["reason"])
            elif results[i].status == "pass":
                message = f"passes, but known_failures.toml expects it to fail: {entry['reason']}"
                marked[i] = replace(results[i], status="fail", message=message)
        if not hits:
            message = "known_failures.toml names a result that does not exist"
            check, case, dtype, quantity = (entry[key] for key in keys)
            marked.append(Result(check, case, dtype, quantity, "fail", message=message))
    return marked


def _badness(result: Result) -> float:
    if result.error is None:
        return math.inf if result.status != "not supported" else -1.0
    if result.tolerance:
        return result.error / result.tolerance
    return math.inf if result.error else 0.0


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
