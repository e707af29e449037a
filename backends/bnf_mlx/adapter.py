"""LoRA and DoRA through mlx-lm: added, switched off for the reference, saved and loaded in mlx-lm's own layout."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from bnf_core.config import FineTuneType, LoraConfig
from bnf_core.errors import UserError
from bnf_core.models.adapters import WEIGHTS, mlx_keys, require_adapter
from bnf_core.models.lora import initial_lora_a, unadapted
from bnf_core.models.model_config import normalised_config
from bnf_core.models.model_folder import copy_companions
from bnf_core.storage.files import replacing
from bnf_mlx.model import dense_weight
from bnf_mlx.optimizer import flat


class Dropout(nn.Dropout):
    """Drops what its key says, the same each time until it is given another: a layer that runs again in the backward
    pass must not drop other values there."""

    def __init__(self, p: float):
        super().__init__(p)
        self._key = mx.random.key(0)

    def __call__(self, x: mx.array) -> mx.array:
        if self._p_1 == 1 or not self.training:
            return x
        kept = mx.random.bernoulli(self._p_1, x.shape, key=self._key)
        return mx.where(kept, x * (1 / self._p_1), 0)


class LoRALinear(nn.Module):
    """Low-rank adaptation (LoRA, arXiv 2106.09685): W x + scale · B A x, the parameters and the result mlx-lm's.

    Its inputs are kept for the backward pass as they come, in half precision. mlx-lm's own class has MLX keep the
    float32 copy that the product with A is computed of, one for every adapted layer.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float):
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.dropout = Dropout(dropout)
        outputs, inputs = dense_weight(linear).shape
        self.lora_a = mx.zeros((inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + (self.scale * self.low_rank(x)).astype(x.dtype)

    def low_rank(self, x: mx.array) -> mx.array:
        """B A x in float32, (..., out)."""
        return _low_rank(self.dropout(x), self.lora_a) @ self.lora_b


_low_rank = mx.checkpoint(mx.matmul)  # x A, for which the backward pass widens x (..., in) again


class DoRALinear(LoRALinear):
    """Weight-decomposed low-rank adaptation (DoRA, arXiv 2402.09353), in the form in which PEFT computes it.

        y = (m / ‖W + scale · B A‖) · (W + scale · B A) x + bias        norms of rows, without gradient (section 4.3)

    mlx-lm's own class computes the same from the dequantised weights, and keeps these for the backward pass. This
    one, of the same parameters, leaves W x to the layer itself, quantised or not, and adds to it: with B = 0 the
    result is the layer's own to the last bit, and a quantised model stays small. Dropout acts on the low-rank path.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float):
        super().__init__(linear, rank, scale, dropout)
        self.m = mx.linalg.norm(dense_weight(linear).astype(mx.float32), axis=1)  # (out,)

    def __call__(self, x: mx.array) -> mx.array:
        adapted = dense_weight(self.linear) + (self.scale * self.lora_b.T) @ self.lora_a.T  # (out, in)
        stretch = self.m / mx.stop_gradient(mx.linalg.norm(adapted, axis=1))  # (out,)
        base = self.linear(x)
        product = base - self.linear.bias if "bias" in self.linear else base
        return base + ((stretch - 1) * product + (stretch * self.scale) * self.low_rank(x)).astype(x.dtype)


def add_adapter(model: nn.Module, config: LoraConfig, seed: int, kind: FineTuneType = "lora") -> nn.Module:
    """A fresh float32 adapter, `lora` or `dora`: A as drawn by `bnf_core.models.lora`, B zero, m the norms of the rows.

    Raises:
        UserError: a target that is no linear layer of this model; a DoRA adapter that mlx-lm could not load.
    """
    named = {name for layer in model.layers for name, m in layer.named_modules() if _is_linear(m)}
    named = {name for name in named if "experts" not in name.split(".")}  # a list of them, in some families
    never = never_adapted(model)
    linear = sorted(name for name in named if _last(name) not in never)
    head = [(name, m) for name, m in model.named_modules() if _last(name) == "lm_head" and _is_linear(m)]  # if not tied
    if config.targets == ["all-linear"]:
        keys, head = set(linear), []
    else:
        keys = {path for path in linear if _last(path) in config.targets}
        there = {_last(path) for path in linear} | {_last(path) for path, _ in head}
        if unknown := sorted(set(config.targets) - there):
            raise UserError(
                f"lora.targets: no linear layer is called {', '.join(unknown)}; this model has "
                f"{', '.join(sorted(there))}"
            )
        head = head if "lm_head" in config.targets else []

    def adapted(linear: Any) -> nn.Module:
        if kind == "dora":
            if 32 % getattr(linear, "bits", 32):  # mlx-lm takes A for another shape then
                raise UserError(
                    f"mlx-lm cannot load a DoRA adapter of {linear.bits}-bit weights: set fine_tune_type to lora, or "
                    "quantise the model to 2, 4 or 8 bits"
                )
            return DoRALinear(linear, config.rank, config.scale, config.dropout)
        return LoRALinear(linear, config.rank, config.scale, config.dropout)

    for layer in model.layers:
        chosen = [(name, module) for name, module in layer.named_modules() if name in keys and _is_linear(module)]
        _put(layer, [(name, adapted(module)) for name, module in chosen])
    _put(model, [(name, adapted(module)) for name, module in head])
    for name, module in _adapted(model):
        a = initial_lora_a(name, config.rank, dense_weight(module.linear).shape[1], seed)  # (r, in)
        module.lora_a = mx.array(a.T)  # (in, r)
    model.eval()  # new modules are in training mode, and would drop inputs
    return model


def new_dropout(model: nn.Module, key: mx.array) -> None:
    """Let every adapter drop other values from now on."""
    modules = _adapted(model)
    for (_, module), own in zip(modules, mx.random.split(key, len(modules)) if modules else (), strict=True):
        module.dropout._key = own


def drop_inputs(model: nn.Module) -> None:
    """For training: the adapter drops inputs, if it is to, and nothing else does. With dropout of the model's own p
    would differ from r before anything is learned, and from one cut into micro-batches to another."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not isinstance(module, Dropout):
            module.eval()


def has_dropout(model: nn.Module) -> bool:
    return any(module.dropout._p_1 < 1 for _, module in _adapted(model))


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is the reference: the same weights, without the adapter."""
    adapted = _adapted(model)
    _put(model, [(name, _base(module)) for name, module in adapted])
    try:
        yield
    finally:
        _put(model, adapted)


def load_adapter(
    model: nn.Module, folder: Path, kind: FineTuneType | None = None, config: LoraConfig | None = None
) -> nn.Module:
    """A saved mlx-lm adapter (LoRA or DoRA), ready to be trained further; its parameters become float32.

    Args:
        kind, config: what it must be for training to go on with the settings given; default: anything.
    Raises:
        UserError: not an mlx-lm adapter, made for another model, or not of that kind, rank or scale.
    """
    _put_on(model, folder, require_adapter(folder, "mlx", kind, config))
    adapted = flat(model.trainable_parameters())
    model.update(tree_unflatten([(name, x.astype(mx.float32)) for name, x in adapted.items()]))
    return _made_ours(model)


def _put_on(model: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    """A saved adapter in mlx-lm's own layers.

    Args:
        config: its adapter_config.json, as the present mlx-lm writes it.
    Raises:
        UserError: it was made for another model, or holds anything but the adapter.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    try:
        dora = config["fine_tune_type"] == "dora"
        linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"], use_dora=dora)
        saved = cast(dict[str, mx.array], mx.load(str(folder / WEIGHTS["mlx"])))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: this adapter does not fit the model: {reason}") from error
    here = {name: x.shape for name, x in flat(model.trainable_parameters()).items()}
    for name in sorted(here.keys() | saved.keys()):
        there = saved[name].shape if name in saved else None
        if there != here.get(name):
            wrong = "is missing from it" if there is None else f"has shape {there} in it, and {here.get(name)} here"
            wrong = wrong if name in here else "is not of an adapter on this model"
            raise UserError(f"{folder}: this adapter does not fit the model: {name} {wrong}")
    model.load_weights(list(saved.items()), strict=False)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write adapters.safetensors and adapter_config.json, all or nothing.

    Raises:
        UserError: the model has no adapter.
    """
    adapted = _adapted(model)
    if not adapted:
        raise UserError("there is no adapter to save")
    with replacing(folder) as partial:
        mx.save_safetensors(str(partial / "adapters.safetensors"), flat(model.trainable_parameters()))
        (partial / "adapter_config.json").write_text(json.dumps(_config(model, adapted), indent=2) + "\n")


def _config(model: nn.Module, adapted: list[tuple[str, Any]]) -> dict[str, Any]:
    """adapter_config.json: mlx-lm has one rank, scale and dropout for the whole model."""
    module = adapted[0][1]
    keys, num_layers = mlx_keys([name for name, _ in adapted], [name for name, _ in model.named_modules()])
    return {
        "fine_tune_type": "dora" if "m" in module else "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": module.lora_b.shape[-1 if module.lora_b.ndim == 3 else 0],  # of experts: (experts, out, r)
            "scale": module.scale,
            "dropout": _dropout(module),
            "keys": keys,
        },
    }


def _made_ours(model: nn.Module) -> nn.Module:
    """With this module's layers and dropout in the places of mlx-lm's, and in evaluation mode."""
    ours = []
    for name, module in _adapted(model):
        if "linear" in module and module.lora_a.ndim == 2:  # not those of experts or embeddings
            kind = DoRALinear if "m" in module else LoRALinear
            made = kind(module.linear, module.lora_a.shape[1], module.scale, _dropout(module))
            made.update({key: module[key] for key in ("lora_a", "lora_b", "m") if key in module})
            ours.append((name, made))
        else:
            module.dropout = Dropout(_dropout(module))
    _put(model, ours)
    model.eval()  # new modules are in training mode, and would drop inputs
    return model


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """Adapter modules by path: mlx-lm's LoRA and DoRA, for linear, expert and embedding layers alike."""
    return [(name, module) for name, module in model.named_modules() if "lora_a" in module]


def _dropout(module: Any) -> float:
    return round(1.0 - module.dropout._p_1, 9)


def _base(module: Any) -> nn.Module:
    return module.linear if "linear" in module else module.embedding


def _put(model: nn.Module, modules: list[tuple[str, Any]]) -> None:
    if modules:
        model.update_modules(tree_unflatten(modules))


def never_adapted(model: nn.Module) -> frozenset[str]:
    """Names of linear layers that `add_adapter` leaves alone: of `bnf_core.models.lora`."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    mixture = any(
        isinstance(module, SwitchLinear | QuantizedSwitchLinear) or "experts" in name.split(".")
        for name, module in model.named_modules()
    )
    return unadapted(getattr(model, "model_type", ""), mixture)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.QuantizedLinear)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def fuse(model: Path, adapter: Path, output: Path, dtype: str, dequantize: bool) -> None:
    """`Backend.fuse`."""
    from mlx_lm.utils import dequantize_model, save_model

    from bnf_mlx.model import DTYPES, cast_weights, load_model, resolve_device

    device = resolve_device("auto")
    with mx.stream(device):
        loaded = load_model(model, device, None)
        _put_on(loaded, adapter, require_adapter(adapter, "mlx"))
        fused = []
        for name, module in loaded.named_modules():
            if not hasattr(module, "fuse"):
                continue
            packed = module.get("linear", module.get("embedding"))
            module.set_dtype(mx.float32)  # the scales of packed weights as well
            whole = module.fuse(dequantize=True)
            whole.set_dtype(DTYPES[dtype])
            if "scales" in packed and not dequantize:
                whole = whole.to_quantized(group_size=packed.group_size, bits=packed.bits, mode=packed.mode)
            fused.append((name, whole))
        loaded.update_modules(tree_unflatten(fused))
        if dequantize:
            cast_weights(loaded, mx.float32)
            dequantize_model(loaded)
        cast_weights(loaded, DTYPES[dtype])
        save_model(output, loaded)
    copy_companions(model, output)
    config = normalised_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    if dequantize:
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
