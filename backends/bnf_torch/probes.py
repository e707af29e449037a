"""What a model's code can do, found out by comparing: surer than a list of families."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bnf_core.steps.batching import collate
from bnf_core.types import Example
from bnf_torch.attention import LAYOUT
from bnf_torch.model import completion_hidden, completion_logits, decoder, head_weight

OWN_WINDOWS = ("gpt_neo",)  # their attention looks so far back in the grid, whatever the mask: no short test shows it


@torch.no_grad()
def head_is_linear(model: PreTrainedModel) -> bool:
    """Whether the logits are hidden @ head.T and nothing else. Some families scale or cap them or add a bias;
    comparing is surer than a list of them."""
    if getattr(model.get_output_embeddings(), "bias", None) is not None:  # may be below half precision's tolerance
        return False
    head = head_weight(model)
    positions = torch.arange(8, device=head.device)
    ids = positions.unsqueeze(0) % len(head)

    def louder(module: nn.Module, inputs: Any, output: Any) -> Any:  # so that a mild cap shows in half precision
        output.last_hidden_state = output.last_hidden_state * 32
        return output

    hook = decoder(model).register_forward_hook(louder)
    try:
        logits = completion_logits(model, ids, positions)
        linear = completion_hidden(model, ids, positions) @ head.T
    finally:
        hook.remove()
    if linear.shape != logits.shape:
        return False
    tolerance = 1e-5 if logits.dtype == torch.float32 else 2e-2
    return bool((logits.float() - linear.float()).abs().max() <= tolerance * linear.float().abs().max())


@torch.no_grad()
def keeps_packed_apart(model: PreTrainedModel) -> bool:
    """Whether two sequences in one row give the states that they give in rows of their own. Recurrent layers and
    attention code of a family's own may not heed `position_ids`; comparing is surer than a list."""
    head = head_weight(model)
    every = torch.arange(8, device=head.device)
    ids, restarting = every % len(head), every.unsqueeze(0) % 4
    try:
        packed = completion_hidden(model, ids.unsqueeze(0), every, position_ids=restarting).float()
    except (TypeError, ValueError):  # it takes no position_ids
        return False
    apart = completion_hidden(model, ids.view(2, 4), every).float()
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return bool((packed - apart).abs().max() <= tolerance * apart.abs().max())


@torch.no_grad()
def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether two completions that share their prompt give the states that they give in rows of their own. Recurrent
    layers, and attention that takes no masks or makes its own, do not; comparing is surer than a list."""
    if getattr(model.config, "model_type", "") in OWN_WINDOWS:
        return False
    device, top = head_weight(model).device, len(head_weight(model))
    ids = [tuple(i % top for i in part) for part in (range(1, 5), range(5, 8), range(8, 12))]
    rows = [Example(ids[0], completion, True) for completion in ids[1:]]

    def states(shared: bool, *layout: str) -> Tensor:
        batch = collate(rows, 2, bins=[[0, 1]] if shared else None, share_prompts=shared)
        names = ("input_ids", "positions", *layout)
        return completion_hidden(model, **{n: torch.tensor(getattr(batch, n)).long().to(device) for n in names}).float()

    apart = states(False)
    leak = (states(True) - apart).square().mean()
    try:
        error = (states(True, *LAYOUT) - apart).square().mean()
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):  # a mask that it cannot take
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return bool(error.sqrt() <= min(tolerance * apart.square().mean().sqrt(), leak.sqrt() / 5))
