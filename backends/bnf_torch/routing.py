"""The load-balancing loss of a mixture-of-experts model's routers (arXiv 2101.03961, equations 4 to 6), as transformers
defines it for its families, of a whole optimizer step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bnf_torch.model import completion_logits, decoder, head_weight


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within it a forward pass appends the logits of every layer's router, (B·T, E) each, to the list."""
    found: list[Tensor] = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_router_logits": True}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.extend(output.router_logits)

    hooks = (
        decoder(model).register_forward_pre_hook(ask, with_kwargs=True),
        decoder(model).register_forward_hook(keep),
    )
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def chosen_per_token(model: PreTrainedModel) -> int:
    """How many experts a router chooses; 0: the configuration does not say."""
    return int(getattr(model.config.get_text_config(), "num_experts_per_tok", 0) or 0)


@torch.no_grad()
def expert_counts(router_logits: Sequence[Tensor], uses: Tensor, top_k: int) -> Tensor:
    """How often each expert is chosen, over all layers: (E,) int64.

    Args:
        router_logits: of each layer, (B·T, E).
        uses: (B, T) int64, `Batch.uses`.
    """
    counts = torch.zeros(router_logits[0].shape[-1], dtype=torch.int64, device=uses.device)
    weights = uses.reshape(-1, 1).expand(-1, top_k).reshape(-1)
    for logits in router_logits:
        counts.scatter_add_(0, logits.topk(top_k, dim=-1).indices.reshape(-1), weights)
    return counts


def load_balancing_loss(router_logits: Sequence[Tensor], uses: Tensor, counts: Tensor, top_k: int) -> Tensor:
    """A micro-batch's part of E · Σ_e f_e · P_e, where f_e is how often a token of the step has chosen expert e and P_e
    the mean of its routers' probability of e, over all layers. The parts of a step add up to its loss, and their
    gradients to its gradient: f_e has none.

    Args:
        router_logits, uses: as in `expert_counts`.
        counts: (E,) int64, the `expert_counts` of the whole step.
    """
    choices = counts.sum() / top_k  # of all tokens in all layers
    weights = uses.reshape(-1).float()
    probabilities = sum(weights @ logits.float().softmax(-1) for logits in router_logits)  # (E,)
    return len(counts) * ((counts / choices) @ (probabilities / choices))


@torch.no_grad()
def balances_experts(model: PreTrainedModel) -> bool:
    """Whether `load_balancing_loss` is what the model's own code computes, found out by comparing."""
    top_k, device = chosen_per_token(model), head_weight(model).device
    positions = torch.arange(8, device=device)
    ids = positions.unsqueeze(0) % len(head_weight(model))
    try:
        own = model(input_ids=ids, use_cache=False, output_router_logits=True).aux_loss
        with recorded(model) as logits:
            completion_logits(model, ids, positions)
    except (AttributeError, TypeError, ValueError):  # it has no routers, or none that can be asked
        return False
    if own is None or not top_k or not logits:
        return False
    uses = torch.ones_like(ids)
    found = load_balancing_loss(logits, uses, expert_counts(logits, uses, top_k), top_k)
    return bool((found - own).abs() <= (1e-5 if logits[0].dtype == torch.float32 else 2e-2) * found.abs())
