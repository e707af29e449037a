"""Training on MLX: whatever saves memory or time leaves the result as it is, and what is trained is what is saved."""

# ruff: noqa: E402  (imports follow the check that MLX is installed)

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from conftest import slow

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.nn as nn
from mlx.utils import tree_flatten

from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.errors import UserError
from bnf_core.steps import loop
from bnf_core.steps.batching import MicroBatching, collate, micro_batches
from bnf_core.steps.steps import Step
from bnf_core.types import Batch, Example, TokenStats
from bnf_mlx import adapter
from bnf_mlx.adapter import DoRALinear, add_adapter
from bnf_mlx.backend import MLXBackend
from bnf_mlx.engine import MLXEngine
from bnf_mlx.losses import bnf_token_loss, token_log_odds
from bnf_mlx.model import Checkpoint, completion_logits, dense_weight, load_model, unfreeze
from bnf_mlx.scored import MicroStep

CPU = mx.Device(mx.cpu)
RATE = 1e-2
KINDS = ["lora", "dora", "full"]


def examples(lengths: list[tuple[int, int]], vocabulary: int = 64) -> list[Example]:
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(1, vocabulary, n).tolist())  # noqa: E731
    return [Example(draw(p), draw(c), i % 2 == 0) for i, (p, c) in enumerate(lengths)]


ROWS = examples([(3, 7), (5, 2), (9, 4), (1, 6), (2, 1), (6, 6), (4, 3)])


# Families that differ in how they attend, made in memory.

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama-sliding": SLIDING,  # what mistral is to mlx-lm, and a window shorter than the sequences
    "qwen3": {"rope_theta": 1e4, "tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 8.0},  # scores with an axis more; logits are capped
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2},
}
NOT_TO_BE_PACKED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_ctx": 128,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 128,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 64,
    },
    "mamba": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}


def model_of(name: str, **overrides: Any) -> nn.Module:
    family = name.partition("-")[0]
    module = importlib.import_module(f"mlx_lm.models.{family}")
    settings = NOT_TO_BE_PACKED.get(name) or SMALL | FAMILIES[name]
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict({"model_type": family} | settings | overrides))
    grown = [(path, p + 0.3 * mx.random.normal(p.shape)) for path, p in tree_flatten(model.parameters())]
    model.load_weights(grown)  # initial weights attend to everything alike
    model.freeze()
    model.eval()
    return model


def engine_of(model: nn.Module, kind: str = "lora", **options: Any) -> MLXEngine:
    if kind == "full":
        model.unfreeze()
    else:
        add_adapter(model, LoraConfig(rank=4, dropout=options.pop("dropout", 0.0)), 0, kind)
        for name, module in model.named_modules():
            if "lora_b" in module:
                module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(len(name))) * 0.1
    return MLXEngine(model, CPU, OptimizerConfig(), **options)


def reference_of(batch: Batch) -> np.ndarray:
    """Some log-odds of each token, whatever the batch it is in."""
    return -3.0 + np.sin(batch.targets).astype(np.float32)


def gradients_of(engine: MLXEngine, batches: list[Batch]) -> dict[str, np.ndarray]:
    mx.random.seed(3)
    parts = [MicroStep(engine.scored)(batch, reference_of(batch))[2] for batch in batches]
    return {name: np.sum([np.array(part[name]) for part in parts], axis=0) for name in parts[0]}


def peak_and_gradients(engine: MLXEngine, batch: Batch) -> tuple[int, dict[str, np.ndarray]]:
    """Bytes at the peak of a step, beside what was held before."""
    gradients_of(engine, [batch])  # whatever is allocated once
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    gradients = gradients_of(engine, [batch])
    return mx.get_peak_memory() - before, gradients


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    top = max(np.abs(g).max() for g in want.values())
    assert top > 0
    for name in want:
        assert np.abs(got[name] - want[name]).max() < tolerance * top, name


def weights_of(engine: MLXEngine) -> dict[str, np.ndarray]:
    return {name: np.array(p) for name, p in tree_flatten(engine.model.trainable_parameters())}


def fit(engine: MLXEngine, batching: MicroBatching, steps: int = 3, first: int = 0) -> list[float]:
    """Norms of some steps on ROWS."""
    norms: list[float] = []
    batches = [(batch, reference_of(batch)) for batch in micro_batches(ROWS, batching)]

    def done(_: Step, stats: list[TokenStats], norm: float) -> None:
        assert [len(s.log_odds) for s in stats] == [len(batch.targets) for batch, _ in batches]
        norms.append(norm)

    loop.train(engine, (Step(first + i, RATE, batches, ROWS, {}) for i in range(steps)), done, 1.0)
    return norms


# Packing


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_give_the_gradient_that_they_give_alone(family, kind):
    engine = engine_of(model_of(family), kind)
    alone = gradients_of(engine, micro_batches(ROWS, MicroBatching(1)))
    packed = micro_batches(ROWS, MicroBatching(2, pack_to=24))
    assert any(batch.packed and len(batch.input_ids) == 2 for batch in packed)
    assert_close(gradients_of(engine, packed), alone)


@pytest.mark.parametrize("family", NOT_TO_BE_PACKED)
def test_a_model_whose_sequences_would_see_each_other_is_not_packed(family):
    engine = engine_of(model_of(family), "full")
    (batch,) = micro_batches(ROWS, MicroBatching(8, pack_to=24))
    with pytest.raises(UserError, match=r"cannot be packed with this model.*without packing"):
        engine.reference_log_odds(batch)
    engine.reference_log_odds(collate(ROWS, 7))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_packing_is_checked_in_half_precision(dtype):
    (batch,) = micro_batches(ROWS, MicroBatching(8, pack_to=24))
    for family in FAMILIES:
        model = model_of(family)
        model.set_dtype(dtype)
        assert np.isfinite(MLXEngine(model, CPU).reference_log_odds(batch)).all()
    model = model_of("gpt2")
    model.set_dtype(dtype)
    with pytest.raises(UserError, match="cannot be packed"):
        MLXEngine(model, CPU).reference_log_odds(batch)


def test_dropout_does_not_get_in_the_way_of_packing():
    engine = engine_of(model_of("llama"), dropout=0.5)
    fit(engine, MicroBatching(8, pack_to=24), steps=1)  # the first thing that is done with the engine


# Micro-batches


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_into_micro_batches_does_not_matter(kind):
    """Seven rows in parts of 3, 2 and 2, of unlike numbers of tokens: a mean of means, or a part left out, shows."""
    whole, parts = engine_of(model_of("llama"), kind), engine_of(model_of("llama"), kind)
    start = weights_of(whole)
    np.testing.assert_allclose(fit(parts, MicroBatching(3)), fit(whole, MicroBatching(8)), rtol=1e-4)
    for name, value in weights_of(whole).items():
        moved = np.abs(value - start[name]).max()
        assert moved > RATE / 10
        assert np.abs(weights_of(parts)[name] - value).mean() < 1e-3 * moved, name


def test_a_part_without_sequences_adds_nothing():
    engine = engine_of(model_of("llama"))
    batches = micro_batches(ROWS[:1], MicroBatching(4, multiple_of=2))
    assert [len(batch.labels) for batch in batches] == [0, 1]
    for order in (batches, batches[::-1]):
        assert_close(gradients_of(engine, order), gradients_of(engine, micro_batches(ROWS[:1], MicroBatching(4))), 1e-7)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_that_is_not_finite_is_not_taken_and_the_next_one_is(kind):
    engine = engine_of(model_of("llama"), kind)
    batch, before, norms = collate(ROWS, 7), weights_of(engine), []
    bad = np.full(len(batch.targets), np.nan, np.float32)
    steps = [Step(i, RATE, [(batch, r)], ROWS, {}) for i, r in enumerate((bad, reference_of(batch)))]

    def done(step: Step, _: list[TokenStats], norm: float) -> None:
        norms.append(norm)
        same = all(np.array_equal(value, before[name]) for name, value in weights_of(engine).items())
        assert same == (step.number == 0)

    loop.train(engine, iter(steps), done, 1.0)
    assert math.isnan(norms[0]) and norms[1] > 0 and engine.optimizer.step == 1


def test_a_loss_that_is_not_finite_stops_the_step_though_its_gradient_is(monkeypatch):
    engine, batch, norms = engine_of(model_of("llama")), collate(ROWS, 7), []
    call, before = MicroStep.__call__, weights_of(engine)
    monkeypatch.setattr(MicroStep, "__call__", lambda *a: (math.inf, *call(*a)[1:]))
    step = Step(0, RATE, [(batch, reference_of(batch))], ROWS, {})
    loop.train(engine, iter([step]), lambda _, __, norm: norms.append(norm), 1.0)
    assert math.isnan(norms[0])
    assert all(np.array_equal(value, before[name]) for name, value in weights_of(engine).items())


def test_an_unknown_token_is_named_before_anything_is_computed():
    engine = engine_of(model_of("llama"))
    batch = collate([Example((5, 64), (3,), True)], 1)
    for use in (lambda: engine.reference_log_odds(batch), lambda: gradients_of(engine, [batch])):
        with pytest.raises(UserError, match="token id 64, and the model knows ids below 64"):
            use()
    with pytest.raises(UserError, match="token id 70"):
        engine.reference_log_odds(collate([Example((5,), (70,), True)], 1))


# Gradient checkpointing


@pytest.mark.parametrize("family", ["llama-sliding", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_with_checkpointing(family, kind):
    batches = micro_batches(ROWS, MicroBatching(2, pack_to=24))
    plain, saving = (engine_of(model_of(family), kind, gradient_checkpointing=on) for on in (False, True))
    assert_close(gradients_of(saving, batches), gradients_of(plain, batches), 1e-6)


def test_layers_that_run_again_drop_the_same_values():
    gradients = [
        gradients_of(
            engine_of(model_of("llama"), dropout=dropout, gradient_checkpointing=on),
            micro_batches(ROWS, MicroBatching(8)),
        )
        for dropout, on in ((0.5, False), (0.5, True), (0.0, False))
    ]
    assert_close(gradients[1], gradients[0], 1e-6)
    with pytest.raises(AssertionError):
        assert_close(gradients[2], gradients[0], 1e-2)


def test_checkpointing_takes_less_memory_and_leaves_the_model_as_it_was():
    batch = collate(examples([(120, 8)] * 2), 2)
    engines = [
        engine_of(model_of("llama", num_hidden_layers=8, intermediate_size=128), gradient_checkpointing=on)
        for on in (False, True)
    ]
    layers, peaks = list(engines[1].model.layers), [peak_and_gradients(engine, batch)[0] for engine in engines]
    assert peaks[1] < 0.5 * peaks[0], f"{peaks[1] / 2**20:.1f} of {peaks[0] / 2**20:.1f} MiB"
    assert all(a is b for a, b in zip(layers, engines[1].model.layers, strict=True))


@pytest.mark.usefixtures("mlx_compiles")
@pytest.mark.parametrize(
    ("kind", "compiled", "part"), [slow("lora", False, 0.8), slow("dora", False, 0.95), slow("lora", True, 0.9)]
)
def test_an_adapter_keeps_its_inputs_in_half_precision_and_learns_the_same(monkeypatch, kind, compiled, part):
    """Rejects a product, or a gradient of it, computed in bfloat16."""
    batch, found = collate(examples([(120, 8)] * 2), 2), []
    for own in (False, True):
        if own:
            monkeypatch.setattr(adapter, "_low_rank", mx.matmul)  # what mlx-lm does
        model = model_of("llama", num_hidden_layers=4, hidden_size=256, head_dim=64)
        model.set_dtype(mx.bfloat16)
        found.append(peak_and_gradients(engine_of(model, kind, compiled=compiled), batch))
    peaks, gradients = zip(*found, strict=True)
    assert peaks[0] < part * peaks[1], [peak / 2**20 for peak in peaks]
    assert_close(gradients[0], gradients[1], 1e-6)


def test_an_error_within_a_step_leaves_the_model_whole(monkeypatch):
    engine = engine_of(model_of("llama"), gradient_checkpointing=True)
    before, layers = weights_of(engine), list(engine.model.layers)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bnf_mlx.scored.linear_bnf_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        gradients_of(engine, [collate(ROWS, 7)])
    monkeypatch.undo()
    for name, value in weights_of(engine).items():
        np.testing.assert_array_equal(value, before[name])
    assert all(a is b for a, b in zip(layers, engine.model.layers, strict=True))
    gradients_of(engine, [collate(ROWS, 7)])


# All weights


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_all_weights_is_that_of_the_literal_loss(tied):
    engine = engine_of(model_of("llama", tie_word_embeddings=tied), "full")
    batch = collate(ROWS, 7)
    assert engine.scored.head and engine.scored.trains_head
    ids, positions, targets = (mx.array(x) for x in (batch.input_ids, batch.positions, batch.targets))
    reference, coefficients = mx.array(reference_of(batch)), mx.array(batch.coefficients)

    def loss(model: nn.Module) -> Any:
        logits = completion_logits(model, ids, positions)
        return (coefficients * bnf_token_loss(*token_log_odds(logits, targets), reference)).sum()

    _, tree = nn.value_and_grad(engine.model, loss)(engine.model)
    literal = {name: np.array(g) for name, g in tree_flatten(tree)}
    assert all(g.any() for g in literal.values()) and ("lm_head.weight" in literal) != tied
    assert_close(gradients_of(engine, [batch]), literal)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny llama with its tokenizer, saved by transformers."""
    pytest.importorskip("torch")
    made: dict[str, Path] = {}

    def make(**overrides: Any) -> Path:
        key = repr(overrides)
        if key not in made:
            made[key] = tiny.make_model(tmp_path_factory.mktemp("model") / "model", **overrides)
        return made[key]

    return make


def loaded(folder: Path, kind: str | None, **options: Any) -> MLXEngine:
    settings = {"lora": LoraConfig(rank=4), "optimizer": OptimizerConfig(warmup_steps=0)} | options
    return MLXBackend().load(folder, device="cpu", fine_tune_type=kind, **settings)  # type: ignore[return-value]


def logits_of(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.arange(1, 60)[None]).astype(mx.float32)[0])


@pytest.mark.parametrize(
    "overrides", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False, "dtype": "bfloat16"}], ids=str
)
def test_a_whole_model_is_loaded_by_mlx_lm_and_by_transformers(checkpoint, tmp_path, monkeypatch, overrides):
    import torch
    from mlx_lm import load
    from mlx_lm import utils as mlx_lm_utils
    from transformers import AutoModelForCausalLM, AutoTokenizer

    engine = loaded(checkpoint(**overrides), "full", dtype="bfloat16")  # of frozen weights, and there are none
    before = logits_of(engine.model)
    np.testing.assert_array_equal(before, logits_of(load_model(checkpoint(**overrides), CPU, mx.float32)))
    fit(engine, MicroBatching(3), steps=2)
    after = logits_of(engine.model)
    assert np.abs(after - before).max() > 0.1
    engine.save(tmp_path / "one")
    monkeypatch.setattr(mlx_lm_utils, "make_shards", lambda weights: [{name: w} for name, w in weights.items()])
    engine.save(tmp_path / "many")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()

    for name in ("one", "many"):
        np.testing.assert_array_equal(logits_of(load_model(tmp_path / name, CPU, None)), after)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert theirs.dtype == torch.float32
        with torch.no_grad():
            logits = theirs(torch.arange(1, 60)[None]).logits[0].numpy()
        assert np.abs(logits - after).max() < 1e-4 * np.abs(after).max()
    text = "What is 2 plus 2?"
    tokenizer = load(str(tmp_path / "one"))[1]
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(checkpoint(**overrides)).encode(text)
    assert {p.name for p in tmp_path.iterdir()} == {"one", "many"}, "no partial folder is left"


def test_the_reference_is_the_model_before_the_first_step(checkpoint):
    engine, batch = loaded(checkpoint(), "full"), collate(ROWS, 7)
    reference = engine.reference_log_odds(batch)
    np.testing.assert_array_equal(reference, loaded(checkpoint(), None).reference_log_odds(batch))
    state = None

    def done(*_: Any) -> None:
        nonlocal state
        state = engine.state()

    loop.train(engine, iter([Step(0, RATE, [(batch, reference)], ROWS, {})]), done, 1.0)
    resumed = loaded(checkpoint(), "full")
    resumed.load_state(whole(state))
    for trained in (engine, resumed):
        with pytest.raises(RuntimeError, match="before the first step"):
            trained.reference_log_odds(batch)
    assert not np.array_equal(engine.evaluate(batch, reference).log_odds, reference)


def test_what_a_model_keeps_as_it_is_is_not_trained():
    model = nn.Module()
    model.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    model.cast_predicate = lambda path: path != "layers.1.bias"
    model.freeze()
    unfreeze(model)
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trained == {"layers.0.weight", "layers.0.bias", "layers.1.weight"}


def test_a_checkpoint_in_another_form_is_refused_at_the_start(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    weights = {name.removeprefix("layers."): w for name, w in tree_flatten(model.parameters())}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    assert Checkpoint(tmp_path, model).names["layers.1.weight"] == "1.weight"
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights | {"1.weight": weights["1.weight"].T})
    with pytest.raises(UserError, match=r"layers\.1\.weight in another form"):
        Checkpoint(tmp_path, model)


def test_tensors_that_the_model_has_no_use_for_are_kept_but_an_old_copy_of_the_head(checkpoint, tmp_path):
    source = tmp_path / "source"
    tiny.make_model(source)
    weights = mx.load(str(source / "model.safetensors"))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.arange(4.0)}
    copy = {"lm_head.weight": weights["model.embed_tokens.weight"] + 0}
    mx.eval(weights, extra, copy)  # read before the file is written over
    mx.save_safetensors(str(source / "model.safetensors"), weights | extra | copy)
    engine = loaded(source, "full")
    fit(engine, MicroBatching(8), steps=1)
    engine.save(tmp_path / "trained")
    saved = mx.load(str(tmp_path / "trained" / "model.safetensors"))
    assert saved.keys() == weights.keys() | extra.keys()


# DoRA


def dora_layer(bias: bool, bits: int | None = None) -> tuple[nn.Module, DoRALinear]:
    """A layer, and it within an adapter that does something."""
    mx.random.seed(0)
    model = nn.Module()
    model.layers = [nn.Module()]
    model.layers[0].proj = nn.Linear(64, 32, bias=bias)
    base = model.layers[0].proj
    if bits:
        base = model.layers[0].proj = nn.QuantizedLinear.from_linear(base, 32, bits)
    model.freeze()
    add_adapter(model, LoraConfig(rank=4, alpha=12), 0, "dora")
    return base, model.layers[0].proj


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_dora_is_its_definition_and_starts_as_the_layer_itself(bias, bits):
    from mlx_lm.tuner.dora import DoRALinear as TheirDoRALinear

    base, layer = dora_layer(bias, bits)
    x = mx.random.normal((5, 64))
    assert mx.array_equal(layer(x), base(x))
    assert {name for name, _ in tree_flatten(layer.trainable_parameters())} == {"m", "lora_a", "lora_b"}
    layer.lora_b = mx.random.normal((4, 32))
    layer.m = layer.m * (1 + 0.3 * mx.random.normal((32,)))
    weight = dense_weight(base)

    def definition(p: dict[str, Any]) -> Any:
        adapted = weight + 3.0 * (p["lora_a"] @ p["lora_b"]).T
        norm = mx.stop_gradient(mx.sqrt((adapted * adapted).sum(axis=1)))
        return x @ (p["m"] / norm * adapted.T) + (base.bias if bias else 0.0)

    def ours(p: dict[str, Any]) -> Any:
        layer.update(p)
        return layer(x)

    parameters = dict(tree_flatten(layer.trainable_parameters()))
    theirs = TheirDoRALinear(64, 32, r=4, scale=3.0)
    theirs.linear = base
    theirs.update(parameters)
    np.testing.assert_allclose(definition(parameters), ours(parameters), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(theirs(x), ours(parameters), rtol=1e-4, atol=1e-4)  # what mlx-lm makes of it afterwards
    weights = mx.random.normal((5, 32))
    want, got = (mx.grad(lambda p, f=f: (weights * f(p)).sum())(parameters) for f in (definition, ours))
    assert_close({n: np.array(g) for n, g in got.items()}, {n: np.array(g) for n, g in want.items()})


def test_an_adapter_that_mlx_lm_could_not_load_is_refused():
    with pytest.raises(UserError, match="6-bit weights"):
        dora_layer(bias=False, bits=6)


def test_dora_is_pefts():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base, layer = dora_layer(bias=True)
    layer.lora_b = mx.random.normal((4, 32))
    layer.m = layer.m * (1 + 0.3 * mx.random.normal((32,)))
    x, weights = mx.random.normal((5, 64)), mx.random.normal((5, 32))

    def loss(p: dict[str, Any]) -> Any:
        layer.update(p)
        return (weights * layer(x)).sum()

    parameters = dict(tree_flatten(layer.trainable_parameters()))
    value, ours = mx.value_and_grad(loss)(parameters)
    config = peft.LoraConfig(r=4, lora_alpha=12, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config)
    named = dict(theirs.named_parameters())
    source = {
        "base_layer.weight": base.weight,
        "base_layer.bias": base.bias,
        "lora_A.default.weight": parameters["lora_a"].T,
        "lora_B.default.weight": parameters["lora_b"].T,
        "lora_magnitude_vector.default.weight": parameters["m"],
    }
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(torch.tensor(np.array(next(value for end, value in source.items() if name.endswith(end)))))
    result = (torch.tensor(np.array(weights)) * theirs(torch.tensor(np.array(x)))).sum()
    result.backward()
    np.testing.assert_allclose(float(value), result.item(), rtol=1e-5)
    grads = {name.split(".")[-3 if "lora_" in name else -1]: p.grad for name, p in named.items() if p.requires_grad}
    theirs_by_ours = {"m": "lora_magnitude_vector", "lora_a": "lora_A", "lora_b": "lora_B"}
    want = {ours_: grads[theirs_].numpy() for ours_, theirs_ in theirs_by_ours.items()}
    assert_close({n: np.array(g) if n == "m" else np.array(g).T for n, g in ours.items()}, want)


# Quantised checkpoints


@pytest.fixture(scope="module")
def quantised(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """The tiny llama as `mlx_lm convert -q` leaves it."""
    from mlx_lm import convert

    made: dict[tuple[int, int], Path] = {}
    source = checkpoint(hidden_size=64, intermediate_size=64, initializer_range=0.1, num_hidden_layers=1)

    def make(bits: int, group_size: int) -> Path:
        if (bits, group_size) not in made:
            made[bits, group_size] = tmp_path_factory.mktemp("quantised") / "model"
            convert(str(source), str(made[bits, group_size]), quantize=True, q_bits=bits, q_group_size=group_size)
        return made[bits, group_size]

    return make


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (8, 32), (8, 64)])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_quantised_layers_learn_as_those_of_the_weights_they_stand_for(quantised, bits, group_size, kind):
    from mlx_lm.utils import dequantize_model

    folder = quantised(bits, group_size)
    engine, batch = loaded(folder, kind), collate(ROWS, 7)
    assert isinstance(engine.model.model.layers[0].mlp.up_proj.linear, nn.QuantizedLinear)
    assert engine.scored.head and engine.scored.dequantised.shape == (304, 64)
    plain = dequantize_model(load_model(folder, CPU, mx.float32))
    plain.freeze()
    add_adapter(plain, LoraConfig(rank=4), 0, kind)
    dense = MLXEngine(plain, CPU, OptimizerConfig(warmup_steps=0))
    np.testing.assert_allclose(engine.reference_log_odds(batch), dense.reference_log_odds(batch), atol=1e-3)
    np.testing.assert_array_equal(
        engine.evaluate(batch, reference_of(batch)).log_odds, engine.reference_log_odds(batch)
    )
    np.testing.assert_allclose(fit(engine, MicroBatching(3)), fit(dense, MicroBatching(3)), rtol=1e-3)
    for name, value in weights_of(engine).items():
        np.testing.assert_allclose(value, weights_of(dense)[name], atol=RATE / 20)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_trained_adapter_is_saved_and_trained_on(checkpoint, quantised, tmp_path, kind, bits):
    folder = quantised(bits, 32) if bits else checkpoint()
    engine = loaded(folder, kind)
    fit(engine, MicroBatching(3), steps=2)
    engine.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fine_tune_type"] == kind
    again = loaded(folder, kind, adapter=tmp_path / "adapter")
    alone = loaded(folder, None, adapter=tmp_path / "adapter")
    for other in (again, alone):
        np.testing.assert_array_equal(logits_of(other.model), logits_of(engine.model))
    batch = collate(ROWS, 7)
    np.testing.assert_array_equal(again.reference_log_odds(batch), engine.reference_log_odds(batch))
    assert fit(again, MicroBatching(3), steps=1)[0] > 0
    assert not np.array_equal(logits_of(again.model), logits_of(engine.model))

    def refused(message: str, kind: str = kind, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            loaded(folder, kind, adapter=tmp_path / "adapter", **options)

    refused("has rank 4 and alpha 32.*lora.rank 8 and lora.alpha 32", lora=LoraConfig(rank=8))
    refused("has rank 4 and alpha 32.*lora.rank 4 and lora.alpha 8", lora=LoraConfig(rank=4, alpha=8))
    refused(f"made with fine_tune_type {kind}, and this run has", kind="dora" if kind == "lora" else "lora")
    refused("mlx_lm fuse", kind="full")


def test_what_cannot_be_loaded_says_what_to_do(checkpoint, quantised):
    with pytest.raises(UserError, match=r"mlx_lm convert .* -q"):
        loaded(checkpoint(), "lora", load_in_4bit=True)
    with pytest.raises(UserError, match=r"are quantised.*lora or dora"):
        loaded(quantised(4, 32), "full")


# Compiled


@pytest.mark.usefixtures("compiled_or_not")
@pytest.mark.parametrize(
    ("kind", "bits", "batching"),
    [("lora", 4, MicroBatching(8)), ("full", None, MicroBatching(8, pack_to=24))],
    ids=["a dequantised head", "packed, a trained head"],
)
def test_a_compiled_step_is_the_same_step(checkpoint, quantised, kind, bits, batching):
    folder = quantised(bits, 32) if bits else checkpoint(num_hidden_layers=1)
    engines = [loaded(folder, kind) for _ in range(2)]
    engines[1] = MLXEngine(
        engines[1].model, CPU, OptimizerConfig(warmup_steps=0), whole=engines[1].whole, compiled=True
    )
    norms = [fit(engine, batching, steps=2) for engine in engines]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)
    values = [weights_of(engine) for engine in engines]
    for name in values[0]:
        assert np.abs(values[1][name] - values[0][name]).mean() < RATE / 500, name
    engines[1].state()  # nothing is left of the tracing


# Resuming


def whole(*states: Any) -> dict[str, np.ndarray]:
    """What the checkpoints make of the processes' states."""
    joined: dict[str, np.ndarray] = {}
    for state in states:
        for name, value in state.items():
            if name == "random/key":
                joined.setdefault(name, np.zeros(value.shape, value.array.dtype))[value.start] = value.array[0]
            else:
                joined[name] = value
    return joined


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_engine_takes_the_same_steps_to_the_bit(checkpoint, kind):
    options = {"lora": LoraConfig(rank=4, dropout=0.3)}
    engine, other = (loaded(checkpoint(), kind, **options) for _ in range(2))
    fit(engine, MicroBatching(3), steps=2)
    state = whole(engine.state())
    fit(engine, MicroBatching(3), steps=2)
    mx.random.seed(99)
    other.load_state(state)
    fit(other, MicroBatching(3), steps=2)
    for name, value in whole(engine.state()).items():
        np.testing.assert_array_equal(whole(other.state())[name], value, err_msg=name)
