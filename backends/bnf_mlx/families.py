"""Which families agree between mlx-lm and transformers, as `bnf_mlx.corrections` has them: found with
`bnf check-model`, transformers 5.23 beside mlx-lm 0.32.2."""

from collections.abc import Mapping
from pathlib import Path

from bnf_core.models.model_config import family_of, full_config, rotation_note

# The published models at whose numbers a family's backends agree in log-odds, loss and gradients, with few layers and a
# small vocabulary: tests/integration/test_families.py holds them to it.
AT_REAL_NUMBERS: Mapping[str, str] = {
    "deepseek_v2": "DeepSeek-V2-Lite, DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "ernie4_5": "ERNIE-4.5-0.3B-PT",
    "exaone4": "EXAONE-4.0-32B",
    "gemma": "gemma-2b, gemma-7b",
    "gemma2": "gemma-2-2b, gemma-2-27b",
    "gemma3_text": "gemma-3-270m, gemma-3-1b-it, gemma-3-4b-it",
    "gemma4_text": "gemma-4-E2B-it, gemma-4-E4B-it",
    "glm": "glm-4-9b-chat",
    "gpt2": "gpt2, gpt2-medium",
    "gpt_bigcode": "starcoderbase-1b, starcoderbase-3b",
    "gpt_neox": "pythia-14m, pythia-160m, pythia-1b",
    "gptj": "gpt-j-6b",
    "granite": "granite-3.1-2b-instruct",
    "helium": "helium-1-preview-2b",
    "jamba": "Jamba-v0.1",
    "lfm2": "LFM2-350M, LFM2-1.2B",
    "llama": "SmolLM2-135M, SmolLM2-360M, Llama-3.2-1B, Llama-3.2-3B",
    "mamba": "mamba-130m-hf, mamba-370m-hf",
    "mamba2": "mamba2-130m, mamba2-370m",
    "minicpm3": "MiniCPM3-4B",
    "ministral3": "Devstral-Small-2-24B-Instruct-2512, Ministral-3-8B-Base-2512",
    "mistral": "Mistral-7B-v0.1, Mistral-7B-v0.3",
    "mixtral": "Mixtral-8x7B-v0.1, Mixtral-8x22B-v0.1",
    "nemotron": "Minitron-4B-Base, nemotron-3-8b-base-4k",
    "nemotron_h": "Nemotron-H-4B-Base-8K, Nemotron-H-8B-Base-8K",
    "olmo2": "OLMo-2-1124-7B, OLMo-2-1124-13B",
    "olmo3": "Olmo-3-7B-Instruct, Olmo-3.1-32B-Instruct",
    "olmoe": "OLMoE-1B-7B-0924",
    "phi": "phi-1, phi-2",
    "phi3": "Phi-3-mini-4k-instruct, Phi-3.5-vision-instruct",
    "qwen2": "Qwen2.5-0.5B, Qwen2.5-1.5B",
    "qwen3": "Qwen3-0.6B, Qwen3-1.7B",
    "qwen3_5_text": "Qwen3.5-0.8B, Qwen3.5-2B",
    "qwen3_moe": "Qwen3-30B-A3B, Qwen3-235B-A22B",
    "qwen3_next": "Qwen3-Next-80B-A3B-Instruct",
    "smollm3": "SmolLM3-3B",
    "stablelm": "stablelm-3b-4e1t",
    "starcoder2": "starcoder2-3b, starcoder2-7b",
}
# Families whose backends agree on a tiny model of numbers made up for it.
AT_SMALL_NUMBERS = frozenset(
    """
    afmoe apertus cohere cohere2 dbrx dots1 ernie4_5_moe exaone_moe falcon_h1 falcon_mamba glm4 glm4_moe
    glm4_moe_lite granitemoe granitemoehybrid hunyuan_v1_dense lfm2_moe minimax_m2 phimoe qwen2_moe seed_oss
    solar_open
    """.split()
)
# Families that agree at two sizes at least.
VERIFIED = frozenset(family for family, models in AT_REAL_NUMBERS.items() if ", " in models)

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


def notes(folder: Path) -> list[str]:
    """What to know of this model on MLX; nothing for a family known to agree."""
    family, config = family_of(folder), full_config(folder)
    said = [f"{family} on MLX: {text}" for text in rotation_note(config)]
    if family in VERIFIED:
        return said
    check = f"`bnf check-model {folder}` compares this one, where both backends are installed"
    if family in AT_REAL_NUMBERS:
        return [*said, f"{family} was compared with PyTorch at the numbers of {AT_REAL_NUMBERS[family]} alone: {check}"]
    if family in AT_SMALL_NUMBERS:
        return [*said, f"{family} agrees with PyTorch in small, but nobody has compared it at real sizes: {check}"]
    return said or [f"{family} has not been compared between PyTorch and MLX: {check}"]
