"""The conformance suite accepts what is right, rejects what is wrong for the right reason, and its files rebuild."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import wrong_backends as wrong
from safetensors.numpy import load_file
from wrong_backends import NumpyBackend, OracleLosses

from bnf_conformance import checks, runner, vectors
from bnf_conformance.runner import Report, run
from bnf_core import registry

L0, SATURATION, L1, L2 = "L0 tokens", "L0 hopeless to saturated", "L1 batches", "L2 fused head"
GRADIENTS = {"gradient", "observed_gradient", "grad_hidden", "grad_head"}

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
    (wrong.RoundedLogits, {(L2, "head_v257", "log_odds"), (L2, "head_v257", "grad_hidden")}, {L2}),
    (
        wrong.NotANumber,
        {(L0, "n1_v2", "token_loss"), (L1, "one_row", "loss"), (L2, "head_one", "loss")},
        {L0, SATURATION, L1, L2},
    ),
    (wrong.Raises, {(L1, "mixed", "all"), (L1, "one_row", "all")}, {L1}),
]


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite without large vocabularies: a mistake shows on small ones."""
    small = [
        (
            name,
            check,
            [case for case in cases if max(a.size for a in case.arrays.values()) < 20_000 or name == SATURATION],
        )
        for name, check, cases in checks.suite()
    ]
    monkeypatch.setattr(runner, "suite", lambda: small)


def test_the_oracle_passes() -> None:
    report = run(NumpyBackend())
    assert report.ok, report.failures
    assert set(report.counts()) == {"pass"}
    # Float64 must be far inside every tolerance, or the checks measure something else than the backend.
    assert all(r.error <= 1e-7 for r in report.results if r.error is not None and r.quantity != "dynamic_target")


@pytest.mark.usefixtures("small_cases")
@pytest.mark.parametrize(("losses", "caught", "may_fail"), MISTAKES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_wrong_backend_is_rejected(
    losses: type[OracleLosses], caught: set[tuple[str, str, str]], may_fail: set[str]
) -> None:
    report = run(NumpyBackend(losses))
    assert not report.ok
    failed = {(r.check, r.case, r.quantity) for r in report.failures}
    assert caught <= failed, f"not caught: {caught - failed}"
    assert {check for check, _, _ in failed} <= may_fail


@pytest.mark.usefixtures("small_cases")
def test_mistakes_are_told_apart() -> None:
    def failed(losses: type[OracleLosses]) -> set[tuple[str, str]]:
        return {(r.case, r.quantity) for r in run(NumpyBackend(losses)).failures}

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


@pytest.mark.usefixtures("small_cases")
def test_what_a_backend_raises_is_reported_and_the_rest_goes_on() -> None:
    report = run(NumpyBackend(wrong.Raises))
    assert {r.message for r in report.failures} == {"NotImplementedError: no batches here"}
    assert {r.check for r in report.results if r.status == "pass"} == {L0, SATURATION, L2}


@pytest.mark.usefixtures("small_cases")
def test_a_frozen_head_must_have_no_gradient_and_shapes_must_fit() -> None:
    class TrainsFrozenHead(OracleLosses):
        def fused(self, *args: object, **kwargs: object) -> object:
            return super().fused(*args, **{**kwargs, "train_head": True})

    class Transposed(OracleLosses):
        def token_loss(self, *args: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            loss, grad = super().token_loss(*args)
            return loss[:, None], grad

    assert {r.check for r in run(NumpyBackend(TrainsFrozenHead)).failures} == {L2}
    assert any("expected shape" in r.message for r in run(NumpyBackend(Transposed)).failures)


@pytest.mark.usefixtures("small_cases")
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


@pytest.mark.usefixtures("small_cases")
def test_the_report_holds_every_result(tmp_path: Path) -> None:
    report = run(NumpyBackend(wrong.NotANumber))
    report.write(tmp_path / "report.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert written["ok"] is False and written["backend"] == "numpy" and written["device"] == "cpu"
    assert written["vectors_version"] == vectors.VERSION and written["environment"]["numpy"] == np.__version__
    assert len(written["results"]) == len(report.results) == sum(written["counts"].values())
    assert {r["check"] for r in written["results"]} == {L0, SATURATION, L1, L2}
    assert report.table().row_count > len(report.failures)


def test_every_tolerance_has_its_reason_and_every_reason_is_used() -> None:
    used = set()
    original = checks.tolerance

    def spy(level: str, quantity: str, dtype: str) -> tuple[float, float]:
        used.add((level, quantity))
        return original(level, quantity, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "tolerance", spy)
        run(NumpyBackend())
    entries = checks._tolerances()
    assert used == {(level, quantity) for level, quantities in entries.items() for quantity in quantities}
    for quantities in entries.values():
        for quantity in quantities.values():
            assert quantity["scale"]
            assert all(entry["reason"] for entry in quantity.values() if isinstance(entry, dict))


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


@pytest.fixture(params=["torch", "mlx"])
def backend_report(request: pytest.FixtureRequest) -> Iterator[Report]:
    if absent := registry.missing(request.param):
        pytest.skip(f"{', '.join(absent)} not installed")
    if request.param == "torch":
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # thousands of tiny operations: more threads only wait for each other
        yield run(registry.get("torch"), "cpu")
        torch.set_num_threads(threads)
    else:
        yield run(registry.get(request.param))


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
