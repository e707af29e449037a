"""Model families on MLX: what mlx-lm reads from a config that transformers wrote, and where the two are known to differ.

transformers keeps everything rotary in one table, renames keys between versions and leaves out whatever has its
default. mlx-lm's models look for the names that each family was published with and, where they find none, stop or
silently take a default of their own. One function makes up for all of it, from tables.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Config = dict[str, Any]

# Where layers of two types have tables of their own, mlx-lm's top-level keys mean the first's.
GLOBAL_LAYERS, LOCAL_LAYERS = "full_attention", "sliding_attention"

# What a family's mlx-lm model reads: another key's value, by that key's name, ...
RENAMED: Mapping[str, Mapping[str, str]] = {
    "gpt2": {"n_ctx": "n_positions"},
    "gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    "lfm2": {"block_dim": "hidden_size"},
}
# ... or something that every checkpoint of the family has and transformers does not write, ...
CONSTANT: Mapping[str, Mapping[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
}
# ... or a word of its own for a kind of layer.
LAYER_TYPES: Mapping[str, Mapping[str, str]] = {
    "granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"},
}


def mlx_config(folder: Path) -> Config:
    """The config of a checkpoint folder as mlx-lm reads it.

    Raises:
        OSError, ValueError: config.json cannot be read.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return normalised_config(_merged(_resolved(folder), config))


def normalised_config(config: Config) -> Config:
    """A config, complete with transformers' defaults, as mlx-lm reads it; what it says already is kept."""
    config = {key: _float(value) for key, value in config.items()}
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = normalised_config(text)
    _spread_rope(config)
    family = str(config.get("model_type"))
    for key, source in RENAMED.get(family, {}).items():
        if config.get(key) is None and source in config:
            config[key] = config[source]
    config = dict(CONSTANT.get(family, {})) | config
    if (words := LAYER_TYPES.get(family)) and isinstance(layers := config.get("layer_types"), list):
        config["layer_types"] = [words.get(layer, layer) for layer in layers]
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
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}


def _float(value: Any) -> Any:
    """transformers writes an infinity, which JSON has no word for, as {"__float__": "Infinity"}."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_float(v) for v in value] if isinstance(value, list) else value


def _resolved(folder: Path) -> Config:
    """The config with every default of transformers', under its present names and the published ones."""
    from transformers import AutoConfig

    try:
        return _named_both_ways(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a model that only mlx-lm knows
        return {}


def _named_both_ways(config: Any) -> Config:
    full = config.to_dict()
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
