"""The forward pass that ends in the loss, its gradients, and what is kept for the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from bnf_core.errors import UserError
from bnf_core.models.model_config import HeadTransform, position_limit
from bnf_core.objectives import Objective, Seen, Structure, batch_loss, structure
from bnf_core.objectives.base import mapped
from bnf_core.objectives.bnf import BNF
from bnf_core.steps.limits import Limits
from bnf_core.types import Array, Batch, TokenScores
from bnf_mlx import adapter
from bnf_mlx.attention import Layout, PageTable, paged_caches, segments_of
from bnf_mlx.linear import detached_log_odds, linear_bnf_loss, linear_log_odds
from bnf_mlx.losses import token_log_odds
from bnf_mlx.model import completion_hidden, completion_logits, head_bias, head_weight
from bnf_mlx.ops import OPS
from bnf_mlx.optimizer import flat
from bnf_mlx.pages import pages
from bnf_mlx.probes import head_transform, packing_head_axes, sharing_head_axes

Gradients = dict[str, mx.array]  # by parameter path


# A compiled step is computed for grids of a width, and numbers of tokens, that are multiples of these: each shape is
# compiled once, and there are to be few.
PAD_COLUMNS, PAD_TOKENS, PAD_ROW = 32, 64, 64


class Inputs(NamedTuple):
    """A micro-batch on the device."""

    ids: mx.array  # (B, T); of a shared one, pages
    segment_ids: mx.array | None  # (B, T) where it is packed
    pages: PageTable | None  # where prompts are shared
    positions: mx.array  # (N,) in the flattened grid
    targets: mx.array  # (N,)
    reference: mx.array  # (N,) log-odds
    coefficients: mx.array  # (N,), for BNF
    structure: Structure | None  # how tokens make up rows and pairs; None for `one_pass`


class ScoredModel:
    """A model as it is trained and evaluated: batches brought to its device, and the head and loss at its end.

    Args:
        model: with an adapter, with all weights trainable, or frozen.
        objective: what the loss is.
        gradient_checkpointing: keep only each layer's input for the backward pass.
        compiled: whether steps are compiled, once for each shape.
    """

    def __init__(
        self,
        model: nn.Module,
        device: mx.Device,
        objective: Objective,
        *,
        gradient_checkpointing: bool,
        compiled: bool,
    ):
        self.model = model
        self.objective = objective
        self.device = device
        self.gradient_checkpointing = gradient_checkpointing
        self.compiled = compiled
        with mx.stream(device):
            self.head = head_transform(model)  # None: the model's own logits are taken
            head = head_weight(model) if self.head else None
            trainable = flat(model.trainable_parameters())
            bias = head_bias(model) if self.head else None
            self.trains_head = any(p is head or p is bias for p in trainable.values() if p is not None)
            kept = head is not None and all(p is not head for p in flat(model.parameters()).values())
            self.dequantised = head if kept else None  # once, not for every batch
            mx.eval(self.dequantised)
            vocabulary = completion_logits(model, mx.arange(2)[None], mx.arange(1)).shape[-1]
            self.limits = Limits(vocabulary, position_limit(dict(vars(getattr(model, "args", None) or object))))

    @property
    def one_pass(self) -> bool:
        """Whether the head and BNF are one function, which needs no second pass over a trained head, and no
        structure."""
        return self.head is not None and isinstance(self.objective, BNF)

    def inputs(self, batch: Batch, ref_log_odds: Array, baseline: float = 0.0, *, pad: bool = False) -> Inputs:
        """A batch on the device; with `pad`, of one of few shapes: more columns of padding, and the last token again
        and again with a coefficient of zero.

        Raises:
            UserError: a token that the model does not know.
        """
        self.limits.require(batch)
        ids, segment_ids, positions, layout = batch.input_ids, batch.segment_ids, batch.positions, None
        if batch.shared:
            if not self.shares_prompts:
                raise UserError(
                    "this model cannot compute a prompt once for several completions. Set share_prompts to false"
                )
            cut = pages(batch, PAD_COLUMNS if pad else 1)
            ids, positions, layout = cut.input_ids, cut.positions, (cut.offsets, cut.lengths, cut.table)
        elif batch.packed:
            _ = self._head_axes  # an error now, and not while MLX traces
        tokens = [batch.targets, ref_log_odds, batch.coefficients]
        again = (0, -len(positions) % PAD_TOKENS if pad else 0)
        if pad:
            if layout is None:
                width = ids.shape[1]
                more = -width % PAD_COLUMNS
                ids = np.pad(ids, ((0, 0), (0, more)))
                segment_ids = np.pad(segment_ids, ((0, 0), (0, more)), constant_values=-1)
                positions = positions // width * (width + more) + positions % width
            positions = np.pad(positions, again, "edge")
            tokens = [np.pad(x, again, "edge") for x in tokens[:2]] + [np.pad(tokens[2], again)]
        segments = mx.array(segment_ids) if batch.packed and layout is None else None
        table = None if layout is None else PageTable(*map(mx.array, layout))
        rows = None
        if not self.one_pass:
            rows = structure(self.objective, batch, baseline, PAD_ROW if pad else 1)
            rows = rows._replace(
                grid=np.where(rows.grid == len(batch.targets), len(positions), rows.grid),
                drawn=mapped(lambda x: np.pad(x, again), rows.drawn),
            )
            rows = mapped(mx.array, rows)
        targets, reference, coefficients = map(mx.array, tokens)
        return Inputs(
            ids=mx.array(ids),
            segment_ids=segments,
            pages=table,
            positions=mx.array(positions),
            targets=targets,
            reference=reference,
            coefficients=coefficients,
            structure=rows,
        )

    def scores(self, inputs: Inputs) -> TokenScores:
        """What the policy says of each token; without gradients where the head is fused."""
        if self.head is not None:
            hidden, head, options = self._before_head(inputs, self.head)
            return TokenScores(*detached_log_odds(hidden, head, inputs.targets, **options))
        logits = completion_logits(self.model, inputs.ids, inputs.positions, self.layout(inputs))
        return TokenScores(*token_log_odds(logits, inputs.targets))

    def loss(self, inputs: Inputs) -> tuple[mx.array, TokenScores]:
        """The micro-batch's part of the loss, and what the policy says of each token."""
        if self.head is None:
            scores = self.scores(inputs)
        else:
            hidden, head, options = self._before_head(inputs, self.head)
            if self.one_pass:
                rest = inputs.targets, inputs.reference, inputs.coefficients
                loss, stats = linear_bnf_loss(hidden, head, *rest, train_head=self.trains_head, **options)
                return loss, TokenScores(stats.log_odds, stats.other_entropy)
            scores = TokenScores(*linear_log_odds(hidden, head, inputs.targets, **options))
        assert inputs.structure is not None
        return batch_loss(self.objective, OPS, Seen(*scores, inputs.reference, inputs.structure)), scores

    def _before_head(self, inputs: Inputs, transform: HeadTransform) -> tuple[mx.array, mx.array, dict[str, Any]]:
        """Hidden states (N, D), the head (V, D), and its bias and soft cap."""
        hidden = completion_hidden(self.model, inputs.ids, inputs.positions, self.layout(inputs))
        head = head_weight(self.model) if self.dequantised is None else self.dequantised
        bias = head_bias(self.model)
        if transform.scale != 1.0:
            hidden, bias = hidden * transform.scale, None if bias is None else bias * transform.scale
        return hidden, head, {"bias": bias, "soft_cap": transform.soft_cap}

    def layout(self, inputs: Inputs) -> Layout | None:
        if inputs.pages is not None:
            assert self._page_head_axes is not None
            return paged_caches(self.model, inputs.pages, self._page_head_axes)
        if inputs.segment_ids is not None:
            return segments_of(self.model, inputs.segment_ids, self._head_axes)
        return None

    @property
    def shares_prompts(self) -> bool:
        with mx.stream(self.device):
            return self._page_head_axes is not None

    @cached_property
    def _head_axes(self) -> int:
        self.model.eval()  # dropout would pass for a difference
        return packing_head_axes(self.model)

    @cached_property
    def _page_head_axes(self) -> int | None:
        self.model.eval()
        return sharing_head_axes(self.model)


class MicroStep:
    """The loss of a micro-batch, what the policy says of its tokens, and the gradients.

    MLX can compile this, once for each shape of the inputs. The model's arrays, which it closes over, must be named
    then, and be put back after each call, or the model would be left with what stands for them while MLX traces.
    """

    def __init__(self, scored: ScoredModel):
        self.scored = scored
        self._drops = adapter.has_dropout(scored.model)
        self._step = self._gradients
        if scored.compiled:
            self._step = mx.compile(self._gradients, inputs=[scored.model.state])

    def __call__(
        self, batch: Batch, ref_log_odds: Array, baseline: float = 0.0, scale: float = 1.0
    ) -> tuple[float, TokenScores, Gradients]:
        """
        Args:
            scale: what the loss is multiplied by for the backward pass, and the gradients are divided by.
        """
        model, tokens = self.scored.model, len(batch.targets)
        if tokens == 0:  # where the processes do not have equally much to do
            nothing = np.zeros(0, np.float32)
            zeros = tree_map(mx.zeros_like, flat(model.trainable_parameters()))
            return 0.0, TokenScores(nothing, nothing), zeros
        inputs = self.scored.inputs(batch, ref_log_odds, baseline, pad=self.scored.compiled)
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32) if self._drops else mx.random.key(0)
        adapter.drop_inputs(model)
        loss, scores, gradients = self._step(inputs, key, mx.array(scale))
        mx.eval(loss, scores, gradients)
        return float(loss), TokenScores(*(np.array(x)[:tokens] for x in scores)), gradients

    def _gradients(
        self, inputs: Inputs, key: mx.array, scale: mx.array
    ) -> tuple[mx.array, tuple[mx.array, ...], Gradients]:
        model = self.scored.model

        def scaled(parameters: Gradients, inputs: Inputs) -> tuple[mx.array, tuple[mx.array, ...]]:
            loss, scores = self._loss(parameters, inputs)
            return loss * scale, scores

        before = flat(model.state)
        try:
            adapter.new_dropout(model, key)
            (loss, scores), gradients = mx.value_and_grad(scaled)(flat(model.trainable_parameters()), inputs)
        finally:
            model.load_weights(list(before.items()), strict=False)
        return loss / scale, scores, {name: g / scale for name, g in gradients.items()}

    def _loss(self, parameters: Gradients, inputs: Inputs) -> tuple[mx.array, tuple[mx.array, ...]]:
        """The micro-batch's part of the loss, and its tokens' scores."""
        scored = self.scored
        scored.model.load_weights(list(parameters.items()), strict=False)
        with recomputed(scored.model) if scored.gradient_checkpointing else nullcontext():
            loss, scores = scored.loss(inputs)
        return loss, tuple(map(mx.stop_gradient, scores))


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
