"""The load-balancing loss of routers: transformers' own, over the whole step, however that is cut."""

# ruff: noqa: E402  (imports follow the check that PyTorch is installed)

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bnf_core import registry
from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.errors import UserError
from bnf_core.steps.batching import MicroBatching, collate, micro_batches
from bnf_core.types import Batch, Example
from bnf_torch.backend import TorchBackend
from bnf_torch.engine import TorchEngine

COEFFICIENT = 0.5
WHOLE = MicroBatching(8, group_by_length=False)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixtral, whose routers send tokens to every expert and to some of them more often."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes["initializer_range"] = 0.4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](**sizes))
    folder = tmp_path_factory.mktemp("routing") / "mixtral"
    model.save_pretrained(folder)
    return folder


def rows() -> list[Example]:
    """Of different lengths, in pairs that share a prompt."""
    draw = np.random.default_rng(1)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.integers(1, 64, draw.integers(1, most)).tolist())

    prompts = [ids(8) for _ in range(4)]
    return [Example(prompts[i // 2], ids(12), i % 2 == 0, i // 2) for i in range(8)]


def load(model: Path, **options: Any) -> TorchEngine:
    settings: dict[str, Any] = {"fine_tune_type": "full", "lora": LoraConfig(), "optimizer": OptimizerConfig()}
    engine = TorchBackend().load(model, device="cpu", dtype="float32", **settings | options)
    assert isinstance(engine, TorchEngine)
    return engine


def accumulated(engine: TorchEngine, parts: list[Batch]) -> tuple[float, dict[str, Any]]:
    """The loss of a step and its gradients, which are dropped again."""
    assert engine.optimizer is not None
    loss, _, _ = engine.accumulate([(part, np.full(len(part.targets), -3, np.float32)) for part in parts], None)
    found = {name: p.grad.numpy().copy() for name, p in engine.trainable.items() if p.grad is not None}
    engine.optimizer.torch.zero_grad()
    return loss, found


def routers_part(model: Path, parts: list[Batch], **options: Any) -> tuple[float, dict[str, Any]]:
    """What the loss of the routers adds to a step's loss and gradients."""
    loss, gradients = accumulated(load(model, router_aux_loss=COEFFICIENT, **options), parts)
    without, others = accumulated(load(model, **options), parts)
    return loss - without, {name: gradients[name] - others[name] for name in gradients}


def largest_difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    scale = max(np.abs(value).max() for value in expected.values())
    return float(max(np.abs(found[name] - expected[name]).max() for name in expected) / scale)


def test_it_is_the_loss_that_transformers_computes(mixture: Path) -> None:
    """Value and gradient, padding left out. Rejects padding that is routed, and a coefficient that is lost."""
    batch = collate(rows(), 8)
    assert (batch.uses == 0).any() and batch.uses.max() == 1
    model = AutoModelForCausalLM.from_pretrained(mixture)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.uses}
    tensors = {name: torch.from_numpy(array).long() for name, array in given.items()}
    own = model(**tensors, output_router_logits=True).aux_loss
    (COEFFICIENT * own).backward()
    loss, gradients = routers_part(mixture, [batch])
    assert loss == pytest.approx(COEFFICIENT * own.item(), abs=1e-6)
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name in theirs if "gate" in name}
    assert largest_difference(gradients, theirs) < 1e-5


CUTS = {
    "one by one": MicroBatching(1, group_by_length=False),
    "threes": MicroBatching(3),
    "packed": MicroBatching(2, pack_to=24),
    "shared": MicroBatching(4, share_prompts=True),
    "processes": MicroBatching(2, multiple_of=3),  # some of which have nothing
}


@pytest.mark.parametrize("name", CUTS)
def test_it_is_that_of_the_whole_step_however_that_is_cut(mixture: Path, name: str) -> None:
    """Rejects experts that are counted in each micro-batch alone, and a shared prompt that counts once."""
    parts = micro_batches(rows(), CUTS[name])
    assert len(parts) > 1
    expected_loss, expected = accumulated(load(mixture, router_aux_loss=COEFFICIENT), micro_batches(rows(), WHOLE))
    engine = load(mixture, router_aux_loss=COEFFICIENT)
    loss, found = accumulated(engine, parts)
    assert loss == pytest.approx(expected_loss, abs=2e-6)
    assert largest_difference(found, expected) < 1e-5
    engine._routing = lambda batches: [  # type: ignore[method-assign]  # the mistake, once
        {"uses": torch.from_numpy(batch.uses).long()} for batch in batches
    ]
    if name != "processes":  # where nothing is routed nothing can be counted
        assert largest_difference(accumulated(engine, parts)[1], expected) > 1e-2


def test_gradient_checkpointing_and_adapters_change_nothing_of_it(mixture: Path) -> None:
    parts = micro_batches(rows(), MicroBatching(3))
    for kind in ("full", "lora"):
        plain, checkpointed = (
            routers_part(mixture, parts, fine_tune_type=kind, gradient_checkpointing=on) for on in (False, True)
        )
        assert plain[0] == checkpointed[0] > 0
        assert any(np.abs(value).max() > 0 for value in plain[1].values())
        assert all(np.array_equal(plain[1][name], checkpointed[1][name]) for name in plain[1])


def test_the_rest_of_a_step_is_as_without_it(mixture: Path) -> None:
    """What the policy says of tokens, the reference, and a step that sets the coefficient to zero."""
    batch = collate(rows(), 8)
    zeros = np.zeros(len(batch.targets), np.float32)
    with_it, without = load(mixture, router_aux_loss=COEFFICIENT), load(mixture)
    for engine in (with_it, without):
        engine.accumulate([(batch, zeros)], None)
    assert np.array_equal(with_it.evaluate(batch, zeros).log_odds, without.evaluate(batch, zeros).log_odds)
    assert not without.scored.balances


def test_a_model_without_such_routers_is_refused(tiny_model: Path, backend_name: str) -> None:
    message = "LlamaForCausalLM has no routers" if backend_name == "torch" else "use --backend torch"
    with pytest.raises(UserError, match=message):
        registry.get(backend_name).load(tiny_model, device="cpu", router_aux_loss=0.01)
