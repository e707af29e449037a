"""The conformance suite accepts what is right, rejects what is wrong for the right reason, and its files rebuild."""

import json
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file

import wrong_backends as wrong
from bnf_align import cli
from bnf_conformance import checks, runner, tolerances, vectors
from bnf_conformance.page import to_html
from bnf_conformance.report import Report, to_json
from bnf_conformance.runner import run
from bnf_conformance.tolerances import Tolerances
from bnf_core import registry
from bnf_core.errors import UserError
from bnf_core.protocol import BatchResult, DenseResult
from conftest import slow
from wrong_backends import NumpyBackend, OracleLosses

ROOT = Path(__file__).parents[2]

L0, SATURATION, L1, L2 = "L0 tokens", "L0 hopeless to saturated", "L1 batches", "L2 fused head"
LO, L3 = "L2 log odds", "L3 objectives"
MALFORMED = "L0 malformed input", "L2 malformed input"
CHECKS = {L0, SATURATION, L1, L2, LO, L3, "L3 saturated objectives", *MALFORMED}

MALFORMED_CASES = tuple(zip(MALFORMED, ("n7_v17_float32", "head_v257_float32"), strict=True))

# Of each wrong backend: results that must be among the failures, as (check, case, quantity), and the checks that may
# fail at all. What is not listed must pass, or the suite could not tell one mistake from another.
MISTAKES = [
    (
        wrong.ShiftedMask,
        {(L1, "mixed", "gradient"), (L1, "mixed", "unscored_gradient"), (L1, "all_good", "loss")},
        {L1},
    ),
    (wrong.FlippedLabel, {(L1, "all_good", "loss"), (L1, "all_bad", "sequence_loss"), (L1, "mixed", "gradient")}, {L1}),
    (wrong.PromptTokensCounted, {(L1, "mixed", "sequence_loss"), (L1, "mixed", "unscored_gradient")}, {L1}),
    (wrong.EosDropped, {(L1, "mixed", "sequence_loss"), (L1, "mixed", "gradient")}, {L1}),
    (wrong.MeanOfMeans, {(L1, "mixed", "loss"), (L1, "mixed", "gradient"), (L1, "all_bad", "loss")}, {L1}),
    (
        wrong.SwappedPolicyAndReference,
        {
            (L0, "n7_v17", "token_loss"),
            (L0, "n7_v17", "dynamic_target"),
            (L1, "mixed", "loss"),
            (L2, "head_one", "loss"),
        },
        {L0, SATURATION, L1, L2},
    ),
    (
        wrong.MissingStopGradient,
        {(L0, "n7_v17", "gradient"), (L0, "n7_v17", "dynamic_target"), (L1, "mixed", "gradient")}
        | {(L2, "head_v257", "grad_hidden"), (L2, "head_v257", "grad_head")},
        {L0, SATURATION, L1, L2},
    ),
    (
        wrong.EpsilonForm,
        {(L0, "n7_v17", "gradient"), (L0, "tie", "token_loss"), (L2, "head_v257", "grad_hidden")}
        | {
            (SATURATION, "4000 tokens", quantity)
            for quantity in ("gradient", "gradient_vs_cross_entropy", "token_loss")
        },
        {L0, SATURATION, L1, L2},
    ),
    (
        wrong.LiteralForm,
        {(SATURATION, "4000 tokens", "gradient"), (L0, "banned", "gradient"), (L0, "saturation", "gradient")},
        {L0, SATURATION, L2},
    ),
    (wrong.RoundedLogits, {(L2, "head_v257", "log_odds"), (L2, "head_v257", "grad_hidden")}, {L2, LO}),
    (
        wrong.NotANumber,
        {(L0, "n1_v2", "token_loss"), (L1, "one_row", "loss"), (L2, "head_one", "loss")},
        {L0, SATURATION, L1, L2},
    ),
    (wrong.Raises, {(L1, "mixed", "all"), (L1, "one_row", "all")}, {L1}),
    (
        wrong.IgnoredDtype,
        {
            (check, case, "gradient_dtype")
            for check, case in ((L0, "n7_v17"), (L1, "mixed"), (L2, "head_v257"), (LO, "head_v257"))
        },
        {L0, L1, L2, LO},
    ),
    (
        wrong.GridRowsAsSequences,
        {(L1, "packed", "loss"), (L1, "packed", "gradient")},
        {L1},
    ),
    (
        wrong.UntrainedTurnsCounted,
        {(L1, case, quantity) for case in ("masked", "masked_packed") for quantity in ("sequence_loss", "gradient")},
        {L1},
    ),
    (wrong.LastChunkDropped, {(L2, "head_v257", "grad_hidden"), (L2, "head_saturated", "grad_hidden")}, {L2}),
    (wrong.TrainsFrozenHead, {(L2, "head_v257", "frozen_head")}, {L2}),
    (wrong.NeverTheSame, {(L0, "n7_v17", "repeat"), (L2, "head_v257", "repeat")}, {L0, SATURATION, L2}),
    (wrong.AnswersAnything, {(check, case, "refused") for check, case in MALFORMED_CASES}, set(MALFORMED)),
    (wrong.ShortFactors, {(L2, "head_v257_float32", "log_odds")}, {L2, LO}),
    (wrong.NoShift, {(L0, "huge", "token_loss")}, {L0, SATURATION, L1, L2}),
    (wrong.TokenZeroIsPadding, {(L0, "n33_v2", "gradient")}, {L0, SATURATION, L1, L2}),
    (wrong.SquaredWeights, {(L0, "n7_v17", "gradient"), (L1, "mixed", "gradient")}, {L0, L1}),
    (
        wrong.SignOfRejected,
        {
            (L3, f"{name}, ordinary", "gradient")
            for name in ("dpo", "f_dpo", "ipo", "kto", "bco", "npo", "d2o", "simpo")
        },
        {L3},
    ),
    (
        wrong.SumForMean,
        {(L3, f"{name}, ordinary", "gradient") for name in ("simpo", "alphapo", "orpo", "asft", "simper", "ipo")},
        {L3},
    ),
    (
        wrong.MissingReference,
        {(L3, f"{name}, ordinary", "loss") for name in ("dpo", "f_dpo", "ipo", "kto", "bco", "npo", "d2o")},
        {L3},
    ),
    (wrong.DetachedTerm, {(L3, f"{name}, first step", "gradient") for name in ("bnf", "dpo", "kto", "slic")}, {L3}),
    (
        wrong.WeightsIgnored,
        {
            (L1, "graded", "loss"),
            (L1, "graded", "gradient"),
            *((L3, f"{name}, weighted", "gradient") for name in ("bnf", "kto", "bco", "npo", "dpo", "orpo")),
        },
        {L1, L3},
    ),
    (wrong.NoBaseline, {(L3, f"{name}, ordinary", "gradient") for name in ("kto", "bco")}, {L3}),
    (wrong.RatioToReference, {(L3, "grpo, ordinary", "loss"), (L3, "grpo, ordinary", "gradient")}, {L3}),
    (wrong.AdvantagesAlike, {(L3, "grpo, first step", "loss"), (L3, "grpo, first step", "gradient")}, {L3}),
    (wrong.Unclipped, {(L3, "grpo, ordinary", "loss"), (L3, "grpo, ordinary", "gradient")}, {L3}),
    (wrong.Normalised, {(L0, "n7_v17", "gradient"), (L1, "mixed", "gradient")}, {L0, SATURATION, L1}),
]


def small(check: checks.Check) -> checks.Check:
    """Without large vocabularies, with some of the tokens and chunks: a mistake shows on few."""
    if check.name == SATURATION:
        return check._replace(cases=[replace(c, arrays={k: a[::8] for k, a in c.arrays.items()}) for c in check.cases])
    cases = [c for c in check.cases if max(a.size for a in c.arrays.values()) < 20_000]
    return check._replace(cases=[replace(c, fields=c.fields | few_chunks(c.fields)) for c in cases])


def few_chunks(fields: dict[str, Any]) -> dict[str, Any]:
    return {"chunk_tokens": fields["chunk_tokens"][::2]} if "chunk_tokens" in fields else {}


@cache
def small_suite() -> list[checks.Check]:
    return [small(check) for check in checks.suite()]


SLOW_SUITE = pytest.param(checks.suite, id="every case", marks=pytest.mark.slow)


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "suite", small_suite)


@pytest.fixture
def batches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what takes no time: for what is the same whatever is checked."""
    monkeypatch.setattr(runner, "suite", lambda: [c for c in small_suite() if c.name in (L1, *MALFORMED)])


class Seen(OracleLosses):
    """Right, and keeps which of its parts are used."""

    parts: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        Seen.parts.add(name)
        return super().__getattribute__(name)


@cache
def mistakes_suite() -> list[checks.Check]:
    """Without float16, in which a mistake shows as in bfloat16."""
    return [check._replace(cases=[without_float16(case) for case in check.cases]) for check in small_suite()]


def without_float16(case: vectors.Case) -> vectors.Case:
    return replace(case, dtypes=tuple(dtype for dtype in case.dtypes if dtype != "float16"))


@cache
def parts_used() -> dict[str, set[str]]:
    """By each check of a backend's losses."""
    found = {}
    for check in mistakes_suite():
        Seen.parts = set()
        report_of(Seen, [check])
        found[check.name] = Seen.parts
    return found


def report_of(losses: type[OracleLosses], checked: list[checks.Check]) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "suite", lambda: checked)
        return run(NumpyBackend(losses))


@cache
def small_report(losses: type[OracleLosses] = OracleLosses) -> Report:
    """Computed once. A check that uses nothing of what a backend does otherwise has the oracle's results."""
    if losses is OracleLosses:
        return report_of(losses, mistakes_suite())
    own = {name for kind in losses.__mro__[: losses.__mro__.index(OracleLosses)] for name in vars(kind)}
    touched = {name for name, parts in parts_used().items() if parts & own - {"__module__", "__doc__"}}
    report = report_of(losses, [check for check in mistakes_suite() if check.name in touched])
    rest = [result for result in small_report().results if result.check not in touched]
    return replace(report, results=[*report.results, *rest])


@pytest.fixture(scope="module", params=[pytest.param(small_suite, id="small cases"), SLOW_SUITE])
def suite_of_oracle(request: pytest.FixtureRequest) -> list[checks.Check]:
    return request.param()


@pytest.fixture(scope="module")
def looked_up(suite_of_oracle: list[checks.Check]) -> set[tuple[str, str]]:
    """Levels and quantities whose tolerance `oracle_report` needed."""
    return set()


@pytest.fixture(scope="module")
def oracle_report(suite_of_oracle: list[checks.Check], looked_up: set[tuple[str, str]]) -> Report:
    original = Tolerances.__call__

    def spy(self: Tolerances, level: str, quantity: str, dtype: str) -> tuple[float, float]:
        looked_up.add((level, quantity))
        return original(self, level, quantity, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tolerances, "__call__", spy)
        return report_of(OracleLosses, suite_of_oracle)


def test_the_oracle_passes(oracle_report: Report) -> None:
    report = oracle_report
    assert report.ok, report.failures
    assert set(report.counts()) == {"pass"}
    # Float64 must be far inside every tolerance, or the checks measure something else than the backend; gradients
    # in half precision are within one rounding.
    for r in report.results:
        assert r.error is not None
        if r.quantity != "dynamic_target" and (r.dtype == "float32" or r.quantity in checks.VALUES):
            assert r.error <= 1e-7, r


@pytest.mark.parametrize(("losses", "caught", "may_fail"), MISTAKES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_wrong_backend_is_rejected(
    losses: type[OracleLosses], caught: set[tuple[str, str, str]], may_fail: set[str]
) -> None:
    report = small_report(losses)
    assert not report.ok
    failed = {(r.check, r.case, r.quantity) for r in report.failures}
    assert caught <= failed, f"not caught: {caught - failed}"
    assert {check for check, _, _ in failed} <= may_fail


def test_mistakes_are_told_apart() -> None:
    def failed(losses: type[OracleLosses]) -> set[tuple[str, str]]:
        return {(r.case, r.quantity) for r in small_report(losses).failures}

    turns = {case for case, _ in failed(wrong.UntrainedTurnsCounted)}
    assert turns == {"masked", "masked_packed"}
    # Values are right without the stop-gradient, sequences are right with a mean of means, and one micro-batch
    # is its own mean; the literal form is right for ordinary tokens, so that the epsilon alone is to blame.
    assert {q for _, q in failed(wrong.MissingStopGradient)}.isdisjoint({"token_loss", "loss", "log_odds"})
    means = failed(wrong.MeanOfMeans)
    assert {q for _, q in means} == {"loss", "gradient"}
    assert {case for case, _ in means}.isdisjoint({"one_micro_batch", "one_row"})
    assert {case for case, _ in failed(wrong.LiteralForm)}.isdisjoint({"n7_v17", "tie", "head_v257", "mixed"})


@pytest.mark.usefixtures("small_cases")
def test_a_dtype_that_is_missing_is_not_a_pass() -> None:
    report = run(NumpyBackend(wrong.Float32Only))
    assert report.ok
    half = [r for r in report.results if r.dtype != "float32"]
    assert half and {r.status for r in half} == {"not supported"}

    class Nothing(OracleLosses):
        dtypes = ()

    assert not run(NumpyBackend(Nothing)).ok


def test_what_a_backend_raises_is_reported_and_the_rest_goes_on() -> None:
    report = small_report(wrong.Raises)
    assert {r.message for r in report.failures} == {"NotImplementedError: no batches here"}
    assert {r.check for r in report.results if r.status == "pass"} == CHECKS - {L1}


@pytest.mark.usefixtures("small_cases")
def test_what_a_backend_says_it_lacks_is_not_supported_and_never_a_pass() -> None:
    report = run(NumpyBackend(wrong.NoFusedHead))
    assert report.ok
    assert {r.status for r in report.results if r.check.startswith("L2")} == {"not supported"}
    versus = {r.status for r in report.results if r.quantity.endswith("_vs_cross_entropy")}
    assert versus == {"not supported"} and all(r.cross_entropy is None for r in report.results)
    assert report.levels() == {
        "L0": {"float32": "in part", "bfloat16": "pass", "float16": "pass"},
        "L1": dict.fromkeys(("float32", "bfloat16", "float16"), "pass"),
        "L2": dict.fromkeys(("float32", "bfloat16", "float16"), "not supported"),
        "L3": {"float32": "pass"},
    }

    report = run(NumpyBackend(wrong.FrozenHeadOnly))
    assert report.ok and report.levels()["L2"]["float32"] == "in part"
    assert {r.status for r in report.results if r.quantity == "grad_head"} == {"not supported"}
    assert {r.status for r in report.results if r.quantity == "grad_hidden"} == {"pass"}

    class Mistyped(OracleLosses):
        lacks = ("fusd",)

    with pytest.raises(UserError, match=r"lacks fusd: expected of dense, batch, fused"):
        run(NumpyBackend(Mistyped))


@pytest.mark.usefixtures("small_cases")
def test_shapes_must_fit() -> None:
    class Transposed(OracleLosses):
        def token_loss(self, *args: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            loss, grad = super().token_loss(*args)
            return loss[:, None], grad

    assert any("expected shape" in r.message for r in run(NumpyBackend(Transposed)).failures)


@pytest.mark.usefixtures("batches_alone")
def test_known_failures_are_strict(tmp_path: Path) -> None:
    def known(case: str, check: str = L1) -> Path:
        entry = {"backend": "numpy", "check": check, "case": case, "dtype": "*", "quantity": "*", "reason": "for now"}
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in entry.items())
        (tmp_path / "known.toml").write_text(f"[[failure]]\n{lines}\n")
        return tmp_path / "known.toml"

    report = run(NumpyBackend(wrong.Raises), known_failures=known("*"))
    assert report.ok and report.counts()["known failure"] > 0
    assert not run(NumpyBackend(wrong.Raises), known_failures=known("mixed")).ok  # the other cases are not excused
    report = run(NumpyBackend(), known_failures=known("mixed"))  # passes against expectation
    assert not report.ok and {r.case for r in report.failures} == {"mixed"}
    report = run(NumpyBackend(), known_failures=known("no such case"))
    assert not report.ok and "does not exist" in report.failures[0].message


# Reports ------------------------------------------------------------------------------------------------------


def test_the_json_report_holds_every_result() -> None:
    reports = [small_report(wrong.NotANumber), small_report()]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    written = json.loads(to_json(reports, {"mlx": "not installed"}), parse_constant=refuse)
    assert written["ok"] is False and written["not_checked"] == {"mlx": "not installed"}
    assert written["vectors_version"] == vectors.VERSION and written["vectors_digest"] == vectors.digest()
    assert [entry["ok"] for entry in written["runs"]] == [False, True]
    for entry, report in zip(written["runs"], reports, strict=True):
        assert (entry["backend"], entry["device"], entry["tier"], entry["tier_measured"]) == (
            "numpy",
            "cpu",
            "cpu",
            True,
        )
        assert entry["environment"]["numpy"] == np.__version__
        assert len(entry["results"]) == len(report.results) == sum(entry["counts"].values())
        assert {r["check"] for r in entry["results"]} == CHECKS
        assert report.table().row_count > len(report.failures)
    assert "inf" in {r["error"] for r in written["runs"][0]["results"]}


@pytest.mark.usefixtures("small_cases")
def test_errors_are_also_told_in_ulps_and_beside_cross_entropy() -> None:
    class OffByUlps(OracleLosses):
        def dense(self, *args: np.ndarray, dtype: str) -> DenseResult:
            result = super().dense(*args, dtype=dtype)
            return replace(result, log_odds=result.log_odds + 3 * np.spacing(np.abs(result.log_odds), dtype=np.float32))

        def cross_entropy(
            self, logits: np.ndarray, targets: np.ndarray, *, dtype: str
        ) -> tuple[np.ndarray, np.ndarray]:
            loss, grad = super().cross_entropy(logits, targets, dtype=dtype)
            return loss * (1 + 1e-3), grad * (1 - 1e-2)

    results = {(r.check, r.case, r.dtype, r.quantity): r for r in run(NumpyBackend(OffByUlps)).results}
    # Log-odds of one token in float32: 3 ULPs, as NumPy counts them; its gradient is off by what float64 is off by.
    ulps = results[L0, "huge_float32", "float32", "log_odds"].ulps
    assert ulps is not None and 2.9 < ulps < 3.1
    assert results[L0, "n7_v17", "float32", "gradient"].ulps < 1e-3
    # Half a unit of 8 bits, however small a number of 24 bits that is.
    ulps = results[L0, "n7_v17", "bfloat16", "gradient"].ulps
    assert ulps is not None and 0.3 < ulps <= 0.5
    for check, case in ((L0, "n7_v17"), (SATURATION, "4000 tokens"), (L1, "mixed"), (L2, "head_v257_float32")):
        gradient = "grad_hidden" if check == L2 else "gradient"
        loss = "token_loss" if check in (L0, SATURATION, L2) else "sequence_loss"
        assert results[check, case, "float32", loss].cross_entropy == pytest.approx(1e-3, rel=1e-3)
        assert results[check, case, "float32", gradient].cross_entropy == pytest.approx(1e-2, rel=1e-3)


class Page(HTMLParser):
    """The text of every table row, by the heading above it; and whether tags are closed as they were opened."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.links: list[str] = []
        self.heading = self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("h2", "tr"):
            self.text = ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "h2":
            self.heading = self.text.strip()
        if tag == "tr":
            self.rows.setdefault(self.heading, []).append(" ".join(self.text.split()))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


@pytest.mark.usefixtures("small_cases")
def test_the_html_report_shows_what_failed_and_what_is_missing_and_needs_no_network() -> None:
    class Hostile(wrong.FrozenHeadOnly):
        def batch(self, *args: object, **kwargs: object) -> BatchResult:
            raise RuntimeError("<script>alert('&')</script>")

    good, bad = small_report(), run(NumpyBackend(Hostile), tier="metal")
    text = to_html([good, bad], {"mlx on cuda": "it offers cpu"})
    page = Page(text)
    assert page.open == [] and page.links == [] and "<script" not in text and "url(" not in text
    assert "light dark" in text and "mlx on cuda" in text and "it offers cpu" in text
    verdicts = page.rows["Verdicts"]
    assert verdicts[1].startswith("numpy on cpu conforms") and verdicts[1].endswith("cpu")
    assert verdicts[2].startswith("numpy on cpu does not conform") and verdicts[2].endswith("metal")
    assert text.count("never measured") == 1
    assert len(page.rows["Failures"]) == 1 + len(bad.failures)
    assert all("<script>alert('&')</script>" in row for row in page.rows["Failures"][1:])  # as text
    assert any("grad_head" in row and "train_head" in row for row in page.rows["Not supported, known to fail"])
    worst = page.rows["Worst errors"]
    at = next(i for i, row in enumerate(worst) if row.startswith("grad_head float32 numpy on cpu 4/4"))
    assert worst[at + 1] == "numpy on cpu not supported"
    assert len(page.rows["Every result"]) == 2 + len(good.results) + len(bad.results)


@pytest.mark.usefixtures("batches_alone")
def test_all_checks_every_installed_backend_and_says_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other(NumpyBackend):
        name = "other"

        def devices(self) -> list[str]:
            return ["cuda", "cpu"]

    backends = {"numpy": NumpyBackend(), "other": Other(), "gone": None}
    monkeypatch.setattr(registry, "names", lambda: sorted(backends))
    monkeypatch.setattr(registry, "missing", lambda name: ["gonelib"] if name == "gone" else [])
    monkeypatch.setattr(registry, "get", lambda name: backends[name])
    monkeypatch.setattr(cli, "prepare", lambda backends: None)  # loads the libraries of training

    def bnf(*words: str) -> tuple[int, str]:
        code = cli.run(["conformance", *words])
        return code, " ".join(capsys.readouterr().err.split())

    report = tmp_path / "report.json"
    assert bnf("--all", "--device", "cpu,cuda", "--report", str(report))[0] == 0
    written = json.loads(report.read_text())
    ran = [(entry["backend"], entry["device"], entry["tier"]) for entry in written["runs"]]
    assert ran == [("numpy", "cpu", "cpu"), ("other", "cpu", "cpu"), ("other", "cuda", "cuda")]
    assert written["not_checked"] == {
        "gone": "not installed (no gonelib)",
        "numpy on cuda": "it offers cpu",
    }
    assert bnf("--all", "--device", "cpu", "--report", str(tmp_path / "report.html"))[0] == 0
    assert Page((tmp_path / "report.html").read_text()).open == []

    backends["other"] = Other(wrong.FlippedLabel)
    assert bnf("--all", "--device", "cpu")[0] == 1
    for words, message in (
        (("--all", "--backend", "numpy"), "expected false with backend 'numpy'"),
        (("--all", "--device", "abacus"), "no installed backend has it"),
        (("--all", "--tier", "abacus"), "unknown tier 'abacus': expected auto, cpu, cuda, tf32, metal"),
        (("--backend", "numpy", "--report", "report.pdf"), "ends in .html or .json"),
        (("--backend", "numpy", "--report", "/proc/no/r.html"), "report /proc/no/r.html: its folder cannot be made"),
    ):
        code, error = bnf(*words)
        assert code == 2 and message in error, (words, error)


# Tolerances ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("oracle_report")
def test_every_tolerance_has_its_reason_and_every_reason_is_used(looked_up: set[tuple[str, str]]) -> None:
    levels = tomllib.loads(tolerances.FILE.read_text())
    tiers = levels.pop("tier")
    goldens = levels.pop("golden")
    assert goldens.keys() == {"loss", "grad_norm", "adapter"}
    assert all(quantity["scale"] and quantity["float32"]["reason"] for quantity in goldens.values())
    assert looked_up == {(level, quantity) for level, quantities in levels.items() for quantity in quantities}
    for quantities in levels.values():
        for quantity in quantities.values():
            assert quantity.pop("scale")
            assert all(entry["reason"] for entry in quantity.values())
    assert {tier for tier, entry in tiers.items() if entry["measured"]} == {"cpu"}
    for tier, entries in tiers.items():
        assert entries.pop("about") and entries.pop("measured") in (True, False)
        for level, quantities in entries.items():
            for quantity, by_dtype in quantities.items():
                for dtype, entry in by_dtype.items():
                    # A departure departs, and only from what there is; a device is never held to more than a CPU.
                    for each in vectors.ALL if dtype == "any" else (dtype,):
                        rtol, atol = Tolerances("cpu")(level, quantity, each)
                        assert entry["reason"] and entry["rtol"] >= rtol and entry["atol"] >= atol, (tier, quantity)
                        assert (entry["rtol"], entry["atol"]) != (rtol, atol), (tier, level, quantity, dtype)


@pytest.mark.parametrize(
    ("device", "system", "tier"),
    [
        ("cpu", "Linux", "cpu"),
        ("cuda", "Linux", "cuda"),
        ("cuda:3", "Linux", "cuda"),
        ("gpu", "Linux", "cuda"),
        ("gpu", "Darwin", "metal"),
        ("mps", "Darwin", "metal"),
        ("abacus", "Linux", "cpu"),
    ],
)
def test_a_device_has_its_tolerances(device: str, system: str, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    assert tolerances.choose("auto", device).tier == tier
    assert tolerances.choose("tf32", device).tier == "tf32"


@pytest.mark.slow
@pytest.mark.usefixtures("small_cases")
def test_the_tf32_tier_has_room_for_tf32_and_not_for_less() -> None:
    assert run(NumpyBackend(wrong.ShortFactors), tier="tf32").ok
    failed = {r.quantity for r in run(NumpyBackend(wrong.BFloat16Factors), tier="tf32").failures}
    assert {"log_odds", "token_loss"} <= failed


# The contract -------------------------------------------------------------------------------------------------


def test_every_clause_names_its_checks_and_every_check_its_clause(oracle_report: Report) -> None:
    text = (ROOT / "conformance" / "SPEC.md").read_text()
    clauses = re.findall(r"^\*\*([A-Z]\d+)\*\*(.*?)(?=^\*\*[A-Z]\d+\*\*|^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(clauses) >= 20 and len({name for name, _ in clauses}) == len(clauses)
    named = set()
    for name, clause in clauses:
        found = re.findall(r"`(L\d [a-z ]+) / (\w+)`", clause)
        assert found, f"clause {name} names no check"
        named.update(found)
    assert named == {(r.check, r.quantity) for r in oracle_report.results}


@pytest.mark.usefixtures("small_cases")
def test_the_example_backend_conforms_once_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is found by its entry point, read from its pyproject.toml as an installation would record it."""
    example = ROOT / "conformance" / "example"
    project = tomllib.loads((example / "pyproject.toml").read_text())["project"]
    record = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["bnf.backends"]
    lines = [f"{name} = {value}" for name, value in points.items()]
    (record / "entry_points.txt").write_text("\n".join(["[bnf.backends]", *lines]) + "\n")

    for folder in (tmp_path, example):
        monkeypatch.syspath_prepend(folder)
    registry._points.cache_clear()
    try:
        code = cli.run(["conformance", "--backend", "example", "--report", str(tmp_path / "report.json")])
    finally:
        registry._points.cache_clear()
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    (entry,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert entry["backend"] == "example"
    verdicts = {level: verdicts["float32"] for level, verdicts in entry["levels"].items()}
    assert verdicts == {"L0": "pass", "L1": "pass", "L2": "in part", "L3": "not supported"}  # it has BNF alone
    assert {level.get("bfloat16", "not supported") for level in entry["levels"].values()} == {"not supported"}


def test_the_example_backend_knows_no_code_of_this_project_but_the_protocol() -> None:
    imported = re.findall(r"^(?:from|import) (\S+)", (ROOT / "conformance/example/bnf_example.py").read_text(), re.M)
    assert {name for name in imported if name.startswith("bnf")} <= {
        "bnf_core.protocol",
        "bnf_core.types",
        "bnf_core.errors",
    }


# Vectors ------------------------------------------------------------------------------------------------------


def test_vectors_rebuild_unchanged(tmp_path: Path) -> None:
    vectors.write(tmp_path)
    stored = vectors.FOLDER
    assert (tmp_path / "manifest.json").read_bytes() == (stored / "manifest.json").read_bytes()
    for level in vectors.DESCRIPTIONS:
        new, old = load_file(tmp_path / f"{level}.safetensors"), load_file(stored / f"{level}.safetensors")
        assert new.keys() == old.keys()
        for name, array in new.items():
            assert array.dtype == old[name].dtype and array.shape == old[name].shape, name
            if array.dtype != np.float64:  # inputs
                assert array.tobytes() == old[name].tobytes(), name
            elif "/grad_h" in name:  # sums over tokens or the vocabulary that cancel: relative to the row
                scale = np.abs(old[name]).max(-1, keepdims=True)
                assert (np.abs(array - old[name]) <= 1e-12 * scale).all(), name
            else:  # NumPy's float64 exp and log may differ in the last bit from one CPU to another
                np.testing.assert_allclose(array, old[name], rtol=1e-12, atol=1e-300, err_msg=name)


def test_a_changed_vector_needs_a_changed_version(tmp_path: Path) -> None:
    assert vectors.digest() == vectors.DIGESTS[vectors.VERSION] and max(vectors.DIGESTS) == vectors.VERSION
    assert len(set(vectors.DIGESTS.values())) == len(vectors.DIGESTS)
    changed = tmp_path / "vectors"
    shutil.copytree(vectors.FOLDER, changed)
    assert vectors.load(changed)
    content = bytearray((changed / "L1.safetensors").read_bytes())
    content[-1] ^= 1  # the last bit of the last array
    (changed / "L1.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"not those of version \d+: reinstall.*raise VERSION"):
        vectors.load(changed)
    (changed / "manifest.json").write_text('{"version": 0}')
    with pytest.raises(UserError, match="vectors of version 0, this suite reads"):
        vectors.load(changed)


def test_rounding_to_a_dtype() -> None:
    x = np.asarray([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -(2**-130), 1e39, np.nan, -np.inf, 65520.0])
    expected = [1.0, 1.0, 1 + 2**-6, -(2**-130), np.inf, np.nan, -np.inf, 65536.0]  # ties to even
    np.testing.assert_array_equal(vectors.rounded(x, "bfloat16"), expected)
    assert vectors.rounded(x, "float16")[-1] == np.inf and vectors.rounded(x, "float32")[1] == x[1]


def test_vectors_are_small_and_described() -> None:
    assert sum(path.stat().st_size for path in vectors.FOLDER.iterdir()) < 8 * 2**20
    manifest = json.loads((vectors.FOLDER / "manifest.json").read_text())
    for entry in manifest["cases"]:
        tensors = load_file(vectors.FOLDER / entry["file"])
        for name, array in entry["arrays"].items():
            stored = tensors[f"{entry['name']}/{name}"]
            assert array == {"shape": list(stored.shape), "dtype": str(stored.dtype)}
            described = name if not name[-1].isdigit() else name.rsplit("_", 1)[0] + "_<m>"
            assert described in manifest["arrays"][entry["level"]]


def test_inputs_are_representable_in_the_dtypes_of_their_case() -> None:
    for case in vectors.load():
        for name in ("logits", "hidden", "head_weight", *(f"logits_{m}" for m in range(9))):
            if name not in case.arrays or case.dtypes == vectors.FLOAT32:
                continue
            assert (case[name].astype(np.float16).astype(np.float32) == case[name]).all(), (case.name, name)
            assert not (case[name].view(np.uint32) & 0xFFFF).any(), (case.name, name)  # bfloat16: the upper half


def test_cases_reach_what_they_are_for() -> None:
    cases = {case.name: case for case in vectors.load()}
    tie = cases["tie"]
    assert (tie["log_odds"].astype(np.float32) == tie["ref_log_odds"]).all()
    assert (cases["tie_exact"]["log_odds"] == cases["tie_exact"]["ref_log_odds"]).all()
    assert np.isposinf(cases["banned"]["log_odds"]).any() and np.isneginf(cases["banned"]["log_odds"]).any()
    assert np.abs(cases["saturation"]["log_odds"]).max() > 199
    assert np.abs(cases["huge"]["logits"]).max() > 9000
    many = vectors.hopeless_to_saturated()
    assert many["logits"].shape[0] == 4000 and many["log_odds"].min() < -59 and many["log_odds"].max() > 59
    gap = np.abs(many["log_odds"] - many["ref_log_odds"])
    assert (gap < 1e-5).sum() > 1000 and (gap > 10).sum() > 500


# Backends -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["small cases", slow("every case")])
def backend_report(backend_name: str, request: pytest.FixtureRequest) -> Report:
    """On every case as a user has it: what MLX compiles is compiled."""
    small = request.param == "small cases"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "suite", small_suite if small else checks.suite)
        if backend_name == "mlx":
            if not small:
                request.getfixturevalue("mlx_compiles")
            return run(registry.get("mlx"))
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # thousands of tiny operations: more threads only wait for each other
        try:
            return run(registry.get("torch"), "cpu")
        finally:
            torch.set_num_threads(threads)


def test_the_backends_conform(backend_report: Report) -> None:
    assert backend_report.ok, [
        (r.check, r.case, r.dtype, r.quantity, r.error, r.message) for r in backend_report.failures
    ]


def test_the_suite_itself_loads_no_framework() -> None:
    code = (
        "import sys, bnf_conformance, bnf_conformance.runner, bnf_conformance.vectors;"
        "print([name for name in ('torch', 'mlx') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
