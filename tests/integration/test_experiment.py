"""`bnf experiment` on a model of a few thousand parameters: cells, their results, resuming, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bnf_align import cli
from bnf_align.experiments import didactic, scales
from bnf_align.experiments.base import METHODS
from bnf_align.experiments.cells import Cell, run
from bnf_align.experiments.references import TEMPERATURES, reference_model
from bnf_align.experiments.rows import Mix
from bnf_align.experiments.subjects import Solutions
from bnf_core import registry
from bnf_core.data.records import parse_row
from bnf_core.data.tokenization import load_tokenizer, tokenize

TINY = didactic.Pretraining(hidden_size=16, intermediate_size=16, layers=1, heads=2, steps=4, batch_size=12)
SMALL = {"items": 4, "scored_pairs": 4, "other_items": 2, "sentences": 4, "seeds": 2, "sweep_seeds": 1}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, pre-trained once with PyTorch."""
    folder = tmp_path_factory.mktemp("experiments") / "models"
    return didactic.didactic(folder, registry.get("torch"), QUIET, TINY)


@pytest.fixture(autouse=True)
def small_scale(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(scales.SCALES["didactic"], steps=2, batch_size=4, learning_rates=(1e-3,), max_tokens=3, **SMALL)
    monkeypatch.setitem(scales.SCALES, "didactic", replace(small, model=lambda folder, backend, console: made))


def cell(**changed: Any) -> Cell:
    return replace(Cell("BNF", "bnf", 1e-3, seed=0, steps=2, batch_size=4), **changed)


# The model


def test_rows_are_as_the_chat_template_writes_them(made: Path) -> None:
    tokenizer = load_tokenizer(made)
    row = {"prompt": "2 + 3 ?", "completion": "2 + 3 = 5 so the answer is 5", "label": True}
    (expected,) = tokenize(parse_row(row, "rows:1"), tokenizer, template="chat", max_length=64).examples
    assert didactic.task_row(row["prompt"], row["completion"], tokenizer).key == expected.key
    assert tokenizer.unk_token_id not in expected.prompt_ids + expected.completion_ids


def test_the_tokenizer_knows_every_word(made: Path) -> None:
    tokenizer = load_tokenizer(made)
    rows = didactic.pretraining_rows(replace(TINY, steps=40), tokenizer)
    assert len(rows) == 40 * TINY.batch_size
    assert all(tokenizer.unk_token_id not in row.prompt_ids + row.completion_ids for row in rows)


def test_both_backends_load_it_alike(made: Path) -> None:
    row = didactic.task_row("2 + 3 ?", "2 + 3 = 5 so the answer is 5", load_tokenizer(made))
    from bnf_core.steps.batching import collate

    batch = collate([row], 1)
    zeros = np.zeros(len(batch.targets), np.float32)
    found = [
        registry.get(name).load(made, device="cpu", dtype="float32").evaluate(batch, zeros).log_odds
        for name in ("torch", "mlx")
        if not registry.missing(name)
    ]
    np.testing.assert_allclose(found[0], found[-1], atol=1e-4)


def test_it_is_made_once_and_keeps_its_midst(made: Path) -> None:
    again = didactic.didactic(made.parent.parent, registry.get("torch"), QUIET, TINY)
    assert again == made and (made.with_name(didactic.STALE) / "model.safetensors").exists()
    losses = json.loads((made.parent / "pretraining.json").read_text())["loss"]
    assert len(losses) == TINY.steps


# Cells


def test_a_cell_is_the_same_each_time(made: Path, backend_name: str) -> None:
    a, b = (run(cell(), made, backend_name) for _ in range(2))
    assert a == b
    assert [point["step"] for point in a["path"]] == [0, 1, 2]
    assert len(a["correct"]) == 4 and len(a["grad_norms"]) == 2 and a["diverged"] is None
    assert run(cell(seed=1), made, backend_name)["grad_norms"] != a["grad_norms"]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_trains(method: Any, made: Path) -> None:
    found = run(cell(objective=method.objective), made, "torch")
    assert found["rows"] == 8 and all(norm > 0 for norm in found["grad_norms"])
    shares = found["gradient_at"]["start"]
    assert sum(shares["chosen"]) + sum(shares["rejected"]) == pytest.approx(1.0, abs=1e-3)
    only = {"npo": "rejected", "nll": "chosen"}.get(method.objective)
    for kind in ("chosen", "rejected"):
        assert (sum(shares[kind]) > 0) == (only in (None, kind))


@pytest.mark.parametrize("answers", ["policy", "start"])
@pytest.mark.parametrize("task", ["problems", "sort"])
def test_the_models_own_answers(made: Path, monkeypatch: pytest.MonkeyPatch, answers: Any, task: str) -> None:
    from bnf_align.experiments import tasks

    odd = tasks.Question("sort 3 1 2 2", lambda text: len(text) % 2 == 1)  # about half of what it says at first
    monkeypatch.setattr(tasks, "questions", lambda task, count, rng: [odd] * count)
    for objective in ("bnf", "grpo"):
        asked = cell(objective=objective, answers=answers, task=task, batch_size=8, learning_rate=1e-2)
        found = run(asked, made, "torch")
        assert len(found["right"]) == 2 and all(0 < share < 1 for share in found["right"])
        assert found["rows"] == (16 if answers == "start" else 0) and len(found["grad_norms"]) == 2
        assert all(norm > 0 for norm in found["grad_norms"])
        assert found["path"][-1]["step"] == 2


def test_graded_rows_train(made: Path) -> None:
    graded, plain = (Mix(paired=0.0, graded=graded) for graded in (True, False))
    for objective in ("bnf", "kto"):
        norms = [run(cell(objective=objective, mix=mix), made, "torch")["grad_norms"] for mix in (graded, plain)]
        assert norms[0] != norms[1] and all(norm > 0 for norm in norms[0])


def test_without_steps_nothing_moves(made: Path) -> None:
    found = run(cell(steps=0), made, "torch")
    assert found["gini"] == 0.0 and not any(found["moved_chosen"] + found["moved_rejected"])


def test_a_reference_that_is_not_the_start(made: Path) -> None:
    tokenizer = load_tokenizer(made)
    from bnf_core.steps.batching import collate

    batch = collate([didactic.task_row("2 + 3 ?", "5", tokenizer)], 1)
    zeros = np.zeros(len(batch.targets), np.float32)
    backend = registry.get("torch")

    def entropy(folder: Path) -> float:
        """The entropy of the other tokens, which grows with the temperature."""
        engine = backend.load(folder, device="cpu", dtype="float32")
        return float(engine.evaluate(batch, zeros).other_entropy[0])

    scale = replace(scales.SCALES["didactic"], model=didactic.didactic)
    found = {kind: entropy(reference_model(kind, made, scale, backend, QUIET)) for kind in TEMPERATURES}
    assert found["cold"] < entropy(made) < found["hot"]


# The command


def ask(folder: Path, *more: str) -> int:
    return cli.run(["experiment", "hybrid", "--output", str(folder), "--hardware.backend", "torch", *more])


def test_an_experiment_is_run_resumed_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnf_align.experiments import cells

    count = 0
    original = cells.run

    def killed_at_the_sixth(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(cells, "run", killed_at_the_sixth)
    assert ask(tmp_path, "--seeds", "1") == 1
    assert "--resume goes on" in capsys.readouterr().err
    assert len(list((tmp_path / "cells").glob("*.json"))) == 5
    assert ask(tmp_path, "--seeds", "1") == 2
    assert "pass --resume" in capsys.readouterr().err
    assert ask(tmp_path, "--seeds", "2", "--resume") == 2
    assert "seeds: 1 → 2" in capsys.readouterr().err
    assert ask(tmp_path, "--seeds", "1", "--resume") == 0
    assert count == 13  # 2 starts, 5 rates, 5 cells, and the one that was killed
    folder = tmp_path / "hybrid"
    assert {p.name for p in folder.iterdir()} == {"settings.json", "results.json", "table.md", "result.png"}
    before = (folder / "results.json").read_bytes()
    assert ask(tmp_path, "--seeds", "1", "--resume") == 0
    assert count == 13 and (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stabilty"], "did you mean stability?"),
        (["stability", "--jobs", "0"], "expected an integer of at least 1"),
        (["stability", "--scale", "huge"], "expected didactic or smollm2 or gsm8k"),
        (["stability", "--scale", "gsm8k"], "stability is run at didactic or smollm2"),
        (["solutions", "--scale", "smollm2"], "solutions is run at gsm8k"),
        (["stability", "--methods", "BNF,PPO"], "methods has 'PPO': stability compares BNF, DPO,"),
        (["stability", "--methods", "DPO,KTO"], "methods lacks BNF, which stability compares the others with"),
        (["solutions"], "solutions needs the file of https://github.com/openai/grade-school-math"),
        (["solutions", "--solutions", "none.jsonl"], "solutions none.jsonl: no such file"),
        (["stability", "--solutions", "some.jsonl"], "scale didactic has word problems, expected no file"),
        (["stability", "--learning-rates", "fast"], "expected numbers above 0"),
        (["stability", "--hardware.device", "cuda"], "expected cpu and float32"),
    ],
)
def test_bad_settings(argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["experiment", *argv, "--output", str(tmp_path / "new")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


# Solutions of GSM8K


@pytest.fixture
def solutions(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up file, and the scale that is about it with LoRA on the tiny model."""
    small = replace(
        scales.SCALES["gsm8k"], steps=2, batch_size=4, learning_rates=(1e-3,), max_tokens=3, **SMALL | {"sentences": 0}
    )
    monkeypatch.setitem(scales.SCALES, "gsm8k", replace(small, model=lambda folder, backend, console: made))
    path = tmp_path / "example_model_solutions.jsonl"
    with path.open("w") as file:
        for i in range(80):
            right, wrong = ({"is_correct": ok, "solution": f"{i} + 3 = {i + 3 + (not ok)}"} for ok in (True, False))
            file.write(json.dumps({"question": f"{i} + 3 ?", "6b_finetuning": right, "175b_finetuning": wrong}) + "\n")
    return path


def test_preference_is_what_likelihoods_say(made: Path, solutions: Path) -> None:
    for changes in ({"objective": "dpo"}, {"objective": "kto", "mix": Mix(paired=0.0, chosen=0.25)}):
        found = run(cell(scale="gsm8k", learning_rate=0.1, **changes), made, "torch", Solutions.read(str(solutions)))
        chosen, rejected = (found["log_p_a_token"][kind] for kind in ("chosen", "rejected"))
        assert found["correct"] == [int(a > b) for a, b in zip(chosen, rejected, strict=True)] and len(chosen) == 4
        assert found["rows"] == 8 and len(found["others"]["word problems"]) == 2
        assert any(found["moved_chosen"]) and all(norm > 0 for norm in found["grad_norms"])


def test_references_computed_once_are_those_of_each_step(
    made: Path, solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnf_align.experiments import cells

    asked = cell(scale="gsm8k", learning_rate=0.1)
    once = run(asked, made, "torch", Solutions.read(str(solutions)))
    monkeypatch.setattr(cells, "before_training", lambda *args: None)
    each = run(asked, made, "torch", Solutions.read(str(solutions)))
    np.testing.assert_allclose(once["grad_norms"], each["grad_norms"], rtol=1e-3)
    np.testing.assert_allclose(once["moved_chosen"], each["moved_chosen"], atol=2e-3)


def test_solutions_are_compared_resumed_and_refused(
    tmp_path: Path, solutions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*more: str) -> tuple[int, str]:
        argv = ["solutions", "--output", str(tmp_path / "out"), "--hardware.backend", "torch", "--seeds", "1"]
        code = cli.run(["experiment", *argv, "--solutions", str(solutions), *more])
        return code, " ".join(capsys.readouterr().err.split())

    assert ask("--methods", "BNF,DPO")[0] == 0
    results = json.loads((tmp_path / "out" / "solutions" / "results.json").read_text())
    assert results["facts"]["methods"] == ["BNF", "DPO"] and results["facts"]["scale"] == "gsm8k"
    assert [(line["setting"], line["method"]) for line in results["lines"]] == [
        ("pairs", "BNF"),
        ("pairs", "DPO"),
        ("no pairs, 62% wrong", "BNF"),
    ]
    assert results["seen"].startswith("Of held-out pairs the right solution was the likelier one in")
    code, said = ask("--methods", "BNF", "--resume")
    assert code == 2 and "methods: ['BNF', 'DPO'] → ['BNF']" in said
    code, said = ask("--resume")
    assert code == 2 and "methods: ['BNF', 'DPO'] → None" in said
    lines = solutions.read_text().splitlines(keepends=True)
    solutions.write_text("".join(lines[1:]))
    code, said = ask("--methods", "BNF,DPO", "--resume")
    assert code == 2 and "solutions: SHA-256" in said
    solutions.write_text("".join(lines[:6]))
    code, said = ask("--output", str(tmp_path / "few"))
    assert code == 2 and "expected at least" in said


def test_the_experiments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["experiment"]) == 0
    assert "stability" in capsys.readouterr().out
