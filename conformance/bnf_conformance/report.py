"""What a run of the suite found: for a person on the screen, for a CI as JSON. page.py makes the HTML."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from bnf_conformance import tolerances, vectors

Status = Literal["pass", "fail", "known failure", "not supported"]
Verdict = Literal["pass", "fail", "in part", "not supported"]


@dataclass(frozen=True)
class Result:
    """One quantity of one check on one case in one dtype."""

    check: str
    case: str
    dtype: str
    quantity: str  # "all" where the check could not measure any
    status: Status
    error: float | None = None  # worst element, relative as tolerances.toml says; inf where there is a NaN
    tolerance: float | None = None
    ulps: float | None = None  # the same in units in the last place of the quantity's dtype
    cross_entropy: float | None = None  # error of the framework's own cross-entropy on the same inputs
    message: str = ""

    @property
    def badness(self) -> float:
        """How far it is up, or over, its tolerance."""
        if self.error is None:
            return math.inf if self.status != "not supported" else -1.0
        if self.tolerance:
            return self.error / self.tolerance
        return math.inf if self.error else 0.0


@dataclass(frozen=True)
class Group:
    """All results of one quantity of one check in one dtype."""

    check: str
    quantity: str
    dtype: str
    results: list[Result] = field(default_factory=list)

    @property
    def worst(self) -> Result:
        return max(self.results, key=lambda result: result.badness)

    @property
    def passed(self) -> int:
        return sum(result.status == "pass" for result in self.results)

    @property
    def status(self) -> Status:
        """The gravest there is."""
        statuses = {result.status for result in self.results}
        order: tuple[Status, ...] = ("fail", "known failure", "pass", "not supported")
        return next(status for status in order if status in statuses)

    def largest(self, name: Literal["ulps", "cross_entropy"]) -> float | None:
        values = [value for result in self.results if (value := getattr(result, name)) is not None]
        return max(values, default=None)


@dataclass(frozen=True)
class Report:
    """The outcome of one run; `ok` decides the exit code."""

    backend: str
    device: str
    tier: str
    environment: dict[str, str]
    results: list[Result]
    vectors_version: int = vectors.VERSION

    @property
    def ok(self) -> bool:
        """Nothing failed, and something passed: a backend without dtypes proves nothing."""
        statuses = {result.status for result in self.results}
        return "fail" not in statuses and "pass" in statuses

    @property
    def measured(self) -> bool:
        """Whether the tier's tolerances were ever held against such a device."""
        return bool(tolerances.tiers()[self.tier]["measured"])

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if result.status == "fail"]

    def counts(self) -> dict[str, int]:
        """Results by status."""
        return dict(Counter(result.status for result in self.results))

    def groups(self) -> list[Group]:
        """Results by check, dtype and quantity, in the order of the suite."""
        found: dict[tuple[str, str, str], Group] = {}
        for result in self.results:
            key = (result.check, result.quantity, result.dtype)
            found.setdefault(key, Group(*key)).results.append(result)
        parts = list(dict.fromkeys((group.check, group.dtype) for group in found.values()))
        return sorted(found.values(), key=lambda group: parts.index((group.check, group.dtype)))

    def levels(self) -> dict[str, dict[str, Verdict]]:
        """Level → dtype → verdict; "in part" where some is not supported and the rest passes."""
        found: dict[str, dict[str, set[Status]]] = {}
        for result in self.results:
            found.setdefault(result.check.partition(" ")[0], {}).setdefault(result.dtype, set()).add(result.status)
        return {level: {d: _verdict(s) for d, s in dtypes.items()} for level, dtypes in found.items()}

    def as_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "device": self.device,
            "tier": self.tier,
            "tier_measured": self.measured,
            "ok": self.ok,
            "counts": self.counts(),
            "levels": self.levels(),
            "environment": self.environment,
            "results": [_json(asdict(result)) for result in self.results],
        }

    def table(self) -> Table:
        """One line per check, quantity and dtype with its worst case, then one per failure."""
        verdict = "conforms" if self.ok else "does not conform"
        tier = f"tolerances {self.tier}" + ("" if self.measured else ", never measured on such a device")
        title = f"{self.backend} on {self.device} {verdict} (vectors {self.vectors_version}, {tier})"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("quantity", overflow="fold", min_width=28)
        for name in ("passed", "ULPs", "error", "CE", "limit"):
            table.add_column(name, justify="right", no_wrap=True)
        part = ""
        for group in self.groups():
            if (name := f"{group.check}, {group.dtype}") != part:
                table.add_row(part := name, style="bold")
            if group.status == "not supported":
                table.add_row(f"  {group.quantity}: not supported", style="dim")
                continue
            worst, style = group.worst, "red" if group.status == "fail" else ""
            cells = [f"  {group.quantity}", f"{group.passed}/{len(group.results)}", plain(group.largest("ulps"))]
            cells += [number(worst.error), number(group.largest("cross_entropy")), number(worst.tolerance)]
            table.add_row(*cells, style=style)
        for x in self.failures:
            where = f"FAIL {x.check}, {x.dtype}, {x.case}, {x.quantity}" + (f": {x.message}" if x.message else "")
            numbers = (plain(x.ulps), number(x.error), number(x.cross_entropy), number(x.tolerance))
            table.add_row(Text(where), "", *numbers, style="red")
        return table


def to_json(reports: Sequence[Report], absent: dict[str, str]) -> str:
    """Every result of every run, for a CI. A number that is not finite is the string "inf".

    Args:
        absent: why, of each backend or device that was asked for and could not be checked.
    """
    whole = {
        "suite": "bnf-conformance",
        "vectors_version": vectors.VERSION,
        "vectors_digest": vectors.DIGESTS[vectors.VERSION],
        "ok": all(report.ok for report in reports),
        "not_checked": absent,
        "runs": [report.as_dict() for report in reports],
    }
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def number(value: float | None) -> str:
    """A relative error."""
    if value is None or value == 0:
        return "" if value is None else "0"
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


def plain(value: float | None) -> str:
    """A number of ULPs: of small ones the tenths, of large ones the size."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.1f}" if value < 1000 else f"{value:.0e}"


def _verdict(statuses: set[Status]) -> Verdict:
    if "fail" in statuses:
        return "fail"
    if "pass" not in statuses and "known failure" not in statuses:
        return "not supported"
    return "pass" if statuses == {"pass"} else "in part"


def _json(result: dict[str, Any]) -> dict[str, Any]:
    return {key: "inf" if isinstance(value, float) and math.isinf(value) else value for key, value in result.items()}
