"""What mlx-lm computes otherwise than transformers and no config key can change, put right in a loaded model.

One table says which family is corrected how. A correction gives single modules a class of their own, derived from
mlx-lm's, or another setting: mlx-lm's code stays as it is, and so do the names and shapes of the weights. What cannot
be put right is in `bnf_mlx.families`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from bnf_core.errors import UserError
from bnf_core.models.model_config import BEYOND, LOCAL_LAYERS, Config, rope_scaling, text_config
from bnf_core.storage.tensors import weight_files

Correction = Callable[[nn.Module, Config, Path], None]  # of a text model, its config and the checkpoint's folder


def correct(model: nn.Module, config: Config, folder: Path) -> None:
    """Have a model as mlx-lm loads it compute what transformers does.

    Raises:
        UserError: the checkpoint lacks what that takes.
    """
    text = text_config(config)
    inner: Any = getattr(model, "language_model", model)
    for correction in (*CORRECTIONS.get(str(text.get("model_type")), ()), _long_rotation):
        correction(inner, text, folder)


def without_ignored_scaling(config: Config) -> Config:
    """A config without the RoPE scaling that mlx-lm ignores, or stops at, and that is put right after loading."""
    text = text_config(config)
    if _rope_scaling not in CORRECTIONS.get(str(text.get("model_type")), ()):
        return config
    plain = text | {"rope_scaling": None}
    return plain if text is config else config | {"text_config": plain}


def _override(module: nn.Module, call: Callable[..., Any]) -> None:
    """Give one module a class of its own, derived from the one it has, with another `__call__`."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})


# Embeddings and heads


def _embedding_scale(model: Any, config: Config, _: Path) -> None:
    """mlx-lm rounds √hidden_size to bfloat16 in every dtype. transformers rounds it to the dtype of the weights, and so
    does MLX with a Python number."""
    body = model.model
    scale, kind = math.sqrt(config["hidden_size"]), type(body)
    body.args = replace(body.args, hidden_size=1)  # nothing is left for mlx-lm to scale by

    def call(self: Any, inputs: Any, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        embeddings = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        return kind.__call__(self, inputs, cache, embeddings * scale)

    _override(body, call)


def _tied_head_scale(model: Any, config: Config, _: Path) -> None:
    """mlx-lm scales what goes into a head of its own, and not what goes into a tied one."""
    if "lm_head" in model:
        return
    scale = config["hidden_size"] / config["dim_model_base"]

    def call(self: Any, inputs: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return self.model.embed_tokens.as_linear(self.model(inputs, mask, cache) / scale)

    _override(model, call)


# Rotary embeddings


def _rope_scaling(model: nn.Module, config: Config, _: Path) -> None:
    """mlx-lm has every kind of RoPE scaling, but not all of its models ask for it."""
    from mlx_lm.models.rope_utils import initialize_rope

    if rope_scaling(config) in (None, "default"):
        return
    for module in model.modules():
        if isinstance(rope := module.get("rope"), nn.RoPE):
            module.rope = initialize_rope(
                rope.dims, rope.base, rope.traditional, config["rope_scaling"], config["max_position_embeddings"]
            )


def _long_rotation(model: nn.Module, config: Config, _: Path) -> None:
    """longrope: mlx-lm has one set of factors. transformers takes the long ones once a batch has a position beyond the
    original length."""
    from mlx_lm.models.rope_utils import SuScaledRoPE

    if rope_scaling(config) != "longrope":
        return
    scaling = config["rope_scaling"]
    stretch = mx.array(scaling[BEYOND]) / mx.array(scaling["short_factor"])

    def call(self: Any, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        beyond = mx.max(mx.array(offset)) + x.shape[-2] > self.original_max_position_embeddings
        freqs = mx.where(beyond, self._long_freqs, self._freqs)
        scaled = x.at[..., : self.dim].multiply(self._scale)
        return mx.fast.rope(scaled, self.dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs)

    for module in model.modules():
        if isinstance(rope := module.get("rope"), SuScaledRoPE):
            rope._long_freqs = rope._freqs * stretch
            _override(rope, call)


def _partial_rotation(model: nn.Module, config: Config, _: Path) -> None:
    """mlx-lm rotates the whole head."""
    for module in model.modules():
        if isinstance(rope := module.get("rope"), nn.RoPE):
            rope.dims = int(module.head_dim * config.get("partial_rotary_factor", 1.0))


# Attention


def _sliding_window(model: Any, config: Config, _: Path) -> None:
    """mlx-lm lets every layer attend to everything."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return
    types = config.get("layer_types") or [LOCAL_LAYERS] * len(model.layers)
    for layer, layer_type in zip(model.layers, types, strict=True):
        if layer_type == LOCAL_LAYERS:
            _override(layer.self_attn, _windowed(type(layer.self_attn), window))


def _windowed(kind: type[nn.Module], window: int) -> Callable[..., mx.array]:
    from mlx_lm.models.base import create_attention_mask

    def call(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        # What a caller asks of `create_attention_mask` decides the mask's form: an array where it was one before.
        mask = create_attention_mask(x, cache, window_size=window, return_array=isinstance(mask, mx.array))
        return kind.__call__(self, x, mask, cache)

    return call


# MLPs and experts

ACTIVATIONS: Mapping[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "silu": nn.silu,
}


def _activation(up: str, down: str, gate: str | None = None) -> Correction:
    """Of an MLP with layers of these names: mlx-lm takes one activation, whatever the config says.

    Raises:
        UserError: the config says one that is not in ACTIVATIONS.
    """

    def correction(model: Any, config: Config, folder: Path) -> None:
        name = activation(config)
        if name not in ACTIVATIONS:
            raise UserError(f"{folder}: the activation {name!r} is not computed on MLX; use --backend torch")
        act = ACTIVATIONS[name]

        def call(self: Any, x: mx.array) -> mx.array:
            inner = self[up](x) if gate is None else act(self[gate](x)) * self[up](x)
            return self[down](inner if gate is not None else act(inner))

        for layer in model.layers:
            _override(layer.mlp, call)

    return correction


def activation(config: Config) -> str:
    """Of a family's MLPs, by whatever key."""
    keys = ("hidden_activation", "hidden_act", "activation_function")
    return next((str(config[key]) for key in keys if config.get(key)), "")


def _groups_left_out(model: nn.Module, _: Config, __: Path) -> None:
    """mlx-lm gives the experts of groups that were not chosen a score of 0, which beats the negative ones that a
    correction bias makes; transformers leaves them out."""

    def call(self: Any, x: mx.array) -> tuple[mx.array, mx.array]:
        shares = mx.sigmoid(x.astype(mx.float32) @ self.weight.astype(mx.float32).T)
        groups = mx.unflatten(shares + self.e_score_correction_bias, -1, (self.n_group, -1))
        best = mx.topk(groups, 2, axis=-1).sum(axis=-1, keepdims=True)
        out = self.n_group - self.topk_group
        left_out = mx.stop_gradient(mx.argpartition(best, kth=out - 1, axis=-2)[..., :out, :])
        scores = mx.put_along_axis(groups, left_out, mx.array(-mx.inf), axis=-2).flatten(-2)
        chosen = mx.stop_gradient(mx.argpartition(-scores, kth=self.top_k - 1, axis=-1)[..., : self.top_k])
        weights = mx.take_along_axis(shares, chosen, axis=-1)
        if self.top_k > 1 and self.norm_topk_prob:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return chosen, weights * self.routed_scaling_factor

    for module in model.modules():
        if "e_score_correction_bias" in module and module.topk_group < module.n_group:
            _override(module, call)


def _softmax_over_all_experts(model: Any, _: Config, __: Path) -> None:
    """mlx-lm takes the softmax over the chosen experts."""

    def call(self: Any, x: mx.array) -> mx.array:
        shares = mx.softmax(self.router(x), axis=-1, precise=True)
        chosen = mx.stop_gradient(mx.argpartition(-shares, kth=self.num_experts_per_tok - 1, axis=-1))
        chosen = chosen[..., : self.num_experts_per_tok]
        weights = mx.take_along_axis(shares, chosen, axis=-1)
        return (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)

    for layer in model.layers:
        if "router" in layer.feed_forward:
            _override(layer.feed_forward, call)


def _correction_bias(model: Any, config: Config, folder: Path) -> None:
    """mlx-lm drops the bias that is added where experts are chosen, and not where they are weighted."""

    def call(self: Any, x: mx.array) -> mx.array:
        shares = self.gate_act(self.gate(x).astype(mx.float32))
        chosen = mx.stop_gradient(mx.argpartition(-(shares + self._correction), kth=self.k - 1, axis=-1)[..., : self.k])
        weights = mx.take_along_axis(shares, chosen, axis=-1)
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), config.get("moe_norm_min", 1e-12))
        y = self.switch_mlp(x, chosen)
        y = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
        return y if self.shared_experts is None else y + self.shared_experts(x)

    files: list[Any] = [mx.load(str(path)) for path in weight_files(folder)]
    stored = {name: value for file in files for name, value in file.items()}
    for i, layer in enumerate(model.layers):
        if "switch_mlp" not in layer.mlp:
            continue
        found = [name for name in stored if name.endswith("e_score_correction_bias") and f".layers.{i}." in name]
        if not found:
            raise UserError(
                f"{folder}: layer {i} has no e_score_correction_bias, which experts are chosen with: mlx-lm's "
                "conversion drops it; use the checkpoint that was published, or --backend torch"
            )
        layer.mlp._correction = stored[found[0]].astype(mx.float32).flatten()
        _override(layer.mlp, call)


def _latent_norm_epsilon(model: Any, _: Config, __: Path) -> None:
    """Of the norms within the attention, which transformers leaves at its default."""
    for layer in model.layers:
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if name in layer.self_attn:
                layer.self_attn[name].eps = 1e-6


_scaled_only = "cohere cohere2 ernie4_5 glm4 helium lfm2 lfm2_moe minimax_m2 phi stablelm".split()
CORRECTIONS: Mapping[str, tuple[Correction, ...]] = {
    **{family: (_rope_scaling,) for family in _scaled_only},
    **{family: (_groups_left_out,) for family in "deepseek_v3 exaone_moe nemotron_h".split()},
    **{family: (_sliding_window,) for family in "mistral phi3 phimoe qwen2 qwen3".split()},
    **{family: (_rope_scaling, _sliding_window) for family in "mixtral qwen2_moe qwen3_moe".split()},
    "dots1": (_sliding_window, _groups_left_out),
    "ernie4_5_moe": (_correction_bias,),
    "gemma": (_rope_scaling, _activation("up_proj", "down_proj", "gate_proj")),
    "gemma2": (_rope_scaling, _sliding_window),
    "gemma3_text": (_embedding_scale,),
    "glm": (_partial_rotation, _rope_scaling),
    "glm4_moe": (_rope_scaling, _groups_left_out),
    "glm4_moe_lite": (_latent_norm_epsilon, _groups_left_out),
    "gpt_bigcode": (_activation("c_fc", "c_proj"),),
    "gpt_neox": (_rope_scaling, _activation("dense_h_to_4h", "dense_4h_to_h")),
    "jamba": (_softmax_over_all_experts,),
    "minicpm3": (_tied_head_scale,),
    "solar_open": (_rope_scaling, _groups_left_out),
    "starcoder2": (_rope_scaling, _sliding_window, _activation("c_fc", "c_proj")),
}  # fmt: skip
