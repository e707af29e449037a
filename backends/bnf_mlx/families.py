"""Where mlx-lm's model families differ from transformers', whatever the config says: found with `bnf check-model` on
tiny models, transformers 5.23 beside mlx-lm 0.32.2."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnf_core.errors import UserError
from bnf_core.models.model_config import Config, family_of, full_config, rope_scaling
from bnf_core.storage.tensors import BFLOAT16

# Families that tests/integration/test_families.py holds to agreement, in log-odds, loss and gradients.
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
    applies: Callable[[Config], bool]  # to a config as `full_config` gives it
    what: str  # plain words; may hold keys of the config in braces
    wrong: bool  # False: small, or in long rows only


def _families(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _activation(config: Config) -> str:
    keys = ("hidden_activation", "hidden_act", "activation_function")
    return next((str(config[key]) for key in keys if config.get(key)), "")


def _is_bfloat16(value: float) -> bool:
    single = np.float32(value)
    return bool(single == single.astype(BFLOAT16).astype(np.float32))


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
        lambda c: rope_scaling(c) not in (None, "default", "dynamic"),
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
        lambda c: rope_scaling(c) == "longrope",
        "rows of more than {original_max_position_embeddings} tokens are rotated by the short factors, "
        "by the long ones in transformers",
        wrong=False,
    ),
)


def require_right_on_mlx(folder: Path) -> None:
    """Refuse a model that mlx-lm is known to compute wrongly.

    Raises:
        UserError: it is.
    """
    config = full_config(folder)
    if wrong := [text for difference, text in _differences(folder, config) if difference.wrong]:
        raise UserError(f"{folder} ({family_of(folder)}) is not computed right on MLX: {wrong[0]}; use --backend torch")


def notes(folder: Path) -> list[str]:
    """What to know of this model on MLX; nothing for a family known to agree."""
    family, known = family_of(folder), _differences(folder, full_config(folder))
    if known or family in VERIFIED:
        return [f"{family} on MLX: {text}" for _, text in known]
    return [
        f"{family} has not been compared between PyTorch and MLX: `bnf check-model {folder}` does that, "
        "where both are installed"
    ]


def _differences(folder: Path, config: Config) -> list[tuple[Difference, str]]:
    config = config | {"model_type": family_of(folder)}
    return [
        (difference, difference.what.format_map(config))
        for difference in DIFFERENCES
        if (not difference.families or config["model_type"] in difference.families) and difference.applies(config)
    ]
