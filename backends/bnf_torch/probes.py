"""What a model's code can do, found out by comparing: surer than a list of families."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from bnf_core.models.model_config import HeadTransform, head_transforms
from bnf_core.steps.probing import Probe, heeds_layout, packing_probe, sharing_probe
from bnf_core.types import Array, Batch
from bnf_torch.attention import LAYOUT
from bnf_torch.linear import soft_capped
from bnf_torch.model import completion_hidden, completion_logits, decoder, head_weight

OWN_WINDOWS = ("gpt_neo",)  # their attention looks so far back in the grid, whatever the mask: no short test shows it


@torch.no_grad()
def head_transform(model: PreTrainedModel) -> HeadTransform | None:
    """What makes the logits of hidden @ head.T + bias, and stays so while something is trained; None: something else
    does. Comparing is surer than a list of families. But an adapter adds nothing before it is trained, so the head has
    to be a matrix to look at as well."""
    layer = model.get_output_embeddings()
    if not _is_plain(layer):
        return None
    head = head_weight(model)
    positions = torch.arange(8, device=head.device)
    ids = positions.unsqueeze(0) % len(head)

    def louder(module: nn.Module, inputs: Any, output: Any) -> Any:  # so that a mild cap shows in half precision
        output.last_hidden_state = output.last_hidden_state * 32
        return output

    hook = decoder(model).register_forward_hook(louder)
    try:
        logits = completion_logits(model, ids, positions).float()
        linear = layer(completion_hidden(model, ids, positions)).float()
    finally:
        hook.remove()
    if linear.shape != logits.shape:
        return None
    tolerance = (1e-5 if head.dtype == torch.float32 else 2e-2) * logits.abs().max()
    for transform in head_transforms(model.config.get_text_config().to_dict()):
        expected, _ = soft_capped(transform.scale * linear, transform.soft_cap)
        if (logits - expected).abs().max() <= tolerance:
            return transform
    return None


def _is_plain(layer: Any) -> bool:
    """Whether a layer is its weight and bias: linear, and nothing adapts, wraps or hooks it."""
    hooks = [layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks]
    if any(hooks):
        return False
    if isinstance(layer, ModulesToSaveWrapper):  # calls the original or a trained copy, and shows the weight of that
        return all(map(_is_plain, (layer.original_module, *layer.modules_to_save.values())))
    mover = getattr(layer, "_hf_hook", None)  # accelerate's, in the place of `forward`
    replaced = "forward" in vars(layer) and not (
        type(mover).__name__ == "AlignDevicesHook" and not getattr(mover, "offload", True)
    )
    return type(layer) is nn.Linear and not replaced


@torch.no_grad()
def keeps_packed_apart(model: PreTrainedModel) -> bool:
    """Whether two sequences in one row give the states that they give in rows of their own. Recurrent layers and
    attention code of a family's own may not heed `position_ids`."""
    return _heeds(model, packing_probe(), ("position_ids",))


@torch.no_grad()
def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether two completions that share their prompt give the states that they give in rows of their own. Recurrent
    layers, and attention that takes no masks or makes its own, do not."""
    return getattr(model.config, "model_type", "") not in OWN_WINDOWS and _heeds(model, sharing_probe(), LAYOUT)


def _heeds(model: PreTrainedModel, probe: Probe, layout: Sequence[str]) -> bool:
    device = head_weight(model).device

    def states(batch: Batch, *names: str) -> Array:
        tensors = {n: torch.from_numpy(getattr(batch, n)).long() for n in ("input_ids", "positions", *names)}
        return completion_hidden(model, **{n: t.to(device) for n, t in tensors.items()}).float().cpu().numpy()

    try:
        told = states(probe.together, *layout)
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):  # it takes no such thing
        return False
    return heeds_layout(states(probe.alone), states(probe.together), told, half=model.dtype != torch.float32)
