"""Goldens: this code computes what the newest one has, a change is seen, and no file changes without a line."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bnf_align import cli
from bnf_align.commands import conformance as command
from bnf_conformance import goldens
from bnf_conformance.goldens import Comparison, Golden, Result, beside
from bnf_core import registry
from bnf_core.errors import UserError
from bnf_core.steps import batching
from conftest import fast_on

ROOT = Path(__file__).parents[2]


@cache
def newest() -> Golden:
    return goldens.load(goldens.releases()[-1])


@cache
def taken(backend: str) -> Result:
    return goldens.take(registry.get(backend))


def test_this_code_computes_what_the_golden_has(backend_name: str) -> None:
    """Bits where it was made with these versions on such a CPU, decimals within the tolerance elsewhere."""
    comparison = beside(newest().results[backend_name], taken(backend_name))
    assert comparison.ok, list(command.told(comparison))


@fast_on("torch")
def test_the_same_run_gives_the_same_bits(backend_name: str) -> None:
    comparison = beside(taken(backend_name), goldens.take(registry.get(backend_name)))
    assert comparison.same_bits and not comparison.other


def test_the_backends_take_one_road() -> None:
    """As far from each other as another machine may be."""
    ours, theirs = (newest().results[name] for name in goldens.BACKENDS)
    worst = beside(ours, replace(theirs, norms=ours.norms, sums=ours.sums)).errors
    assert all(0 < worst[name][0] <= worst[name][1] for name in ("loss", "grad_norm"))


@fast_on("torch")
def test_a_bug_is_seen(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of a micro-batch's own rows, instead of the step's."""
    right = batching.collate
    monkeypatch.setattr(batching, "collate", lambda chosen, _, *args, **kw: right(chosen, len(chosen), *args, **kw))
    errors = beside(newest().results[backend_name], goldens.take(registry.get(backend_name))).errors
    assert all(error > 100 * allowed for error, allowed in errors.values())


def changed(**fields: Any) -> Comparison:
    result = newest().results["torch"]
    return beside(result, replace(result, **fields))


def test_other_bits_fail_only_where_nothing_else_differs() -> None:
    result = newest().results["torch"]
    assert changed().ok and changed().same_bits
    nearly = [result.loss[0] * (1 + 1e-12), *result.loss[1:]]
    same_versions = changed(loss=nearly)
    assert not same_versions.ok and "what is computed has changed" in list(command.told(same_versions))[-1]
    other = changed(loss=nearly, made_with={**result.made_with, "torch": "9.9"})
    assert other.ok and not other.same_bits
    assert f"made with torch {result.made_with['torch']} (here 9.9)" in list(command.told(other))[-1]
    far = {"made_with": {**result.made_with, "torch": "9.9"}}
    assert not changed(loss=[x + 1e-3 for x in result.loss], **far).ok
    assert not changed(grad_norm=[*result.grad_norm[:-1], float("nan")], **far).ok
    assert not changed(sums={name: value + 1e-3 for name, value in result.sums.items()}, **far).ok
    assert not changed(norms={}, sums={}, **far).ok
    assert not changed(loss=result.loss[:-1], grad_norm=result.grad_norm[:-1], **far).ok
    assert not changed(digest="0" * 64).ok


def test_every_golden_has_its_line_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    lines = re.findall(r"^- Golden ([\d.]+): .*?`sha256:([0-9a-f]{64})`", text, re.MULTILINE | re.DOTALL)
    assert set(lines) >= {(name, goldens.file_digest(goldens.FOLDER / f"{name}.json")) for name in goldens.releases()}
    for name in goldens.releases():
        golden = goldens.load(name)
        assert golden.release == name and re.fullmatch(r"\d{4}-\d\d-\d\d", golden.date)
        assert tuple(golden.results) == goldens.BACKENDS
        assert all(len(result.loss) == goldens.STEPS for result in golden.results.values())


def run(*words: str) -> int:
    return cli.run(["conformance", "--backend", "torch", *words])


def written(path: Path, **changes: Any) -> str:
    content = json.loads((goldens.FOLDER / f"{goldens.releases()[-1]}.json").read_text("utf-8"))
    path.write_text(json.dumps(content | changes))
    return str(path)


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(name: str, *words: str) -> str:
        assert run("--golden", name, *words) == 2
        return capsys.readouterr().err

    path = tmp_path / "golden.json"
    assert "expected a .json file, or a release of 0.1.0" in refused("0.0.9")
    assert "has format 2, and this version of bnf-align reads 1" in refused(written(path, format=2))
    assert "has no results of 'torch': it has none at all" in refused(written(path, results={}))
    path.write_text("{")
    assert "is no golden: JSONDecodeError" in refused(str(path))
    stored = newest().results["torch"].as_dict()
    stored["steps"][3]["loss"] += 1e-9
    assert "in decimal and" in refused(written(path, results={"torch": stored}))
    assert "expected no report" in refused("0.1.0", "--report", str(tmp_path / "report.json"))
    assert "expected device cpu" in refused("0.1.0", "--device", "cuda")
    with pytest.raises(UserError, match="has losses alone"):
        goldens.take(LossesAlone())  # type: ignore[abstract]


class LossesAlone(registry.Backend):
    name = "alone"


def test_the_command_compares(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(goldens, "take", lambda backend: newest().results[backend.name])
    assert run("--golden", "0.1.0") == 0
    assert "the same bits" in capsys.readouterr().out
    off = replace(newest().results["torch"], digest="")
    monkeypatch.setattr(goldens, "take", lambda backend: off)
    assert run("--golden", "0.1.0") == 1


def test_the_file_holds_what_was_taken(tmp_path: Path) -> None:
    results = newest().results
    goldens.write(tmp_path / "1.2.3.json", results, "2031-01-01")
    again = goldens.load(str(tmp_path / "1.2.3.json"))
    assert again.results == results and again.date == "2031-01-01"
