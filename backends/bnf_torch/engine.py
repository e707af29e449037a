"""A loaded PyTorch model that scores, trains and generates: bnf_core.protocol.Engine."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from bnf_core.batching import Batch
from bnf_core.config import OptimizerConfig
from bnf_core.pieces import require_same_shapes, under
from bnf_core.processes import ALONE, Processes
from bnf_core.protocol import Array, Done, Step, TokenStats
from bnf_torch import adapter
from bnf_torch.linear import linear_bnf_loss
from bnf_torch.losses import bnf_token_loss, token_log_odds
from bnf_torch.model import completion_hidden, completion_logits, head_is_linear, head_weight
from bnf_torch.optimizer import Optimizer


class TorchEngine:
    processes: Processes = ALONE

    def __init__(self, model: PreTrainedModel | PeftModel, optimizer: OptimizerConfig | None = None):
        self.model = model
        self.base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        self.device: torch.device = self.base.device
        self.dtype = str(self.base.dtype).removeprefix("torch.")
        self.fused = head_is_linear(self.base)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = Optimizer(self.trainable, optimizer) if optimizer and self.trainable else None

    def reference_log_odds(self, batch: Batch) -> Array:
        with adapter.adapter_off(self.model):
            return self.evaluate(batch, np.zeros(len(batch.targets), np.float32)).log_odds

    @torch.no_grad()
    def evaluate(self, batch: Batch, ref_log_odds: Array) -> TokenStats:
        self.model.eval()
        return _to_numpy(self._loss(batch, ref_log_odds)[1])

    def fit(self, steps: Iterator[Step], done: Done, max_grad_norm: float | None) -> None:
        if self.optimizer is None:
            raise RuntimeError("this engine was loaded without anything to train and an optimizer")
        for step in steps:
            self.model.train()
            stats, loss = [], 0.0
            for batch, ref_log_odds in step.batches:
                micro_loss, micro_stats = self._loss(batch, ref_log_odds)
                micro_loss.backward()
                loss += float(micro_loss.detach())
                stats.append(_to_numpy(micro_stats))
            norm = self.optimizer.update(step.learning_rate, max_grad_norm) if math.isfinite(loss) else math.nan
            done(step, stats, norm)

    def state(self) -> dict[str, Array]:
        state = {f"weights/{name}": p.detach() for name, p in self.trainable.items()}
        if self.optimizer is not None:
            state |= {f"optimizer/{name}": value for name, value in self.optimizer.state().items()}
        state["random/cpu"] = torch.get_rng_state()
        if self.device.type in ("cuda", "mps"):
            state["random/device"] = getattr(torch, self.device.type).get_rng_state(*self._cuda_index())
        return {name: value.cpu().numpy().copy() for name, value in state.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Array]) -> None:
        weights = under("weights", state)
        require_same_shapes(weights, {name: tuple(p.shape) for name, p in self.trainable.items()})
        for name, p in self.trainable.items():
            p.copy_(torch.tensor(weights[name]))
        if self.optimizer is not None:
            self.optimizer.load_state({name: torch.tensor(a) for name, a in under("optimizer", state).items()})
        torch.set_rng_state(torch.tensor(state["random/cpu"]))
        if "random/device" in state and self.device.type in ("cuda", "mps"):
            generator = torch.tensor(state["random/device"])
            getattr(torch, self.device.type).set_rng_state(generator, *self._cuda_index())

    def _cuda_index(self) -> tuple[torch.device, ...]:
        """Which of several GPUs; MPS has one and takes no argument."""
        return (self.device,) if self.device.type == "cuda" else ()

    def _loss(self, batch: Batch, ref_log_odds: Array) -> tuple[Tensor, TokenStats]:
        """Σ coefficients · ℓ of the batch, and its token statistics."""
        ids, positions, targets = (
            self._tensor(batch.input_ids),
            self._tensor(batch.positions),
            self._tensor(batch.targets),
        )
        reference, coefficients = self._tensor(ref_log_odds), self._tensor(batch.coefficients)
        if self.fused:
            hidden = completion_hidden(self.base, ids, positions)  # (N, D)
            return linear_bnf_loss(hidden, head_weight(self.base), targets, reference, coefficients)
        log_odds, entropy = token_log_odds(completion_logits(self.base, ids, positions), targets)
        token_loss = bnf_token_loss(log_odds, entropy, reference)
        return torch.dot(coefficients, token_loss), TokenStats(log_odds.detach(), entropy, token_loss.detach())

    def _tensor(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        return (tensor.long() if tensor.dtype == torch.int32 else tensor).to(self.device)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        self.model.eval()
        width = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)  # padded on the left, so that all end together
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=list(stop_ids) or None, pad_token_id=0
        )
        output = cast(Any, self.base).generate(
            ids.to(self.device), attention_mask=mask.to(self.device), generation_config=config
        )
        return [_until(row[width:].tolist(), stop_ids) for row in output]

    def save(self, folder: Path) -> None:
        adapter.save_adapter(self.model, folder)


def _to_numpy(stats: TokenStats) -> TokenStats:
    return TokenStats(*(s.cpu().numpy() for s in stats))


def _until(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    stops = [i for i, token in enumerate(ids) if token in stop_ids]
    return ids[: stops[0]] if stops else ids
