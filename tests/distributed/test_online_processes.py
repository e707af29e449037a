"""On several processes a run draws the same samples, and takes the same road, as on one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from invariance import WAYS, command, launch, ways

FLAGS = "--iterations 2 --prompts-per-iteration 3 --samples-per-prompt 4 --updates-per-batch 2 --sample-tokens 6"
FLAGS += " --rank 4 --alpha 8 --lr 5e-3 --warmup-steps 1 --epsilon 1e-2 --max-length 64 --micro-batch-size 3"
FLAGS += " --stop [a,e,i] --reference-policy previous --device cpu --dtype float32 --sample-batch-size 4 --eval-every 2"


def words(model: Path, folder: Path, backend: str, output: str) -> tuple[list[str], Path]:
    prompts = folder / "prompts.txt"
    # Of very different lengths, and an uneven share for each process.
    prompts.write_text("".join("What is " + "1 plus " * (i * i % 7) + "2?\n" for i in range(5)))
    given = ["online", "--model", str(model), "--prompts", str(prompts), "--valid", str(prompts)]
    given += ["--judge", "regex(pattern='[a-n]')", "--backend", backend, "--output", str(folder / output)]
    return [*given, *FLAGS.split()], folder / output


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def drawn(run: Path) -> list[Any]:
    rows = [json.loads(line) for file in sorted((run / "samples").glob("*")) for line in file.read_text().splitlines()]
    return [(row["prompt_ids"], row["completion_ids"], row["label"], row["iteration"], row["sample"]) for row in rows]


@pytest.mark.parametrize("way", ways("fsdp"))
def test_two_processes_do_what_one_does(way: str, tiny_model: Path, tmp_path: Path) -> None:
    backend = WAYS[way][0]
    alone, whole = words(tiny_model, tmp_path, backend, "alone")
    assert command(alone) == 0
    together, run = words(tiny_model, tmp_path, backend, "together")
    (code, output), (other_code, other_output) = launch(way, [("", together)], [tmp_path] * 2)
    assert code == other_code == 0, output + other_output
    assert "on 2 processes" in output and "prompts" not in other_output
    assert drawn(run) == drawn(whole) and len(drawn(run)) == 24
    for a, b in zip(lines(whole), lines(run), strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "grad_norm", "entropy", "pass_at_1", "both_labels", "log_odds_shift/rejected"):
            if a.get(name) is not None:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name
    assert np.isfinite([line["loss"] for line in lines(run) if line["kind"] == "train"]).all()
