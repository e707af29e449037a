"""What a model's code can do, found out by comparing: surer than a list of families."""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from bnf_core.errors import UserError
from bnf_core.models.model_config import HeadTransform, head_transforms
from bnf_core.steps.probing import heeds_layout, packing_probe, sharing_probe
from bnf_core.types import Array, Batch
from bnf_mlx.attention import Layout, PageTable, paged_caches, segments_of
from bnf_mlx.model import WIDE, completion_logits, output_head, text_model
from bnf_mlx.optimizer import flat
from bnf_mlx.pages import Pages, pages


def head_transform(model: nn.Module) -> HeadTransform | None:
    """What makes the logits of hidden @ head.T + bias; None: something else does. Comparing is surer than a list of
    families, in float32, where a mild cap shows."""
    ids, text = mx.arange(8)[None], text_model(model)
    try:
        body, head = text.model, output_head(model)
        if type(head) not in MATRICES:
            return None
        states = body(ids, cache=None).astype(mx.float32)
        text.model = _Answering(body, states)
        try:
            logits = model(ids)
        finally:
            text.model = body
    except (AttributeError, TypeError, ValueError):  # no such parts: the model's own logits it is
        return None
    linear = cast(Any, getattr(head, "as_linear", head))(states)
    if logits.shape != linear.shape:
        return None
    settings = getattr(text, "args", None) or getattr(model, "args", None)
    for transform in head_transforms(vars(settings) if settings is not None else {}):
        expected, cap = transform.scale * linear, transform.soft_cap
        expected = expected if cap is None else cap * mx.tanh(expected / cap)
        if mx.abs(logits - expected).max() <= 1e-5 * mx.abs(logits).max():
            return transform
    return None


MATRICES = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding, *WIDE.values())


class _Answering(nn.Module):
    """In the place of a model's body: states known beforehand, and the body's parts, such as tied embeddings."""

    def __init__(self, body: nn.Module, states: mx.array):
        super().__init__()
        self.__dict__.update(vars(body))
        dict.update(self, body)
        self._states = states

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._states


def packing_head_axes(model: nn.Module) -> int:
    """How this model takes the mask of a packed grid.

    Raises:
        UserError: packed sequences see each other, or the model cannot be given a mask, or positions are absolute.
    """
    probe = packing_probe()
    segment_ids = mx.array(probe.together.segment_ids)
    head_axes = _head_axes(model, probe.alone, probe.together, lambda axes: segments_of(model, segment_ids, axes))
    if head_axes is None:
        raise UserError(
            "sequences cannot be packed with this model: its positions are absolute, or its layers pass on more than "
            "attention does. Train it without packing"
        )
    return head_axes


def sharing_head_axes(model: nn.Module) -> int | None:
    """How this model takes the mask of pages; None: its completions cannot share prompts, for its positions cannot
    differ from row to row, or its layers pass on more than attention does."""
    probe = sharing_probe()
    shared = pages(probe.together)
    table = PageTable(*map(mx.array, (shared.offsets, shared.lengths, shared.table)))
    return _head_axes(model, probe.alone, shared, lambda axes: paged_caches(model, table, axes))


def _head_axes(model: nn.Module, alone: Batch, together: Batch | Pages, layout: Callable[[int], Layout]) -> int | None:
    """The head axes with which the model heeds a layout, if there are any."""

    def logits(grid: Batch | Pages, told: Layout | None = None) -> Array:
        ids, positions = mx.array(grid.input_ids), mx.array(grid.positions)
        return np.array(completion_logits(model, ids, positions, told).astype(mx.float32))

    half = any(x.dtype in (mx.bfloat16, mx.float16) for x in flat(model.parameters()).values())
    truth, untold = logits(alone), logits(together)
    for head_axes in (1, 2):
        try:
            if heeds_layout(truth, untold, logits(together, layout(head_axes)), half=half):
                return head_axes
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError):  # another kind of cache or mask
            continue
    return None
