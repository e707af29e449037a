"""Runs every check on a backend."""

import math
import platform
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bnf_conformance import tolerances
from bnf_conformance.checks import CAPABILITIES, Check, NotSupported, Subject, suite
from bnf_conformance.report import Report, Result, Status
from bnf_conformance.vectors import Case
from bnf_core.errors import UserError
from bnf_core.protocol import Backend, Losses

KNOWN_FAILURES = Path(__file__).parent / "known_failures.toml"


def run(backend: Backend, device: str = "auto", *, tier: str = "auto", known_failures: Path = KNOWN_FAILURES) -> Report:
    """Run the whole suite.

    Args:
        backend: what `bnf_core.registry.get` returned.
        device: one of `backend.devices()`, or `auto`.
        tier: which tolerances of tolerances.toml hold; `auto` takes the device's.
        known_failures: the file of accepted failures.
    Returns:
        A report of every result. A check that raises fails with the message, and the others go on.
    Raises:
        UserError: the backend has no such device, there is no such tier, or the backend lacks something unheard of.
    """
    resolved = (backend.devices() or [device])[0] if device == "auto" else device
    limits = tolerances.choose(tier, resolved)
    losses = backend.losses(device)
    lacks = frozenset(getattr(losses, "lacks", ()))
    if unknown := lacks.difference(CAPABILITIES):
        raise UserError(
            f"backend {backend.name!r} lacks {', '.join(sorted(unknown))}: expected of {', '.join(CAPABILITIES)}"
        )
    results = [
        result
        for check in suite()
        for case in check.cases
        for dtype in case.dtypes
        for result in _run_one(Subject(losses, dtype, limits, lacks), check, case)
    ]
    environment = {
        "bnf-align": version("bnf-align"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        **backend.describe(),
    }
    results = _apply_known(backend.name, results, known_failures)
    return Report(backend.name, resolved, limits.tier, environment, results)


def _run_one(subject: Subject, check: Check, case: Case) -> Iterator[Result]:
    where = (check.name, case.name, subject.dtype)
    if missing := _missing(subject.losses, subject.dtype, check.needs, subject.lacks):
        yield Result(*where, "all", "not supported", message=f"the backend has no {missing}")
        return
    try:
        for m in check.run(subject, case):
            if isinstance(m, NotSupported):
                yield Result(*where, m.quantity, "not supported", message=f"the backend has no {m.lacks}")
                continue
            status: Status = "pass" if m.error <= m.tolerance else "fail"
            message = (
                m.note if math.isfinite(m.error) or m.ulps is None else f"NaN or a wrong infinity {m.note}".strip()
            )
            yield Result(*where, m.quantity, status, m.error, m.tolerance, m.ulps, m.cross_entropy, message)
    except Exception as error:  # whatever a backend raises is its failure, not the suite's
        yield Result(*where, "all", "fail", message=f"{type(error).__name__}: {error}")


def _missing(losses: Losses, dtype: str, needs: str, lacks: frozenset[str]) -> str | None:
    if dtype not in losses.dtypes:
        return dtype
    return needs if needs in lacks else None


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
