"""LoRA and DoRA through PEFT: added, switched off for the reference, saved and loaded in PEFT's own layout."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bnf_core.adapters import WEIGHTS, require_adapter
from bnf_core.config import FineTuneType, LoraConfig
from bnf_core.errors import UserError
from bnf_core.lora import initial_lora_a


def add_lora(model: PreTrainedModel, lora: LoraConfig, seed: int, *, dora: bool = False) -> PeftModel:
    """A fresh float32 adapter: A as drawn by `bnf_core.lora`, B zero.

    Args:
        dora: learn each column's magnitude apart from its direction as well (arXiv 2402.09353).
    Raises:
        UserError: a target that is no linear layer of this model.
    """
    if lora.targets != ["all-linear"]:
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        if unknown := sorted(set(lora.targets) - linear):
            raise UserError(
                f"lora.targets: no linear layer is called {', '.join(unknown)}; "
                f"this model has {', '.join(sorted(linear))}"
            )
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it by r: any number will do
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.targets == ["all-linear"] else lora.targets,
        task_type="CAUSAL_LM",
        use_dora=dora,
    )
    return add_adapter(model, config, seed)


def add_adapter(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """A fresh adapter of any kind that PEFT has; of LoRA's default kind A is drawn as `add_lora` says."""
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
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
    with safe_open(folder / WEIGHTS["peft"], framework="numpy") as file:
        saved = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118
    expected = {name for name in get_peft_model_state_dict(peft_model, save_embedding_layers=False) if "lora_" in name}
    if different := sorted(expected ^ saved):  # PEFT goes on without them
        missing = "missing from it" if different[0] in expected else "not of this model"
        raise UserError(
            f"{folder}: this adapter does not fit the model: {len(different)} tensors do not match, the first, "
            f"{different[0]}, is {missing}"
        )
    return peft_model


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
