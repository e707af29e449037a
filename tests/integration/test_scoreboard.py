"""Other published forms of the loss: they are what their publications say, and the page tells what they miss."""

import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from test_conformance import small_suite

from bnf_align import cli
from bnf_conformance import runner
from bnf_conformance.report import Report
from conftest import fast_on
from others import __main__ as command
from others import scoreboard
from others.backends import FormBackend, FormLosses
from others.forms import OAT, PAPER, Form

PAGE = Path(__file__).parents[2] / "docs" / "scoreboard.md"
FORMS = pytest.mark.parametrize("form", [PAPER, OAT], ids=lambda form: form.name)


@cache
def small_report(form: Form, framework: str) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "suite", small_suite)
        return runner.run(FormBackend(form, framework), "cpu")


@FORMS
def test_a_form_is_what_its_publication_says(backend_name: str, form: Form) -> None:
    """One token by hand: π = (0.5, 0.3, 0.2), the first observed, r = 0.8."""
    losses = FormLosses(form, backend_name)
    logits, weights = np.log(np.array([[0.5, 0.3, 0.2]], np.float32)), np.ones(1, np.float32)
    got = losses.dense(logits, np.array([0]), np.array([math.log(4)], np.float32), weights, dtype="float32")
    t = 0.5 / (0.8 + form.epsilon)
    share = (1 - t + form.epsilon) / (0.5 + form.epsilon)
    others = 0.3 * math.log(0.3) + 0.2 * math.log(0.2)
    np.testing.assert_allclose(got.token_loss, [-t * math.log(0.5) - share * others], rtol=3e-7)
    # Of −t log p − share Σ sg(π) log π, t and share constant: all of the weight also goes through log Σ e^z.
    total = t + share * 0.5
    expected = [[total * 0.5 - t, total * 0.3 - share * 0.3, total * 0.2 - share * 0.2]]
    np.testing.assert_allclose(got.grad_logits, expected, rtol=1e-6, atol=1e-7)


def test_what_completions_are_divided_by() -> None:
    lengths = np.array([4, 2, 9])
    assert PAPER.divisors(lengths).tolist() == [4, 2, 9] and OAT.divisors(lengths).tolist() == [2, 2, 2]


def errors(report: Report, check: str, quantity: str, dtype: str = "float32") -> Iterator[tuple[str, float, bool]]:
    for r in report.results:
        if (r.check, r.quantity, r.dtype) == (check, quantity, dtype) and r.error is not None:
            yield r.case, r.error, r.status == "pass"


@fast_on("torch")
def test_the_paper_form_divides_as_we_do_and_oat_by_the_shortest(backend_name: str) -> None:
    own, shortest = (small_report(form, backend_name) for form in (PAPER, OAT))
    assert all(passed for _, _, passed in errors(own, "L1 batches", "sequence_loss"))
    assert all(error < 1e-5 for case, error, _ in errors(own, "L1 batches", "loss") if "one" in case)
    # Lengths from 1 to 12 in one batch: the completion of 12 tokens weighs twelve times what it should.
    by_case = {case: error for case, error, _ in errors(shortest, "L1 batches", "sequence_loss")}
    assert by_case["one_micro_batch"] == pytest.approx(11, rel=1e-3)


def bold() -> dict[tuple[str, str], list[bool]]:
    """Check and quantity → which of the forms' cells are over the limit, of the page's two tables of clauses."""
    found = {}
    for line in PAGE.read_text("utf-8").splitlines():
        if row := re.match(r"\| [A-Z]\d+ \| (L\d [a-z ]+): ([^|]+) \| [^|]+ \|(.*)\|$", line):
            cells = [cell.strip() for cell in row[3].split("|")]
            found[row[1], row[2]] = [cells[i].startswith("**") for i in (1, 2, 5, 6)]
            assert not any(cells[i].startswith("**") for i in (0, 4)), line
    return found


@FORMS
def test_the_page_tells_what_fails(backend_name: str, form: Form) -> None:
    """Of part of the cases; the slow test is of all."""
    column = (0 if backend_name == "torch" else 2) + (form is OAT)
    told = {name for name, cells in bold().items() if cells[column]}
    failed = {
        (r.check, r.quantity if r.dtype == "float32" else f"{r.quantity}, {r.dtype}")
        for r in small_report(form, backend_name).failures
    }
    assert failed and failed <= told


def test_the_page_says_what_the_command_says_of_it() -> None:
    forms = "".join(f"- **{form.name}**: {form.source}.\n" for form in scoreboard.FORMS)
    assert PAGE.read_text("utf-8").startswith(f"{scoreboard.INTRODUCTION}\n{forms}{scoreboard.READING}")


@pytest.mark.slow
def test_the_page_is_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = bold()
    assert command.main(["--output", str(tmp_path / "page.md")], cli.console) == 0
    monkeypatch.setitem(globals(), "PAGE", tmp_path / "page.md")
    assert bold() == told


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "none" / "page.md")
    assert cli.guarded(lambda: command.main(["--output", output], cli.console)) == 2
    assert f"output {output}: no folder" in capsys.readouterr().err


def test_every_clause_is_judged() -> None:
    names = [clause.name for clause in scoreboard.clauses()]
    assert names[0] == "T1" and len(names) == len(set(names)) >= 20
    assert all(clause.checks for clause in scoreboard.clauses())
