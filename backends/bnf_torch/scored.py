"""The forward pass that ends in the loss."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bnf_core.models.model_config import HeadTransform
from bnf_core.objectives import Objective, Seen, Structure, batch_loss
from bnf_core.objectives.bnf import BNF
from bnf_core.types import TokenScores
from bnf_torch.attention import Masks, use_masks
from bnf_torch.linear import linear_bnf_loss, linear_log_odds
from bnf_torch.losses import token_log_odds
from bnf_torch.model import completion_hidden, completion_logits, head_bias, head_weight
from bnf_torch.ops import OPS
from bnf_torch.probes import head_transform, keeps_packed_apart, shares_prompts
from bnf_torch.routing import balances_experts, chosen_per_token, expert_counts, load_balancing_loss, recorded


class ScoredModel(nn.Module):
    """A causal language model whose forward pass ends in the loss: what DDP and FSDP wrap. Outside of the forward
    pass a sharded head is not there to compute a loss with.

    Args:
        model: with its adapter's layers, if any, inside.
        objective: what the loss is.
        autocast: compute in this precision, whatever the weights'; None: in theirs.
        router_aux_loss: coefficient of the load-balancing loss of the model's routers; 0: none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        autocast: torch.dtype | None = None,
        router_aux_loss: float = 0.0,
    ):
        super().__init__()
        self.model = model
        self.objective = objective
        self.autocast = autocast
        self.router_aux_loss = router_aux_loss
        self.head: HeadTransform | None = None  # None: the model's own logits are taken
        self.packs = self.shares = self.balances = False

    def probe(self, masks: Masks | None = None) -> None:
        """Find out what the model's code does. To be called once, before everything else.

        Args:
            masks: for shared prompts, of `attention`; where the model's code does not take blocks, what suits the
                device instead.
        """
        use_masks(self.model, masks)
        self.head = head_transform(self.model)
        self.packs = keeps_packed_apart(self.model)
        self.shares = shares_prompts(self.model)
        if masks == "blocks" and not self.shares:
            use_masks(self.model, None)
            self.shares = shares_prompts(self.model)
        self.balances = self.router_aux_loss > 0 and balances_experts(self.model)

    @property
    def one_pass(self) -> bool:
        """Whether the head and BNF are one function, which needs no second pass over a trained head, and no
        structure."""
        return self.head is not None and isinstance(self.objective, BNF)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        ref_log_odds: Tensor,
        coefficients: Tensor,
        structure: Structure | None = None,
        uses: Tensor | None = None,
        counts: Tensor | None = None,
        **layout: Tensor,
    ) -> tuple[Tensor, TokenScores]:
        """The micro-batch's part of the loss, and what the policy says of each token.

        Args:
            input_ids: (B, T) int64.
            positions: (N,) int64, into the flattened grid.
            targets: (N,) int64.
            ref_log_odds: (N,) float32.
            coefficients: (N,) float32, for BNF.
            structure: how tokens make up rows and pairs; not needed for `one_pass`.
            uses: (B, T) int64, `Batch.uses`, where the loss of the routers is added.
            counts: (E,) int64, the experts chosen in the whole step; None: this is all of it.
            layout: (B, T) int64 each: `position_ids` of a packed grid, all of LAYOUT of a shared one.
        """
        if uses is not None:
            with recorded(self.model) as routed:
                loss, scores = self.forward(
                    input_ids, positions, targets, ref_log_odds, coefficients, structure, **layout
                )
            top_k = chosen_per_token(self.model)
            counts = expert_counts(routed, uses, top_k) if counts is None else counts
            return loss + self.router_aux_loss * load_balancing_loss(routed, uses, counts, top_k), scores
        with self._precision(input_ids.device):
            if self.head is not None:
                hidden = completion_hidden(self.model, input_ids, positions, **layout)  # (N, D)
            else:
                logits = completion_logits(self.model, input_ids, positions, **layout)  # (N, V)
        if self.head is None:
            log_odds, entropy = token_log_odds(logits, targets)
        else:
            scale, soft_cap = self.head
            dtype = self.autocast or hidden.dtype
            head, bias = head_weight(self.model).to(dtype), head_bias(self.model)
            hidden = hidden.to(dtype)
            if scale != 1.0:
                hidden, bias = hidden * scale, None if bias is None else bias * scale
            if self.one_pass:
                rest = ref_log_odds, coefficients
                loss, stats = linear_bnf_loss(hidden, head, targets, *rest, bias=bias, soft_cap=soft_cap)
                return loss, TokenScores(stats.log_odds, stats.other_entropy)
            log_odds, entropy = linear_log_odds(hidden, head, targets, bias=bias, soft_cap=soft_cap)
        assert structure is not None
        loss = batch_loss(self.objective, OPS, Seen(log_odds, entropy, ref_log_odds, structure))
        return loss, TokenScores(log_odds.detach(), entropy)

    def chosen_experts(self, input_ids: Tensor, uses: Tensor, **layout: Tensor) -> Tensor:
        """How often each expert is chosen in a micro-batch, (E,) int64; see `forward`."""
        nowhere = torch.zeros(0, dtype=torch.int64, device=input_ids.device)
        with recorded(self.model) as routed, self._precision(input_ids.device):
            completion_hidden(self.model, input_ids, nowhere, **layout)
        return expert_counts(routed, uses, chosen_per_token(self.model))

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]
