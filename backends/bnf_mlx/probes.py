"""What a model's code can do, found out by comparing: surer than a list of families."""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from bnf_core.errors import UserError
from bnf_core.steps.batching import collate
from bnf_core.types import Example
from bnf_mlx.attention import Layout, PageTable, paged_caches, segments_of
from bnf_mlx.model import completion_logits, output_head, text_model
from bnf_mlx.optimizer import flat
from bnf_mlx.pages import pages


def head_is_linear(model: nn.Module) -> bool:
    """Whether the logits are hidden @ head.T and nothing else. Some families scale or cap them or add a bias;
    comparing is surer than a list of them, in float32, where a mild cap shows."""
    ids, text = mx.arange(8)[None], text_model(model)
    try:
        body, head = text.model, output_head(model)
        if type(head) not in MATRICES or "bias" in head:
            return False
        states = body(ids).astype(mx.float32)
        text.model = _Answering(body, states)
        try:
            logits = model(ids)
        finally:
            text.model = body
    except (AttributeError, TypeError, ValueError):  # no such parts: the model's own logits it is
        return False
    linear = cast(Any, getattr(head, "as_linear", head))(states)
    error = mx.abs(logits - linear).max()
    return logits.shape == linear.shape and bool(error <= 1e-5 * mx.abs(logits).max())


MATRICES = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)


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
    """How this model takes the mask of a packed grid: comparing is surer than a list of families.

    Raises:
        UserError: packed sequences see each other, or the model cannot be given a mask, or positions are absolute.
    """
    parts = [np.arange(12) % 8, np.arange(7, 27) % 8]
    alone = [completion_logits(model, mx.array(ids)[None], mx.arange(len(ids))).astype(mx.float32) for ids in parts]
    rows = ((0, 1), (1, 0))  # two, so that a mask cannot pass for one of heads
    grid = mx.array(np.stack([np.concatenate([parts[i] for i in row]) for row in rows]))
    segment_ids = mx.array(np.stack([np.repeat([0, 1], [len(parts[i]) for i in row]) for row in rows]))
    expected = mx.concatenate([alone[i] for row in rows for i in row])

    def error(layout: Layout | None) -> float:
        logits = completion_logits(model, grid, mx.arange(grid.size), layout).astype(mx.float32)
        return float(mx.sqrt(mx.square(logits - expected).mean() / mx.square(expected).mean()))

    head_axes = _closest(model, error, lambda head_axes: segments_of(model, segment_ids, head_axes))
    if head_axes is None:
        raise UserError(
            "sequences cannot be packed with this model: its positions are absolute, or its layers pass on more than "
            "attention does. Train it without packing"
        )
    return head_axes


def sharing_head_axes(model: nn.Module) -> int | None:
    """How this model takes the mask of pages; None: its completions cannot share prompts, for its positions cannot
    differ from row to row, or its layers pass on more than attention does."""
    ids = [tuple((np.arange(length) * step % 8).tolist()) for length, step in ((11, 1), (6, 3), (9, 5))]
    rows = [Example(ids[0], completion, True) for completion in ids[1:]]
    alone = collate(rows, 2)
    expected = completion_logits(model, mx.array(alone.input_ids), mx.array(alone.positions)).astype(mx.float32)
    shared = pages(collate(rows, 2, bins=[[0, 1]], share_prompts=True))
    grid, positions = mx.array(shared.input_ids), mx.array(shared.positions)

    def error(layout: Layout | None) -> float:
        logits = completion_logits(model, grid, positions, layout).astype(mx.float32)
        return float(mx.sqrt(mx.square(logits - expected).mean() / mx.square(expected).mean()))

    table = PageTable(*map(mx.array, (shared.offsets, shared.lengths, shared.table)))
    return _closest(model, error, lambda head_axes: paged_caches(model, table, head_axes))


def _closest(model: nn.Module, error: Callable[[Layout | None], float], layout: Callable[[int], Layout]) -> int | None:
    """The head axes with which the error of a layout is no more than round-off, if there are any."""
    half = any(x.dtype in (mx.bfloat16, mx.float16) for x in flat(model.parameters()).values())
    tolerance = min(5e-2 if half else 1e-4, error(None) / 5)
    for head_axes in (1, 2):
        try:
            if error(layout(head_axes)) <= tolerance:
                return head_axes
        except (ValueError, TypeError, AttributeError, IndexError, RuntimeError):  # another kind of cache or mask
            continue
    return None
