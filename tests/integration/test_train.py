"""The training loop on a tiny model, on each backend, and the two backends against each other."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

import forked
from bnf_align import cli
from bnf_align.commands.train import RunResult, train
from bnf_core import registry
from bnf_core.config import DataConfig, HardwareConfig, LoraConfig, OptimizerConfig, TrainConfig
from bnf_core.errors import TrainingStopped, UserError
from bnf_core.storage.checkpoints import Checkpoints
from bnf_core.types import Array, Batch
from conftest import fast_on

QUIET = Console(quiet=True)


def config(model: Path, data: Path, output: Path, backend: str, **overrides: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "hardware": HardwareConfig(backend=backend, device="cpu", dtype="float32"),
        "lora": LoraConfig(rank=4, alpha=8),
        # A large epsilon: AdamW otherwise turns the round-off of a vanishing gradient into a whole step.
        "optimizer": OptimizerConfig(learning_rate=5e-3, warmup_steps=2, epsilon=1e-5),
        "batch_size": 5,  # 12 rows: the last batch of an epoch is short
        "epochs": 2,
        "valid": str(data),
    }
    return TrainConfig(model=str(model), data=DataConfig(str(data)), output=str(output), **(settings | overrides))


def lines(result: RunResult, kind: str) -> list[dict[str, Any]]:
    logged = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in logged if line["kind"] == kind]


def adapter_weights(folder: Path) -> dict[str, np.ndarray]:
    """LoRA matrices by module, as (A (r, in), B (out, r)), from either backend's file."""
    result = {}
    for file in folder.glob("*.safetensors"):
        for name, value in load_file(file).items():
            module, _, part = name.removesuffix(".weight").removeprefix("base_model.model.").rpartition(".")
            mlx = part in ("lora_a", "lora_b")
            result[f"{module}.{part.lower()}"] = value.T if mlx else value
    return result


@fast_on("torch")
@pytest.mark.usefixtures("drawn")
def test_training_moves_good_rows_up_and_bad_rows_down(
    tiny_model: Path, feedback: Path, tmp_path: Path, backend_name: str
) -> None:
    result = train(config(tiny_model, feedback, tmp_path / "run", backend_name, epochs=6), QUIET)
    assert result.before is not None and result.after is not None
    assert result.before["log_odds_shift/chosen"] == result.before["log_odds_shift/rejected"] == 0.0
    assert result.after["log_odds_shift/chosen"] > 0.5
    assert result.after["log_odds_shift/rejected"] < -0.5
    assert result.after["preference_accuracy"] >= result.before["preference_accuracy"]
    assert result.picture.stat().st_size > 0
    steps = lines(result, "train")
    assert [line["step"] for line in steps] == list(range(1, 19))
    assert sum(line["tokens"] for line in steps) == 6 * result.before["tokens"]  # every row, every epoch
    assert (result.folder / "config.yaml").read_text().startswith("model:")
    text = (result.trained / "README.md").read_text()
    assert text.startswith("---\n") and "LoRA adapter of rank 4" in text and "objective `bnf`" in text
    assert f"| `log_odds_shift/chosen` | 0.0000 | {result.after['log_odds_shift/chosen']:.4f} |" in text
    facts = Checkpoints(result.folder / "checkpoints", 1).newest()[0].facts
    assert facts["training rows"] in text and "epochs: 6" in text


@fast_on("mlx")
def test_the_cut_into_micro_batches_does_not_matter(
    tiny_model: Path, feedback: Path, tmp_path: Path, backend_name: str
) -> None:
    runs = [
        train(config(tiny_model, feedback, tmp_path / str(size), backend_name, micro_batch_size=size), QUIET)
        for size in (1, 3, 5)
    ]
    losses = [[line["loss"] for line in lines(run, "train")] for run in runs]
    assert np.ptp(losses, axis=0).max() < 2e-6
    weights = [adapter_weights(run.trained) for run in runs]
    for name, value in weights[0].items():
        for other in weights[1:]:
            np.testing.assert_allclose(other[name], value, atol=2e-5, err_msg=name)


def test_both_backends_take_the_same_road(tiny_model: Path, feedback: Path, tmp_path: Path) -> None:
    for name in ("torch", "mlx"):
        if registry.missing(name):
            pytest.skip(f"{name} is not installed")
    torch_run, mlx_run = (
        train(config(tiny_model, feedback, tmp_path / name, name), QUIET) for name in ("torch", "mlx")
    )
    a, b = lines(torch_run, "train"), lines(mlx_run, "train")
    assert b[0]["loss"] == pytest.approx(a[0]["loss"], rel=1e-5)
    assert b[0]["grad_norm"] == pytest.approx(a[0]["grad_norm"], rel=1e-4)
    for step_a, step_b in zip(a, b, strict=True):
        assert step_b["loss"] == pytest.approx(step_a["loss"], rel=1e-4, abs=1e-5)
        assert step_b["learning_rate"] == step_a["learning_rate"]
    weights_a, weights_b = adapter_weights(torch_run.trained), adapter_weights(mlx_run.trained)
    assert weights_a.keys() == weights_b.keys()
    for name, value in weights_a.items():
        np.testing.assert_allclose(weights_b[name], value, atol=5e-4, err_msg=name)


@fast_on("mlx")
def test_a_saved_adapter_scores_as_the_trained_one(
    tiny_model: Path, feedback: Path, tmp_path: Path, backend_name: str
) -> None:
    from bnf_align.commands.evaluate import evaluate
    from bnf_core.config import EvaluateConfig

    run = train(config(tiny_model, feedback, tmp_path / "run", backend_name), QUIET)
    hardware = HardwareConfig(backend=backend_name, device="cpu", dtype="float32")
    scored = evaluate(
        EvaluateConfig(str(tiny_model), DataConfig(str(feedback)), adapter=str(run.trained), hardware=hardware), QUIET
    )
    assert run.after is not None
    for name, value in run.after.items():
        assert scored[name] == pytest.approx(value, abs=1e-5), name


@fast_on("torch")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_adapter(
    tiny_model: Path, feedback: Path, tmp_path: Path, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bnf_align.commands.train as module

    class Poisoned(module.ReferenceCache):
        asked = 0

        def __call__(self, batch: Batch) -> Array:
            Poisoned.asked += 1
            values = super().__call__(batch)
            return values * np.float32("nan") if Poisoned.asked == 3 else values

    constant = {"optimizer": OptimizerConfig(learning_rate=5e-3, schedule="constant", warmup_steps=0), "valid": None}
    good = train(config(tiny_model, feedback, tmp_path / "good", backend_name, max_steps=2, **constant), QUIET)
    monkeypatch.setattr(module, "ReferenceCache", Poisoned)
    with pytest.raises(TrainingStopped, match=r"step 3: the loss is not finite.*feedback\.jsonl:\d+"):
        train(config(tiny_model, feedback, tmp_path / "run", backend_name, **constant), QUIET)
    kept, expected = adapter_weights(tmp_path / "run" / "adapter"), adapter_weights(good.trained)
    assert kept.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(kept[name], value)


def test_a_finished_run_is_not_overwritten_unless_asked(tiny_model: Path, feedback: Path, tmp_path: Path) -> None:
    settings = config(tiny_model, feedback, tmp_path / "run", "torch", max_steps=1)
    before = train(settings, QUIET).trained / "adapter_model.safetensors"
    content = before.read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        train(settings, QUIET)
    assert before.read_bytes() == content
    settings.overwrite = True
    train(settings, QUIET)


def test_an_interrupt_saves_the_adapter(tiny_model: Path, feedback: Path, tmp_path: Path) -> None:
    words = ["train", "--model", str(tiny_model), "--data", str(feedback), "--output", str(tmp_path / "run")]
    words += ["--backend", "torch", "--device", "cpu", "--epochs", "100000"]
    process = forked.start(cli.run, words, output=tmp_path / "said")
    metrics, said = tmp_path / "run" / "metrics.jsonl", tmp_path / "said"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.is_alive() and time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)
    process.terminate()
    assert forked.ended(process) == 1
    assert "interrupted after step" in said.read_text() and "Traceback" not in said.read_text()
    assert adapter_weights(tmp_path / "run" / "adapter")
