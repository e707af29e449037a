"""Who sees whom in a grid whose rows hold more than one sequence: packed ones, or completions that share a prompt.

The model's own masks are asked for positions in the sequence instead of the grid. On a CPU attention is then computed
segment by segment, on CUDA by FlexAttention (arXiv 2412.05496) in blocks of 128 tokens, so that what a mask hides costs
nothing and no (T, T) mask is made.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, groupby, pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LAYOUT = ("position_ids", "segment_ids", "prefix_ids")  # of a batch
BLOCK = 128  # tokens, of queries and of keys
WITH_MASKS = ("sdpa", "eager", "flex_attention")  # kinds of attention that take any mask


Masks = Literal["segments", "blocks", "dense"]
CHOSEN = "_bnf_masks"  # attribute of a model


@contextmanager
def attending(
    model: PreTrainedModel,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    prefix_ids: Tensor | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Within it the model heeds the layout of a grid, if it is called with the options given.

    From `position_ids` alone, which begin anew, transformers tells packed sequences apart. With the rest of the layout,
    whatever mask the model builds, such as one of a sliding window, is asked for positions in the sequence instead of
    the grid, and hides what is neither in a token's own segment nor in the one that it goes on from.

    Args:
        position_ids, segment_ids, prefix_ids: (B, T), as in `Batch`.
    Raises:
        ValueError: the model's kind of attention takes no such mask.
    """
    if position_ids is None or segment_ids is None or prefix_ids is None:
        yield {} if position_ids is None else {"position_ids": position_ids}
        return
    kind, masks = model.config._attn_implementation, ALL_MASK_ATTENTION_FUNCTIONS
    how = masks_of(model)
    if kind not in WITH_MASKS:
        raise ValueError(f"attention of the kind {kind!r} takes no masks of one's own")
    rows = _rows(segment_ids, prefix_ids) if how == "segments" else None
    blocks = _blocks(segment_ids, prefix_ids) if how == "blocks" else None
    right, width = masks[kind], segment_ids.shape[1]

    def layout_mask(*, mask_function: Callable[..., Tensor], **options: Any) -> Any:
        def visible(b: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            own, other = segment_ids[b, q], segment_ids[b, kv]
            seen = mask_function(b, head, position_ids[b, q], position_ids[b, kv])
            return seen & ((other == own) | (other == prefix_ids[b, q]))

        if blocks is not None:
            _attend_by_layout()
            return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(width, width))
        options |= {"attention_mask": None, "allow_is_causal_skip": False}
        mask = right(mask_function=visible, **options)
        if rows is not None:
            _attend_by_layout()
            mask.segments = rows  # with the mask they reach a layer also when it is computed again for its gradient
        return mask

    masks[kind] = layout_mask
    try:  # with a mask transformers does not take positions that begin anew for packed sequences
        yield {"position_ids": position_ids, "attention_mask": torch.ones_like(segment_ids)}
    finally:
        masks[kind] = right


def masks_of(model: PreTrainedModel) -> Masks:
    """What tells the model's attention who sees whom: what `use_masks` has chosen, or on a CPU `segments`."""
    kind = model.config._attn_implementation
    chosen: Masks | None = getattr(model, CHOSEN, None)
    if kind == "flex_attention":
        return "blocks"
    if kind != "sdpa":
        return "dense"
    return chosen or ("segments" if model.device.type == "cpu" else "dense")


def use_masks(model: PreTrainedModel, masks: Masks | None) -> None:
    """From now on; None: what suits the device."""
    setattr(model, CHOSEN, masks)


class Row(NamedTuple):
    """The segments of a row of the grid, one after another."""

    lengths: list[int]  # tokens of each
    prefixes: list[int]  # the segment, by its place, that each goes on from, or itself


def _rows(segment_ids: Tensor, prefix_ids: Tensor) -> list[Row]:
    """Of (B, T) ids as in `Batch`."""
    rows = []
    for ids in torch.stack([segment_ids, prefix_ids], 2).tolist():
        runs = [(own, prefix, len(list(run))) for (own, prefix), run in groupby(map(tuple, ids))]
        place = {own: i for i, (own, _, _) in enumerate(runs)}
        rows.append(Row([length for _, _, length in runs], [place[prefix] for _, prefix, _ in runs]))
    return rows


def _blocks(segment_ids: Tensor, prefix_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks of keys each block of queries may see something of, and perhaps some more: how many, (B, 1, Q), and
    which, (B, 1, Q, K), these first. A model's sliding window, which would hide more of them, is not looked at.

    Args:
        segment_ids, prefix_ids: (B, T), as in `Batch`.
    """
    count = -(-segment_ids.shape[1] // BLOCK)

    def ends(ids: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest of each block, (B, count)."""
        padded = nn.functional.pad(ids.float(), (0, count * BLOCK - ids.shape[1]), mode="replicate")
        least, greatest = padded.unflatten(1, (count, BLOCK)).aminmax(dim=2)
        return least, greatest

    own, prefix = ends(segment_ids), ends(prefix_ids)

    def meet(queries: tuple[Tensor, Tensor]) -> Tensor:
        return (own[0][:, None, :] <= queries[1][:, :, None]) & (queries[0][:, :, None] <= own[1][:, None, :])

    causal = torch.ones(count, count, dtype=torch.bool, device=segment_ids.device).tril()
    seen = (causal & (meet(own) | meet(prefix))).unsqueeze(1)  # (B, 1, Q, K)
    indices = (~seen).int().argsort(dim=-1, stable=True)
    return seen.sum(-1, dtype=torch.int32), indices.int()


@cache
def _attend_by_layout() -> None:
    """Have transformers' "sdpa" attention heed the segments of a mask that has them, and masks in blocks; any other is
    left to it. A layer that is computed again for its gradient is given the same mask."""
    right = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        if isinstance(attention_mask, BlockMask):
            return by_blocks(module, query, key, value, attention_mask, **options)
        rows = getattr(attention_mask, "segments", None)
        if rows is None or attention_mask is None or options.get("position_bias") is not None:
            return right(module, query, key, value, attention_mask, **options)
        return by_segments(module, query, key, value, attention_mask, rows, **options)

    # Outside of layers that are compiled, or each new layout would have them compiled again.

    @torch.compiler.disable
    def by_blocks(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, **options: Any
    ) -> tuple[Tensor, None]:
        flex, scale = ALL_ATTENTION_FUNCTIONS["flex_attention"], options.get("scaling")  # all that "sdpa" heeds
        return flex(module, query, key, value, mask, scaling=scale)[0], None

    @torch.compiler.disable
    def by_segments(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, masks: Tensor, rows: list[Row], **options: Any
    ) -> tuple[Tensor, None]:
        found = []
        for row, q_row, k_row, v_row, mask in zip(rows, query, key, value, masks, strict=True):
            # split, not slices: the gradient of each slice would be as large as the row
            q, k, v = (x.unsqueeze(0).split(row.lengths, 2) for x in (q_row, k_row, v_row))  # (1, heads, L, D) each
            spans = [slice(*edges) for edges in pairwise(accumulate(row.lengths, initial=0))]
            for i, prefix in enumerate(row.prefixes):
                seen = [i] if prefix == i else [prefix, i]
                mask_of = torch.cat([mask[:, spans[i], spans[j]] for j in seen], 2).unsqueeze(0)
                keys, values = (torch.cat([x[j] for j in seen], 2) for x in (k, v))
                found.append(right(module, q[i], keys, values, mask_of, **options)[0])  # (1, L, heads, D)
        return torch.cat(found, 1).view(len(query), query.shape[2], *found[0].shape[2:]), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
