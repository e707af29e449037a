"""The report as one HTML file: no network, no script, light and dark as the reader's screen is. page.html.j2 is its
text; here is what it shows."""

from collections.abc import Sequence
from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader, StrictUndefined

from bnf_conformance import tolerances, vectors
from bnf_conformance.report import Group, Report, Result, number, plain

# Of a status, its class in the style sheet.
CLASSES = {"pass": "pass", "fail": "fail", "in part": "part", "known failure": "known", "not supported": "not"}


def to_html(reports: Sequence[Report], absent: dict[str, str]) -> str:
    """The whole report.

    Args:
        reports: one a backend and device.
        absent: why, of each backend or device that was asked for and could not be checked.
    """
    environment = Environment(
        loader=PackageLoader("bnf_conformance", "."),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"backend": _name, "number": number, "plain": plain}
    tiers = dict.fromkeys(report.tier for report in reports)
    return environment.get_template("page.html.j2").render(
        reports=reports,
        absent=absent,
        ok=all(report.ok for report in reports),
        now=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        version=vectors.VERSION,
        digest=vectors.DIGESTS[vectors.VERSION][:19],
        classes=CLASSES,
        levels=list(dict.fromkeys(level for report in reports for level in report.levels())),
        verdicts=_verdicts,
        tiers=[(tier, tolerances.tiers()[tier]["about"], tolerances.tiers()[tier]["measured"]) for tier in tiers],
        failures=[(report, x) for report in reports for x in report.failures],
        worst=_worst(reports),
        gaps=_gaps(reports),
        names=list(dict.fromkeys(name for report in reports for name in report.environment)),
    )


def _name(report: Report) -> str:
    return f"{report.backend} on {report.device}"


def _verdicts(report: Report, level: str) -> list[tuple[str, str]]:
    """Each verdict of a level, and the dtypes that have it: pass, "float32, bfloat16"; not supported, "float16"."""
    found = report.levels().get(level, {})
    kinds = dict.fromkeys(found.values())
    return [(kind, ", ".join(dtype for dtype, verdict in found.items() if verdict == kind)) for kind in kinds]


def _worst(reports: Sequence[Report]) -> dict[str, dict[tuple[str, str], list[tuple[Report, Group]]]]:
    """By check, then by quantity and dtype: the backends of one stand below each other."""
    tables: dict[str, dict[tuple[str, str], list[tuple[Report, Group]]]] = {}
    for report in reports:
        for group in report.groups():
            lines = tables.setdefault(group.check, {})
            lines.setdefault((group.quantity, group.dtype), []).append((report, group))
    return tables


def _gaps(reports: Sequence[Report]) -> list[tuple[Report, Result]]:
    """What is no pass and no failure, once for each check, dtype and quantity."""
    found: dict[tuple[str, ...], tuple[Report, Result]] = {}
    for report in reports:
        for x in report.results:
            if x.status not in ("pass", "fail"):
                found.setdefault((_name(report), x.check, x.dtype, x.quantity, x.status), (report, x))
    return list(found.values())
