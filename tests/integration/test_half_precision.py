"""LoRA gradients in half precision, against float32: as near at small coefficients as at large ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from bnf_core import registry
from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.processes import ALONE
from bnf_core.steps.batching import collate
from bnf_core.steps.scaling import SMALLER, loss_scales
from bnf_core.types import Array, Batch, Example
from conftest import slow

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, epsilon=1.0, warmup_steps=0, schedule="constant")
BOUNDS = {"float16": 1e-2, "bfloat16": 4e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With weights of usual size, or gradients would be large enough for any format."""
    folder = tmp_path_factory.mktemp("usual") / "model"
    return tiny.make_model(folder, initializer_range=0.02, hidden_size=64, intermediate_size=128)


def rows(sequences: int) -> tuple[Batch, Array]:
    draw = np.random.default_rng(0)
    examples = [Example((5, 6, 7), tuple(draw.integers(1, 300, 40).tolist()), bool(i % 2)) for i in range(4)]
    batch = collate(examples, sequences)
    return batch, np.full(len(batch.targets), -5.0, np.float32)


def engine_in(name: str, model: Path, dtype: str) -> Any:
    lora = LoraConfig(rank=4, alpha=8)
    return registry.get(name).load(
        model, device="cpu", dtype=dtype, fine_tune_type="lora", lora=lora, optimizer=OPTIMIZER
    )


def update(name: str, model: Path, dtype: str, sequences: int) -> tuple[Array, float]:
    """What one step moves, which with epsilon 1 is in proportion to the gradient, and the gradient's norm."""
    engine = engine_in(name, model, dtype)
    before = dict(engine.state())
    _, norm = engine.step([rows(sequences)], 1.0, None)
    after = dict(engine.state())
    names = sorted(key for key in after if key.startswith("weights/"))
    return np.concatenate([(after[key] - before[key]).ravel() for key in names]), norm


@pytest.mark.parametrize("sequences", [slow(4), slow(512), 32768])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_small_coefficients_cost_nothing(model: Path, backend_name: str, dtype: str, sequences: int) -> None:
    """Coefficients of 6e-3, 5e-5 and 8e-7. Rejects float16 without loss scaling, or with gradients left scaled."""
    expected, expected_norm = update(backend_name, model, "float32", sequences)
    found, norm = update(backend_name, model, dtype, sequences)
    assert np.linalg.norm(found - expected) <= BOUNDS[dtype] * np.linalg.norm(expected)
    assert norm == pytest.approx(expected_norm, rel=BOUNDS[dtype])


def test_a_scale_that_is_too_large_gives_way(model: Path, backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To one at which no gradient is infinite; the step is taken."""
    expected, _ = update(backend_name, model, "float32", 4)
    engine_module = __import__(f"bnf_{backend_name}.engine", fromlist=["loss_scales"])
    tried: list[float] = []

    def scales(*arguments: Any) -> Any:
        for scale in loss_scales(*arguments):
            tried.append(scale)
            yield scale if len(tried) > 1 else 2.0**40

    monkeypatch.setattr(engine_module, "loss_scales", scales)
    found, norm = update(backend_name, model, "float16", 4)
    assert len(tried) == 2 and np.isfinite(norm)
    assert np.linalg.norm(found - expected) <= BOUNDS["float16"] * np.linalg.norm(expected)


def test_the_scales() -> None:
    batch, reference = rows(512)  # coefficients of 1 / 20480
    first, second, _ = loss_scales("float16", [(batch, reference)], ALONE)
    assert first == 2.0**14 and second == first * SMALLER
    assert list(loss_scales("bfloat16", [(batch, reference)], ALONE)) == [1.0]
    assert next(iter(loss_scales("float16", [], ALONE))) == 1.0
