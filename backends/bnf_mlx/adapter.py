"""LoRA through mlx-lm: added, switched off for the reference, saved and loaded in mlx-lm's own layout."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from bnf_core.config import LoraConfig
from bnf_core.errors import UserError
from bnf_core.files import replacing
from bnf_core.lora import initial_lora_a


def add_lora(model: nn.Module, lora: LoraConfig, seed: int) -> nn.Module:
    """A fresh float32 adapter: A as drawn by `bnf_core.lora`, B zero.

    Raises:
        UserError: a target that is no linear layer of this model's decoder layers.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    linear = sorted({name for layer in model.layers for name, m in layer.named_modules() if _is_linear(m)})
    if lora.targets == ["all-linear"]:
        keys = linear
    else:
        keys = [path for path in linear if _last(path) in lora.targets]
        if unknown := sorted(set(lora.targets) - set(map(_last, linear))):
            raise UserError(
                f"lora.targets: no linear layer is called {', '.join(unknown)}; "
                f"this model has {', '.join(sorted(set(map(_last, linear))))}"
            )
    parameters = {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout, "keys": keys}
    linear_to_lora_layers(model, len(model.layers), parameters)
    for name, module in _adapted(model):
        a = initial_lora_a(name, lora.rank, module.lora_a.shape[0], seed)  # (r, in)
        module.lora_a = mx.array(a.T)  # (in, r)
    model.eval()  # new modules are in training mode, and would drop inputs
    return model


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is the reference: the same weights, without the adapter."""
    adapted = _adapted(model)
    _put(model, [(name, _base(module)) for name, module in adapted])
    try:
        yield
    finally:
        _put(model, adapted)


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """A saved mlx-lm adapter (LoRA or DoRA), ready to be trained further; its parameters become float32.

    Raises:
        UserError: not an mlx-lm adapter, or made for another model.
    """
    from mlx_lm.tuner.utils import load_adapters

    config_file, weights_file = folder / "adapter_config.json", folder / "adapters.safetensors"
    if (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{folder} holds a PEFT adapter, and this is the mlx backend: use --backend torch")
    if not config_file.is_file():
        raise UserError(f"{folder} is not an adapter: it has no adapter_config.json")
    if not weights_file.is_file():
        raise UserError(f"{folder} has no adapters.safetensors; other files of weights are not loaded")
    try:
        config = json.loads(config_file.read_text())
        kind = config.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora"):
            raise UserError(f"{folder} was made with fine_tune_type {kind}: expected lora or dora")
        load_adapters(model, str(folder))
        saved = set(mx.load(str(weights_file)))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: this adapter does not fit the model: {reason}") from error
    expected = dict(tree_flatten(model.trainable_parameters()))
    if absent := sorted(set(expected) - saved):
        raise UserError(
            f"{folder}: this adapter does not fit the model: {len(absent)} of {len(expected)} tensors are missing, "
            f"the first is {absent[0]}"
        )
    model.update(tree_unflatten([(name, x.astype(mx.float32)) for name, x in expected.items()]))
    model.eval()
    return model


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write adapters.safetensors and adapter_config.json, all or nothing.

    Raises:
        UserError: the model has no adapter.
    """
    adapted = _adapted(model)
    if not adapted:
        raise UserError("there is no adapter to save")
    with replacing(folder) as partial:
        mx.save_safetensors(str(partial / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
        (partial / "adapter_config.json").write_text(json.dumps(_config(model, adapted), indent=2) + "\n")


def _config(model: nn.Module, adapted: list[tuple[str, Any]]) -> dict[str, Any]:
    """adapter_config.json: mlx-lm has one rank, scale and dropout for the whole model."""
    module = adapted[0][1]
    in_layer = sorted({key for layer in model.layers for key, _ in _adapted(layer)})
    return {
        "fine_tune_type": "dora" if "m" in module else "lora",
        "num_layers": len(model.layers),
        "lora_parameters": {
            "rank": module.lora_b.shape[-1 if module.lora_b.ndim == 3 else 0],  # of experts: (experts, out, r)
            "scale": module.scale,
            "dropout": round(1.0 - module.dropout._p_1, 9),
            "keys": in_layer,
        },
    }


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """Adapter modules by path: mlx-lm's LoRA and DoRA, for linear, expert and embedding layers alike."""
    return [(name, module) for name, module in model.named_modules() if "lora_a" in module]


def _base(module: Any) -> nn.Module:
    return module.linear if "linear" in module else module.embedding


def _put(model: nn.Module, modules: list[tuple[str, Any]]) -> None:
    model.update_modules(tree_unflatten(modules))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.QuantizedLinear)


def _last(path: str) -> str:
    return path.rpartition(".")[2]
