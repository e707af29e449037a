"""Which clauses of SPEC.md each published form keeps, and by how much it misses the others: docs/scoreboard.md."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bnf_conformance import runner, vectors
from bnf_conformance.checks import Subject
from bnf_conformance.report import Group, Report, number
from bnf_core import oracle, registry
from others.backends import FRAMEWORKS, FormBackend
from others.forms import OAT, PAPER

SPEC = Path(__file__).parents[1] / "SPEC.md"
FORMS = (PAPER, OAT)
HALF = ("bfloat16", "float16")
SURE = (5, 10, 15, 20, 60)  # |log-odds| of policy and reference up to which the gradient's error is told
Reports = Mapping[tuple[str, str], Report]  # by framework, and "ours" or the form's name


@dataclass(frozen=True)
class Clause:
    name: str  # as T1
    checks: tuple[tuple[str, str], ...]  # check and quantity


def clauses() -> list[Clause]:
    """The clauses of SPEC.md with the checks that each names."""
    found = re.findall(r"^\*\*([A-Z]\d+)\*\*(.*?)(?=^\*\*[A-Z]\d+\*\*|^#|\Z)", SPEC.read_text("utf-8"), re.M | re.S)
    return [Clause(name, tuple(re.findall(r"`(L\d [a-z ]+) / (\w+)`", text))) for name, text in found]


def run() -> Reports:
    """Every form and our own backend on each framework, on the CPU."""
    reports = {}
    for framework in FRAMEWORKS:
        reports[framework, "ours"] = runner.run(registry.get(framework), "cpu")
        for form in FORMS:
            reports[framework, form.name] = runner.run(FormBackend(form, framework), "cpu")
    return reports


def page(reports: Reports) -> str:
    """The whole page, in Markdown."""
    judged = {key: _groups(report) for key, report in reports.items()}
    head = "| clause | quantity | allowed |" + "".join(
        f" {framework}: ours | {' | '.join(form.name for form in FORMS)} | cross-entropy |" for framework in FRAMEWORKS
    )
    columns = 3 + len(FRAMEWORKS) * (len(FORMS) + 2)
    parts = [INTRODUCTION, "".join(f"- **{form.name}**: {form.source}.\n" for form in FORMS) + READING]
    for title, dtypes in (("float32", ("float32",)), ("bfloat16 and float16", HALF)):
        parts.append(f"## {title}\n\n{head}\n|{'---|' * columns}\n" + "".join(_rows(judged, dtypes)))
    parts.append(_by_log_odds())
    parts.append("## Kept by both\n\n" + "".join(_kept(judged)))
    versions = reports["torch", "ours"].environment | reports["mlx", "ours"].environment
    named = ", ".join(f"{name} {versions[name]}" for name in ("bnf-align", "torch", "mlx", "numpy"))
    parts.append(f"Vectors {vectors.VERSION}, {named}, on {versions['platform'].partition('-')[0]}.\n")
    return "\n".join(parts)


def _groups(report: Report) -> dict[tuple[str, str, str], Group]:
    return {(group.check, group.quantity, group.dtype): group for group in report.groups()}


Judged = Mapping[tuple[str, str], Mapping[tuple[str, str, str], Group]]


def fails(judged: Judged, framework: str, form: str, check: str, quantity: str, dtype: str) -> bool:
    group = judged[framework, form].get((check, quantity, dtype))
    return group is not None and group.status == "fail"


def _rows(judged: Judged, dtypes: tuple[str, ...]) -> Iterator[str]:
    for clause in clauses():
        for check, quantity in clause.checks:
            for dtype in dtypes:
                if not any(
                    fails(judged, framework, form.name, check, quantity, dtype)
                    for framework in FRAMEWORKS
                    for form in FORMS
                ):
                    continue
                name = f"{quantity}, {dtype}" if len(dtypes) > 1 else quantity
                cells = [clause.name, f"{check}: {name}"]
                cells.append(number(judged["torch", "ours"][check, quantity, dtype].worst.tolerance))
                for framework in FRAMEWORKS:
                    ours = judged[framework, "ours"][check, quantity, dtype]
                    cells.append(number(ours.worst.error))
                    cells += [_cell(judged[framework, form.name].get((check, quantity, dtype))) for form in FORMS]
                    cells.append(number(ours.largest("cross_entropy")))
                yield f"| {' | '.join(cells)} |\n"


def _cell(group: Group | None) -> str:
    if group is None or group.status == "not supported":
        return "—"
    text = number(group.worst.error)
    return f"**{text}**" if group.status == "fail" else text


def _by_log_odds() -> str:
    """The worst error of a token's gradient, relative to its largest element, by how sure policy and reference are."""
    case = vectors.hopeless_to_saturated()
    logits, targets, reference = case["logits"], case["targets"], case["ref_log_odds"]
    _, expected = oracle.token_loss(logits, targets, reference)
    _, of_cross_entropy = oracle.token_loss(logits, targets, np.full(len(targets), -np.inf))
    sure = np.maximum(np.abs(case["log_odds"]), np.abs(reference))
    names, columns = [], []
    for framework in FRAMEWORKS:
        ours = registry.get(framework).losses("cpu")
        gradients = [
            losses.dense(logits, targets, reference, np.ones_like(reference), dtype="float32").grad_logits
            for losses in (ours, *(FormBackend(form, framework).losses() for form in FORMS))
        ]
        pairs = [(gradient, expected) for gradient in gradients]
        pairs.append((ours.cross_entropy(logits, targets, dtype="float32")[1], of_cross_entropy))
        for got, e in pairs:
            error = partial(Subject(ours, "float32").worst, "saturation", "gradient")
            largest = np.abs(e).max(1, keepdims=True)
            within = [sure <= limit for limit in SURE]
            columns.append([error(got[tokens], e[tokens], largest[tokens]).error for tokens in within])
        names += [f"{framework}: ours", *(form.name for form in FORMS), "cross-entropy"]
    head = f"| log-odds within | tokens | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}\n"
    rows = (
        f"| ±{limit} | {np.count_nonzero(sure <= limit)} | {' | '.join(number(c[i]) for c in columns)} |\n"
        for i, limit in enumerate(SURE)
    )
    return f"## The gradient, by how sure the models are\n{BY_LOG_ODDS}\n{head}{''.join(rows)}"


def _kept(judged: Judged) -> Iterator[str]:
    for clause in clauses():
        groups = [
            group
            for framework in FRAMEWORKS
            for form in FORMS
            for (check, quantity, _), group in judged[framework, form.name].items()
            if (check, quantity) in clause.checks
        ]
        if groups and all(group.status == "pass" for group in groups):
            names = ", ".join(f"{check}: {quantity}" for check, quantity in clause.checks)
            yield f"- **{clause.name}** ({names})\n"


INTRODUCTION = """# Scoreboard

What is published of the BNF loss, written down as formulae in our own words (`conformance/others/forms.py`) and run
through the [conformance suite](conformance.md) as backends of PyTorch and of MLX. `python -m others`, in a checkout,
writes this page again.
"""
READING = """
Errors are relative, as `conformance/bnf_conformance/tolerances.toml` says. What is over the limit is **bold**; "not
finite" is a NaN or a wrong infinity. Beside them stand our own backend and the framework's own cross-entropy on the
same inputs. The worst of all cases is shown, so that an error of 1e25 is a gradient where there should be almost none.
Clauses are those of [SPEC.md](../conformance/SPEC.md):

- T1 and T2 are what a form's log p and its other tokens' term amount to, for neither has log-odds.
- Several micro-batches are averaged, which S1 and S3 forbid; S2 shows the division by lengths alone.
- Both forms compute in the dtype of the logits, which is what their rows in half precision show.
- Neither is fused with the head or knows other objectives: clauses F, O and B are not asked.
"""
BY_LOG_ODDS = """
Of the tokens of clause H1, in float32, the worst of those where the log-odds of policy and reference both lie within so
many units.
"""
