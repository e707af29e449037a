"""Loading a causal language model, and splitting it into a body that gives hidden states and a head."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from bnf_core.errors import UserError
from bnf_core.families import mlx_config

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def devices() -> list[str]:
    """What a model can be put on here, best first."""
    return ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]


def resolve_device(device: str) -> mx.Device:
    """`auto` is the best there is.

    Raises:
        UserError: the device is not present.
    """
    present = devices()
    if device == "auto":
        device = present[0]
    if device not in present:
        raise UserError(f"device {device!r} is not present: MLX offers {', '.join(present)}")
    return mx.Device(mx.gpu if device == "gpu" else mx.cpu)


def resolve_dtype(dtype: str, device: mx.Device) -> mx.Dtype | None:
    """`auto` is float32 on the CPU, and None, the checkpoint's own, on the GPU."""
    if dtype == "auto":
        return mx.float32 if device == mx.Device(mx.cpu) else None
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_model(folder: Path, device: mx.Device, dtype: mx.Dtype | None) -> nn.Module:
    """A frozen model in evaluation mode; safetensors only, no code from the checkpoint.

    Raises:
        UserError: mlx-lm cannot read it, or tensors are missing.
    """
    from mlx_lm.utils import load_model as mlx_lm_load

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model: it has no config.json")
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"{folder} has no model*.safetensors; pickled weights are not loaded: convert them first")
    try:
        with mx.stream(device):
            model, _ = mlx_lm_load(folder, lazy=True, model_config=mlx_config(folder))
            if dtype is not None:
                _cast(model, dtype)
            mx.eval(model.parameters())
    except SystemExit as error:  # what mlx-lm does after printing which package the model needs
        raise UserError(f"{folder}: this model needs another package; mlx-lm's message is above") from error
    except Exception as error:  # mlx-lm's many model files raise whatever they like
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: mlx-lm cannot load this model: {reason}") from error
    model.freeze()
    model.eval()
    return model


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast the floating parameters but those which a model keeps as they are, such as a router's biases."""
    castable = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, x: mx.array) -> mx.array:
        return x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) and castable(path) else x

    model.update(tree_map_with_path(cast, model.parameters()))


def head_weight(model: nn.Module) -> mx.array:
    """(V, D), tied or not; of a quantised head, the weights it stands for.

    Raises:
        AttributeError: the model keeps its head elsewhere.
    """
    head = _head(model)
    if not isinstance(head, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return head.weight
    return mx.dequantize(head.weight, head.scales, head.biases, head.group_size, head.bits, mode=head.mode)


def completion_hidden(model: nn.Module, input_ids: mx.array, positions: mx.array) -> mx.array:
    """The states before the head, (N, D), at flat positions of the (B, T) grid of token ids.

    Rows are padded on the right and the model is causal, so no attention mask is needed.
    """
    hidden = _text_model(model).model(input_ids)  # (B, T, D)
    return hidden.flatten(0, 1)[positions]


def completion_logits(model: nn.Module, input_ids: mx.array, positions: mx.array) -> mx.array:
    """The model's own logits, (N, V), at flat positions: for heads that are more than a matrix."""
    return model(input_ids).flatten(0, 1)[positions]


def head_is_linear(model: nn.Module) -> bool:
    """Whether the logits are hidden @ head.T and nothing else. Some families scale or cap them or add a bias;
    comparing is surer than a list of them."""
    ids = mx.arange(8)[None]
    logits = completion_logits(model, ids, mx.arange(8))
    try:
        linear = completion_hidden(model, ids, mx.arange(8)) @ head_weight(model).T
        if "bias" in _head(model):  # may be smaller than half precision's tolerance
            return False
    except (AttributeError, TypeError, ValueError):  # no such parts: the model's own logits it is
        return False
    tolerance = 1e-5 if logits.dtype == mx.float32 else 2e-2
    error = mx.abs(logits.astype(mx.float32) - linear.astype(mx.float32)).max()
    return linear.shape == logits.shape and bool(error <= tolerance * mx.abs(logits).max())


def _text_model(model: nn.Module) -> Any:
    return getattr(model, "language_model", model)


def _head(model: nn.Module) -> nn.Module:
    text = _text_model(model)
    return text.lm_head if "lm_head" in text else text.model.embed_tokens
