"""Learning rate and initial adapters: what every backend shares, against values worked by hand."""

import numpy as np
import pytest

from bnf_core.config import OptimizerConfig
from bnf_core.models.lora import initial_lora_a
from bnf_core.steps.schedule import learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533906, 0.5, 0.1464466094]),
    ],
)
def test_warmup_then_the_schedule(schedule: str, expected: list[float]) -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=2)
    assert [learning_rate(step, 6, config) / 2.0 for step in range(6)] == pytest.approx(expected)


def test_a_warmup_longer_than_the_run_never_reaches_the_peak() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    assert [learning_rate(step, 3, config) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_initial_adapters_depend_on_seed_and_module_alone() -> None:
    a = initial_lora_a("model.layers.0.self_attn.q_proj", 4, 64, seed=0)
    assert a.shape == (4, 64) and a.dtype == np.float32
    np.testing.assert_array_equal(a, initial_lora_a("model.layers.0.self_attn.q_proj", 4, 64, seed=0))
    assert not np.allclose(a, initial_lora_a("model.layers.1.self_attn.q_proj", 4, 64, seed=0))
    assert not np.allclose(a, initial_lora_a("model.layers.0.self_attn.q_proj", 4, 64, seed=1))


def test_initial_adapters_are_uniform_in_plus_minus_one_over_the_root_of_the_width() -> None:
    a = initial_lora_a("layer", 64, 256, seed=0) * 16
    assert -1 <= a.min() < -0.99 and 0.99 < a.max() <= 1
    assert abs(a.mean()) < 0.02 and abs(a.std() - 1 / np.sqrt(3)) < 0.01
