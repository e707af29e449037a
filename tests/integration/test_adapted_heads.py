"""An adapter on the head, and whatever else wraps or hooks it: the fused loss must not read the weight past it."""

# ruff: noqa: E402  (imports follow the checks that both frameworks are installed)

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from bnf_core import registry
from bnf_core.config import FineTuneType, LoraConfig, OptimizerConfig
from bnf_core.models.lora import initial_lora_a
from bnf_core.steps.batching import collate
from bnf_core.types import Array, Batch, Example

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
LORA = LoraConfig(rank=4, alpha=12, targets=["q_proj", "lm_head"])
ROWS = [Example((5, 6, 7), (8, 9, 10, 11), True), Example((5, 6), (12, 13), False)]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("untied") / "model", tie_word_embeddings=False)


def batch_with_reference(engine: Any) -> tuple[Batch, Array]:
    """A reference now above the policy, now below it."""
    batch = collate(ROWS, len(ROWS))
    log_odds = engine.evaluate(batch, np.zeros(len(batch.targets), np.float32)).log_odds
    return batch, log_odds + np.sin(batch.targets).astype(np.float32)


def gradients(name: str, model: Path, kind: FineTuneType, lora: LoraConfig) -> dict[str, Array]:
    """Of one step, by path; whatever the backend appends to a path is left off."""
    engine: Any = registry.get(name).load(model, device="cpu", fine_tune_type=kind, lora=lora, optimizer=OPTIMIZER)
    batch, reference = batch_with_reference(engine)
    if name == "mlx":
        return {path: np.array(g) for path, g in engine.micro_step(batch, reference)[2].items()}
    engine.accumulate([(batch, reference)], None)
    return {path.replace("base_model.model.", ""): p.grad.numpy() for path, p in engine.trainable.items()}


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head"]])
def test_an_adapter_on_the_head_gets_its_gradient(untied: Path, backend_name: str, targets: list[str]) -> None:
    """B = 0 hides it from any comparison of logits. The truth is the whole head's gradient G, from training all
    weights: that of B is scale · G Aᵀ. Rejects a fused head that reads the weight past the adapter."""
    lora = replace(LORA, targets=targets)
    found = gradients(backend_name, untied, "lora", lora)
    whole = gradients(backend_name, untied, "full", lora)["lm_head.weight"]  # (V, D)
    b = next(g if backend_name == "torch" else g.T for path, g in found.items() if "lm_head.lora_b" in path.lower())
    a = initial_lora_a("lm_head", lora.rank, whole.shape[1], seed=0)
    expected = lora.scale * whole @ a.T
    np.testing.assert_allclose(b, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3


def test_it_is_trained_saved_and_read_again(untied: Path, backend_name: str, tmp_path: Path) -> None:
    backend = registry.get(backend_name)
    engine = backend.load(untied, device="cpu", fine_tune_type="lora", lora=LORA, optimizer=OPTIMIZER)
    batch, reference = batch_with_reference(engine)
    before = engine.reference_log_odds(batch)
    for _ in range(3):
        engine.step([(batch, reference)], 1e-2, None)
    engine.save(tmp_path / "adapter")
    after = engine.evaluate(batch, reference).log_odds
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_array_equal(engine.reference_log_odds(batch), before)
    again = backend.load(untied, device="cpu", adapter=tmp_path / "adapter")
    np.testing.assert_allclose(again.evaluate(batch, reference).log_odds, after, atol=1e-5)


def hooked(head: Any) -> None:
    head.register_forward_hook(lambda _, __, output: output * 1)


def hooked_before(head: Any) -> None:
    head.register_forward_pre_hook(lambda _, inputs: inputs)


def replaced(head: Any) -> None:
    whole = head.forward
    head.forward = lambda x: whole(x)


def parametrized(head: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(head, "weight", torch.nn.Identity())


def moved(head: Any) -> None:
    """As accelerate does where it puts a model on a device."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(head, AlignDevicesHook("cpu"))


@pytest.mark.parametrize(
    ("change", "fused"),
    [(None, True), (hooked, False), (hooked_before, False), (replaced, False), (parametrized, False), (moved, True)],
)
def test_a_head_that_may_become_more_than_its_weight_is_not_fused(tiny_model: Path, change: Any, fused: bool) -> None:
    """Each is the identity as yet, so that comparing logits would not tell."""
    from bnf_torch.model import load_model
    from bnf_torch.probes import head_transform

    model = load_model(tiny_model, torch.device("cpu"), torch.float32)
    if change is not None:
        change(model.get_output_embeddings())
    assert (head_transform(model) is not None) == fused
