"""Layers that several processes compute between them, each a part of every matrix, as the family's plan in transformers
says (`base_model_tp_plan`; arXiv 1909.08053). Embeddings, norms and the head stay as they are: the fused loss wants the
head's rows together."""

import logging

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from bnf_core.errors import UserError

# A matrix by its outputs or by its inputs; and a norm of heads, of which each process has some.
STYLES = {"colwise": "out_features", "rowwise": "in_features", "replicated_with_grad_allreduce": None}


def split_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split the layers of a model that is on no device, and have their forward passes join what was split.

    Raises:
        UserError: the family has no plan, one of other kinds of layers, or sizes that the processes do not divide.
    """
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it tells of every tensor that is gathered
    plan = _plan(model)
    _require_divisible(model, plan, mesh.size())
    expanded = model._expand_parallel_plan(plan)
    modules = dict(model.named_modules())
    for name, style in expanded.items():
        if name in modules and style in ("colwise", "rowwise"):  # where PEFT looks, to split an adapter alike
            modules[name].__dict__.update(_hf_tp_plan=style, _hf_device_mesh=mesh)
    apply_tensor_parallelism(model, mesh, expanded)


def _plan(model: PreTrainedModel) -> dict[str, str]:
    name = type(model).__name__
    plan = {path: style for path, style in (model.tp_plan or {}).items() if ".*." in path}
    if not plan:
        raise UserError(f"tp_size: transformers has no plan for {name}: use dp_shard_size (FSDP2) instead")
    if other := sorted(path for path, style in plan.items() if style not in STYLES):
        raise UserError(
            f"tp_size: {other[0]} of {name} would be split by {plan[other[0]]}, and only plain linear layers are: "
            "use dp_shard_size (FSDP2) instead"
        )
    return plan


def _require_divisible(model: PreTrainedModel, plan: dict[str, str], count: int) -> None:
    config = model.config.get_text_config()
    modules = dict(model.named_modules())
    sizes = {key: getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
    for path, style in plan.items():
        layer = modules.get(path.replace("*", "0"))
        if (size := STYLES[style]) and isinstance(layer, nn.Linear):
            sizes[f"{size} of {path}"] = getattr(layer, size)
    for what, size in sizes.items():
        if size and size % count:
            raise UserError(f"tp_size: {what} is {size}, which {count} processes do not divide: use a divisor of it")
