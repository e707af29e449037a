"""What only the PyTorch engine can get wrong: packing, precision, checkpointed activations, saving, mistakes."""

# ruff: noqa: E402  (imports follow the check that PyTorch is installed)

import json
import math
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tiny
from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.errors import UserError
from bnf_core.processes import ALONE, Processes
from bnf_core.steps import loop
from bnf_core.steps import steps as plan
from bnf_core.steps.batching import MicroBatching, Rows, collate, micro_batches
from bnf_core.steps.reference import ReferenceCache
from bnf_core.steps.steps import Step
from bnf_core.types import Example, TokenStats
from bnf_torch.backend import TorchBackend
from bnf_torch.engine import TorchEngine
from bnf_torch.optimizer import Optimizer, adamw
from bnf_torch.probes import head_transform
from conftest import slow

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant")
LORA = LoraConfig(rank=4, alpha=8)


def rows(count: int = 7, longest: int = 12) -> list[Example]:
    draw = np.random.default_rng(1)

    def ids() -> tuple[int, ...]:
        return tuple(draw.integers(1, 300, draw.integers(1, longest)).tolist())

    return [Example(ids(), ids(), bool(i % 3), i // 2) for i in range(count)]


def load(model: Path, kind: Any = "lora", **options: Any) -> TorchEngine:
    engine = TorchBackend().load(model, device="cpu", fine_tune_type=kind, lora=LORA, optimizer=OPTIMIZER, **options)
    assert isinstance(engine, TorchEngine)
    return engine


def step_of(engine: TorchEngine, examples: list[Example], batching: MicroBatching) -> Step:
    """With a reference that is now above the policy, now below it, whatever the cut."""
    with_reference = []
    for batch in micro_batches(examples, batching):
        log_odds = engine.evaluate(batch, np.zeros(len(batch.targets), np.float32)).log_odds
        with_reference.append((batch, log_odds + np.sin(batch.targets).astype(np.float32)))
    return Step(0, 1e-2, with_reference, examples, {})


def gradients(engine: TorchEngine, examples: list[Example], batching: MicroBatching) -> dict[str, np.ndarray]:
    """Of one step, unclipped; dropped again."""
    step = step_of(engine, examples, batching)
    if engine.optimizer is None:
        engine.optimizer = Optimizer(engine.trainable, adamw(engine.trainable, OPTIMIZER))
    engine.accumulate(step.batches, None)
    found = {n: p.grad.float().numpy().copy() for n, p in engine.trainable.items() if p.grad is not None}
    engine.optimizer.torch.zero_grad()
    return found


def fit(engine: TorchEngine, count: int = 4) -> list[float]:
    norms: list[float] = []
    reference = ReferenceCache(engine.reference_log_odds)
    plan.with_reference(micro_batches(rows(), MicroBatching(2)), reference, ALONE)
    taken = plan.steps(
        Rows(rows(), 0),
        batch_size=3,
        num_steps=count,
        optimizer=OPTIMIZER,
        batching=MicroBatching(2),
        reference=reference,
        processes=ALONE,
    )
    loop.train(engine, taken, lambda step, stats, norm: norms.append(norm), 1.0)
    return norms


def test_no_number_of_a_step_is_waited_for_by_itself(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All leave the device together, once. Rejects a loss, a norm or a check that is asked for as soon as it is
    there: a GPU would have nothing to do meanwhile. transformers itself asks once a forward pass, in making a mask,
    whether its rows are packed."""
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._local_scalar_dense.default:
                asked.append([line for line in traceback.format_stack() if "/torch/" not in line][-2])
            return function(*args, **(kwargs or {}))

    engine = load(tiny_model)
    step = step_of(engine, rows(), MicroBatching(2))
    monkeypatch.setattr("bnf_torch.linear.check_targets", lambda *_: None)  # which CUDA is not waited for with
    with Watch():
        loss, scores, norm = engine.accumulate(step.batches, 1.0)
    assert [place for place in asked if "masking_utils.py" not in place] == []
    assert len(scores) == len(step.batches) > 2
    assert [len(score.log_odds) for score in scores] == [len(batch.targets) for batch, _ in step.batches]
    expected = math.sqrt(sum(float((p.grad**2).sum()) for p in engine.trainable.values()))  # type: ignore[misc]
    assert expected == pytest.approx(min(norm, 1.0), rel=1e-5) and math.isfinite(loss)


# Packing

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"sliding_window": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
}
SHAPE = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def family(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**SHAPE | FAMILIES.get(name, {}))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_packing_changes_no_gradient(tmp_path, name):
    """Rejects sequences that see each other, positions that go on from one sequence to the next, and windows that
    reach into the sequence before."""
    engine = load(family(tmp_path, name), "full")
    apart, packed = MicroBatching(1, group_by_length=False), MicroBatching(2, pack_to=40)
    parts = micro_batches(rows(), packed)
    assert any(part.packed for part in parts)
    assert any((part.segment_ids[:, -1] > part.segment_ids[:, 0]).any() for part in parts)
    expected, found = gradients(engine, rows(), apart), gradients(engine, rows(), packed)
    assert expected.keys() == found.keys()
    scale = max(np.abs(g).max() for g in expected.values())
    for parameter in expected:
        assert np.abs(found[parameter] - expected[parameter]).max() < 3e-6 * scale, parameter


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packing_with_either_attention(tiny_model, attention):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention)
    engine = TorchEngine(model)
    examples = rows()
    alone = [engine.evaluate(collate([e], 1), np.zeros(len(e.completion_ids), np.float32)).log_odds for e in examples]
    packed = collate(examples, 1, bins=[[0, 1, 2], [3, 4], [5, 6]])
    together = engine.evaluate(packed, np.zeros(len(packed.targets), np.float32)).log_odds
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_packed_is_refused(tmp_path):
    """Recurrent layers know nothing of positions. Rejects packing that silently mixes the sequences."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=304, hidden_size=32, num_hidden_layers=2, state_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    engine = TorchBackend().load(tmp_path, device="cpu")
    assert isinstance(engine, TorchEngine) and not engine.scored.packs
    examples = rows(3)
    engine.reference_log_odds(collate(examples, 1))
    with pytest.raises(UserError, match="MambaForCausalLM lets sequences in one row see each other"):
        engine.reference_log_odds(collate(examples, 1, bins=[[0, 1], [2]]))


# Precision and memory


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_checkpointed_activations_give_the_same_bits(tiny_model, kind):
    plain, checkpointed = load(tiny_model, kind), load(tiny_model, kind, gradient_checkpointing=True)
    assert checkpointed.base.model.layers[0].gradient_checkpointing
    expected, found = gradients(plain, rows(), MicroBatching(3)), gradients(checkpointed, rows(), MicroBatching(3))
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_what_is_trained_is_float32_and_the_rest_as_asked(tiny_model, kind):
    engine = load(tiny_model, kind, dtype="bfloat16")
    assert engine.dtype == "bfloat16"
    assert {p.dtype for p in engine.trainable.values()} == {torch.float32}
    frozen = {p.dtype for p in engine.base.parameters() if not p.requires_grad}
    assert frozen == (set() if kind == "full" else {torch.bfloat16})
    computed: set[Any] = set()
    layer = engine.base.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: computed.add(output.dtype))
    assert all(math.isfinite(norm) for norm in fit(engine))
    assert computed == {torch.bfloat16}


def test_half_precision_is_as_accurate_as_a_model_that_is_all_of_it(tiny_model):
    """Both round at the same places. Rejects products accumulated, or a loss taken, in bfloat16; and float32."""

    def flat(engine: TorchEngine) -> np.ndarray:
        return np.concatenate([g.ravel() for g in gradients(engine, rows(), MicroBatching(3)).values()])

    exact, ours = (flat(load(tiny_model, "full", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    theirs = flat(TorchEngine(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)))
    error, allowed = np.linalg.norm(ours - exact), np.linalg.norm(theirs - exact)
    assert allowed / 10 < error < 1.5 * allowed


def test_an_adapter_keeps_its_inputs_in_half_precision_and_learns_what_pefts_own_does(tiny_model):
    """Rejects a product, or a gradient of it, computed in bfloat16."""
    kept, learnt = [], []
    for pefts in (True, False):
        engine = load(tiny_model, dtype="bfloat16")
        torch.manual_seed(1)
        for layer in (module for module in engine.model.modules() if isinstance(module, LoraLayer)):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
            layer.cast_input_dtype_enabled = pefts
        wide: list[int] = []

        def note(tensor: Any, wide: list[int] = wide) -> Any:
            if tensor.dtype == torch.float32 and tensor.shape[-1:] == (64,):  # the MLP's width, of no other tensor
                wide.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            learnt.append(gradients(engine, rows(), MicroBatching(3)))
        kept.append(sum(wide))
    assert kept[1] < 0.5 * kept[0]  # of ours A itself is left
    for name, expected in learnt[0].items():
        assert np.abs(learnt[1][name] - expected).max() <= 1e-6 * np.abs(expected).max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mild_cap_is_not_lost_in_half_precision(dtype):
    """Rejects logits compared as they are: the cap changes the largest by one part in 75."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 304, "head_dim": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gemma2", num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **sizes)
    )
    model = model.to(dtype).eval()
    for cap in (None, 5.0):
        model.config.final_logit_softcapping = None
        largest = model(torch.arange(8)[None]).logits.abs().max().item()
        model.config.final_logit_softcapping = cap and cap * largest
        assert head_transform(model) == (1.0, model.config.final_logit_softcapping)


@pytest.mark.parametrize("what", ["loss and gradient", "loss elsewhere", "norm"])
def test_a_step_that_is_not_finite_is_not_taken(tiny_model, what):
    """And the optimizer's moments stay: the next step is as if there had been none before."""

    class Elsewhere(Processes):
        def sum(self, values: np.ndarray) -> np.ndarray:
            return values + np.inf

    engine, other = load(tiny_model), load(tiny_model)
    good = step_of(engine, rows(), MicroBatching(3))
    batches = good.batches
    if what == "loss and gradient":
        batches = [(batch, np.full_like(r, np.nan)) for batch, r in batches]
    if what == "norm":  # whose squares float32 cannot hold
        batches = [(replace(batch, coefficients=batch.coefficients * 1e30), r) for batch, r in batches]
    norms: list[float] = []

    def done(step: Step, stats: list[TokenStats], norm: float) -> None:
        norms.append(norm)

    engine.processes = Elsewhere() if what == "loss elsewhere" else ALONE
    loop.train(engine, iter([replace(good, batches=batches)]), done, 1.0)
    engine.processes = ALONE
    loop.train(engine, iter([good]), done, 1.0)
    loop.train(other, iter([good]), done, 1.0)
    assert not math.isfinite(norms[0]) and norms[1] == norms[2]
    for name, p in engine.trainable.items():
        assert torch.equal(p, other.trainable[name]), name


def test_what_done_or_steps_raise_ends_the_training_after_the_last_step(tiny_model):
    class StopHere(Exception):
        pass

    engine = load(tiny_model)
    step = step_of(engine, rows(), MicroBatching(3))

    def stop(*args: Any) -> None:
        raise StopHere

    with pytest.raises(StopHere):
        loop.train(engine, iter([step, step]), stop, 1.0)
    after = {name: p.detach().clone() for name, p in engine.trainable.items()}

    def steps():
        raise StopHere
        yield

    with pytest.raises(StopHere):
        loop.train(engine, steps(), stop, 1.0)
    once = load(tiny_model)
    loop.train(once, [step], lambda *args: None, 1.0)
    for name, p in once.trainable.items():
        assert torch.equal(p, after[name]) and torch.equal(p, engine.trainable[name]), name


def test_fit_draws_nothing_but_dropout(tiny_model):
    """Rejects a trainer that seeds the generators anew: resumed runs would see other dropout."""
    engine = load(tiny_model)
    step = step_of(engine, rows(), MicroBatching(3))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    loop.train(engine, iter([step]), lambda *args: None, 1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_process_resumes_its_own_random_numbers(tiny_model: Path) -> None:
    """Rejects those of another process, and of none."""
    engine = load(tiny_model)
    engine.processes = Processes()
    states = []
    for seed in range(4):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state().numpy())
    for rank, state in enumerate(states):
        engine.processes.rank = rank
        engine.load_random_state({"random/cpu": np.stack(states)})
        assert np.array_equal(torch.get_rng_state().numpy(), state)


def test_the_reference_of_full_fine_tuning_is_computed_before_the_first_step(tiny_model):
    engine = load(tiny_model, "full")
    batch = collate(rows(3), 3)
    step = step_of(engine, rows(), MicroBatching(3))
    engine.reference_log_odds(batch)
    loop.train(engine, iter([step]), lambda *args: None, 1.0)
    with pytest.raises(RuntimeError, match="compute it beforehand"):
        engine.reference_log_odds(batch)
    resumed = load(tiny_model, "full")
    resumed.load_state({k: getattr(v, "array", v) for k, v in engine.state().items()})
    with pytest.raises(RuntimeError, match="compute it beforehand"):
        resumed.reference_log_odds(batch)


# Saving


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_model_is_a_folder_that_transformers_and_mlx_lm_load(tiny_model, tmp_path, dtype):
    engine = load(tiny_model, "full", dtype=dtype)
    fit(engine)
    engine.save(tmp_path / "model")
    ids = torch.arange(12)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert model.dtype == getattr(torch, dtype)
    expected = model.float()(ids).logits.detach().numpy()[0]
    if dtype == "float32":
        assert np.array_equal(expected, engine.base.eval()(ids).logits.detach().numpy()[0])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == tiny.TEMPLATE
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    mx.set_default_device(mx.cpu)
    loaded, _ = utils.load_model(tmp_path / "model")
    loaded.set_dtype(mx.float32)
    found = np.array(loaded(mx.arange(12)[None])[0])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", slow("dora")])
def test_an_adapter_is_saved_loaded_and_trained_on(tiny_model, tmp_path, kind):
    engine = load(tiny_model, kind)
    fit(engine)
    engine.save(tmp_path / "adapter")
    ids = torch.arange(12)[None]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, engine.model.eval()(ids).logits)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_dora"] == (kind == "dora")
    again = load(tiny_model, kind, adapter=tmp_path / "adapter")
    for name, p in engine.trainable.items():
        assert torch.equal(again.trainable[name], p), name
    batch = collate(rows(3), 3)
    np.testing.assert_array_equal(again.reference_log_odds(batch), load(tiny_model).reference_log_odds(batch))
    assert fit(again)[0] > 0
    scoring = TorchBackend().load(tiny_model, device="cpu", adapter=tmp_path / "adapter")
    assert isinstance(scoring, TorchEngine) and not scoring.trainable


# Mistakes


def test_tokens_that_the_model_does_not_know_are_named(tiny_model):
    engine = load(tiny_model)
    with pytest.raises(UserError, match="token id 400, and the model knows ids below 304"):
        engine.reference_log_odds(collate([Example((1, 400), (2,), True)], 1))
    with pytest.raises(UserError, match="token id 304, and"):
        engine.reference_log_odds(collate([Example((1,), (304,), True)], 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True}, "needs a CUDA device"),
        ({"load_in_4bit": True, "kind": "full"}, "4-bit weights cannot be trained"),
        ({"kind": "full", "dtype": "float16"}, "loss scaling"),
        ({"kind": "full", "adapter": Path("some/adapter")}, "merge it"),
    ],
)
def test_settings_that_do_not_go_together(tiny_model, options, message):
    with pytest.raises(UserError, match=message):
        load(tiny_model, **options)


def test_an_adapter_of_another_rank_or_model_is_refused(tiny_model, tmp_path):
    other = tiny.make_model(tmp_path / "other", hidden_size=64)
    load(other).save(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"does not fit the model \(it was made for .*other"):
        load(tiny_model, adapter=tmp_path / "adapter")
    rank4, rank8 = (
        load(tiny_model),
        TorchBackend().load(
            tiny_model, device="cpu", fine_tune_type="lora", lora=LoraConfig(rank=8), optimizer=OPTIMIZER
        ),
    )
    state = {name: getattr(value, "array", value) for name, value in rank4.state().items()}
    with pytest.raises(UserError, match="rank 4 in the checkpoint and 8 here"):
        rank8.load_state(state)
