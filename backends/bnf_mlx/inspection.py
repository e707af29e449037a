"""Looking inside a model for `bnf check-model`: what each module computes, and each adapter's gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from bnf_core.config import LoraConfig
from bnf_core.models.lora import initial_lora_a
from bnf_core.models.model_config import module_path
from bnf_core.types import Array, Batch
from bnf_mlx.adapter import adapter_off, add_adapter, never_adapted
from bnf_mlx.losses import bnf_token_loss, token_log_odds
from bnf_mlx.model import DTYPES, completion_logits, load_model
from bnf_mlx.optimizer import flat

CPU = mx.Device(mx.cpu)
Seen = dict[str, tuple[mx.array, mx.array]]


class MLXInspector:
    """A model on the CPU. Its modules go by `bnf_core.models.model_config.module_path`, as on every backend.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(self, folder: Path, dtype: str = "float32"):
        self.model = load_model(folder, CPU, DTYPES[dtype])

    def linear_layers(self) -> set[str]:
        """Paths of what an adapter can be put on."""
        linear, never = nn.Linear | nn.QuantizedLinear, never_adapted(self.model)
        return {
            module_path(name)
            for name, module in self.model.named_modules()
            if isinstance(module, linear) and name.rpartition(".")[2] not in never
        }

    def trace(self, input_ids: Array) -> dict[str, tuple[Array, Array]]:
        """First input and output of every module that was called, by path, in the order in which they finished; the
        model itself is the path "".

        Args:
            input_ids: (B, T) int32.
        """
        seen: Seen = {}
        with mx.stream(CPU), _recording(self.model, seen):
            self.model(mx.array(input_ids))
            mx.eval(list(seen.values()))
        return {path: (_numpy(given), _numpy(made)) for path, (given, made) in seen.items()}

    def observe(self, batch: Batch, lora: LoraConfig, seed: int) -> tuple[Array, Array, float, dict[str, Array]]:
        """One training step's numbers with an adapter whose A and B are both drawn by `bnf_core.models.lora`.

        Returns:
            The log-odds without and with the adapter, (N,) each, the BNF loss, and the gradients by path: of
            `….lora_a` (r, in), of `….lora_b` (out, r).
        """
        ids, positions, targets, coefficients = map(
            mx.array, (batch.input_ids, batch.positions, batch.targets, batch.coefficients)
        )

        def log_odds() -> tuple[mx.array, mx.array]:
            return token_log_odds(completion_logits(self.model, ids, positions), targets)

        def loss(reference: mx.array) -> tuple[mx.array, mx.array]:
            odds, entropy = log_odds()
            return (coefficients * bnf_token_loss(odds, entropy, reference)).sum(), odds

        with mx.stream(CPU):
            add_adapter(self.model, lora, seed)
            drawn = {
                name: _draw(name, p, lora.rank, seed) for name, p in flat(self.model.trainable_parameters()).items()
            }
            self.model.update(tree_unflatten(list(drawn.items())))
            with adapter_off(self.model):
                reference = mx.stop_gradient(log_odds()[0])
                mx.eval(reference)
            (value, odds), gradients = nn.value_and_grad(self.model, loss)(reference)
            mx.eval(value, odds, gradients)
        by_path = {module_path(name): _numpy(g).T for name, g in flat(gradients).items()}
        return _numpy(reference), _numpy(odds), value.item(), by_path


def _draw(name: str, parameter: mx.array, rank: int, seed: int) -> mx.array:
    """A (in, r) or B (r, out), the transpose of what `bnf_core.models.lora` draws."""
    path, _, part = module_path(name).rpartition(".")
    if part == "lora_a":
        return mx.array(initial_lora_a(path, rank, parameter.shape[0], seed).T)
    return mx.array(initial_lora_a(f"{path}.lora_b", parameter.shape[1], rank, seed).T)


@contextmanager
def _recording(model: nn.Module, seen: Seen) -> Iterator[None]:
    """Within it every module notes what it is given and what it makes: MLX has no hooks, so each gets a class of
    its own for a while."""
    modules = [(module, type(module), module_path(name)) for name, module in model.named_modules()]
    try:
        for module, kind, path in modules:
            module.__class__ = _noting(kind, path, seen)
        yield
    finally:
        for module, kind, _ in modules:
            module.__class__ = kind


def _noting(kind: type[nn.Module], path: str, seen: Seen) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = kind.__call__(self, *args, **kwargs)
        given, made = _first([*args, *kwargs.values()]), _first(output)
        if given is not None and made is not None:
            seen[path] = (given, made)
        return output

    return type(kind.__name__, (kind,), {"__call__": call})


def _first(value: Any) -> mx.array | None:
    """The first array of what a module takes or gives, which may be a tuple of several."""
    if isinstance(value, tuple | list):
        return next((x for x in value if isinstance(x, mx.array)), None)
    return value if isinstance(value, mx.array) else None


def _numpy(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32))
