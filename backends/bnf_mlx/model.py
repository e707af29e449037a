"""A causal language model: loaded, split into a body that gives hidden states and a head, made to see packed
sequences apart and shared prompts once, and saved as a checkpoint."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from bnf_core.devices import choose_device
from bnf_core.errors import UserError
from bnf_core.models.model_config import full_config
from bnf_core.models.model_folder import copy_companions
from bnf_core.storage.files import replacing
from bnf_core.storage.tensors import INDEX, weight_files
from bnf_mlx.attention import Layout
from bnf_mlx.corrections import correct, without_ignored_scaling
from bnf_mlx.optimizer import flat

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def devices() -> list[str]:
    """What a model can be put on here, best first."""
    return ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]


def resolve_device(device: str) -> mx.Device:
    """`auto` is the best there is.

    Raises:
        UserError: the device is not present.
    """
    return mx.Device(mx.gpu if choose_device(device, devices(), "MLX") == "gpu" else mx.cpu)


def resolve_dtype(dtype: str, device: mx.Device) -> mx.Dtype | None:
    """`auto` is float32 on the CPU, and None, the checkpoint's own, on the GPU."""
    if dtype == "auto":
        return mx.float32 if device == mx.Device(mx.cpu) else None
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_model(folder: Path, device: mx.Device, dtype: mx.Dtype | None) -> nn.Module:
    """A frozen model in evaluation mode, computed as transformers does; safetensors only, no code from the checkpoint.

    Raises:
        UserError: mlx-lm cannot read it, or tensors are missing.
    """
    from mlx_lm.utils import load_model as mlx_lm_load

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model: it has no config.json")
    if not weight_files(folder):  # or the two libraries would not read the same ones
        raise UserError(f"{folder} has no model*.safetensors; pickled weights are not loaded: convert them first")
    try:
        with mx.stream(device):
            config = full_config(folder)
            if config.get("model_file") is not None:  # older versions of mlx-lm would run it
                raise UserError(f"{folder} brings code of its own, {config['model_file']}, which is never run")
            model, _ = mlx_lm_load(folder, lazy=True, model_config=without_ignored_scaling(config))
            correct(model, config, folder)
            if dtype is not None:
                cast_weights(model, dtype)
            if device == mx.Device(mx.cpu):
                multiply_in_float32(model)
            mx.eval(model.parameters())
        model.freeze()
    except UserError:
        raise
    except SystemExit as error:  # what mlx-lm does after printing which package the model needs
        raise UserError(f"{folder}: this model needs another package; mlx-lm's message is above") from error
    except Exception as error:  # mlx-lm's many model files raise whatever they like
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: mlx-lm cannot load this model: {reason}") from error
    model.eval()
    return model


def unfreeze(model: nn.Module) -> None:
    """Make all weights trainable, but those that a model keeps as they are, such as a router's biases.

    Raises:
        UserError: the weights are quantised.
    """
    if any(isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding) for module in model.modules()):
        raise UserError(
            "the weights of this model are quantised, and cannot all be trained: set fine_tune_type to lora or dora, "
            "or name the model that it was made from"
        )
    castable = getattr(model, "cast_predicate", lambda _: True)
    model.unfreeze()
    for name, module in model.named_modules():
        kept = [key for key in module if not castable(f"{name}.{key}".lstrip("."))]
        module.freeze(recurse=False, keys=kept)


def cast_weights(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast the floating parameters but those which a model keeps as they are, such as a router's biases."""
    castable = getattr(model, "cast_predicate", lambda _: True)

    def cast_one(path: str, x: mx.array) -> mx.array:
        return x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) and castable(path) else x

    model.update(tree_map_with_path(cast_one, model.parameters()))


def multiply_in_float32(model: nn.Module) -> None:
    """Have the linear layers of half precision multiply in float32 and round once. MLX adds up in float32 as well, but
    on a CPU without vector instructions: of 70 tokens the same product takes it twelve times as long."""
    for module in model.modules():
        kind = WIDE.get(type(module))  # a class derived from these computes in a way of its own
        if kind is not None and module.weight.dtype in (mx.bfloat16, mx.float16):
            module.__class__ = kind


class _WideLinear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        product: mx.array = _wide_product(x, self.weight)
        return (product + self.bias if "bias" in self else product).astype(x.dtype)


class _WideEmbedding(nn.Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return _wide_product(x, self.weight).astype(x.dtype)


WIDE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _WideLinear, nn.Embedding: _WideEmbedding}


@mx.checkpoint  # or both float32 copies of every layer would be kept for the backward pass
def _wide_product(x: mx.array, weight: mx.array) -> mx.array:
    return x.astype(mx.float32) @ weight.astype(mx.float32).T


def head_weight(model: nn.Module) -> mx.array:
    """(V, D), tied or not; of a quantised head, the weights it stands for.

    Raises:
        AttributeError: the model keeps its head elsewhere.
    """
    return dense_weight(output_head(model))


def head_bias(model: nn.Module) -> mx.array | None:
    """(V,), where the head has one."""
    return output_head(model).get("bias")


def dense_weight(layer: Any) -> mx.array:
    """(out, in), or (V, D); of a quantised layer, the weights it stands for."""
    if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return layer.weight
    return mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits, mode=layer.mode)


def completion_hidden(
    model: nn.Module, input_ids: mx.array, positions: mx.array, layout: Layout | None = None
) -> mx.array:
    """The states before the head, (N, D), at flat positions of the (B, T) grid of token ids.

    Rows are padded on the right and the model is causal, so no attention mask is needed but in the `layout` of a
    packed or shared grid.
    """
    hidden = text_model(model).model(input_ids, cache=layout)  # (B, T, D)
    return hidden.flatten(0, 1)[positions]


def completion_logits(
    model: nn.Module, input_ids: mx.array, positions: mx.array, layout: Layout | None = None
) -> mx.array:
    """The model's own logits, (N, V), at flat positions: for heads that are more than a matrix."""
    return model(input_ids, cache=layout).flatten(0, 1)[positions]


class Checkpoint:
    """A checkpoint folder as what a whole model is saved like: the same names, config and tokenizer.

    Raises:
        UserError: it holds some of the freshly loaded model's parameters in another form, such as transposed or not
            stacked, so that they could not be saved as transformers reads them. The values are compared.
    """

    def __init__(self, folder: Path, model: nn.Module):
        self.folder = folder
        self.names: dict[str, str] = {}  # in the checkpoint, by the parameter's path
        stored = _stored(folder)
        for path, value in flat(model.parameters()).items():
            near = [n for n in stored if n == path or n.endswith(f".{path}") or path.endswith(f".{n}")]
            for name in sorted(near, key=lambda n: n != path):
                same_shape = stored[name].shape == value.shape
                if same_shape and mx.array_equal(stored.pop(name).astype(value.dtype), value):  # and let go of it
                    self.names[path] = name
                    break
            else:
                raise UserError(
                    f"{folder}: mlx-lm holds {path} in another form than the checkpoint does, and this model could not "
                    "be saved whole after training: set fine_tune_type to lora or dora, or use --backend torch"
                )

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a folder that mlx-lm and transformers load, all or nothing. Tensors of the checkpoint that the model
        has no use for are copied."""
        from mlx_lm.utils import make_shards

        weights = {self.names[path]: value for path, value in flat(model.parameters()).items()}
        tied = "lm_head" not in text_model(model)  # a copy of the embedding under this name would be the old one
        for name, value in _stored(self.folder).items():
            if name not in weights and not (tied and name.endswith("lm_head.weight")):
                weights[name] = value
        shards = make_shards(weights)  # of 5 GB at most
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        files = files if len(shards) > 1 else ["model.safetensors"]
        with replacing(folder) as partial:
            copy_companions(self.folder, partial)
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            (partial / "config.json").write_text(json.dumps(_of_float32(config), indent=2) + "\n", encoding="utf-8")
            for file, shard in zip(files, shards, strict=True):
                mx.save_safetensors(str(partial / file), shard, metadata={"format": "pt"})
            if len(shards) > 1:
                index = {
                    "metadata": {"total_size": sum(value.nbytes for value in weights.values())},
                    "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
                }
                (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _of_float32(config: dict[str, Any]) -> dict[str, Any]:
    config = {k: "float32" if k in ("dtype", "torch_dtype") else v for k, v in config.items()}
    return {k: _of_float32(v) if k == "text_config" else v for k, v in config.items()}


def _stored(folder: Path) -> dict[str, mx.array]:
    """A checkpoint's tensors, read when they are used."""
    tensors: dict[str, mx.array] = {}
    for path in weight_files(folder):
        tensors |= cast(dict[str, mx.array], mx.load(str(path)))
    return tensors


def text_model(model: nn.Module) -> Any:
    return getattr(model, "language_model", model)


def output_head(model: nn.Module) -> nn.Module:
    text = text_model(model)
    return text.lm_head if "lm_head" in text else text.model.embed_tokens
