"""Every family of both libraries that can be had as a tiny random checkpoint, saved by transformers: the verified ones
agree on both backends, the known differences are there, the unreadable ones stop. docs/models.md says the same."""

# ruff: noqa: E402  (imports follow the check that both frameworks are installed)

import copy
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from conftest import fast_of, slow
from published import PUBLISHED, Published

torch = pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

from transformers import CONFIG_MAPPING, PreTrainedConfig

from bnf_align.commands import check_model
from bnf_align.commands.check_model import Result, compare, relative_error, rows
from bnf_core import registry
from bnf_core.config import LoraConfig
from bnf_core.errors import UserError
from bnf_core.models import model_config
from bnf_core.models.model_config import module_path
from bnf_core.steps.batching import collate
from bnf_core.types import Array, Example
from bnf_mlx import corrections, families
from bnf_mlx.backend import MLXBackend
from bnf_mlx.inspection import MLXInspector as Inspector

DOCS = Path(__file__).parents[2] / "docs"
Settings = dict[str, Any]

BASE: Settings = {
    "vocab_size": 96,
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
HEAD: Settings = {"head_dim": 8}
WINDOW: Settings = {"head_dim": 8, "sliding_window": 8, "num_hidden_layers": 4}  # rows are longer than it
GPT2: Settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS: Settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS: Settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: Settings = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LATENT: Settings = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
}
DELTA: Settings = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "head_dim": 8,
    "num_hidden_layers": 4,
}


def rope(kind: str = "default", base: float = 50_000.0, **settings: Any) -> Settings:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **settings}}


def families_with(correction: corrections.Correction) -> list[str]:
    return sorted(family for family, made in corrections.CORRECTIONS.items() if correction in made)


LONGROPE = rope(
    "longrope",
    short_factor=[1.1, 1.2, 1.3, 1.4],
    long_factor=[2.0, 3.0, 4.0, 5.0],
    original_max_position_embeddings=100,
)
YARN = {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 32}
MAMBA_JAMBA: Settings = {
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "use_mamba_kernels": False,
    "num_experts": 1,
}

VERIFIED: dict[str, Settings] = {
    "afmoe": EXPERTS | WINDOW | {"num_dense_layers": 1},
    "apertus": {},
    "cohere": {"logit_scale": 0.5},
    "cohere2": WINDOW,
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 50_000.0},
    }
    | rope(),
    "deepseek_v2": ROUTED | LATENT | HEAD | rope("yarn", mscale=0.7, mscale_all_dim=0.7, **YARN),
    "deepseek_v3": ROUTED | LATENT | HEAD | {"num_nextn_predict_layers": 0},
    "dots1": ROUTED | HEAD,
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    "exaone4": WINDOW,
    "exaone_moe": WINDOW | EXPERTS,
    "falcon_h1": HEAD
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "falcon_mamba": {"state_size": 8},
    "gemma": HEAD,
    "gemma2": HEAD | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0, "sliding_window": 64},
    "gemma3_text": WINDOW | {"num_hidden_layers": 6},
    "gemma4_text": WINDOW
    | {"num_hidden_layers": 6, "global_head_dim": 16}
    | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8},
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": ROUTED | HEAD | {"n_group": 1},
    "glm4_moe_lite": ROUTED | LATENT | {"n_group": 1},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2 | {"n_inner": 64},
    "gpt_neox": {"intermediate_size": 128},
    "gptj": GPT2 | {"rotary_dim": 4},
    "granite": {
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "granitemoe": LOCAL_EXPERTS,
    "granitemoehybrid": LOCAL_EXPERTS
    | {"shared_intermediate_size": 32, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "jamba": MAMBA_JAMBA | {"num_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"block_multiple_of": 8, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "llama": rope(),
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "minicpm3": LATENT | HEAD | LONGROPE | {"tie_word_embeddings": False},
    "minimax_m2": LOCAL_EXPERTS | HEAD | {"rotary_dim": 4},
    "ministral3": HEAD,
    "mistral": rope() | {"sliding_window": None},
    "mixtral": LOCAL_EXPERTS | {"sliding_window": None},
    "nemotron": {},
    "nemotron_h": HEAD
    | {"mamba_num_heads": 16, "mamba_head_dim": 8, "ssm_state_size": 8}
    | {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
    "phi3": LONGROPE | {"original_max_position_embeddings": 100, "sliding_window": None},
    "phimoe": LOCAL_EXPERTS | {"attention_bias": True, "lm_head_bias": True, "sliding_window": None},
    "qwen2": rope(),
    "qwen2_moe": EXPERTS | rope() | {"shared_expert_intermediate_size": 16},
    "qwen3": HEAD | rope("yarn", **YARN),
    "qwen3_5_text": DELTA,
    "qwen3_moe": EXPERTS | HEAD,
    "qwen3_next": EXPERTS | DELTA | {"shared_expert_intermediate_size": 16},
    "seed_oss": HEAD,
    "smollm3": rope() | {"num_hidden_layers": 4},  # every fourth layer has no positions
    "solar_open": HEAD | {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "stablelm": {},
    "starcoder2": rope(),
}

# One of each kind: attention with every rotation, windows, caps, a latent, experts of each router, states and what is
# mixed of them. The others put the same parts together.
OF_EACH_KIND = ["cohere2", "deepseek_v2", "falcon_h1", "gemma2", "gemma3_text", "glm4_moe", "gpt2", "gpt_neox"]
OF_EACH_KIND += ["granitemoehybrid", "jamba", "lfm2", "llama", "mamba2", "minicpm3", "olmoe", "phi3", "qwen3"]
OF_EACH_KIND += ["qwen3_next", "smollm3"]

LINEAR = rope("linear", factor=4.0)
WINDOWED: Settings = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}  # rows are longer
GROUPS: Settings = {"n_group": 2, "topk_group": 1, "n_routed_experts": 8, "num_experts": 8}
# What mlx-lm computes otherwise in some configs, and bnf_mlx.corrections puts right.
CORRECTED: list[tuple[str, str, Settings]] = [
    *((family, "RoPE scaling", LINEAR) for family in families_with(corrections._rope_scaling)),
    *((family, "sliding window", WINDOWED) for family in families_with(corrections._sliding_window)),
    ("gemma", "GELU as it was first published", {"hidden_act": "gelu"}),
    ("gpt_bigcode", "GELU's approximation", {"activation_function": "gelu_pytorch_tanh"}),
    ("gpt_neox", "exact GELU", {"hidden_act": "gelu"}),
    ("starcoder2", "GELU's approximation", {"hidden_act": "gelu_pytorch_tanh"}),
    ("glm", "partial rotation", {"partial_rotary_factor": 0.25}),
    ("glm4_moe_lite", "epsilon", {"rms_norm_eps": 1e-3}),
    ("jamba", "experts", {}),
    *((family, "expert groups", GROUPS) for family in families_with(corrections._groups_left_out)),
    ("minicpm3", "tied head", {"tie_word_embeddings": True}),
]
# What a correction has to leave as it is, and what the config alone puts right.
LEFT_ALONE: list[tuple[str, str, Settings]] = [
    *((family, "a window that is not used", {"sliding_window": 8}) for family in ("qwen2", "qwen3_moe")),
    ("smollm3", "window of the layers without positions", WINDOWED),
    ("gpt_bigcode", "exact GELU", {"activation_function": "gelu"}),
    ("gpt_neox", "GELU's approximation", {"hidden_act": "gelu_pytorch_tanh"}),
    ("starcoder2", "exact GELU", {"hidden_act": "gelu"}),
    ("jamba", "no experts", {"num_experts": 1}),
    ("llama", "yarn's own factor", rope("yarn", attention_factor=1.5, **YARN)),
    ("qwen3_moe", "yarn", rope("yarn", **YARN)),
]

# Of a published model, beside `published.PUBLISHED`: what keeps it small.
SMALLER: dict[str, Settings] = {
    "gpt_neox": {"intermediate_size": None},  # four times the hidden size
}


def settings_of(model: Published) -> Settings:
    """A published model's numbers, few layers, a small vocabulary and narrow MLPs."""
    smaller = dict(SMALLER.get(model.family, {}))
    if "intermediate_size" in smaller:
        smaller["intermediate_size"] = 4 * model.numbers["hidden_size"]
    return VERIFIED[model.family] | dict(model.numbers) | smaller


# The others take seconds each, some of them minutes, on MLX's own BLAS.
NARROWEST = {"EleutherAI/pythia-14m", "HuggingFaceTB/SmolLM2-135M", "state-spaces/mamba-130m-hf"}


UNREADABLE: dict[str, Settings] = {
    "bitnet": {},
    "gpt_oss": LOCAL_EXPERTS | WINDOW,
    "llama4_text": HEAD | {"intermediate_size_mlp": 64, "num_local_experts": 4},
    "mimo_v2_flash": {},
    "minimax": LOCAL_EXPERTS | HEAD,
    "nanochat": {},
    "olmo": {},
    "olmo_hybrid": {},
    "qwen3_5_moe_text": EXPERTS | DELTA | {"shared_expert_intermediate_size": 16},
    "recurrent_gemma": {"num_key_value_heads": 1, "num_hidden_layers": 3, "attention_window_size": 8},
}


def config_of(family: str, settings: Settings) -> PreTrainedConfig:
    """transformers' config of a family; a setting goes by one name, which some classes have several for (n_embd and
    hidden_size)."""
    kind = CONFIG_MAPPING[family]
    base: Settings = {"vocab_size": 96} if family == "dbrx" else BASE
    merged = {kind.attribute_map.get(name, name): value for given in (base, settings) for name, value in given.items()}
    return kind(**copy.deepcopy(merged))  # transformers writes into what it is given


def make(folder: Path, family: str, settings: Settings) -> Path:
    """A tiny checkpoint of the family, as transformers saves it (gpt2: under the names it was published with)."""
    from safetensors.numpy import load_file, save_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of(family, settings)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():  # initial weights give logits too flat to tell positions apart
            # A wide sum of such weights would give states so large that float32 has no digits left for a comparison.
            p.add_(torch.randn_like(p) * (min(0.1, 0.57 / p.shape[-1] ** 0.5) if p.ndim > 1 else 0.03))
        for name, b in model.named_buffers():  # a router's corrections, zero at first
            if "bias" in name and b.is_floating_point():
                b.add_(torch.randn_like(b) * 0.5 - 1)  # scores below zero, but for some
        if family == "gemma4_text":  # its scores have no scale but what the keys' norm has learned
            for name, p in model.named_parameters():
                if name.endswith("k_norm.weight"):
                    p.mul_(p.numel() ** -0.5)
    model.save_pretrained(folder)
    if family == "gpt2":
        weights = load_file(folder / "model.safetensors")
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def checked(folder: Path) -> Result:
    return compare(folder, ["torch", "mlx"], rows(folder, None, Console()))


def at_real_numbers(model: Published, folder: Path) -> Result:
    """Two rows of random tokens: fewer than `bnf check-model` takes, for wide models take long on MLX's own BLAS. Both
    chosen: the losses of two rows of both labels cancel to whatever is left, and no relative error says anything."""
    batch = rows(make(folder, model.family, settings_of(model)), None, Console())
    few = [Example(tuple(ids[:8]), tuple(ids[8:24]), True) for ids in batch.input_ids[:2].tolist()]
    return compare(folder, ["torch", "mlx"], collate(few, 2))


# Of published numbers at which the backends do not agree with MLX's own BLAS, which on Linux adds products one after
# another; an entry goes when they do.
KNOWN_FAILURES = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "log-odds are off from float64's by 1.5e-5, where 1e-5 is allowed; 4.0e-6 with "
    "OpenBLAS, 1.3e-6 on PyTorch"
}
OWN_BLAS = platform.system() == "Linux" and "openblas" not in os.environ.get("LD_PRELOAD", "")


def marks_of(model: Published) -> list[pytest.MarkDecorator]:
    marks = [] if model.model in NARROWEST else [pytest.mark.slow]
    if reason := KNOWN_FAILURES.get(model.model):
        marks.append(pytest.mark.xfail(OWN_BLAS, reason=reason, strict=True))
    return marks


@pytest.mark.parametrize("model", [pytest.param(model, id=model.model, marks=marks_of(model)) for model in PUBLISHED])
def test_a_family_agrees_at_the_numbers_of_a_published_model(model: Published, tmp_path: Path) -> None:
    result = at_real_numbers(model, tmp_path)
    assert result.agree, (result.comparisons, result.divergence)


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.model)
def test_a_checkpoint_has_the_numbers_it_is_named_for(model: Published) -> None:
    kind = CONFIG_MAPPING[model.family]
    made = config_of(model.family, settings_of(model)).to_dict()
    numbers = {kind.attribute_map.get(name, name): value for name, value in model.numbers.items()}
    moved = {"rope_parameters", "global_head_dim"}  # completed; told layer by layer
    assert {name: made.get(name) for name in numbers.keys() - moved} == {n: numbers[n] for n in numbers.keys() - moved}


@pytest.mark.parametrize("family", fast_of(VERIFIED, *OF_EACH_KIND))
def test_a_verified_family_agrees(family: str, tmp_path: Path) -> None:
    result = checked(make(tmp_path, family, VERIFIED[family]))
    assert result.agree, (result.comparisons, result.divergence)
    assert result.gradients
    MLXBackend().load(tmp_path, device="cpu")  # and is not refused


ADAPTED = {"mixtral", "glm4_moe", "granitemoe", "phimoe", "dbrx", "nemotron_h"}  # fast: one of each way to be a mixture


@pytest.mark.parametrize(
    "family", [name if name in ADAPTED else pytest.param(name, marks=pytest.mark.slow) for name in VERIFIED]
)
def test_all_linear_adapts_the_same_layers_of_a_family(family: str, tmp_path: Path) -> None:
    """Rejects PEFT's own choice, which adapts the experts of some mixtures, and mlx-lm's, which adapts routers."""
    folder = make(tmp_path, family, VERIFIED[family])
    options: Any = {"device": "cpu", "dtype": "float32", "fine_tune_type": "lora", "lora": LoraConfig(rank=2)}
    engines: list[Any] = [registry.get(name).load(folder, **options) for name in ("torch", "mlx")]
    torch_paths = {name for name, module in engines[0].base.named_modules() if hasattr(module, "lora_A")}
    mlx_paths = {name for name, module in engines[1].model.named_modules() if "lora_a" in module}
    ours, theirs = ({module_path(name) for name in paths} for paths in (torch_paths, mlx_paths))
    assert ours == theirs
    assert theirs
    assert not [name for name in engines[0].trainable if ".experts." in name or ".gate." in name or "router" in name]


@pytest.mark.parametrize(("family", "target"), [("glm4_moe", "gate_proj"), ("deepseek_v3", "kv_b_proj")])
def test_what_one_backend_could_not_adapt_is_no_target(family: str, target: str, tmp_path: Path) -> None:
    """Experts, of a model whose first layer has none; and what is kept as matrices by head."""
    folder = make(tmp_path, family, VERIFIED[family])
    for name in ("torch", "mlx"):
        with pytest.raises(UserError, match=rf"no linear layer is called {target}; this model has k"):
            registry.get(name).load(folder, device="cpu", fine_tune_type="lora", lora=LoraConfig(targets=[target]))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param(
            family, VERIFIED[family] | settings, id=f"{family}: {what}",
            marks=[pytest.mark.slow] if what in (before[1] for before in (*CORRECTED, *LEFT_ALONE)[:i]) else [],
        )
        for i, (family, what, settings) in enumerate((*CORRECTED, *LEFT_ALONE))
    ],
)  # fmt: skip
def test_a_corrected_model_agrees(family: str, settings: Settings, tmp_path: Path) -> None:
    result = checked(make(tmp_path, family, settings))
    assert result.agree, (result.comparisons, result.divergence)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [pytest.param(family, VERIFIED[family] | settings, id=f"{family}: {what}") for family, what, settings in CORRECTED],
)
def test_without_its_correction_a_model_does_not_agree(
    family: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corrections, "CORRECTIONS", dict(corrections.CORRECTIONS) | {family: ()})
    monkeypatch.setattr(check_model, "diagnose", lambda *_: None)  # that it differs is enough
    folder = make(tmp_path, family, settings)
    try:
        result = checked(folder)
    except UserError:  # mlx-lm stops at it
        return
    assert not result.agree, result.comparisons


def dbrx(folder: Path, attention: float, table: float | None) -> Path:
    """Made with the RoPE base of `rope()`; its config says these."""
    make(folder, "dbrx", VERIFIED["dbrx"])
    config = json.loads((folder / "config.json").read_text())
    config["attn_config"]["rope_theta"] = attention
    config["rope_parameters"] = None if table is None else config["rope_parameters"] | {"rope_theta": table}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_dbrx_as_published_keeps_its_rope_base(tmp_path: Path) -> None:
    """In attn_config alone, where transformers does not look."""
    published = dbrx(tmp_path / "published", 500_000.0, None)
    result = checked(published)
    assert result.agree, result.comparisons
    said_twice, other = dbrx(tmp_path / "twice", 500_000.0, 500_000.0), dbrx(tmp_path / "other", 10_000.0, 10_000.0)
    batch = collate([Example(tuple(range(20)), tuple(range(20, 40)), True)], 1)
    for name in ("torch", "mlx"):
        load = registry.get(name).load
        one, same, another = (
            load(folder, device="cpu").reference_log_odds(batch) for folder in (published, said_twice, other)
        )
        np.testing.assert_array_equal(one, same)
        assert relative_error(another, one) > 1e-3


@pytest.mark.parametrize("backend_name", ["torch", "mlx"])
def test_two_rope_bases_are_refused(backend_name: str, tmp_path: Path) -> None:
    folder = dbrx(tmp_path, 500_000.0, 10_000.0)
    with pytest.raises(UserError, match="the RoPE base is 500000 in attn_config and 10000 in rope_parameters"):
        registry.get(backend_name).load(folder, device="cpu")


def long(folder: Path, family: str) -> Path:
    """Rotated otherwise beyond 32 tokens; rows are of up to 64."""
    short: Settings = {"original_max_position_embeddings": 32}
    return make(folder, family, VERIFIED[family] | short | {"rope_parameters": LONGROPE["rope_parameters"] | short})


@pytest.mark.parametrize("family", ["phi3", "minicpm3"])
def test_long_rows_are_rotated_by_the_long_factors(family: str, tmp_path: Path) -> None:
    result = checked(long(tmp_path, family))
    assert result.agree, (result.comparisons, result.divergence)


@pytest.mark.parametrize(
    "family", [slow(family) if family == "mimo_v2_flash" else family for family in UNREADABLE]
)  # it is large
def test_an_unreadable_family_stops_mlx(family: str, tmp_path: Path) -> None:
    folder = make(tmp_path, family, UNREADABLE[family])
    with pytest.raises(UserError, match=r"mlx-lm cannot load this model|needs another package"):
        Inspector(folder)


def test_everything_that_is_claimed_is_tested() -> None:
    at_real_numbers: dict[str, list[str]] = {}
    for model in PUBLISHED:
        at_real_numbers.setdefault(model.family, []).append(model.model.rpartition("/")[2])
    assert {family: ", ".join(models) for family, models in at_real_numbers.items()} == families.AT_REAL_NUMBERS
    assert VERIFIED.keys() == families.AT_REAL_NUMBERS.keys() | families.AT_SMALL_NUMBERS
    assert not families.AT_REAL_NUMBERS.keys() & families.AT_SMALL_NUMBERS
    assert UNREADABLE.keys() == families.UNREADABLE.keys()
    assert not VERIFIED.keys() & families.UNREADABLE.keys()


def test_no_published_config_of_a_verified_family_needs_a_note(tmp_path: Path) -> None:
    for model in PUBLISHED:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model.family} | dict(model.numbers)))
        said = [note for note in families.notes(tmp_path) if "keep --max-length" not in note]
        assert model.family not in families.VERIFIED or not said, model.model


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("cohere", "cohere agrees with PyTorch in small, but nobody has compared it at real sizes: `bnf check-model"),
        ("granite", "granite was compared with PyTorch at the numbers of granite-3.1-2b-instruct alone"),
        ("abacus", "abacus has not been compared between PyTorch and MLX"),
        ("llama", ""),
    ],
)
def test_what_nobody_has_compared_at_real_sizes_is_said(family: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (note,) = MLXBackend().notes(tmp_path) or [""]
    assert said in note and bool(said) == bool(note)


def test_where_a_long_row_changes_its_neighbours_that_is_said(tmp_path: Path) -> None:
    folder = long(tmp_path, "phi3")
    few, many = (Example(tuple(range(n)), tuple(range(n, n + 8)), True) for n in (20, 80))
    for name in ("torch", "mlx"):
        alone, beside, even = (
            registry.get(name).load(folder, device="cpu").reference_log_odds(collate(batch, len(batch)))[:8]
            for batch in ([few], [few, many], [few, few])
        )
        assert relative_error(alone, beside) > 1e-3 > 1e-5 > relative_error(alone, even)
        assert any("a row of more than 32 tokens" in note for note in registry.get(name).notes(folder))


GEMMA3 = next(model for model in PUBLISHED if model.model.endswith("gemma-3-270m"))


def test_rounding_the_embedding_scale_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corrections, "CORRECTIONS", dict(corrections.CORRECTIONS) | {"gemma3_text": ()})
    result = checked(make(tmp_path, "gemma3_text", VERIFIED["gemma3_text"]))
    assert [c.quantity for c in result.comparisons if not c.agrees][:2] == ["log-odds, reference", "log-odds, policy"]
    assert result.divergence is not None and result.divergence.where == "what goes into layers.0"


# Of the error that bfloat16 itself makes: frameworks round at other places within a layer.
BFLOAT16_EXCESS = 1.5


@pytest.mark.parametrize(
    "name", ["SmolLM2-135M", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma-3-270m", "Qwen2.5-0.5B"))]
)
def test_in_bfloat16_mlx_is_as_near_to_float32_as_pytorch(name: str, tmp_path: Path) -> None:
    model = next(model for model in PUBLISHED if model.model.endswith(name))
    folder = make(tmp_path, model.family, settings_of(model))
    batch = rows(folder, None, Console())

    def log_odds(backend: str, dtype: str) -> Array:
        return registry.get(backend).load(folder, device="cpu", dtype=dtype).reference_log_odds(batch)

    exact = log_odds("torch", "float32")
    theirs, ours = (float(np.square(log_odds(name, "bfloat16") - exact).mean()) for name in ("torch", "mlx"))
    assert 0 < ours**0.5 <= BFLOAT16_EXCESS * theirs**0.5, (ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gemmas_scaled_embeddings_are_transformers_to_the_bit(dtype: str, tmp_path: Path) -> None:
    """In half precision transformers rounds the scale to the dtype of the weights; so does MLX."""
    import mlx.core as mx
    from transformers import AutoModelForCausalLM

    from bnf_mlx.inspection import _recording
    from bnf_mlx.model import DTYPES, load_model

    folder = make(tmp_path, GEMMA3.family, settings_of(GEMMA3))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    ids = torch.arange(96)[None]
    expected = theirs.get_input_embeddings()(ids).detach().float().numpy()
    ours = load_model(folder, mx.Device(mx.cpu), DTYPES[dtype])
    seen: dict[str, tuple[mx.array, mx.array]] = {}
    with mx.stream(mx.cpu), _recording(ours, seen):
        ours(mx.array(ids.numpy()))
        into_first_layer = np.array(seen["layers.0"][0].astype(mx.float32))
    assert np.array_equal(into_first_layer, expected)


# What mlx-lm reads


def test_rope_settings_move_to_where_mlx_lm_reads_them() -> None:
    llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    config = {"rope_parameters": llama3 | {"partial_rotary_factor": 0.5}}
    normalised = model_config.normalised_config(config)
    assert normalised["rope_theta"] == 500000.0
    assert normalised["partial_rotary_factor"] == 0.5
    assert normalised["rope_scaling"]["rope_type"] == normalised["rope_scaling"]["type"] == "llama3"
    assert normalised["rope_scaling"]["low_freq_factor"] == 1.0
    assert list(config) == ["rope_parameters"], "the caller's dictionary is not changed"
    by_layer = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    normalised = model_config.normalised_config({"text_config": {"rope_parameters": by_layer}})["text_config"]
    assert (normalised["rope_theta"], normalised["rope_local_base_freq"]) == (1e6, 1e4)
    assert normalised["rope_scaling"] is None
    kept = model_config.normalised_config({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 8.0}})
    assert kept["rope_theta"] == 7.0


def test_a_config_of_before_a_renaming_keeps_what_it_says() -> None:
    old = {"model_type": "gpt_neox", "rotary_emb_base": 20_000, "rotary_pct": 0.5}
    assert model_config.normalised_config(old).items() >= old.items()


def test_defaults_and_renamed_keys_are_found_inside_a_text_config_too(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 48}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = model_config.full_config(tmp_path)["text_config"]
    assert text["hidden_size"] == 48 and text["num_attention_heads"] == 8
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)


def test_infinity_is_a_number() -> None:
    config = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert model_config.normalised_config(config)["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize(
    ("torch_name", "mlx_name", "path"),
    [
        ("model.layers.3.mlp", "model.layers.3.mlp", "layers.3.mlp"),
        ("gpt_neox.layers.0", "model.h.0", "layers.0"),
        ("model.embed_tokens", "language_model.model.embed_tokens", "embed_tokens"),
        ("lm_head", "lm_head", "lm_head"),
        ("", "", ""),
    ],
)
def test_modules_go_by_one_path(torch_name: str, mlx_name: str, path: str) -> None:
    assert model_config.module_path(torch_name) == model_config.module_path(mlx_name) == path


# Training


def test_training_a_family_that_was_not_compared_says_so(
    tiny_model: Path,
    feedback: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bnf_align import cli

    monkeypatch.setenv("LD_PRELOAD", "")
    command = f"train --model {tiny_model} --data {feedback} --max-steps 1 --output {tmp_path}/run --backend"
    monkeypatch.setattr(families, "VERIFIED", frozenset())
    monkeypatch.setattr(families, "AT_REAL_NUMBERS", {})
    assert cli.run([*command.split(), "mlx"]) == 0
    assert "llama has not been compared" in " ".join(capsys.readouterr().out.split())
    assert cli.run([*command.split(), "torch", "--overwrite"]) == 0
    assert "not been compared" not in capsys.readouterr().out


# docs/models.md


def described() -> str:
    """What the tables of bnf_mlx.families say, for docs/models.md."""
    lines = ["## Verified", "", "| family | at the numbers of |", "|---|---|"]
    lines += [f"| `{name}` | {families.AT_REAL_NUMBERS[name]} |" for name in sorted(families.VERIFIED)]
    lines += ["", "## Compared", "", "| family | at the numbers of |", "|---|---|"]
    rest = families.AT_REAL_NUMBERS.keys() - families.VERIFIED
    lines += [f"| `{name}` | {families.AT_REAL_NUMBERS[name]} |" for name in sorted(rest)]
    small = ", ".join(f"`{name}`" for name in sorted(families.AT_SMALL_NUMBERS))
    lines += [f"| {small} | no published model: tiny ones |", ""]
    lines += [
        "## Not readable",
        "",
        "Not by mlx-lm, as transformers saves them.",
        "",
        "| family | reason |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {reason} |" for name, reason in sorted(families.UNREADABLE.items())]
    return "\n".join(lines) + "\n"


def test_the_page_says_what_the_tables_say() -> None:
    assert described() in (DOCS / "models.md").read_text(), f"docs/models.md should hold:\n{described()}"
