"""What only the MLX backend can get wrong: loading, layout, memory, AdamW. The rest is tested for all backends."""

# ruff: noqa: E402  (imports follow the check that MLX is installed)

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import slow

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.nn as nn
from mlx.utils import tree_flatten

import forked
from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.errors import UserError
from bnf_core.models.lora import initial_lora_a
from bnf_core.steps import loop
from bnf_core.steps.batching import collate
from bnf_core.steps.steps import Step
from bnf_core.types import Example
from bnf_mlx.adapter import adapter_off, add_adapter, load_adapter, save_adapter
from bnf_mlx.backend import MLXBackend
from bnf_mlx.engine import MLXEngine
from bnf_mlx.linear import detached_log_odds, linear_bnf_loss, linear_log_odds
from bnf_mlx.losses import accurate_sum, token_log_odds
from bnf_mlx.model import head_weight, load_model, multiply_in_float32
from bnf_mlx.optimizer import Optimizer
from bnf_mlx.probes import head_transform
from bnf_mlx.scored import MicroStep

CPU = mx.Device(mx.cpu)
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": {},
    "llama-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True},
    "llama-scaled": {"rope_parameters": LLAMA3_ROPE},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "smollm3": {"num_hidden_layers": 4},  # every fourth layer has no positions
    "starcoder2": {"hidden_act": "gelu"},
    "cohere": {"logit_scale": 0.5},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "phi": {},  # the head has a bias
}
LINEAR_HEADS = {name: name not in ("cohere", "gemma2") for name in FAMILIES}
PROMPTS = [[5, 6, 7], [9], [3, 4, 8, 10, 11, 12]]
EXAMPLES = [
    Example((5, 6, 7), (8, 9, 2), True),
    Example((9,), (30, 31, 32, 33, 2), False),
    Example((3, 4, 8, 10, 11, 12), (40, 2), True),
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Makes, once a session, a tiny random checkpoint of a family, saved by transformers with its logits."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            torch = pytest.importorskip("torch")
            from transformers import CONFIG_MAPPING, AutoModelForCausalLM

            torch.manual_seed(0)
            config = CONFIG_MAPPING[name.partition("-")[0]](**TINY | FAMILIES[name])
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for p in model.parameters():  # initial weights give logits too flat to tell positions apart
                    p.add_(torch.randn_like(p) * 0.1)
                logits = model(torch.arange(3, 63)[None]).logits[0]
            model.save_pretrained(folder)
            np.save(folder / "logits.npy", logits.numpy())
        return folder

    return make


@pytest.fixture
def llama(checkpoint) -> nn.Module:
    return load_model(checkpoint("llama"), CPU, mx.float32)


def randomised(model: nn.Module) -> nn.Module:
    """With an adapter that does something: B is zero at first."""
    for name, p in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            module = model
            for part in name.split(".")[:-1]:
                module = module[int(part)] if part.isdigit() else module[part]
            module.lora_b = mx.random.normal(p.shape, key=mx.random.key(len(name))) * 0.3
    return model


def logits_of(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.arange(3, 63)[None])[0])


# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_saved_by_transformers_gives_the_same_logits(checkpoint, family):
    folder = checkpoint(family)
    expected = np.load(folder / "logits.npy")
    error = np.abs(logits_of(load_model(folder, CPU, mx.float32)) - expected).max()
    assert error < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_is_fused_with_what_it_does_to_logits(checkpoint, family):
    for dtype in (mx.float32, mx.bfloat16):
        transform = head_transform(load_model(checkpoint(family), CPU, dtype))
        assert transform is not None and (transform == (1.0, None)) == LINEAR_HEADS[family]


def test_what_a_config_leaves_out_is_what_transformers_takes_it_to_be(checkpoint, tmp_path):
    shutil.copytree(checkpoint("starcoder2"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]  # a base of 10,000 in transformers, of 100,000 in mlx-lm
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = np.load(tmp_path / "logits.npy")
    error = np.abs(logits_of(load_model(tmp_path, CPU, mx.float32)) - expected).max()
    assert error < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_head_is_a_matrix_in_any_precision(tied):
    """Rejects a comparison in half precision, in which MLX adds up quantised products on a CPU to a few per cent."""
    from mlx_lm.models import llama

    sizes = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    rest = {"rms_norm_eps": 1e-5, "vocab_size": 512, "tie_word_embeddings": tied, "model_type": "llama"}
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(sizes | rest))
    nn.quantize(model, 64, 4)
    for dtype in (mx.float32, mx.bfloat16):
        model.set_dtype(dtype)
        assert head_transform(model) == (1.0, None)


def test_a_mild_cap_is_not_lost_in_half_precision(checkpoint):
    model = load_model(checkpoint("gemma2"), CPU, mx.bfloat16)
    logits = mx.abs(model(mx.arange(8)[None])).max().item()
    model.final_logit_softcapping = 5 * logits  # changes the largest by about one part in 75
    assert head_transform(model) is None  # and not the one of the config


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_multiplied_in_float32_and_rounded_once(dtype):
    """Rejects a product that is rounded before the bias is added, a gradient rounded on the way, and a float32 copy of
    every layer's weights that is kept for the backward pass."""
    mx.random.seed(0)
    inputs, outputs, tokens = 640, 1024, 40
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.Embedding(outputs, inputs))
    model.set_dtype(dtype)
    multiply_in_float32(model)
    linear, embedding = model.layers
    x, g = (mx.random.normal((tokens, n)).astype(dtype) for n in (inputs, outputs))
    wide = mx.float32

    def rounded(y: Any) -> list[Any]:
        return y.astype(dtype).astype(wide).tolist()

    with mx.stream(CPU):
        weight, tied = linear.weight.astype(wide), embedding.weight.astype(wide)
        assert rounded(linear(x)) == rounded(x.astype(wide) @ weight.T + linear.bias.astype(wide))
        assert rounded(embedding.as_linear(x)) == rounded(x.astype(wide) @ tied.T)
        for product, matrix in ((linear, weight), (embedding.as_linear, tied)):
            (found,) = mx.vjp(product, [x], [g])[1]
            assert found.dtype == dtype and rounded(found) == rounded(g.astype(wide) @ matrix)

        layers = nn.Sequential(*(nn.Linear(inputs, inputs) for _ in range(30)))
        layers.set_dtype(dtype)
        multiply_in_float32(layers)
        mx.eval(layers.parameters(), x)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(lambda x: layers(x).astype(wide).square().sum())(x))
        copies = (mx.get_peak_memory() - before) / (4 * inputs**2)
        assert copies < 20  # MLX runs some ten operations ahead


def test_loading_errors_say_what_to_do(checkpoint, tmp_path):
    backend = MLXBackend()
    for folder, message in ((tmp_path, "no config.json"), (tmp_path / "absent", "no config.json")):
        with pytest.raises(UserError, match=message):
            backend.load(folder)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no model\*\.safetensors"):
        backend.load(tmp_path)
    shutil.copy(checkpoint("llama") / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UserError, match="no_such_model not supported"):
        backend.load(tmp_path)
    with pytest.raises(UserError, match="device 'cuda' is not present"):
        backend.load(checkpoint("llama"), device="cuda")
    with pytest.raises(UserError, match="dtype 'int8'"):
        backend.load(checkpoint("llama"), dtype="int8")


# The fused head


def test_sums_over_a_large_vocabulary_keep_their_digits():
    x = np.full((2, 151_937), 0.3, np.float32)  # mx.sum on the CPU is off by 1e-3 here
    got = np.array(accurate_sum(mx.array(x)), np.float64)
    assert got.shape == (2, 1)
    np.testing.assert_allclose(got, x.astype(np.float64).sum(-1, keepdims=True), rtol=1e-6)


def fused_inputs(n, vocab=4096, width=16, dtype=mx.float32):
    key = mx.random.split(mx.random.key(0), 5)
    hidden, head = mx.random.normal((n, width), key=key[0]), mx.random.normal((vocab, width), key=key[1])
    targets = mx.random.randint(0, vocab // 8, (n,), key=key[2])  # with repeats: gradients of a row add up
    reference, coefficients = mx.random.normal((n,), key=key[3]) - 8, mx.random.normal((n,), key=key[4])
    inputs = hidden.astype(dtype), head.astype(dtype), targets, reference, coefficients
    mx.eval(inputs)
    return inputs


def loss_of(*inputs, **options):
    return linear_bnf_loss(*inputs, **options)[0]


@pytest.mark.parametrize(
    "mode", ["trained head", slow("statistics alone"), slow("frozen head"), slow("head asked for unannounced")]
)
@pytest.mark.parametrize("dtype", [mx.float32, pytest.param(mx.bfloat16, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_tokens(mode, dtype):
    def peak(n: int) -> int:
        inputs = fused_inputs(n, width=8, dtype=dtype)
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        if mode == "statistics alone":
            mx.eval(detached_log_odds(*inputs[:3], chunk_tokens=64))
        else:
            argnums = 0 if mode == "frozen head" else (0, 1)
            gradient = mx.value_and_grad(loss_of, argnums=argnums)
            mx.eval(gradient(*inputs, train_head=True if mode == "trained head" else None, chunk_tokens=64))
        return mx.get_peak_memory() - before

    peak(256)  # anything that is allocated once
    # MLX allocates for several operations ahead of the one that computes, for more of them on a busy machine: the least
    # of a few runs is nearest to what the computation itself needs. 1,792 tokens more are 28 chunks: an array of all
    # logits would add 28 times a chunk's memory in float32, 14 times in half precision.
    small, chunk = min(peak(256) for _ in range(4)), 64 * 4096 * 4
    growth = min(peak(2048) for _ in range(4)) - small
    assert growth < 7 * chunk, f"{small / chunk:.1f} chunks grew by {growth / chunk:.1f}"


@pytest.mark.usefixtures("compiled_or_not")
def test_the_head_gradient_is_right_announced_or_not_and_under_compile():
    inputs = fused_inputs(37)

    def dense(hidden, head, targets, reference, coefficients):
        from bnf_mlx import bnf_token_loss

        return (coefficients * bnf_token_loss(*token_log_odds(hidden @ head.T, targets), reference)).sum()

    expected_loss, expected = mx.value_and_grad(dense, argnums=(0, 1, 4))(*inputs)
    for train_head in (None, True):
        function = mx.value_and_grad(lambda *a, t=train_head: loss_of(*a, train_head=t, chunk_tokens=10), (0, 1, 4))
        for gradient in (function, mx.compile(function)):
            loss, grads = gradient(*inputs)
            np.testing.assert_allclose(loss.item(), expected_loss.item(), rtol=1e-5)
            for got, want in zip(grads, expected, strict=True):
                assert np.abs(np.array(got - want)).max() < 1e-5 * np.abs(np.array(want)).max()


def test_the_gradient_scales_with_what_is_done_to_the_loss():
    inputs = fused_inputs(5)
    once = mx.grad(loss_of)(*inputs)
    assert mx.array_equal(mx.grad(lambda *a: -4.0 * loss_of(*a))(*inputs), -4.0 * once)


def test_statistics_alone_are_those_of_the_loss():
    inputs = fused_inputs(21)
    _, stats = linear_bnf_loss(*inputs, chunk_tokens=8)
    for function in (linear_log_odds, detached_log_odds):
        log_odds, entropy = function(*inputs[:3], chunk_tokens=8)
        assert mx.array_equal(log_odds, stats.log_odds) and mx.array_equal(entropy, stats.other_entropy)


# Adapters


def test_an_adapter_starts_from_the_shared_weights_in_mlx_layout(llama):
    add_adapter(llama, LoraConfig(rank=4, targets=["q_proj", "down_proj"]), seed=7)
    parameters = dict(tree_flatten(llama.trainable_parameters()))
    layers = {name.rpartition(".")[0] for name in parameters}
    assert layers == {f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")}
    name = "model.layers.1.mlp.down_proj"
    assert all(p.dtype == mx.float32 for p in parameters.values())
    np.testing.assert_array_equal(np.array(parameters[name + ".lora_a"]), initial_lora_a(name, 4, 64, 7).T)
    assert parameters[name + ".lora_b"].shape == (4, 32) and not parameters[name + ".lora_b"].any()


def test_all_linear_is_every_linear_layer_but_the_head(llama):
    add_adapter(llama, LoraConfig(rank=2), seed=0)
    adapted = {name.split(".")[-2] for name, _ in tree_flatten(llama.trainable_parameters())}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_unknown_target_names_what_there_is(llama):
    with pytest.raises(UserError, match=r"no linear layer is called c_attn.*down_proj, gate_proj"):
        add_adapter(llama, LoraConfig(targets=["q_proj", "c_attn"]), seed=0)


@pytest.mark.parametrize("kind", ["lora", "dora", "quantised"])
def test_without_its_adapter_the_model_is_exactly_the_one_that_was_loaded(llama, kind):
    if kind == "quantised":
        nn.quantize(llama, group_size=32, bits=8)
        llama.freeze()
    before = logits_of(llama)
    add_adapter(llama, LoraConfig(rank=2), seed=0, kind="dora" if kind == "dora" else "lora")
    randomised(llama)
    after = logits_of(llama)
    assert np.abs(after - before).max() > 0.1
    with pytest.raises(RuntimeError), adapter_off(llama):
        np.testing.assert_array_equal(logits_of(llama), before)
        raise RuntimeError  # the adapter comes back whatever happens inside
    np.testing.assert_array_equal(logits_of(llama), after)


def test_an_adapter_survives_saving_and_loading(checkpoint, llama, tmp_path):
    folder = tmp_path / "adapter"
    randomised(add_adapter(llama, LoraConfig(rank=4, alpha=12, dropout=0.25, targets=["v_proj"]), seed=0))
    save_adapter(llama, folder)
    save_adapter(llama, folder)  # over an earlier one
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "no partial folder is left"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["num_layers"] == 2
    assert config["lora_parameters"] == {"rank": 4, "scale": 3.0, "dropout": 0.25, "keys": ["self_attn.v_proj"]}

    again = load_adapter(load_model(checkpoint("llama"), CPU, mx.float32), folder)
    np.testing.assert_array_equal(logits_of(again), logits_of(llama))
    assert {n for n, _ in tree_flatten(again.trainable_parameters())} == set(
        mx.load(str(folder / "adapters.safetensors"))
    )


def test_adapters_that_do_not_fit_are_refused(checkpoint, llama, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(add_adapter(llama, LoraConfig(rank=2), seed=0), folder)

    def refused(message: str, family: str = "llama") -> None:
        with pytest.raises(UserError, match=message):
            load_adapter(load_model(checkpoint(family), CPU, mx.float32), folder)

    refused("does not fit the model", "starcoder2")  # other layers
    refused("does not fit the model", "smollm3")  # the same layers, and two more
    weights = dict(mx.load(str(folder / "adapters.safetensors")))
    removed = sorted(weights)[0]
    mx.save_safetensors(str(folder / "adapters.safetensors"), {k: v for k, v in weights.items() if k != removed})
    refused(f"{removed} is missing from it")
    (folder / "adapters.safetensors").write_bytes(b"not safetensors")
    refused("does not fit the model")
    (folder / "adapters.safetensors").unlink()
    refused(r"has no adapters\.safetensors")
    (folder / "adapter_config.json").unlink()
    refused("has no adapter_config.json")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    refused("PEFT adapter")


def test_mlx_lm_itself_generates_with_a_saved_adapter(checkpoint, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    model = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), model)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(model)

    engine: Any = MLXBackend().load(model, device="cpu", fine_tune_type="lora", lora=LoraConfig(rank=4))
    (plain,) = engine.generate([[5, 6, 7]], 6, [2])
    randomised(engine.model)
    (adapted,) = engine.generate([[5, 6, 7]], 6, [2])
    assert plain != adapted
    engine.save(tmp_path / "adapter")
    arguments = ["--model", model, "--adapter-path", tmp_path / "adapter", "--prompt", "w5 w6 w7", "--max-tokens", 6]
    arguments += ["--temp", 0, "--ignore-chat-template", "--verbose", "False"]
    said = tmp_path / "said"
    assert forked.ended(forked.start(mlx_lm_generate, [str(word) for word in arguments], output=said)) == 0
    assert said.read_text().split() == [f"w{token}" for token in adapted]


def test_code_in_a_checkpoint_is_never_run(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_file": "own.py"}))
    (model / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(UserError, match=r"code of its own, own\.py, which is never run"):
        load_model(model, mx.Device(mx.cpu), mx.float32)
    assert not (tmp_path / "run").exists()


def mlx_lm_generate(words: list[str]) -> None:
    from mlx_lm.generate import main

    sys.argv = ["generate", *words]
    main()


# AdamW


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_adamw_and_clipping_follow_torch(max_norm):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(10, 5, 3)).astype(np.float32)
    gradients[:, 0] = 1e-9  # where epsilon decides
    config = OptimizerConfig(beta1=0.8, beta2=0.95, epsilon=1e-8, weight_decay=0.1)

    model = nn.Module()
    model.p = mx.array(start)
    ours = Optimizer(model, config)
    p = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([p], betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    for step, gradient in enumerate(gradients):
        rate = 0.01 * (step + 1)
        norm = ours.update({"p": mx.array(gradient)}, rate, max_norm)
        p.grad = torch.tensor(gradient)
        expected = torch.nn.utils.clip_grad_norm_([p], float("inf") if max_norm is None else max_norm)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        np.testing.assert_allclose(norm, expected.item(), rtol=1e-6)
        # MLX's own AdamW is 5e-5 of a step away after the first.
        np.testing.assert_allclose(np.array(model.p), p.detach().numpy(), rtol=2e-6, atol=2e-7)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = nn.Module()
    model.p, model.q = mx.ones((2,)), mx.ones((2,))
    optimizer = Optimizer(model, OptimizerConfig(weight_decay=0.1))
    for bad in (np.nan, np.inf):
        assert not np.isfinite(optimizer.update({"p": mx.array([1.0, bad]), "q": mx.ones((2,))}, 0.1, 1.0))
    assert mx.array_equal(model.p, mx.ones((2,))) and mx.array_equal(model.q, mx.ones((2,)))
    assert optimizer.step == 0 and not optimizer.first["q"].any()


# The engine


def engine_of(folder: Path, **options) -> MLXEngine:
    settings = {"fine_tune_type": "lora", "lora": LoraConfig(rank=4), "optimizer": OptimizerConfig(warmup_steps=0)}
    return MLXBackend().load(folder, device="cpu", **(settings | options))  # type: ignore[return-value]


def gradients_of(engine: MLXEngine, batches) -> dict[str, np.ndarray]:
    parts = [MicroStep(engine.scored)(batch, np.full(len(batch.targets), -3.0, np.float32))[2] for batch in batches]
    return {name: np.array(sum(part[name] for part in parts)) for name in parts[0]}


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    top = max(np.abs(g).max() for g in want.values())
    assert top > 0
    for name in want:
        assert np.abs(got[name] - want[name]).max() < 1e-5 * top, name


def test_micro_batches_add_up(checkpoint):
    whole = gradients_of(engine_of(checkpoint("llama")), [collate(EXAMPLES, 3)])
    parts = gradients_of(
        engine_of(checkpoint("llama")), [collate(EXAMPLES[1:2], 3), collate([EXAMPLES[2], EXAMPLES[0]], 3)]
    )
    assert_close(parts, whole)


def test_the_dense_path_computes_what_the_fused_one_does(checkpoint):
    batch = collate(EXAMPLES, 3)
    fused, dense = engine_of(checkpoint("llama-theta")), engine_of(checkpoint("llama-theta"))
    assert fused.scored.head == (1.0, None)
    dense.scored.head = None
    assert_close(gradients_of(dense, [batch]), gradients_of(fused, [batch]))
    reference = fused.reference_log_odds(batch)
    for got, want in zip(dense.evaluate(batch, reference), fused.evaluate(batch, reference), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_a_head_with_extras_is_scored_and_trained_with_them(checkpoint, family):
    engine, batch = engine_of(checkpoint(family)), collate([Example((3,), tuple(range(4, 63)), True)], 1)
    logits = np.load(checkpoint(family) / "logits.npy")[:59]
    expected, _ = token_log_odds(mx.array(logits), mx.array(batch.targets))
    np.testing.assert_allclose(engine.reference_log_odds(batch), np.array(expected), atol=1e-4)
    assert any(g.any() for g in gradients_of(engine, [batch]).values())


def test_training_moves_the_policy_and_not_the_reference(checkpoint):
    engine, batch = engine_of(checkpoint("llama")), collate(EXAMPLES, 3)
    reference = engine.reference_log_odds(batch)
    done = []
    step = Step(0, 1e-2, [(batch, reference)], EXAMPLES, {})
    loop.train(engine, iter([step]), lambda _, stats, norm: done.append((stats[0], norm)), 1.0)
    (first, norm), second = done[0], engine.evaluate(batch, reference)
    np.testing.assert_array_equal(first.log_odds, reference)  # B is zero: p = r to the bit
    assert norm > 0
    np.testing.assert_array_equal(engine.reference_log_odds(batch), reference)
    good, bad = batch.labels[batch.sequence_ids] > 0, batch.labels[batch.sequence_ids] < 0
    assert (second.log_odds - first.log_odds)[good].mean() > 0 > (second.log_odds - first.log_odds)[bad].mean()


def test_a_quantised_head_is_scored_with_the_weights_it_stands_for(llama):
    nn.quantize(llama, group_size=32, bits=8)
    llama.freeze()
    assert head_transform(llama) and head_weight(llama).shape == (64, 32)
    engine, batch = MLXEngine(add_adapter(llama, LoraConfig(rank=2), 0), CPU), collate(EXAMPLES[:1], 1)
    expected, _ = token_log_odds(
        llama(mx.array(batch.input_ids))[0][mx.array(batch.positions)], mx.array(batch.targets)
    )
    np.testing.assert_allclose(engine.reference_log_odds(batch), np.array(expected), atol=1e-4)


def test_generation_in_a_batch_is_that_of_each_prompt_and_ends_before_the_stop_token(checkpoint):
    engine = engine_of(checkpoint("llama"))
    together = engine.generate(PROMPTS, 8, [])
    assert [len(c) for c in together] == [8, 8, 8]
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert engine.generate([prompt], 8, []) == [completion]
        ids = mx.array([prompt + completion[:-1]])
        assert mx.argmax(engine.model(ids)[0, len(prompt) - 1 :], axis=-1).tolist() == completion
    stop = together[0][3]
    assert engine.generate(PROMPTS[:1], 8, [stop]) == [together[0][: together[0].index(stop)]]


def test_the_backend_describes_itself():
    facts = MLXBackend().describe()
    assert facts["mlx"] and facts["mlx-lm"] and "cpu" in facts["devices"]
    if sys.platform == "linux":
        assert "GFLOP/s" in facts["cpu matrix product"]
