"""LoRA and DoRA through PEFT: added, switched off for the reference, saved and loaded in PEFT's own layout."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bnf_core.config import FineTuneType, LoraConfig
from bnf_core.errors import UserError
from bnf_core.models.adapters import WEIGHTS, require_adapter
from bnf_core.models.lora import UNADAPTED, initial_lora_a
from bnf_core.storage.tensors import read_header
from bnf_torch.model import DTYPES, load_model, save_model


class LowRank(nn.Linear):
    """LoRA's A: a float32 product of inputs that are kept for the backward pass as they come, in half precision.

    PEFT casts the inputs beforehand, and every adapted layer keeps its own float32 copy: of a model in bfloat16 half of
    all that the backward pass keeps. The product is the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return cast(Tensor, _WidenedProduct.apply(x, self.weight))


class _WidenedProduct(torch.autograd.Function):
    """x Wᵀ in W's precision: x (..., in), W (out, in), result (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x.to(weight.dtype), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        return (
            (gradient @ weight).to(x.dtype) if for_x else None,
            flat.T @ x.flatten(0, -2).to(weight.dtype) if for_weight else None,
        )


def add_lora(model: PreTrainedModel, lora: LoraConfig, seed: int, *, dora: bool = False) -> PeftModel:
    """A fresh float32 adapter: A as drawn by `bnf_core.models.lora`, B zero.

    Args:
        dora: learn each column's magnitude apart from its direction as well (arXiv 2402.09353).
    Raises:
        UserError: a target that is no linear layer of this model.
    """
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    everywhere = lora.targets == ["all-linear"]
    if not everywhere and (unknown := sorted(set(lora.targets) - linear)):
        raise UserError(
            f"lora.targets: no linear layer is called {', '.join(unknown)}; this model has {', '.join(sorted(linear))}"
        )
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it by r: any number will do
        lora_dropout=lora.dropout,
        target_modules="all-linear" if everywhere else lora.targets,
        exclude_modules=(sorted(UNADAPTED & linear) or None) if everywhere else None,
        task_type="CAUSAL_LM",
        use_dora=dora,
    )
    return add_adapter(model, config, seed)


def add_adapter(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """A fresh adapter of any kind that PEFT has; of LoRA's default kind A is drawn as `add_lora` says."""
    peft_model = _made_ours(get_peft_model(model, config, autocast_adapter_dtype=True))
    if getattr(config, "init_lora_weights", None) is not True:
        return peft_model
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            a = cast(nn.Linear, module.lora_A["default"])
            with torch.no_grad():
                a.weight.copy_(torch.from_numpy(initial_lora_a(name, a.out_features, a.in_features, seed)))
    return peft_model


def adapter_off(model: PeftModel | PreTrainedModel) -> AbstractContextManager[None]:
    """Within it the model is the reference: the same weights, without the adapter."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def load_adapter(
    model: PreTrainedModel, folder: Path, kind: FineTuneType | None = None, lora: LoraConfig | None = None
) -> PeftModel:
    """A saved PEFT adapter.

    Args:
        kind, lora: to train it further: what it must be for the settings given; default: it stays as it is.
    Raises:
        UserError: not a PEFT adapter, pickled weights, made for another model, or not of that kind, rank or scale.
    """
    require_adapter(folder, "peft", kind, lora)
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=kind is not None, use_safetensors=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: this adapter does not fit the model (it was made for {base}): {reason}") from error
    saved = {name for name in read_header(folder / WEIGHTS["peft"]).tensors if "lora_" in name}
    expected = {name for name in get_peft_model_state_dict(peft_model, save_embedding_layers=False) if "lora_" in name}
    if different := sorted(expected ^ saved):  # PEFT goes on without them
        missing = "missing from it" if different[0] in expected else "not of this model"
        raise UserError(
            f"{folder}: this adapter does not fit the model: {len(different)} tensors do not match, the first, "
            f"{different[0]}, is {missing}"
        )
    return _made_ours(peft_model)


def _made_ours(model: PeftModel) -> PeftModel:
    """With `LowRank` in the places of A in LoRA and DoRA; other variants stay as PEFT computes them."""
    layers: list[Any] = [module for module in model.get_base_model().modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name, a in list(layer.lora_A.items()):
            if type(a) is nn.Linear and isinstance(layer.lora_variant.get(name), DoraLinearVariant | None):
                layer.lora_A[name] = LowRank(a.in_features, a.out_features, bias=False, device="meta")
                layer.lora_A[name].weight = a.weight
                layer.cast_input_dtype_enabled = False
    return model


def save_adapter(model: PeftModel | PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json into a folder that is there.

    Args:
        model: that has the adapter.
        tensors: the adapter's weights, whole, by the names that the model has for them.
    Raises:
        UserError: the model has no adapter.
    """
    if not isinstance(model, PeftModel):
        raise UserError("there is no adapter to save")
    model.save_pretrained(str(folder), state_dict=dict(tensors), save_embedding_layers=False)


def fuse(model: Path, adapter: Path, output: Path, dtype: str) -> None:
    """`Backend.fuse`: plain weights, always."""
    adapted: Any = load_adapter(load_model(model, torch.device("cpu"), torch.float32), adapter)
    fused = adapted.merge_and_unload()
    save_model(fused, {name: p.detach().to(DTYPES[dtype]) for name, p in fused.named_parameters()}, output, model)
