"""Looking inside a model for `bnf check-model`: what each module computes, and each adapter's gradient."""

from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from bnf_core.config import LoraConfig
from bnf_core.models.lora import initial_lora_a
from bnf_core.models.model_config import module_path
from bnf_core.types import Array, Batch
from bnf_torch.adapter import adapter_off, add_lora, linear_layers, never_adapted
from bnf_torch.losses import bnf_token_loss, token_log_odds
from bnf_torch.model import DTYPES, completion_logits, load_model


class TorchInspector:
    """A model on the CPU. Its modules go by `bnf_core.models.model_config.module_path`, as on every backend.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(self, folder: Path, dtype: str = "float32"):
        self.model = load_model(folder, torch.device("cpu"), DTYPES[dtype])

    def linear_layers(self) -> set[str]:
        """Paths of what an adapter can be put on by name."""
        refused = never_adapted(self.model)
        return {module_path(name) for name in linear_layers(self.model) if name.rpartition(".")[2] not in refused}

    @torch.no_grad()
    def trace(self, input_ids: Array) -> dict[str, tuple[Array, Array]]:
        """First input and output of every module that was called, by path, in the order in which they finished; the
        model itself is the path "".

        Args:
            input_ids: (B, T) int32.
        """
        seen: dict[str, tuple[Array, Array]] = {}

        def record(path: str) -> Any:
            def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                tensors = _first([*args, *kwargs.values()]), _first(output)
                if tensors[0] is not None and tensors[1] is not None:
                    seen[path] = (_numpy(tensors[0]), _numpy(tensors[1]))

            return hook

        handles = [
            module.register_forward_hook(record(module_path(name)), with_kwargs=True)
            for name, module in self.model.named_modules()
        ]
        try:
            self.model(torch.tensor(input_ids).long(), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def observe(self, batch: Batch, lora: LoraConfig, seed: int) -> tuple[Array, Array, float, dict[str, Array]]:
        """One training step's numbers with an adapter whose A and B are both drawn by `bnf_core.models.lora`.

        Returns:
            The log-odds without and with the adapter, (N,) each, the BNF loss, and the gradients by path: of
            `….lora_a` (r, in), of `….lora_b` (out, r).
        """
        policy = add_lora(self.model, lora, seed)
        parameters: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                path = module_path(name)
                a, b = (cast(nn.Linear, part["default"]).weight for part in (module.lora_A, module.lora_B))
                parameters |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
                with torch.no_grad():
                    a.copy_(torch.from_numpy(initial_lora_a(path, lora.rank, a.shape[1], seed)))
                    b.copy_(torch.from_numpy(initial_lora_a(f"{path}.lora_b", b.shape[0], lora.rank, seed)))

        ids, positions, targets = (torch.tensor(x).long() for x in (batch.input_ids, batch.positions, batch.targets))
        with torch.no_grad(), adapter_off(policy):
            reference, _ = token_log_odds(completion_logits(self.model, ids, positions), targets)
        log_odds, entropy = token_log_odds(completion_logits(self.model, ids, positions), targets)
        loss = torch.dot(torch.tensor(batch.coefficients), bnf_token_loss(log_odds, entropy, reference))
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return (
            _numpy(reference),
            _numpy(log_odds),
            loss.item(),
            {
                path: _numpy(torch.zeros_like(p) if g is None else g)  # None: the model reads past this adapter
                for (path, p), g in zip(parameters.items(), gradients, strict=True)
            },
        )


def _first(value: Any) -> Tensor | None:
    """The first tensor of what a module takes or gives, which may be a tuple of several."""
    if isinstance(value, tuple | list):
        return next((x for x in value if isinstance(x, Tensor)), None)
    return value if isinstance(value, Tensor) else getattr(value, "logits", getattr(value, "last_hidden_state", None))


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().float().numpy()
