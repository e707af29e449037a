"""Layers that two processes compute between them, alone or beside FSDP2's shards: the steps of one process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from test_shards import together
from test_torch_distributed import require_same_steps, steps, trained

import shards_worker
import tiny
import torch_worker

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
CASES: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora"},
    "full": {"type": "full", "packing": True, "gradient_checkpointing": True},
}


SIZES: dict[str, Any] = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Tied, and with norms of heads, of which each process has some."""
    from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
    from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
    from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    made = {
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, **heads, tie_word_embeddings=False)),
        "experts": Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **heads, num_experts=2, moe_intermediate_size=16)),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=304, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
        ),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    odd = tiny.make_model(folder / "odd", num_key_value_heads=1)
    return {"llama": tiny_model, "odd": odd} | {name: folder / name for name in made}


def require_same_trained(alone: Path, together: Path) -> None:
    one, several = trained(alone), trained(together)
    assert one.keys() == several.keys()
    difference = np.concatenate([(several[key] - one[key]).ravel() for key in one])
    # Where a gradient is all but zero, Adam divides its round-off by itself.
    assert np.abs(difference).max() < torch_worker.OPTIMIZER.learning_rate * 0.1
    assert abs(difference.mean()) < 1e-6 and np.abs(difference).mean() < 2e-6


def test_two_processes_compute_every_layer_together(models: dict[str, Path], tmp_path: Path) -> None:
    """Rejects norms of heads whose gradient is of one process's heads alone. What cannot be split every process says by
    name, before anything is trained."""
    case = {"type": "full", "steps": 1}
    torch_worker.train(models["qwen3"], case, tmp_path / "alone")
    refused = {name: (str(models[name]), "lora") for name in ("odd", "experts", "gpt2")}
    refused["dora"] = (str(models["llama"]), "dora")
    folder = tmp_path / "together"
    together(shards_worker.splitting, models["qwen3"], case, refused, folder=folder, count=2, tp_size=2)
    require_same_steps(steps(tmp_path / "alone"), steps(folder), 2e-5)
    require_same_trained(tmp_path / "alone", folder)
    for rank in range(2):
        said = json.loads((folder / f"said-{rank}.json").read_text())
        assert "num_key_value_heads is 1, which 2 processes do not divide" in said["odd"]
        assert "model.layers.*.mlp.experts" in said["experts"] and "only plain linear layers are" in said["experts"]
        assert "transformers has no plan for GPT2LMHeadModel" in said["gpt2"]
        assert "DoRA needs the norms of whole rows" in said["dora"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("llama", 2), ("qwen3", 4)])
def test_layers_in_parts_take_the_steps_of_one_process(
    models: dict[str, Path], tmp_path: Path, name: str, count: int
) -> None:
    """Two processes, or two times two in shards. Rejects gradients of a split layer's inputs, of heads' norms or of a
    replicated adapter that are not summed; micro-batches that are dealt to all processes; a checkpoint that has a part
    of a layer twice, or not at all."""
    for case in CASES:
        torch_worker.train(models[name], CASES[case], tmp_path / "alone" / case)
    half = torch_worker.STEPS // 2
    torch_worker.train(models[name], CASES["full"] | {"steps": half}, tmp_path / "first half")
    cases = CASES | {"resumed": CASES["full"] | {"resume": str(tmp_path / "first half" / "checkpoints")}}
    folder = tmp_path / "together"
    sizes = {"tp_size": 2, "dp_shard_size": count // 2}
    together(shards_worker.training, models[name], cases, None, folder=folder, count=count, **sizes)
    for case in CASES:
        require_same_steps(steps(tmp_path / "alone" / case), steps(folder / case), 2e-5)
        require_same_trained(tmp_path / "alone" / case, folder / case)
    whole = steps(tmp_path / "alone" / "full")
    require_same_steps(whole[half:], steps(folder / "resumed"), 2e-5)
    for case in CASES:
        again = CASES[case] | {"resume": str(folder / case / "checkpoints"), "steps": torch_worker.STEPS + 1}
        torch_worker.train(models[name], again, tmp_path / "again" / case)
        assert len(steps(tmp_path / "again" / case)) == 1
