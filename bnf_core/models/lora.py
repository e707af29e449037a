"""The adapter's initial weights, drawn here so that every backend starts from the same ones."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Linear layers that no adapter is put on: transformers' Mamba models read this one's weight past it.
UNADAPTED = frozenset(("dt_proj",))
# PEFT refuses an adapter on these layers of Mamba models, ...
MAMBAS = frozenset("falcon_h1 falcon_mamba mamba mamba2 nemotron_h".split())
MAMBA_REFUSED = frozenset(("out_proj",))
# ... and takes these names for a layer's experts as well, which transformers keeps in one tensor. Routers (`gate`,
# `router`, and its only `layer`) are linear layers to mlx-lm alone.
EXPERT_NAMES = frozenset("gate_proj up_proj down_proj w1 w2 w3 gate router layer".split())

# mlx-lm keeps this one of these families as matrices by head, which are no linear layer.
BY_HEAD = frozenset(
    "bailing_hybrid deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear longcat_flash mistral4".split()
)
KEPT_BY_HEAD = frozenset(("kv_b_proj",))


def unadapted(model_type: str, mixture: bool) -> frozenset[str]:
    """Names of linear layers that no adapter is put on, the same on every backend.

    Args:
        mixture: whether the model has mixtures of experts.
    """
    own = MAMBA_REFUSED if model_type in MAMBAS else KEPT_BY_HEAD if model_type in BY_HEAD else frozenset()
    return UNADAPTED | own | (EXPERT_NAMES if mixture else frozenset())


def initial_lora_a(module: str, rank: int, in_features: int, seed: int) -> NDArray[Any]:
    """A of one adapted module, (rank, in_features) float32, uniform in ±1/√in_features; B starts at zero.

    That is PEFT's Kaiming-uniform and mlx-lm's own distribution. The draw depends on the seed and the module's
    path alone, not on the order in which a framework visits its modules.

    Args:
        module: path in the model, such as `model.layers.0.self_attn.q_proj`.
    """
    digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
    draw = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    bound = 1.0 / np.sqrt(in_features)
    return draw.uniform(-bound, bound, (rank, in_features)).astype(np.float32)
