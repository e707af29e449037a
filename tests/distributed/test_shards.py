"""A model that lies in shards among four processes from the start, once or in two replicas of two shards: the same as
one process has, in a quarter of the memory."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import slow

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from test_torch_distributed import require_same_steps, steps, trained

import forked
import shards_worker
import tiny
import torch_worker
from bnf_core.storage.tensors import TensorWriter
from invariance import free_ports

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
COUNT = 4
CASES: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora"},
    "full": {"type": "full", "packing": True, "gradient_checkpointing": True},
}


def together(
    target: Callable[..., None], *args: Any, folder: Path, count: int = COUNT, shards: bool = True, **sizes: int
) -> None:
    """On all processes, which must end well.

    Args:
        shards: by FSDP2, or else by DDP.
        sizes: of accelerate's `parallelism_config`, such as tp_size.
    """
    port = str(free_ports(1)[0])
    shared = {f"PARALLELISM_CONFIG_{name.upper()}": str(size) for name, size in sizes.items()}
    shared |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"} if sizes else {}
    shared |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    shared |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if shards else {}
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"output-{rank}" for rank in range(count)]
    started = [
        forked.start(target, *args, folder, environment=shared | {"RANK": str(i), "LOCAL_RANK": str(i)}, output=output)
        for i, output in enumerate(outputs)
    ]
    codes = [forked.ended(process, 900) for process in started]
    assert codes == [0] * count, "\n".join(output.read_text()[-3000:] for output in outputs)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, str]:
    """Tied and not, of matrices that lie the other way round, of experts that transformers joins in loading, and
    packed by MLX."""
    from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
    from transformers.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeForCausalLM

    folder = tmp_path_factory.mktemp("models")
    made = {"llama": tiny_model, "untied": tiny.make_model(folder / "untied", tie_word_embeddings=False)}
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=304, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    sizes = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    for count in (6, 8):
        config = Qwen2MoeConfig(
            **sizes, num_experts=count, moe_intermediate_size=16, shared_expert_intermediate_size=16
        )
        made[f"{count} experts"] = folder / str(count)
        Qwen2MoeForCausalLM(config).save_pretrained(folder / str(count))
    made["gpt2"] = folder / "gpt2"
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    if find_spec("mlx_lm"):
        from test_quantization import quantised

        wide = tiny.make_model(folder / "wide", hidden_size=64, intermediate_size=128)
        made["packed"] = quantised(wide, folder / "packed", q_bits=4)
    return {name: str(path) for name, path in made.items()}


LOADED = [("llama", "full", "float32", 1)]
LOADED_TOO = [
    ("gpt2", "dora", "float32", 1),
    ("untied", "lora", "bfloat16", 1),
    ("8 experts", "full", "bfloat16", 1),
    ("llama", "dora", "float32", 2),
    ("packed", "lora", "float32", 1),
]


@pytest.mark.parametrize("cases", [LOADED, slow(LOADED_TOO)], ids=["one", "others"])
def test_a_model_in_shards_is_the_model(models: dict[str, str], cases: list[Any], tmp_path: Path) -> None:
    """The fast: all weights. Slow: matrices that lie the other way round, adapters, experts, quantised ones."""
    known: list[shards_worker.Case] = [(models[name], *rest) for name, *rest in cases if name in models]
    together(shards_worker.loading, known, folder=tmp_path)


def test_what_one_process_cannot_load_none_waits_for(models: dict[str, str], tmp_path: Path) -> None:
    together(shards_worker.refusals, models["6 experts"], models["llama"], folder=tmp_path)
    for rank in range(COUNT):
        experts, unseen = json.loads((tmp_path / f"said-{rank}.json").read_text())
        assert "6 experts" in experts and "in 4 shards leave a process without any" in experts
        assert "llama-elsewhere" in unseen or "model-elsewhere" in unseen, unseen


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_replicas_of_shards_take_the_steps_of_one_process(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """Two replicas of two shards. Rejects gradients that are not summed over replicas, or summed twice; a checkpoint
    with rows of both replicas, or of neither."""
    case = CASES[name]
    torch_worker.train(tiny_model, case, tmp_path / "alone")
    together(shards_worker.training, tiny_model, {name: case}, 2, folder=tmp_path / "four")
    require_same_steps(steps(tmp_path / "alone"), steps(tmp_path / "four" / name), 2e-5)
    require_same_weights(tmp_path / "alone", tmp_path / "four" / name)
    again = case | {"resume": str(tmp_path / "four" / name / "checkpoints"), "steps": torch_worker.STEPS + 1}
    torch_worker.train(tiny_model, again, tmp_path / "again")
    assert len(steps(tmp_path / "again")) == 1


def require_same_weights(alone: Path, others: Path) -> None:
    one, several = trained(alone), trained(others)
    assert one.keys() == several.keys()
    difference = np.concatenate([(several[key] - one[key]).ravel() for key in one])
    assert np.abs(difference).max() < torch_worker.OPTIMIZER.learning_rate * 0.1
    assert abs(difference.mean()) < 1e-6 and np.abs(difference).mean() < 2e-6


@pytest.mark.slow
def test_replicas_of_shards_resume_what_one_process_began(tiny_model: Path, tmp_path: Path) -> None:
    case, half = CASES["full"], torch_worker.STEPS // 2
    torch_worker.train(tiny_model, case, tmp_path / "alone")
    torch_worker.train(tiny_model, case | {"steps": half}, tmp_path / "first half")
    resumed = case | {"resume": str(tmp_path / "first half" / "checkpoints")}
    together(shards_worker.training, tiny_model, {"resumed": resumed}, 2, folder=tmp_path / "four")
    require_same_steps(steps(tmp_path / "alone")[half:], steps(tmp_path / "four" / "resumed"), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True], ids=["ddp", "fsdp"])
def test_4_bit_weights_take_the_steps_of_one_process(shards: bool, tiny_model: Path, tmp_path: Path) -> None:
    """LoRA on them, with gradient checkpointing as QLoRA has it. Rejects packed weights that FSDP2 casts or cuts within
    a block, and scales that do not go with them."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    case = {"type": "lora", "gradient_checkpointing": True, "dtype": "float32"}
    together(shards_worker.training_in_4bit, tiny_model, case, folder=tmp_path / "one", count=1, shards=False)
    together(shards_worker.training_in_4bit, tiny_model, case, folder=tmp_path / "two", count=2, shards=shards)
    torch_worker.train(tiny_model, case, tmp_path / "whole")
    one, whole = steps(tmp_path / "one"), steps(tmp_path / "whole")
    assert abs(one[0]["norm"] / whole[0]["norm"] - 1) > 1e-3, "the weights are quantised"
    require_same_steps(one, steps(tmp_path / "two"), 2e-5)
    require_same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True], ids=["ddp", "fsdp"])
def test_traced_layers_take_the_steps_of_one_process(shards: bool, tiny_model: Path, tmp_path: Path) -> None:
    """One that runs them as they are written. Rejects layers that are traced with what shards them, or instead."""
    case = {"type": "lora", "gradient_checkpointing": True}
    torch_worker.train(tiny_model, case, tmp_path / "one")
    together(shards_worker.training_traced, tiny_model, case, folder=tmp_path / "two", count=2, shards=shards)
    require_same_steps(steps(tmp_path / "one"), steps(tmp_path / "two"), 2e-5)
    require_same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("coefficient", [0.0, 0.5], ids=["off", "on"])
def test_routers_take_the_steps_of_one_process(
    shards: bool, coefficient: float, models: dict[str, str], tmp_path: Path
) -> None:
    """All weights of a mixture of experts, with the load-balancing loss over the whole step and without. Rejects
    experts that are counted on one process alone, and a loss that is added by each of them whole."""
    mixture = Path(models["8 experts"])
    case = {"type": "full", "router_aux_loss": coefficient}
    torch_worker.train(mixture, case, tmp_path / "one")
    if coefficient:
        torch_worker.train(mixture, case | {"router_aux_loss": 0.0}, tmp_path / "without")
        norms = [steps(tmp_path / name)[0]["norm"] for name in ("one", "without")]
        assert abs(norms[0] / norms[1] - 1) > 1e-3, "the routers' loss has its part in the gradient"
    together(shards_worker.training, mixture, {"two": case}, None, folder=tmp_path, count=2, shards=shards)
    require_same_steps(steps(tmp_path / "one"), steps(tmp_path / "two"), 2e-5)
    require_same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_the_trainer_reads_its_shard(tiny_model: Path, tmp_path: Path) -> None:
    """BNFTrainer on two processes takes the steps of one, and neither has the whole model. Rejects an adapter that is
    drawn otherwise in shards."""
    (tmp_path / "alone").mkdir()
    shards_worker.trainer(tiny_model, tmp_path / "alone")
    together(shards_worker.trainer, tiny_model, folder=tmp_path / "two", count=2)
    one, two = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("alone", "two"))
    for name in ("full", "lora"):
        assert len(one[name]) == 2 and abs(one[name][1] - one[name][0]) > 1e-3, "it has learned something"
        assert two[name] == pytest.approx(one[name], rel=2e-5)


LAYERS, HIDDEN, INNER, VOCABULARY = 20, 1024, 4096, 1000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 1.3 GB in float32; one layer's random weights in all of its layers."""
    from transformers.models.llama import LlamaConfig

    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    draw = np.random.default_rng(0)
    square = (HIDDEN, HIDDEN)
    layer = {f"self_attn.{name}_proj.weight": square for name in "qkvo"}
    layer |= {"mlp.gate_proj.weight": (INNER, HIDDEN), "mlp.up_proj.weight": (INNER, HIDDEN)}
    layer |= {"mlp.down_proj.weight": (HIDDEN, INNER)}
    norms = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    one = {name: draw.standard_normal(shape, np.float32) / 32 for name, shape in (layer | norms).items()}
    arrays = {f"model.layers.{i}.{name}": array for i in range(LAYERS) for name, array in one.items()}
    arrays["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[name] = draw.standard_normal((VOCABULARY, HIDDEN), np.float32)  # type: ignore[assignment]
    with TensorWriter(folder / "model.safetensors", arrays, {"format": "pt"}) as file:
        for name, array in arrays.items():
            file.add(name, array)
    return folder


@pytest.mark.slow
def test_no_process_holds_more_than_its_share(large: Path, tmp_path: Path) -> None:
    """In loading, saving and resuming. Rejects a process that reads the whole checkpoint, keeps what it has read mapped
    into memory, or copies all it saves first; and a first process that gathers the model before it writes it."""
    size = (large / "model.safetensors").stat().st_size
    together(shards_worker.memory, large, folder=tmp_path)
    for rank in range(COUNT):
        peaks = json.loads((tmp_path / f"peaks-{rank}.json").read_text())
        assert peaks["resumed"] <= 1.3 * size / COUNT + 2**30, peaks
    assert 1.3 * size / COUNT + 2**30 < size + min(peaks["before"], 2**29), "the model is large enough to tell"
