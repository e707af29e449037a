"""Every kind of adapter that PEFT has: with it off the model is the reference, and what is saved is all of it; or it is
refused by name."""

# ruff: noqa: E402  (imports follow the check that PyTorch is installed)

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import tiny
from conftest import fast_of

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from bnf_core.errors import UserError
from bnf_torch.adapter import adapter_off, add_adapter, fuse, load_adapter, save_adapter
from bnf_torch.model import load_model

TARGETS = ["q_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
IDS = torch.arange(24).unsqueeze(0) * 7 % 300

# What a kind needs besides target_modules.
NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": "self_attn"},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CPT": {"task_type": "CAUSAL_LM", "cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1]},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [7, 14], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 16},
}
AROUND = "acts outside of the model's layers"
STAYS = "cannot be switched off"
AROUND_THE_MODEL = {"ADALORA", "ADAPTION_PROMPT", "POLY", "SHADOW"}
AROUND_THE_MODEL |= {"CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
ELSEWHERE = {"ADAMSS", "XLORA", "LORA"}  # wants scikit-learn; is made of saved adapters; is below
KINDS = sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - ELSEWHERE)

LORA_SETTINGS: dict[str, tuple[dict[str, Any], str | None]] = {
    "plain": ({}, None),
    "bias all": ({"bias": "all"}, f"{STAYS}.*biases \\(bias: all\\)"),
    "bias lora_only": ({"bias": "lora_only"}, f"{STAYS}.*biases \\(bias: lora_only\\)"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, f"{STAYS}.*layer_replication"),
    "pissa": ({"init_lora_weights": "pissa"}, f"{STAYS}.*init_lora_weights: pissa"),
    "olora": ({"init_lora_weights": "olora"}, f"{STAYS}.*init_lora_weights: olora"),
    "alora": ({"alora_invocation_tokens": [5, 6]}, f"alora_invocation_tokens {AROUND}"),
    "dora": ({"use_dora": True}, None),
    "rslora": ({"use_rslora": True}, None),
    "lora_bias": ({"lora_bias": True}, None),
    "patterns": ({"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 3}}, None),
    "modules_to_save": ({"modules_to_save": ["lm_head", "norm"]}, None),
    "modules_to_save embed_tokens": ({"modules_to_save": ["embed_tokens"]}, None),
    "trainable_token_indices": ({"trainable_token_indices": [7, 14]}, None),
    "target_parameters": ({"target_parameters": ["lm_head.weight"]}, None),
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, None),
    "embed_tokens": ({"target_modules": ["q_proj", "embed_tokens"]}, None),
    "ensure_weight_tying": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, None),
}

# Fast of each: what is refused when it is made, and one of each way to be switched off and saved.
FAST_KINDS = {"IA3", "LOHA", "OFT", "TRAINABLE_TOKENS", "VBLORA", "VERA", *AROUND_THE_MODEL} & set(KINDS)
FAST_SETTINGS = ["bias all", "layer_replication", "dora", "modules_to_save", "embed_tokens", "ensure_weight_tying"]
REFUSED = [name for name, (_, refusal) in LORA_SETTINGS.items() if refusal]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return tiny.make_model(folder, tie_word_embeddings=request.param == "tied", attention_bias=True)


@cache
def _loaded(folder: Path) -> Any:
    return load_model(folder, torch.device("cpu"), torch.float32)


def loaded(folder: Path) -> Any:
    return copy.deepcopy(_loaded(folder))


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(model: Any) -> Any:
    """With everything that is to be trained moved."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.1)
    return model


def made(folder: Path, config: Any) -> Any:
    return add_adapter(loaded(folder), config, seed=0)


def config_of(kind: str) -> Any:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    settings = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, "num_virtual_tokens": 2} | NEEDS.get(kind, {})
    known = config.__dataclass_fields__
    return config(**{key: value for key, value in settings.items() if key in known})


def assert_off_and_saved(folder: Path, model: Any, saved: Path) -> None:
    base, now = logits(loaded(folder)), logits(trained(model).get_base_model())
    assert (now - base).abs().max() > 1e-3
    with adapter_off(model):
        assert torch.equal(logits(model.get_base_model()), base)
    saved.mkdir()
    save_adapter(model, {name: p for name, p in model.named_parameters() if p.requires_grad}, saved)
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(folder), saved)), now)
    again = load_adapter(loaded(folder), saved)
    assert torch.equal(logits(again.get_base_model()), now)
    with adapter_off(again):
        assert torch.equal(logits(again.get_base_model()), base)


@pytest.mark.parametrize("kind", fast_of(KINDS, *FAST_KINDS))
def test_every_kind(tiny_model: Path, kind: str, tmp_path: Path) -> None:
    """Rejects an adapter saved without what it does not train, such as random projections."""
    if kind in AROUND_THE_MODEL:
        with pytest.raises(UserError, match=AROUND):
            made(tiny_model, config_of(kind))
        return
    assert_off_and_saved(tiny_model, made(tiny_model, config_of(kind)), tmp_path / "saved")


@pytest.mark.parametrize("name", fast_of(LORA_SETTINGS, *REFUSED, *FAST_SETTINGS))
def test_every_setting_of_lora(model: Path, name: str, tmp_path: Path) -> None:
    settings, refusal = LORA_SETTINGS[name]
    if refusal is None:
        assert_off_and_saved(model, made(model, LoraConfig(**LORA | settings)), tmp_path / "saved")
        return
    with pytest.raises(UserError, match=refusal):
        made(model, LoraConfig(**LORA | settings))


def by_peft(folder: Path, saved: Path, settings: dict[str, Any], *, embeddings: bool = False) -> Any:
    """An adapter that PEFT has made, moved and saved; its logits."""
    model = trained(get_peft_model(loaded(folder), LoraConfig(**LORA | settings)))
    model.save_pretrained(str(saved), save_embedding_layers=embeddings)
    return logits(PeftModel.from_pretrained(loaded(folder), saved))


@pytest.mark.parametrize("name", fast_of(LORA_SETTINGS, *FAST_SETTINGS))
def test_a_saved_adapter_is_refused_or_can_be_switched_off(model: Path, name: str, tmp_path: Path) -> None:
    """And either way it can be fused: nothing needs to be switched off then."""
    settings, refusal = LORA_SETTINGS[name]
    if name == "alora":
        pytest.skip("PEFT computes it where its tokens are, and cannot merge it")
    expected = by_peft(model, tmp_path / "saved", settings)
    if refusal is None:
        again = load_adapter(loaded(model), tmp_path / "saved")
        assert torch.equal(logits(again.get_base_model()), expected)
    else:
        with pytest.raises(UserError, match=f"saved {refusal}"):
            load_adapter(loaded(model), tmp_path / "saved")
    (tmp_path / "fused").mkdir()
    if name in ("layer_replication", "lora_bias"):
        with pytest.raises(UserError, match=r"cannot be written|base layer has no bias"):
            fuse(model, tmp_path / "saved", tmp_path / "fused", "float32")
        return
    fuse(model, tmp_path / "saved", tmp_path / "fused", "float32")
    assert (logits(_loaded(tmp_path / "fused")) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["lm_head", "modules_to_save", "trainable_token_indices"])
def test_embeddings_that_are_saved_beside_an_adapter(model: Path, name: str, tmp_path: Path) -> None:
    """PEFT saves them where they are targeted, and loads them into the model itself. As they were they do no harm."""
    expected = by_peft(model, tmp_path / "saved", LORA_SETTINGS[name][0], embeddings=True)
    again = load_adapter(loaded(model), tmp_path / "saved")
    assert torch.equal(logits(again.get_base_model()), expected)
    with adapter_off(again):
        assert torch.equal(logits(again.get_base_model()), logits(loaded(model)))


def test_embeddings_that_an_adapter_brings_are_refused_and_can_be_fused(model: Path, tmp_path: Path) -> None:
    """Only one row differs, and no short text would show it."""
    saved, fused = tmp_path / "saved", tmp_path / "fused"
    by_peft(model, saved, {"target_modules": ["q_proj", "embed_tokens"]}, embeddings=True)
    tensors = load_file(saved / "adapter_model.safetensors")
    (name,) = [name for name in tensors if name.endswith("embed_tokens.base_layer.weight")]
    tensors[name][299] += 1.0
    save_file(tensors, saved / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be switched off.*model\.embed_tokens\.weight"):
        load_adapter(loaded(model), saved)
    expected = logits(PeftModel.from_pretrained(loaded(model), saved))
    fused.mkdir()
    fuse(model, saved, fused, "float32")
    if "untied" in str(model):  # tied, PEFT puts them into the head as well
        assert (logits(loaded(fused)) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_model_that_has_an_adapter_already(tiny_model: Path, tmp_path: Path) -> None:
    """Given to BNFTrainer as it is: no one knows what the model was without it, so its settings tell."""
    from bnf_torch.trainer import BNFConfig, BNFTrainer

    rows = [{"prompt": "What?", "completion": " It is 4.", "label": True}]
    args = BNFConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=64)
    for settings, refusal in (({"bias": "all"}, "bias: all"), ({"init_lora_weights": "pissa"}, "pissa")):
        with warnings.catch_warnings(), pytest.raises(UserError, match=refusal):
            warnings.simplefilter("ignore")
            BNFTrainer(get_peft_model(loaded(tiny_model), LoraConfig(**LORA | settings)), args, rows)
