"""A checkpoint's config as both frameworks read it, and the names that both have for a model's modules.

transformers keeps everything rotary in one table, renames keys between versions and leaves out whatever has its
default. mlx-lm's models look for the names that each family was published with and, where they find none, stop or
silently take a default of their own. A normalised config says it both ways.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bnf_core.errors import UserError

Config = dict[str, Any]

# Where layers of two types have tables of their own, mlx-lm's top-level keys mean the first's.
GLOBAL_LAYERS, LOCAL_LAYERS = "full_attention", "sliding_attention"

# What a family's mlx-lm model reads, from transformers' resolved config.
DERIVED: Mapping[str, Mapping[str, Callable[[Config], Any]]] = {
    "apertus": {"mlp_bias": lambda _: False, "post_norm": lambda _: False, "qk_norm": lambda _: True},
    "dbrx": {"attn_config": lambda c: c["attn_config"] | {"rope_theta": c["rope_theta"]}},
    "exaone4": {
        "sliding_window_pattern": lambda c: "".join("L" if t == LOCAL_LAYERS else "G" for t in c["layer_types"])
    },
    "exaone_moe": {"is_moe_layer": lambda c: [kind == "sparse" for kind in c["mlp_layer_types"]]},
    "gemma": {"hidden_act": lambda c: "gelu_pytorch_tanh" if c["hidden_act"] == "gelu" else c["hidden_act"]},
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
    "nemotron_h": {"time_step_limit": lambda c: [c["time_step_min"], math.inf]},  # transformers has no other
    "qwen3_5_moe_text": {"model_type": lambda _: "qwen3_5_moe"},
    "qwen3_5_text": {"model_type": lambda _: "qwen3_5"},
    "solar_open": {
        "first_k_dense_replace": lambda _: 0,
        "partial_rotary_factor": lambda c: c.get("partial_rotary_factor", 1.0),
    },
}

# Families that look positions up in a table, learned or of sines: rows of more tokens have none. Found by giving one
# token too many to every causal language model of transformers.
TABLED_POSITIONS = frozenset(
    "bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small codegen ctrl electra ernie "
    "git gpt2 gpt_bigcode gpt_neo gptj marian mbart megatron-bert mpt mvp openai-gpt opt pegasus plbart rembert "
    "roc_bert roformer trocr xlm".split()
)
# And those whose table begins with a row for padding, and rows before it.
AFTER_PADDING = frozenset("camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl".split())

# What stands before the decoder's own modules, and what its list of layers is called.
DECODER = re.compile(r"^(?:language_model\.)?(?:model|transformer|gpt_neox|backbone)\.")
LAYERS = re.compile(r"^\w+\.(?=\d)")


def module_path(name: str) -> str:
    """A module's name within the decoder, the same in transformers and mlx-lm: `model.layers.0.mlp` and
    `gpt_neox.h.0.mlp` are both `layers.0.mlp`."""
    return LAYERS.sub("layers.", DECODER.sub("", name))


class HeadTransform(NamedTuple):
    """What a model does to hidden @ head.T + bias: soft_cap · tanh(scale · … / soft_cap)."""

    scale: float = 1.0
    soft_cap: float | None = None


def head_transforms(config: Mapping[str, Any]) -> list[HeadTransform]:
    """Those that a config's keys may mean, the likeliest first. Which of them it is, if any, comparing shows: a family
    may have a key and not heed it."""

    def number(name: str) -> float | None:
        value = config.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None

    scale = number("logit_scale") or number("lm_head_multiplier")  # cohere; falcon_h1
    if divisor := number("logits_scaling"):  # granite
        scale = 1.0 / divisor
    if (base := number("dim_model_base")) and (width := number("hidden_size")):  # minicpm
        scale = base / width
    soft_cap = number("final_logit_softcapping") or number("logits_soft_cap")  # gemma2; recurrent_gemma
    return list(dict.fromkeys([HeadTransform(scale or 1.0, soft_cap), HeadTransform()]))


def full_config(folder: Path) -> Config:
    """The config of a checkpoint folder, complete with transformers' defaults and the keys that mlx-lm reads.

    Raises:
        OSError, ValueError: config.json cannot be read.
        UserError: it has two values of one number.
    """
    return normalised_config(_merged(resolved_config(folder), raw_config(folder)))


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


def rotation_note(config: Config) -> list[str]:
    """What to know of RoPE scalings that heed the longest row of a batch; nothing for others."""
    if rope_scaling(config) not in ("longrope", "dynamic"):
        return []
    longest = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return [
        f"a row of more than {longest} tokens has every row of its micro-batch rotated otherwise, so that their losses "
        f"depend on it: keep --max-length at {longest} or below"
    ]


BEYOND = "long_factor_beyond"  # ours: the long factors, where mlx-lm is given the short ones in their place


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
    _spread_yarn(config)
    scaling = config["rope_scaling"]
    if rope_scaling(config) == "longrope" and BEYOND not in scaling:
        # mlx-lm rotates by the long factors always, transformers only in rows beyond the original length.
        factors = {"long_factor": scaling.get("short_factor"), BEYOND: scaling.get("long_factor")}
        config["rope_scaling"] = scaling | factors


def _spread_yarn(config: Config) -> None:
    """mlx-lm knows YaRN's attention factor as 0.1 · mscale · ln(factor) + 1 alone; transformers takes `mscale` only
    beside `mscale_all_dim`."""
    scaling = config["rope_scaling"]
    if rope_scaling(config) != "yarn" or scaling.get("mscale_all_dim") or (scaling.get("factor") or 1.0) <= 1.0:
        return
    given = scaling.get("attention_factor")
    mscale = 1.0 if given is None else (given - 1.0) / (0.1 * math.log(scaling["factor"]))
    config["rope_scaling"] = scaling | {"mscale": mscale}


def _float(value: Any) -> Any:
    """transformers writes an infinity, which JSON has no word for, as {"__float__": "Infinity"}."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_float(v) for v in value] if isinstance(value, list) else value


def raw_config(folder: Path) -> Config:
    config: Config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def read_config(folder: Path) -> Any:
    """transformers' configuration of a checkpoint: what the model was published with, where transformers has lost it.

    Raises:
        OSError, ValueError: transformers cannot read it.
        UserError: it has two values of one number.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type == "dbrx":
        _rope_base_of_attention(config, folder)
    return config


def _rope_base_of_attention(config: Any, folder: Path) -> None:
    """DBRX was published with its RoPE base, 500,000, in `attn_config`, where transformers has not looked since its
    version 5, and takes 10,000."""
    raw = raw_config(folder)
    published = raw.get("attn_config", {}).get("rope_theta")
    given = raw.get("rope_theta", (raw.get("rope_parameters") or {}).get("rope_theta"))
    if published is None or published == given:
        return
    if given is not None:
        raise UserError(
            f"{folder}/config.json: the RoPE base is {published:g} in attn_config and {given:g} in rope_parameters; "
            "write into both the one that the weights were trained with (Databricks' models: 500000)"
        )
    config.rope_parameters["rope_theta"] = published


def resolved_config(folder: Path) -> Config:
    """The config with every default of transformers', under its present names and the published ones; empty for a
    model that only mlx-lm knows."""
    return _from_transformers(folder, _named_both_ways)


def transformers_config(folder: Path) -> Config:
    """The config as transformers holds it, under its present names alone; empty for a model it does not know."""
    return _from_transformers(folder, lambda config: config.to_dict())


def _from_transformers(folder: Path, read: Callable[[Any], Config]) -> Config:
    try:
        return read(read_config(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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


def text_config(config: Config) -> Config:
    """What of a config describes the language model, where it describes others as well."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def position_limit(config: Config) -> int | None:
    """How many tokens a row can have at most, of a config with its defaults; None: positions are computed."""
    family = config.get("model_type")
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    found: int | None = next((config[name] for name in names if config.get(name)), None)
    if found is not None and family in AFTER_PADDING:
        return found - int(config.get("pad_token_id") or 0) - 1
    return found if family in TABLED_POSITIONS else None


def rope_scaling(config: Config) -> str | None:
    scaling = config.get("rope_scaling") or {}
    kind: str | None = scaling.get("rope_type", scaling.get("type"))
    return kind


def family_of(folder: Path) -> str:
    """The checkpoint's model_type."""
    return str(raw_config(folder).get("model_type"))
