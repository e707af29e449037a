"""The report as one HTML file: no network, no script, light and dark as the reader's screen is."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape

from bnf_conformance import tolerances, vectors
from bnf_conformance.report import Group, Report, Result, Verdict, number, plain

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8dce2, #3a4048); --dim: light-dark(#5c6570, #9aa4b0);
  --good: light-dark(#0f6b34, #5fd08a); --bad: light-dark(#b3181c, #ff8a80); --some: light-dark(#8a5a00, #f0c060);
  --ground: light-dark(#ffffff, #14171b); --raised: light-dark(#f5f7f9, #1c2026); --ink: light-dark(#16191d, #e8ebef) }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0 0 .25rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .35rem } p { max-width: 60rem; margin: .5rem 0 } .dim { color: var(--dim) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .87rem }
th, td { padding: .28rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th { white-space: nowrap } thead th { background: var(--raised) } summary { cursor: pointer; margin: .75rem 0 }
.n, thead th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.pass { color: var(--good) } .fail { color: var(--bad); font-weight: 600 } .part, .known { color: var(--some) }
.not { color: var(--dim); font-style: italic } .pass, .fail, .part, .known, .not { white-space: nowrap }
"""

READ = """
<p>One line for each quantity, dtype and backend, with the worst of its cases. <b>ULPs</b> are units in the last place
of the quantity's dtype, <b>error</b> is relative; both count from the quantity's scale. <b>CE</b> is the error of the
framework's own cross-entropy on the same inputs, measured in the same way, where it has such a quantity. The
<b>limit</b> is the tolerance of the error.</p>"""


def to_html(reports: Sequence[Report], absent: dict[str, str]) -> str:
    """The whole report.

    Args:
        reports: one a backend and device.
        absent: why, of each backend or device that was asked for and could not be checked.
    """
    ok = all(report.ok for report in reports)
    title = "BNF conformance"
    parts = [
        f"<h1>{title}: {_mark('pass' if ok else 'fail', 'all pass' if ok else 'failed')}</h1>",
        f'<p class="dim">{datetime.now(UTC):%Y-%m-%d %H:%M} UTC · vectors {vectors.VERSION}, '
        f"{vectors.DIGESTS[vectors.VERSION][:19]}…</p>",
        "<h2>Verdicts</h2>",
        _verdicts(reports),
        *(
            f"<p>{escape(name)}: {_mark('not supported', 'not checked')}, {escape(why)}</p>"
            for name, why in absent.items()
        ),
        "<h2>Failures</h2>",
        _list([(r, x) for r in reports for x in r.failures], "Nothing failed."),
        "<h2>Worst errors</h2>",
        READ,
        *_worst(reports),
        "<h2>Not supported, known to fail</h2>",
        "<p>Neither counts as a pass.</p>",
        _list(_gaps(reports), "Nothing is missing, and no failure is excused."),
        "<h2>Where it ran</h2>",
        _environments(reports),
        "<h2>Every result</h2>",
        *(_all(report) for report in reports),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _name(report: Report) -> str:
    return f"{report.backend} on {report.device}"


def _mark(status: str, text: str | None = None) -> str:
    """A status in its colour, and in words, for whoever sees no colours."""
    words = {"pass": "pass", "fail": "fail", "in part": "part", "known failure": "known", "not supported": "not"}
    return f'<span class="{words[status]}">{escape(text or status)}</span>'


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    thead, tbody = f"<thead><tr>{''.join(head)}</tr></thead>", f"<tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>{thead}\n{tbody}</table></div>'


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>\n"


def _th(text: str, kind: str = "") -> str:
    return f'<th class="{kind}">{escape(text)}</th>' if kind else f"<th>{escape(text)}</th>"


def _td(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _n(text: str) -> str:
    return f'<td class="n">{escape(text)}</td>'


def _verdicts(reports: Sequence[Report]) -> str:
    levels = list(dict.fromkeys(level for report in reports for level in report.levels()))
    head = [_th(""), _th("verdict"), *map(_th, levels), _th("tolerances")]
    rows = []
    for report in reports:
        word = _mark("pass", "conforms") if report.ok else _mark("fail", "does not conform")
        cells = [f"<td>{_level(report.levels().get(level, {}))}</td>" for level in levels]
        rows.append(_row([_th(_name(report)), f"<td>{word}</td>", *cells, _td(report.tier)]))
    about = []
    for tier in dict.fromkeys(report.tier for report in reports):
        entry = tolerances.tiers()[tier]
        doubt = "" if entry["measured"] else f" {_mark('in part', 'They were never measured on such a device.')}"
        about.append(f"<p>Tolerances <b>{escape(tier)}</b>: {escape(entry['about'])}.{doubt}</p>")
    return _table(head, rows) + "".join(about)


def _level(verdicts: dict[str, Verdict]) -> str:
    """pass float32, bfloat16; not supported float16"""
    kinds = dict.fromkeys(verdicts.values())
    parts = ((kind, ", ".join(dtype for dtype, v in verdicts.items() if v == kind)) for kind in kinds)
    return "<br>".join(f"{_mark(kind)} {escape(dtypes)}" for kind, dtypes in parts)


def _worst(reports: Sequence[Report]) -> Iterator[str]:
    """One table a check; the backends of one quantity and dtype stand below each other."""
    head = [_th("quantity"), _th("dtype"), _th("backend"), _th("passed")]
    head += [_th(name, "n") for name in ("ULPs", "error", "CE", "limit")] + [_th("worst case")]
    tables: dict[str, dict[tuple[str, str], list[tuple[Report, Group]]]] = {}
    for report in reports:
        for group in report.groups():
            lines = tables.setdefault(group.check, {})
            lines.setdefault((group.quantity, group.dtype), []).append((report, group))
    for check, lines in tables.items():
        rows = [
            _row([_td(quantity if i == 0 else ""), _td(dtype if i == 0 else ""), _td(_name(report)), *_cells(group)])
            for (quantity, dtype), groups in lines.items()
            for i, (report, group) in enumerate(groups)
        ]
        yield f"<h3>{escape(check)}</h3>{_table(head, rows)}"


def _cells(group: Group) -> list[str]:
    if group.status == "not supported":
        return [f"<td>{_mark('not supported')}</td>", *[_td("")] * 5]
    worst = group.worst
    verdict = _mark(group.status, f"{group.passed}/{len(group.results)}")
    numbers = plain(group.largest("ulps")), number(worst.error), number(group.largest("cross_entropy"))
    return [f"<td>{verdict}</td>", *map(_n, numbers), _n(number(worst.tolerance)), _td(worst.case)]


def _gaps(reports: Sequence[Report]) -> list[tuple[Report, Result]]:
    """What is no pass and no failure, once for each check, dtype and quantity."""
    found: dict[tuple[str, ...], tuple[Report, Result]] = {}
    for report in reports:
        for x in report.results:
            if x.status not in ("pass", "fail"):
                found.setdefault((_name(report), x.check, x.dtype, x.quantity, x.status), (report, x))
    return list(found.values())


def _list(results: Sequence[tuple[Report, Result]], nothing: str) -> str:
    if not results:
        return f"<p>{nothing}</p>"
    head = [_th(t) for t in ("backend", "check", "case", "dtype", "quantity", "", "error", "limit", "what")]
    return _table(head, [_row([_th(_name(report)), *_result(x)]) for report, x in results])


def _result(x: Result) -> list[str]:
    cells = [_td(x.check), _td(x.case), _td(x.dtype), _td(x.quantity), f"<td>{_mark(x.status)}</td>"]
    return [*cells, _n(number(x.error)), _n(number(x.tolerance)), _td(x.message)]


def _environments(reports: Sequence[Report]) -> str:
    names = list(dict.fromkeys(name for report in reports for name in report.environment))
    head = [_th(""), *(_th(_name(report)) for report in reports)]
    return _table(head, [_row([_th(n), *(_td(r.environment.get(n, "")) for r in reports)]) for n in names])


def _all(report: Report) -> str:
    head = [_th(t) for t in ("check", "case", "dtype", "quantity", "", "error", "limit", "what", "ULPs", "CE")]
    rows = [_row([*_result(x), _n(plain(x.ulps)), _n(number(x.cross_entropy))]) for x in report.results]
    counts = ", ".join(f"{count} {status}" for status, count in report.counts().items())
    return f"<details><summary>{escape(_name(report))}: {counts}</summary>{_table(head, rows)}</details>"
