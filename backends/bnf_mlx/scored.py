"""The forward pass that ends in the loss, its gradients, and what is kept for the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from bnf_core.errors import UserError
from bnf_core.types import Array, Batch, TokenStats
from bnf_mlx import adapter
from bnf_mlx.attention import PageTable
from bnf_mlx.linear import linear_bnf_loss
from bnf_mlx.model import completion_hidden
from bnf_mlx.optimizer import flat

if TYPE_CHECKING:
    from bnf_mlx.engine import MLXEngine

Gradients = dict[str, mx.array]  # by parameter path


class Inputs(NamedTuple):
    """A micro-batch on the device."""

    ids: mx.array  # (B, T); of a shared one, pages
    segment_ids: mx.array | None  # (B, T) where it is packed
    pages: PageTable | None  # where prompts are shared
    positions: mx.array  # (N,) in the flattened grid
    targets: mx.array  # (N,)
    reference: mx.array  # (N,) log-odds
    coefficients: mx.array  # (N,)


class MicroStep:
    """The loss of a micro-batch, the statistics of its tokens and its gradients.

    MLX can compile this, once for each shape of the inputs. The model's arrays, which it closes over, must be named
    then, and be put back after each call, or the model would be left with what stands for them while MLX traces.
    """

    def __init__(self, engine: "MLXEngine"):
        self.engine = engine
        self._drops = adapter.has_dropout(engine.model)
        self._step = self._gradients
        if engine.compiled:
            self._step = mx.compile(self._gradients, inputs=[engine.model.state])

    def __call__(self, batch: Batch, ref_log_odds: Array) -> tuple[float, TokenStats, Gradients]:
        model, tokens = self.engine.model, len(batch.targets)
        if tokens == 0:  # where the processes do not have equally much to do
            nothing = np.zeros(0, np.float32)
            zeros = tree_map(mx.zeros_like, flat(model.trainable_parameters()))
            return 0.0, TokenStats(nothing, nothing, nothing), zeros
        inputs = self.engine.inputs(batch, ref_log_odds, pad=self.engine.compiled)
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32) if self._drops else mx.random.key(0)
        model.train()
        loss, stats, gradients = self._step(inputs, key)
        mx.eval(loss, stats, gradients)
        return float(loss), TokenStats(*(np.array(x)[:tokens] for x in stats)), gradients

    def _gradients(self, inputs: Inputs, key: mx.array) -> tuple[mx.array, tuple[mx.array, ...], Gradients]:
        model = self.engine.model
        before = flat(model.state)
        try:
            adapter.new_dropout(model, key)
            (loss, stats), gradients = mx.value_and_grad(self._loss)(flat(model.trainable_parameters()), inputs)
        finally:
            model.load_weights(list(before.items()), strict=False)
        return loss, stats, gradients

    def _loss(self, parameters: Gradients, inputs: Inputs) -> tuple[mx.array, tuple[mx.array, ...]]:
        """Σ coefficients · ℓ of the micro-batch, and its token statistics."""
        engine = self.engine
        engine.model.load_weights(list(parameters.items()), strict=False)
        with recomputed(engine.model) if engine.gradient_checkpointing else nullcontext():
            if not engine.fused:
                stats = engine.stats(inputs)
                return (inputs.coefficients * stats.token_loss).sum(), tuple(map(mx.stop_gradient, stats))
            hidden = completion_hidden(engine.model, inputs.ids, inputs.positions, engine.layout(inputs))  # (N, D)
        rest = inputs.targets, inputs.reference, inputs.coefficients
        loss, stats = linear_bnf_loss(hidden, engine.head(), *rest, train_head=engine.trains_head)
        return loss, tuple(stats)


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Within it the model's layers keep only their inputs for the backward pass, and run again there.

    mlx-lm changes the call of the layer's class for good; this puts something else in the places of the layers.

    Raises:
        UserError: the model does not let its layers be replaced.
    """
    layers = model.layers
    kept = list(layers)
    layers[:] = [_Recomputed(layer) for layer in kept]
    try:
        if not isinstance(model.layers[0], _Recomputed):
            raise UserError("gradient checkpointing: this model makes its list of layers anew, so switch it off")
        yield
    finally:
        layers[:] = kept


class _Recomputed:
    """A layer whose inner values are forgotten and computed again. The rest of it can be seen through."""

    def __init__(self, layer: nn.Module):
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer
        parameters = flat(layer.trainable_parameters())

        def run(parameters: Gradients, args: Any, kwargs: Any) -> Any:
            layer.load_weights(list(parameters.items()), strict=False)
            return layer(*args, **kwargs)

        # Parameters are inputs: MLX finds no gradient of what the function merely closes over.
        output = mx.checkpoint(run)(parameters, args, kwargs)
        layer.load_weights(list(parameters.items()), strict=False)  # for a layer that is used twice
        return output


@contextmanager
def wired_memory() -> Iterator[None]:
    """On Metal, let MLX keep as much memory resident as Apple recommends, as mlx-lm does."""
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    before = maybe_set_recommended_wired_limit()
    try:
        yield
    finally:
        if before is not None:
            mx.synchronize()
            mx.set_wired_limit(before)
