"""Layers that two processes compute between them, alone or beside FSDP2's shards: the same steps as one process takes."""

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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Tied, and with norms of heads, of which each process has some."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=304, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    tiny.make_tokenizer(folder / "qwen3")
    Qwen3ForCausalLM(config).save_pretrained(folder / "qwen3")
    return {"llama": tiny_model, "qwen3": folder / "qwen3"}


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
        one, several = trained(tmp_path / "alone" / case), trained(folder / case)
        assert one.keys() == several.keys()
        difference = np.concatenate([(several[key] - one[key]).ravel() for key in one])
        assert np.abs(difference).max() < torch_worker.OPTIMIZER.learning_rate * 0.1
        assert abs(difference.mean()) < 1e-6 and np.abs(difference).mean() < 2e-6
    whole = steps(tmp_path / "alone" / "full")
    require_same_steps(whole[half:], steps(folder / "resumed"), 2e-5)
    for case in CASES:
        again = CASES[case] | {"resume": str(folder / case / "checkpoints"), "steps": torch_worker.STEPS + 1}
        torch_worker.train(models[name], again, tmp_path / "again" / case)
        assert len(steps(tmp_path / "again" / case)) == 1
