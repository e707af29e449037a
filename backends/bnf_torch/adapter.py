"""LoRA and DoRA through PEFT: added, switched off for the reference, saved and loaded in PEFT's own layout."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from bnf_core.config import FineTuneType, LoraConfig
from bnf_core.errors import UserError
from bnf_core.models.adapters import WEIGHTS, require_adapter, stays_on
from bnf_core.models.lora import initial_lora_a, unadapted
from bnf_core.storage.tensors import read_header
from bnf_torch.model import DTYPES, completion_logits, head_weight, load_model
from bnf_torch.processes import like, whole
from bnf_torch.saving import save_model


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
    layers, never = linear_layers(model), never_adapted(model)
    linear = {last for name in layers if (last := name.rpartition(".")[2]) not in never}
    _require_whole(model, dora)
    everywhere = lora.targets == ["all-linear"]
    if not everywhere and (unknown := sorted(set(lora.targets) - linear)):
        raise UserError(
            f"lora.targets: no linear layer is called {', '.join(unknown)}; this model has {', '.join(sorted(linear))}"
        )
    numbered = [name for name in layers if any(map(str.isdigit, name.split(".")))]  # in a decoder layer
    inner = [name for name in numbered if name.rpartition(".")[2] not in never]
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it by r: any number will do
        lora_dropout=lora.dropout,
        target_modules=inner if everywhere else lora.targets,
        task_type="CAUSAL_LM",
        use_dora=dora,
    )
    return add_adapter(model, config, seed)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """By path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def never_adapted(model: PreTrainedModel) -> frozenset[str]:
    """Names of linear layers that `add_lora` leaves alone: of `bnf_core.models.lora`."""
    mixture = any(name.endswith(".experts") for name, _ in model.named_modules())
    return unadapted(model.config.model_type, mixture)


def add_adapter(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """A fresh adapter of any kind that PEFT has; of LoRA's default kind A is drawn as `add_lora` says. On a model that
    is on no device, one that is `not_plain` in nothing: `fill` draws it.

    Raises:
        UserError: it cannot be switched off, or acts outside of the model's layers.
    """
    if model.device.type == "meta":  # this kind can be switched off
        return _made_ours(get_peft_model(model, config, autocast_adapter_dtype=True))
    before = _some_logits(model).detach()
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    require_removable(peft_model, before)
    _made_ours(peft_model)
    if getattr(config, "init_lora_weights", None) is True:
        draw(peft_model, seed)
    return peft_model


def _require_whole(model: PreTrainedModel, dora: bool) -> None:
    """Raises UserError for DoRA on layers of which no process has whole rows; PEFT fails at their norms."""
    if dora and any(hasattr(module, "_hf_tp_plan") for module in model.modules()):
        raise UserError(
            "tp_size: DoRA needs the norms of whole rows of weights, and each process has parts of them: use "
            "fine_tune_type lora, or dp_shard_size (FSDP2) instead"
        )


@torch.no_grad()
def draw(model: PeftModel, seed: int) -> None:
    """A of every layer as `bnf_core.models.lora` draws it; each process its own rows, where the model is sharded."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            a = cast(nn.Linear, module.lora_A["default"]).weight
            rank, inputs = a.shape
            a.copy_(like(initial_lora_a(name, rank, inputs, seed), a))


def adapter_off(model: PeftModel | PreTrainedModel) -> AbstractContextManager[None]:
    """Within it the model is the reference: the same weights, without the adapter."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def drop_inputs(model: PeftModel | PreTrainedModel) -> None:
    """For training: the adapter drops inputs, if it is to, and nothing else does. With dropout of the model's own p
    would differ from r before anything is learned, and from one cut into micro-batches to another."""
    model.eval()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.train()
            module.get_base_layer().eval()
        elif isinstance(module, GradientCheckpointingLayer):
            module.training = module.gradient_checkpointing  # which transformers does in training mode alone


def require_removable(model: PeftModel, before: Tensor | None = None, name: str = "this adapter") -> None:
    """Whether the model is the reference with its adapter off, and what its layers compute all that the adapter does.
    Found out by comparing: PEFT has too many kinds and settings for a list.

    Args:
        before: `_some_logits` of the model without the adapter, where they are known.
        name: of the adapter, for messages.
    Raises:
        UserError: it is not, in words of the adapter's own settings where they tell.
    """
    config = model.peft_config[model.active_adapter]
    base = cast(PreTrainedModel, model.get_base_model())
    activated = getattr(config, "alora_invocation_tokens", None)
    # AdaLoRA adds to the loss there, X-LoRA weighs adapters, Poly and Shadow want inputs of their own.
    if activated or config.is_prompt_learning or type(model.base_model).forward is not BaseTuner.forward:
        what = (
            "alora_invocation_tokens" if activated else f"of PEFT's kind {getattr(config.peft_type, 'value', None)}, it"
        )
        raise UserError(f"{name}: {what} acts outside of the model's layers: expected an adapter such as LoRA")
    with adapter_off(model), torch.enable_grad():
        trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
        off = _some_logits(base)
        used = torch.autograd.grad(off.sum(), list(trained.values()), allow_unused=True) if off.requires_grad else ()
    still = [path for path, gradient in zip(trained, used, strict=False) if gradient is not None]
    said = stays_on(config.to_dict())
    if still or (said if before is None else not torch.equal(off.detach(), before)):
        reason = said or (f"it trains {still[0]}" if still else "it changes the model's own weights")
        raise UserError(_stays_on(name, reason))


def _stays_on(name: str, reason: str) -> str:
    return (
        f"{name} cannot be switched off, and the model without it would be the reference: {reason}. Leave that out; of "
        "a saved adapter make a model with `bnf fuse`, and train that with an adapter of its own"
    )


def _own_name(name: str) -> str:
    """A tensor of an adapter's file, as the model without the adapter calls it."""
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name.removeprefix("base_model.model."))


def _some_ids(model: PreTrainedModel) -> Tensor:
    head = head_weight(model)
    return torch.arange(4, device=head.device).unsqueeze(0) % len(head)


def _some_logits(model: PreTrainedModel) -> Tensor:
    ids = _some_ids(model)
    return completion_logits(model, ids, torch.arange(ids.numel(), device=ids.device))


def load_adapter(
    model: PreTrainedModel,
    folder: Path,
    kind: FineTuneType | None = None,
    lora: LoraConfig | None = None,
    *,
    removable: bool = True,
) -> PeftModel:
    """A saved PEFT adapter.

    Args:
        kind, lora: to train it further: what it must be for the settings given; default: it stays as it is.
        removable: whether the model without it is to be the reference.
    Raises:
        UserError: not a PEFT adapter, pickled weights, made for another model, not of that kind, rank or scale, or one
            that cannot be switched off.
    """
    config = require_adapter(folder, "peft", kind, lora)
    if model.device.type == "meta":
        return _attached(model, folder, config, trainable=kind is not None)
    saved = read_header(folder / WEIGHTS["peft"]).tensors.keys()
    own = {name: value.clone() for name, value in model.state_dict().items() if name in set(map(_own_name, saved))}
    before = _some_logits(model).detach() if removable else None
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=kind is not None, use_safetensors=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: this adapter does not fit the model (it was made for {base}): {reason}") from error
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False).keys()
    beside = {name for name in saved - expected if _own_name(name) in own}  # the model's own, which PEFT has replaced
    twice = {name for name in saved - expected if ".modules_to_save." in name or ".token_adapter." in name}
    if different := sorted(expected ^ (saved - beside - twice)):  # PEFT goes on without them
        missing = "missing from it" if different[0] in expected else "not of this model"
        raise UserError(
            f"{folder}: this adapter does not fit the model: {len(different)} tensors do not match, the first, "
            f"{different[0]}, is {missing}"
        )
    _made_ours(peft_model)
    if removable:
        now = peft_model.state_dict()
        if replaced := sorted(name for name in beside if not torch.equal(now[name], own[_own_name(name)])):
            raise UserError(_stays_on(str(folder), f"it brings weights of the model's own, {_own_name(replaced[0])}"))
        require_removable(peft_model, before, str(folder))
    if kind is None:  # switched on again, PEFT lets it be trained
        peft_model.requires_grad_(False)
    return peft_model


# Settings of PEFT that do more than add low-rank products to layers, or put other weights in their places.
NOT_PLAIN = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "megatron_config")


def not_plain(config: dict[str, Any]) -> str:
    """What of an adapter has to be tried on a whole model, in words; empty for plain LoRA and DoRA."""
    unusual = [key for key in NOT_PLAIN if config.get(key)] + [str(said) for said in [stays_on(config)] if said]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unusual:
        return ", ".join(unusual) or f"{config.get('peft_type')} with bias {config.get('bias', 'none')}"
    return ""


def _attached(model: PreTrainedModel, folder: Path, config: dict[str, Any], *, trainable: bool) -> PeftModel:
    """A saved adapter's layers on a model that is on no device; `fill` fills them.

    Raises:
        UserError: it does not fit the model, or is of a kind that has to be tried on a whole model.
    """
    if what := not_plain(config):
        raise UserError(f"{folder}: {what} cannot be loaded in shards: expected plain LoRA or DoRA, or use DDP")
    _require_whole(model, bool(config.get("use_dora")))
    peft_config = PeftConfig.from_pretrained(str(folder))
    peft_config.inference_mode = not trainable
    try:
        peft_model = get_peft_model(model, peft_config, autocast_adapter_dtype=True)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder}: this adapter does not fit the model: {' '.join(str(error).split())[:300]}"
        ) from error
    expected = {name: tuple(p.shape) for name, p in _adapter_parameters(peft_model).items()}
    saved = {name: tensor.shape for name, tensor in read_header(folder / WEIGHTS["peft"]).tensors.items()}
    if different := sorted(name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name)):
        raise UserError(
            f"{folder}: this adapter does not fit the model: {len(different)} tensors do not match, the first, "
            f"{different[0]}, is of shape {saved.get(different[0])} in it and {expected.get(different[0])} here"
        )
    if not trainable:
        peft_model.requires_grad_(False)
    return _made_ours(peft_model)


def _adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Of LoRA and DoRA, by the names that they are saved under."""
    return {
        name.replace(".default.weight", "" if ".lora_magnitude_vector." in name else ".weight"): p
        for name, p in model.named_parameters()
        if ".lora_" in name
    }


@torch.no_grad()
def fill(model: PeftModel, device: torch.device, source: Path | int) -> None:
    """Give weights to an adapter that has none yet, on a sharded model that has: each process its own rows.

    Args:
        source: the folder it was saved in; or of a fresh one, the seed.
    """
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                zeros = like(np.zeros(p.shape, np.float32), p, device)
                module._parameters[name] = nn.Parameter(zeros, p.requires_grad)
    if isinstance(source, Path):
        stored = read_header(source / WEIGHTS["peft"]).tensors
        for name, p in _adapter_parameters(model).items():
            p.copy_(like(stored[name].float32(), p))
    else:
        draw(model, source)
        _set_magnitudes(model)


def _set_magnitudes(model: PeftModel) -> None:
    """DoRA's, at first the norms of the weight's rows; of one layer after the other."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_magnitude_vector:
            weight = whole(cast(Tensor, layer.get_base_layer().weight)).float()
            weight = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
            p = cast(nn.Parameter, layer.lora_magnitude_vector["default"].weight)
            p.copy_(like(torch.linalg.norm(weight, dim=1).cpu().numpy(), p))


def _made_ours(model: PeftModel) -> PeftModel:
    """With `LowRank` in the places of A in LoRA and DoRA; other variants stay as PEFT computes them."""
    layers: list[Any] = [module for module in model.get_base_model().modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for part in [*layer.lora_A.values(), *layer.lora_B.values()]:
            if "forward" in vars(part):  # PEFT has the sizes of this process's part in there, transformers wants all
                part.out_features, part.in_features = part.weight.shape
        for name, a in list(layer.lora_A.items()):
            split = "forward" in vars(a)  # by tensor parallelism, which has put its own around it
            if (
                type(a) is nn.Linear
                and not split
                and isinstance(layer.lora_variant.get(name), DoraLinearVariant | None)
            ):
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
    with _without_card(model):
        # With what an adapter keeps and does not train, such as random projections. Of the rest PEFT takes nothing.
        model.save_pretrained(str(folder), state_dict=model.state_dict() | dict(tensors), save_embedding_layers=False)


@contextmanager
def _without_card(model: PeftModel) -> Iterator[None]:
    """PEFT would write a model card that has nothing but headings."""
    named = cast(Any, model)
    named.create_or_update_model_card = lambda output_dir: None
    try:
        yield
    finally:
        del named.create_or_update_model_card


def fuse(model: Path, adapter: Path, output: Path, dtype: str) -> None:
    """`Backend.fuse`: plain weights, always."""
    base = load_model(model, torch.device("cpu"), torch.float32)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head.weight is embedding.weight
    if tied:  # PEFT would add what is for the one to both
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    adapted: Any = load_adapter(base, adapter, removable=False)
    if getattr(adapted.peft_config[adapted.active_adapter], "layer_replication", None):
        raise UserError(f"{adapter} has layers of the model twice (layer_replication): such a model cannot be written")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")  # that is seen to here
            fused = adapted.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{adapter}: PEFT cannot make one model of this adapter and the model: {reason}") from error
    head, embedding = fused.get_output_embeddings(), fused.get_input_embeddings()
    if tied and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
    else:
        tied = False
    fused.config.tie_word_embeddings = fused.config.get_text_config().tie_word_embeddings = tied
    save_model(fused, dict(fused.named_parameters()), output, model, DTYPES[dtype])
