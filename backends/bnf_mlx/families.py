"""Which families agree between mlx-lm and transformers, as `bnf_mlx.corrections` has them, and where they still differ:
found with `bnf check-model`, transformers 5.23 beside mlx-lm 0.32.2."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bnf_core.errors import UserError
from bnf_core.models.model_config import Config, family_of, full_config, rope_scaling

# Families that tests/integration/test_families.py holds to agreement, in log-odds, loss and gradients.
VERIFIED = frozenset(
    """
    afmoe apertus cohere cohere2 dbrx deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1
    falcon_mamba gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gptj
    granite granitemoe granitemoehybrid helium hunyuan_v1_dense jamba lfm2 lfm2_moe llama mamba mamba2 minicpm3
    minimax_m2 ministral3 mistral mixtral nemotron nemotron_h olmo2 olmo3 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3
    qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open stablelm starcoder2
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


def _other_rope_base(config: Config) -> bool:
    attention = config.get("attn_config")
    base = attention.get("rope_theta") if isinstance(attention, dict) else None
    return base is not None and base != config.get("rope_theta")


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        frozenset(("dbrx",)),
        _other_rope_base,
        "mlx-lm takes the RoPE base from attn_config, transformers from rope_parameters ({rope_theta}), and these "
        "differ: write the right one into both",
        wrong=True,
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
