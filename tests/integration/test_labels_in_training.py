"""Labels that are not true or false, from the command line to the weights, on each backend."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from bnf_align import cli

Run = Callable[..., tuple[str, list[dict[str, Any]]]]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, backend_name: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """Two steps on these rows: what was printed, and metrics.jsonl."""

    def train(name: str, rows: list[dict[str, Any]], *flags: str, code: int = 0) -> tuple[str, list[dict[str, Any]]]:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = f"train --model {tiny_model} --data {data} --output {tmp_path / name} --backend {backend_name}"
        words += " --device cpu --dtype float32 --batch-size 4 --max-steps 2 --epochs 9 --warmup-steps 0 --rank 4"
        assert cli.run([*words.split(), *flags]) == code
        out, err = capsys.readouterr()
        log = tmp_path / name / "metrics.jsonl"
        return out + err, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return train


def rows(*labels: Any, **more: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{i // 2} + 1 =", "completion": f" {i}", "label": label, **more} for i, label in enumerate(labels)
    ]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_a_graded_label_is_a_label_times_a_weight(run: Run, tmp_path: Path) -> None:
    graded = run("graded", rows(0.5, -1.0, 0.25, -0.125))
    alike = zip(rows(True, False, True, False), (0.5, 1, 0.25, 0.125), strict=True)
    weighted = run("weighted", [row | {"weight": weight} for row, weight in alike], "--micro-batch-size", "1")
    whole = run("whole", rows(True, False, True, False))
    assert losses(graded[1]) == pytest.approx(losses(weighted[1]), rel=1e-4)
    assert losses(graded[1])[0] != pytest.approx(losses(whole[1])[0], rel=0.1)
    files = [next((tmp_path / name / "adapter").glob("*.safetensors")) for name in ("graded", "weighted", "whole")]
    a, b, c = (np.concatenate([value.ravel() for _, value in sorted(load_file(file).items())]) for file in files)
    np.testing.assert_allclose(a, b, atol=2e-6)
    assert np.abs(a - c).max() > 1e-4


def test_a_rule_a_shape_and_what_is_left_out_are_told(run: Run) -> None:
    scored = [
        {"prompt": f"{i // 3} + 1 =", "response": f" {i}", "helpfulness": i % 3, "coherence": 4} for i in range(9)
    ]
    out, lines = run("rule", scored, "--data.label", "helpfulness > mean", "--template", "chat")
    first = next(line for line in out.splitlines() if line.strip())
    assert first.endswith("rule.jsonl: HelpSteer's ratings (prompt, response, helpfulness)")
    assert "columns that are not used: coherence" in out and "train: 9 rows (3 chosen, 6 rejected)" in out
    assert len(losses(lines)) == 2
    out, _ = run("zero", rows(True, False, 0.0, True), "--data.streaming", "true")
    assert "zero.jsonl: unpaired rows (prompt, completion, label)" in out
    assert "completions are left out: a label or weight of 0" in out


def test_bad_input_is_exit_code_2_and_leaves_no_run(run: Run, tmp_path: Path) -> None:
    out, _ = run("d2o", rows(0.5, False, True, -0.5), "--objective", "d2o", code=2)
    assert "2 of 4 rows have a graded label or a weight, the first: " in out and out.count("bnf: ") == 1
    out, _ = run("zeros", rows(True, False, weight=0), code=2)
    assert "the labels or weights of all 2 completions are 0" in out
    out, _ = run("flat", rows(True, score=3), "--data.label", "score > mean", "--data.streaming", "true", code=2)
    assert "compares the completions of a prompt" in out
    out, _ = run("unruly", rows(True), "--data.label", "score >> 3", code=2)
    assert "data.label is 'score >> 3'" in out
    assert not any((tmp_path / name / "adapter").exists() for name in ("d2o", "zeros", "flat", "unruly"))


def test_a_reference_needs_no_labels(tiny_model: Path, tmp_path: Path, backend_name: str) -> None:
    data = tmp_path / "scored.jsonl"
    data.write_text("".join(json.dumps(row | {"score": i}) + "\n" for i, row in enumerate(rows(True, False))))
    words = f"reference --model {tiny_model} --data {data} --output {tmp_path / 'ref'} --backend {backend_name}"
    assert cli.run([*words.split(), "--device", "cpu", "--data.label", "score > mean"]) == 0
