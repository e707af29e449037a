"""Model families on MLX: what mlx-lm reads from a config that transformers wrote, and where the two still differ.

transformers keeps everything rotary in one table, renames keys between versions and leaves out whatever has its
default. mlx-lm's models look for the names that each family was published with and, where they find none, stop or
silently take a default of their own. `mlx_config` makes up for that from one table. What no config can make up for is
listed below it: found with `bnf check-model` on tiny models, transformers 5.23 beside mlx-lm 0.32.2.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnf_core.errors import UserError

Config = dict[str, Any]

# Where layers of two types have tables of their own, mlx-lm's top-level keys mean the first's.
GLOBAL_LAYERS, LOCAL_LAYERS = "full_attention", "sliding_attention"

# What a family's mlx-lm model reads, from transformers' resolved config.
DERIVED: Mapping[str, Mapping[str, Callable[[Config], Any]]] = {
    "apertus": {"mlp_bias": lambda _: False, "post_norm": lambda _: False, "qk_norm": lambda _: True},
    "exaone4": {
        "sliding_window_pattern": lambda c: "".join("L" if t == LOCAL_LAYERS else "G" for t in c["layer_types"])
    },
    "exaone_moe": {"is_moe_layer": lambda c: [kind == "sparse" for kind in c["mlp_layer_types"]]},
    "gemma4_text": {
        "global_head_dim": lambda c: next(iter(c["per_layer_config"].values()))["head_dim"],
    },
    "gpt2": {"n_ctx": lambda c: c["n_positions"]},
    "gpt_neox": {"rotary_emb_base": lambda c: c["rope_theta"], "rotary_pct": lambda c: c["partial_rotary_factor"]},
    "granitemoehybrid": {
        "layer_types": lambda c: ["mamba" if t == "linear_attention" else "attention" for t in c["layer_types"]],
        "position_embedding_type": lambda c: c["position_embedding_type"] or "nope",
    },
    "lfm2": {"block_dim": lambda c: c["hidden_size"]},
    "minimax_m2": {"shared_intermediate_size": lambda _: 0},
    "qwen3_5_moe_text": {"model_type": lambda _: "qwen3_5_moe"},
    "qwen3_5_text": {"model_type": lambda _: "qwen3_5"},
    "solar_open": {
        "first_k_dense_replace": lambda _: 0,
        "partial_rotary_factor": lambda c: c.get("partial_rotary_factor", 1.0),
    },
}

# Families that tests/test_families.py holds to agreement, in log-odds, loss and gradients.
VERIFIED = frozenset(
    """
    afmoe apertus cohere cohere2 deepseek_v2 deepseek_v3 dots1 ernie4_5 exaone4 exaone_moe falcon_h1 falcon_mamba
    gemma gemma2 gemma3_text gemma4_text glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gptj granite granitemoe
    granitemoehybrid helium hunyuan_v1_dense jamba lfm2 lfm2_moe llama mamba mamba2 minicpm3 minimax_m2 ministral3
    mistral mixtral nemotron nemotron_h olmo2 olmo3 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text
    qwen3_moe qwen3_next seed_oss smollm3 solar_open stablelm starcoder2
    """.split()
)

# Families that mlx-lm has and cannot load from what transformers saves: it stops, it never loads them wrong.
UNREADABLE: Mapping[str, str] = {
    "bitnet": "mlx-lm reads packed ternary weights only",
    "gpt_oss": "mlx-lm reads MXFP4 experts only",
    "llama4_text": "mlx-lm's model of that name is another, dense one",
    "mimo_v2_flash": "mlx-lm reads the original code's config keys only",
    "minimax": "mlx-lm's model of that name is minimax_m2",
    "nanochat": "mlx-lm reads the tensor names of the original code only",
    "olmo": "mlx-lm reads the original code's checkpoints, with the package ai2-olmo",
    "olmo_hybrid": "mlx-lm knows two of the layers' norms by other names",
    "qwen3_5_moe_text": "mlx-lm reads the experts of a layer as one tensor only",
    "recurrent_gemma": "mlx-lm's model class skips MLX's own set-up",
}


@dataclass(frozen=True)
class Difference:
    """Where mlx-lm computes something else than transformers, whatever the config says."""

    families: frozenset[str]  # none: every family
    applies: Callable[[Config], bool]  # to a config as `mlx_config` gives it
    what: str  # plain words; may hold keys of the config in braces
    wrong: bool  # False: small, or in long rows only


def _families(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _activation(config: Config) -> str:
    keys = ("hidden_activation", "hidden_act", "activation_function")
    return next((str(config[key]) for key in keys if config.get(key)), "")


def _scaling(config: Config) -> str | None:
    scaling = config.get("rope_scaling") or {}
    kind: str | None = scaling.get("rope_type", scaling.get("type"))
    return kind


def _is_bfloat16(value: float) -> bool:
    return not struct.unpack("<I", struct.pack("<f", value))[0] & 0xFFFF


# The families whose sliding window mlx-lm implements; the others attend to everything.
WINDOWED = _families("afmoe cohere2 exaone4 exaone_moe gemma3_text gemma4_text gpt_oss llama ministral3 olmo3")
# The families whose RoPE scaling mlx-lm ignores.
UNSCALED = _families(
    """
    cohere cohere2 ernie4_5 gemma gemma2 glm glm4 glm4_moe gpt_neox helium lfm2 lfm2_moe minimax_m2 mixtral phi
    qwen2_moe qwen3_moe solar_open stablelm starcoder2
    """
)

DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        _families("glm"),
        lambda c: c.get("partial_rotary_factor", 1.0) != 1.0,
        "mlx-lm rotates the whole head, the checkpoint a part of {partial_rotary_factor}",
        wrong=True,
    ),
    Difference(
        _families("ernie4_5_moe"),
        lambda _: True,
        "mlx-lm chooses experts without the checkpoint's correction bias",
        wrong=True,
    ),
    Difference(
        _families("jamba"),
        lambda c: c.get("num_experts", 1) > 1,
        "mlx-lm takes the softmax over the chosen experts, transformers over all {num_experts}",
        wrong=True,
    ),
    Difference(
        _families("dbrx"),
        lambda _: True,
        "mlx-lm takes the RoPE base from attn_config, transformers from rope_parameters",
        wrong=True,
    ),
    Difference(
        UNSCALED,
        lambda c: _scaling(c) not in (None, "default", "dynamic"),
        "mlx-lm ignores the RoPE scaling",
        wrong=True,
    ),
    Difference(
        _families("minicpm3"),
        lambda c: bool(c.get("tie_word_embeddings")),
        "mlx-lm does not scale the logits of a tied head",
        wrong=True,
    ),
    Difference(
        _families("gemma gpt_bigcode starcoder2"),
        lambda c: _activation(c) in ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
        "mlx-lm computes the exact GELU, the checkpoint says its tanh approximation (about 1e-4 of the logits)",
        wrong=False,
    ),
    Difference(
        _families("gpt_neox"),
        lambda c: _activation(c) == "gelu",
        "mlx-lm computes GELU's tanh approximation, the checkpoint says the exact one (about 3e-4 of the logits)",
        wrong=False,
    ),
    Difference(
        _families("gemma3_text"),
        lambda c: not _is_bfloat16(math.sqrt(c["hidden_size"])),
        "mlx-lm rounds the embedding's scale, √{hidden_size}, to bfloat16 (up to 4e-3 of it)",
        wrong=False,
    ),
    Difference(
        _families("falcon_mamba jamba mamba"),
        lambda _: True,
        "an adapter on dt_proj does nothing in transformers, which reads the weight past it, and is trained by mlx-lm",
        wrong=False,
    ),
    Difference(
        _families("glm4_moe_lite"),
        lambda c: c.get("rms_norm_eps") != 1e-6,
        "the latent norms' epsilon is {rms_norm_eps} in mlx-lm and 1e-6 in transformers (2e-5 of the logits for 1e-5)",
        wrong=False,
    ),
    Difference(
        frozenset(),
        lambda c: (
            bool(c.get("sliding_window"))
            and c.get("use_sliding_window") is not False
            and c["model_type"] not in WINDOWED
        ),
        "mlx-lm has no sliding window for this family: rows of more than {sliding_window} tokens differ",
        wrong=False,
    ),
    Difference(
        frozenset(),
        lambda c: _scaling(c) == "longrope",
        "rows of more than {original_max_position_embeddings} tokens are rotated by the short factors, "
        "by the long ones in transformers",
        wrong=False,
    ),
)

# What stands before the decoder's own modules, and what its list of layers is called.
DECODER = re.compile(r"^(?:language_model\.)?(?:model|transformer|gpt_neox|backbone)\.")
LAYERS = re.compile(r"^\w+\.(?=\d)")


def module_path(name: str) -> str:
    """A module's name within the decoder, the same in transformers and mlx-lm: `model.layers.0.mlp` and
    `gpt_neox.h.0.mlp` are both `layers.0.mlp`."""
    return LAYERS.sub("layers.", DECODER.sub("", name))


def require_right_on_mlx(folder: Path) -> None:
    """Refuse a model that mlx-lm is known to compute wrongly.

    Raises:
        UserError: it is.
    """
    config = mlx_config(folder)
    if wrong := [text for difference, text in _differences(folder, config) if difference.wrong]:
        raise UserError(f"{folder} ({_family(folder)}) is not computed right on MLX: {wrong[0]}; use --backend torch")


def mlx_notes(folder: Path) -> list[str]:
    """What to know of this model on MLX; nothing for a family known to agree."""
    family, known = _family(folder), _differences(folder, mlx_config(folder))
    if known or family in VERIFIED:
        return [f"{family} on MLX: {text}" for _, text in known]
    return [
        f"{family} has not been compared between PyTorch and MLX: `bnf check-model {folder}` does that, "
        "where both are installed"
    ]


def _differences(folder: Path, config: Config) -> list[tuple[Difference, str]]:
    config = config | {"model_type": _family(folder)}
    return [
        (difference, difference.what.format_map(config))
        for difference in DIFFERENCES
        if (not difference.families or config["model_type"] in difference.families) and difference.applies(config)
    ]


def _family(folder: Path) -> str:
    return str(_raw(folder).get("model_type"))


def mlx_config(folder: Path) -> Config:
    """The config of a checkpoint folder as mlx-lm reads it.

    Raises:
        OSError, ValueError: config.json cannot be read.
    """
    return normalised_config(_merged(_resolved(folder), _raw(folder)))


def normalised_config(config: Config) -> Config:
    """A config, complete with transformers' defaults, as mlx-lm reads it; what it says already is kept."""
    config = {key: _float(value) for key, value in config.items()}
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = normalised_config(text)
    _spread_rope(config)
    for key, derive in DERIVED.get(str(config.get("model_type")), {}).items():
        with suppress(LookupError):  # a config from before the key it is derived from: it has the derived one
            config[key] = derive(config)
    return config


def _spread_rope(config: Config) -> None:
    """Copy the rotary table's entries to the top-level keys of before transformers 5."""
    config.setdefault("rope_scaling", None)
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if isinstance(rope.get(GLOBAL_LAYERS), dict):  # one table for each type of layer
        if isinstance(local := rope.get(LOCAL_LAYERS), dict):
            config.setdefault("rope_local_base_freq", local.get("rope_theta"))
        rope = rope[GLOBAL_LAYERS]
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key in rope and config.get(key) is None:
            config[key] = rope[key]
    if rope.get("rope_type", "default") != "default" and config["rope_scaling"] is None:
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} | {"type": rope["rope_type"]}
    if _scaling(config) == "longrope":
        # mlx-lm rotates by the long factors always, transformers only in rows beyond the original length.
        config["rope_scaling"] |= {"long_factor": config["rope_scaling"].get("short_factor")}


def _float(value: Any) -> Any:
    """transformers writes an infinity, which JSON has no word for, as {"__float__": "Infinity"}."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_float(v) for v in value] if isinstance(value, list) else value


def _raw(folder: Path) -> Config:
    config: Config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _resolved(folder: Path) -> Config:
    """The config with every default of transformers', under its present names and the published ones."""
    from transformers import AutoConfig

    try:
        return _named_both_ways(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a model that only mlx-lm knows
        return {}


def _named_both_ways(config: Any) -> Config:
    full: Config = config.to_dict()
    for published, present in config.attribute_map.items():
        if present in full:
            full.setdefault(published, full[present])
    if (text := getattr(config, "text_config", None)) is not None:
        full["text_config"] = _named_both_ways(text)
    return full


def _merged(defaults: Config, config: Config) -> Config:
    merged = defaults | config
    if isinstance(config.get("text_config"), dict) and isinstance(defaults.get("text_config"), dict):
        merged["text_config"] = defaults["text_config"] | config["text_config"]
    return merged
