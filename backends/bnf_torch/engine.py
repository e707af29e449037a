"""A loaded PyTorch model that scores, trains and generates: bnf_core.protocol.Engine."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from bnf_core.config import AttentionMasks, OptimizerConfig
from bnf_core.errors import UserError, memory_errors
from bnf_core.models.model_config import position_limit
from bnf_core.objectives import Objective, structure
from bnf_core.objectives.bnf import BNF
from bnf_core.processes import ALONE, Processes
from bnf_core.sampling import Completion, greedy
from bnf_core.steps.limits import Limits
from bnf_core.steps.scaling import loss_scales
from bnf_core.storage.files import agreed, replacing
from bnf_core.storage.shards import (
    OPTIMIZER,
    REFERENCE_WEIGHTS,
    WEIGHTS,
    Shard,
    Taken,
    joined,
    put_under,
    require_same_shapes,
    under,
)
from bnf_core.types import Array, Batch, TokenScores
from bnf_torch import adapter
from bnf_torch.attention import LAYOUT, masks_of
from bnf_torch.compiling import compile_layers, uncompiled
from bnf_torch.errors import FULL
from bnf_torch.model import head_weight
from bnf_torch.ops import tensors
from bnf_torch.optimizer import Optimizer, adamw
from bnf_torch.processes import OrderedSum, gradients_wait, lost_processes, pieces, spread, stored_like, whole
from bnf_torch.sampling import sample
from bnf_torch.saving import save_model
from bnf_torch.scored import ScoredModel


class TorchEngine:
    """
    Args:
        model: with an adapter or without; what requires a gradient is trained.
        optimizer: None: nothing will be trained.
        objective: what the loss is.
        device: what computes; by default where the model is.
        dtype: what is computed in, where the weights are float32; None: as they are.
        source: the folder that the model is from, for the files that `save` leaves as they are.
        router_aux_loss: coefficient of the load-balancing loss of a mixture-of-experts model's routers; 0: none.
        attention_masks: of packed and shared-prompt batches, as `HardwareConfig` says.
        compile: the decoder layers, as `HardwareConfig` says, where something is trained.
        deterministic: add each micro-batch's gradient by itself, in the order of the step's micro-batches.
        fill: gives weights to a model that has none yet, once it is sharded.
    Raises:
        UserError: there is to be a loss of the routers, or masks in blocks, and the model has none.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        optimizer: OptimizerConfig | None = None,
        *,
        objective: Objective | None = None,
        processes: Processes = ALONE,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        source: Path | None = None,
        gradient_checkpointing: bool = False,
        router_aux_loss: float = 0.0,
        attention_masks: AttentionMasks = "auto",
        compile: bool = False,
        deterministic: bool = False,
        fill: Callable[[], None] | None = None,
    ):
        self.model = model
        self.base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        self.processes = processes
        self.device = device or self.base.device
        self.full = not isinstance(model, PeftModel) and any(p.requires_grad for p in model.parameters())
        self.dtype = str(dtype or self.base.dtype).removeprefix("torch.")
        self.source = source
        self.steps_taken = False
        self.reference_weights: dict[str, Tensor] = {}  # by name; empty: those that training starts from
        if gradient_checkpointing:
            checkpoint_activations(self.base)
        trains = any(p.requires_grad for p in model.parameters())
        if compile and trains:
            compile_layers(self.base, self.device)
        autocast = None if dtype in (None, torch.float32, self.base.dtype) else dtype
        sharded = getattr(processes, "sharded", False)
        self.objective = objective or BNF()
        self.scored = ScoredModel(self.base, self.objective, None if sharded else autocast, router_aux_loss)
        self.deterministic = deterministic
        self.to_train = self.scored if deterministic else spread(self.scored, processes, self.device, autocast)
        if fill is not None:
            fill()
        for method in ("probe", "generate", "chosen_experts"):
            register_fsdp_forward_method(self.scored, method)
        self.scored.eval()
        # FlexAttention is compiled, for which what only scores does not wait.
        wanted = attention_masks if trains else "dense"
        if wanted == "auto":
            wanted = "blocks" if self.device.type == "cuda" else "auto"
        with uncompiled():
            self.scored.probe(None if wanted == "auto" else wanted)
        self._reshard()
        if attention_masks == wanted == "blocks" and not (self.scored.shares and masks_of(self.base) == "blocks"):
            raise UserError(
                f"hardware.attention_masks is blocks, which {type(self.base).__name__} does not take. Set it to auto"
            )
        if router_aux_loss and not self.scored.balances:
            raise UserError(
                f"router_aux_loss is {router_aux_loss:g}, and {type(self.base).__name__} has no routers whose "
                "load-balancing loss transformers computes in the usual way. Set router_aux_loss to 0"
            )
        self.limits = Limits(len(head_weight(self.base)), position_limit(self.base.config.to_dict()))
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer: Optimizer | None = None
        if optimizer and self.trainable:
            self.optimizer = Optimizer(self.trainable, adamw(self.trainable, optimizer))

    @property
    def shares_prompts(self) -> bool:
        return self.scored.shares

    # Scoring

    def reference_log_odds(self, batch: Batch) -> Array:
        if self.reference_weights:
            self._exchange()
            try:
                return self.evaluate(batch, np.zeros(len(batch.targets), np.float32)).log_odds
            finally:
                self._exchange()
        if self.full and self.steps_taken:
            raise RuntimeError("all weights are trained and no longer those of the reference: compute it beforehand")
        with adapter.adapter_off(self.model):
            return self.evaluate(batch, np.zeros(len(batch.targets), np.float32)).log_odds

    def refresh_reference(self) -> None:
        self.reference_weights = {name: p.detach().clone() for name, p in self.trainable.items()}

    @torch.no_grad()
    def _exchange(self) -> None:
        """The policy's weights and the reference's, each in the other's place; a second time puts them back."""
        self._reshard()
        for name, p in self.trainable.items():
            policy = p.detach().clone()  # one at a time
            p.copy_(self.reference_weights[name])
            self.reference_weights[name].copy_(policy)

    @memory_errors(FULL)
    @torch.no_grad()
    def evaluate(self, batch: Batch, ref_log_odds: Array) -> TokenScores:
        self.scored.eval()
        with lost_processes():
            _, scores = self.scored(**self._inputs(batch, ref_log_odds))
        self._reshard()
        return _to_numpy(scores)

    @memory_errors(FULL)
    @torch.no_grad()
    def sample(self, rows: Sequence[Completion]) -> None:
        self.limits.require_rows(rows)
        self.scored.eval()
        autocast = self.scored.autocast
        with (
            uncompiled(),
            _without_settings(self.base),
            torch.autocast(self.device.type, autocast) if autocast else nullcontext(),
        ):
            sample(self.scored.generate, rows, self.device, sharded=isinstance(self.scored, FSDPModule))
        self._reshard()

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        return greedy(self, prompts, max_tokens, stop_ids)

    def adapter_off(self) -> AbstractContextManager[None]:
        return adapter.adapter_off(self.model)

    def _inputs(self, batch: Batch, ref_log_odds: Array, baseline: float = 0.0) -> dict[str, Any]:
        """What ScoredModel's forward takes, on its device."""
        arrays = {
            "positions": batch.positions,
            "targets": batch.targets,
            "ref_log_odds": ref_log_odds,
            "coefficients": batch.coefficients,
        }
        inputs: dict[str, Any] = self._grid(batch) | {n: tensors(array, self.device) for n, array in arrays.items()}
        if not self.scored.one_pass:
            inputs["structure"] = tensors(structure(self.objective, batch, baseline), self.device)
        return inputs

    def _grid(self, batch: Batch) -> dict[str, Tensor]:
        """The token ids of a batch, and as much of its layout as the model needs, on its device."""
        self.limits.require(batch)
        arrays = {"input_ids": batch.input_ids}
        if batch.shared and not self.scored.shares:
            raise UserError(
                f"{type(self.base).__name__} cannot compute a prompt once for several completions. "
                "Set share_prompts to false"
            )
        if batch.packed and not (self.scored.packs or self.scored.shares):
            raise UserError(
                f"packing: {type(self.base).__name__} lets sequences in one row see each other. Set packing to false"
            )
        if batch.shared or batch.packed:
            names = LAYOUT if self.scored.shares else ("position_ids",)
            arrays |= {name: getattr(batch, name) for name in names}
            if self.limits.positions is not None:  # padding may go on beyond them
                arrays["position_ids"] = np.minimum(batch.position_ids, self.limits.positions - 1)
        return {name: tensors(array, self.device) for name, array in arrays.items()}

    def _reshard(self) -> None:
        """FSDP keeps embeddings and head gathered after a forward pass, and would not see new weights in the shards."""
        if isinstance(self.scored, FSDPModule):
            self.scored.reshard()

    # Training

    @memory_errors(FULL)
    def step(
        self,
        batches: Sequence[tuple[Batch, Array]],
        learning_rate: float,
        max_grad_norm: float | None,
        baseline: float = 0.0,
    ) -> tuple[list[TokenScores], float]:
        if self.optimizer is None:
            raise RuntimeError("this engine was loaded without anything to train and an optimizer")
        _, stats, norm = self.accumulate(batches, max_grad_norm, baseline)
        self.optimizer.step(learning_rate)
        return stats, norm

    def accumulate(
        self, batches: Sequence[tuple[Batch, Array]], max_grad_norm: float | None, baseline: float = 0.0
    ) -> tuple[float, list[TokenScores], float]:
        """Gradients of one step over all its micro-batches and processes, clipped.

        Returns:
            the loss of the global batch, that of the routers included, the scores of this process's micro-batches, and
            the norm of the gradient before clipping. Where either number is not finite the norm is not, and there is
            no gradient.
        """
        assert self.optimizer is not None
        adapter.drop_inputs(self.model)
        routing = self._routing([batch for batch, _ in batches])
        averaged = 1 if self.deterministic else self.processes.shares  # DDP and FSDP take the mean
        for scale in loss_scales(self.dtype, batches, self.processes):
            losses: list[Tensor] = []
            scores: list[TokenScores] = []
            gradients = OrderedSum(self.trainable.values(), self.processes)
            with lost_processes():
                for i, (batch, ref_log_odds) in enumerate(batches):
                    with nullcontext() if self._syncs(i, len(batches)) else gradients_wait(self.to_train):
                        inputs = self._inputs(batch, ref_log_odds, baseline) | routing[i]
                        micro_loss, micro_scores = self.to_train(**inputs)
                        (micro_loss * (scale * averaged)).backward()
                    if self.deterministic:
                        gradients.add()
                    losses.append(micro_loss.detach())
                    scores.append(micro_scores)
                if self.deterministic:
                    gradients.put_back()
                mine, norm, stats = _fetched(losses, self.optimizer.clip(max_grad_norm, scale), scores)
                loss = float(self.processes.sum(np.array([mine]))[0])
            if not (math.isfinite(norm) and math.isfinite(loss)):
                self.optimizer.drop()
            if math.isfinite(norm) or not math.isfinite(loss):
                break
        if not math.isfinite(loss):
            norm = math.nan
        self.steps_taken = self.steps_taken or math.isfinite(norm)
        return loss, stats, norm

    @torch.no_grad()
    def _routing(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """What the loss of the routers needs beside each micro-batch's inputs: the experts that the whole step chooses,
        for which a step of several micro-batches or processes takes a forward pass more."""
        if not self.scored.balances:
            return [{} for _ in batches]
        uses = [{"uses": tensors(batch.uses, self.device)} for batch in batches]
        if len(batches) == self.processes.count == 1:
            return uses
        counts = torch.stack(
            [self.scored.chosen_experts(**self._grid(batch), **used) for batch, used in zip(batches, uses, strict=True)]
        ).sum(0)
        self._reshard()
        if self.processes.count > 1:
            counts = torch.from_numpy(self.processes.sum(counts.double().cpu().numpy())).long().to(self.device)
        return [used | {"counts": counts} for used in uses]

    def _syncs(self, i: int, count: int) -> bool:
        """Gradients are summed over the processes with the last micro-batch; but all weights' unsharded gradients
        would take the memory that sharding saves."""
        return i == count - 1 or (self.full and isinstance(self.scored, FSDPModule))

    # What training changes

    def state(self) -> Mapping[str, Array | Shard]:
        parts: dict[str, Tensor] = put_under(WEIGHTS, self.trainable)
        parts |= put_under(REFERENCE_WEIGHTS, self.reference_weights)
        if self.optimizer is not None:
            parts |= put_under(OPTIMIZER, dict(self.optimizer.state()))
        return joined(Taken(pieces(parts, self.processes)), self._random_state())

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Array]) -> None:
        self._reshard()
        self.load_weights(state)
        if self.optimizer is not None:
            self.optimizer.load_state(under(OPTIMIZER, state))
        reference = under(REFERENCE_WEIGHTS, state)
        self.reference_weights = {name: stored_like(reference, name, self.trainable[name]) for name in reference}
        self.load_random_state(state)
        self.steps_taken = True

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Array]) -> None:
        weights = under(WEIGHTS, state)
        require_same_shapes(weights, {name: tuple(p.shape) for name, p in self.trainable.items()})
        for name, p in self.trainable.items():
            p.copy_(stored_like(weights, name, p))

    def _random_state(self) -> dict[str, Array | Shard]:
        """Each process has generators of its own: a row of an array."""
        states = {"random/cpu": torch.get_rng_state()}
        if self.device.type in ("cuda", "mps"):
            states["random/device"] = getattr(torch, self.device.type).get_rng_state(*self._cuda_index()).cpu()
        rank, count = self.processes.rank, self.processes.count
        return {name: Shard(s.numpy().copy()[None], rank, (count, len(s))) for name, s in states.items()}

    def load_random_state(self, state: Mapping[str, Array]) -> None:
        """This process's generators; one that has no part in the state keeps its own."""
        states, rank = {name: state[name] for name in state if name.startswith("random/")}, self.processes.rank
        # Copies: of a view PyTorch 2.13 looks for the state as far behind its place as that is behind the first.
        mine = {name: torch.tensor(rows[rank]) for name, rows in states.items() if rank < len(rows)}
        if "random/cpu" in mine:
            torch.set_rng_state(mine["random/cpu"])
        if "random/device" in mine and self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).set_rng_state(mine["random/device"], *self._cuda_index())

    def _cuda_index(self) -> tuple[torch.device, ...]:
        """Which of several GPUs; MPS has one and takes no argument."""
        return (self.device,) if self.device.type == "cuda" else ()

    # Saving

    def save(self, folder: Path) -> None:
        with replacing(folder, self.processes) as partial:
            self.write(partial)

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """What was trained, into a folder that is there, beside whatever else is in it."""
        if self.full:
            weights = dict(self.base.named_parameters())
            save_model(self.base, weights, folder, self.source, getattr(torch, self.dtype), self.processes)
            return
        gathered = {name: whole(p.detach()) for name, p in self.trainable.items()}
        with agreed(self.processes):
            if self.processes.rank == 0:
                adapter.save_adapter(self.model, {name: tensor.cpu() for name, tensor in gathered.items()}, folder)


@contextmanager
def _without_settings(model: PreTrainedModel) -> Iterator[None]:
    """Within it generation is as it is asked for. transformers would take what is not from the checkpoint's own
    generation_config, such as a penalty for repetition, which has a say in greedy decoding as well."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again (arXiv 1604.06174)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            quiet: Any = partial(_checkpoint_quietly, layer)
            layer._gradient_checkpointing_func = quiet


def _checkpoint_quietly(layer: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """A layer that is in training mode so that it is checkpointed, and is to compute as in evaluation mode."""

    def run(*args: Any) -> Any:
        layer.training = False
        try:
            return function(*args)
        finally:
            layer.training = True

    return checkpoint(run, *args, use_reentrant=False)


def _fetched(
    losses: Sequence[Tensor], norm: Tensor, scores: Sequence[TokenScores]
) -> tuple[float, float, list[TokenScores]]:
    """A step's loss, norm and scores from the device, all at once: the one time in a step that it is waited for."""
    parts = [*losses, norm.to(torch.float32), *(part for micro in scores for part in micro)]
    flat = torch.cat([part.detach().reshape(-1) for part in parts]).cpu()
    numbers = [part.numpy() for part in flat.split([part.numel() for part in parts])]
    count = len(losses)
    loss = sum(float(number[0]) for number in numbers[:count])
    per_token = iter(numbers[count + 1 :])
    return loss, float(numbers[count][0]), [TokenScores(next(per_token), next(per_token)) for _ in scores]


def _to_numpy(scores: TokenScores) -> TokenScores:
    return TokenScores(*(s.cpu().numpy() for s in scores))
