"""Who sees whom in a grid whose rows hold packed sequences, and in the pages of sequences that share prompts: what a
model is given in the place of its layers' caches."""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn


class Segments:
    """What keeps the sequences of a packed grid apart, given to a model in the place of a layer's cache.

    mlx-lm's models ask their cache for the attention mask and hand it keys and values: this one lets a token see the
    earlier tokens of its own segment, and keeps nothing. Positions go on through a row; rotary embeddings depend on
    distances alone.
    """

    offset = 0

    def __init__(self, segment_ids: mx.array, head_axes: int):
        self.segment_ids = segment_ids  # (B, T)
        self.head_axes = head_axes  # of the attention scores: 2 where groups of heads that share keys have their own

    def make_mask(self, length: int, return_array: bool = True, window_size: int | None = None) -> mx.array:
        """(B, 1, T, T) bool, or (B, 1, 1, T, T); always an array, whatever is asked for."""
        distance = mx.arange(length)[:, None] - mx.arange(length)
        near = (distance >= 0) & (distance < (window_size or length))
        mask = near & (self.segment_ids[:, :, None] == self.segment_ids[:, None])
        return mx.expand_dims(mask, tuple(range(1, 1 + self.head_axes)))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


class PageTable(NamedTuple):
    """`bnf_mlx.pages.Pages` on the device."""

    offsets: mx.array  # (R,)
    lengths: mx.array  # (R,)
    table: mx.array  # (R, A) earlier pages, and the page itself; −1 for none


class PagedCache:
    """What pages of shared prompts and completions look each other up with, given to a model in the place of a layer's
    cache, as `Segments` are. Each page has the keys and values of those before it, its prompt's among them, beside its
    own; rotary embeddings begin at the page's offset.
    """

    def __init__(self, pages: PageTable, head_axes: int):
        self.offset = pages.offsets  # (R,)
        self.lengths = pages.lengths  # (R,)
        self.table = mx.maximum(pages.table, 0)  # (R, A)
        self.present = pages.table >= 0  # (R, A)
        self.head_axes = head_axes

    def make_mask(self, length: int, return_array: bool = True, window_size: int | None = None) -> mx.array:
        """(R, 1, W, A·W) bool, or (R, 1, 1, W, A·W)."""
        at = mx.arange(length)
        queries = self.offset[:, None] + at  # (R, W), positions in the sequence
        real = (at < self.lengths[:, None])[self.table] & self.present[..., None]  # (R, A, W)
        keys = queries[self.table]
        distance = queries[:, :, None] - keys.flatten(1)[:, None]  # (R, W, A·W)
        mask = (distance >= 0) & real.flatten(1)[:, None]
        if window_size:
            mask = mask & (distance < window_size)
        return mx.expand_dims(mask, tuple(range(1, 1 + self.head_axes)))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """(R, …, W, d) to (R, …, A·W, d)."""
        return self._looked_up(keys), self._looked_up(values)

    def _looked_up(self, x: mx.array) -> mx.array:
        return mx.moveaxis(x[self.table], 1, -3).flatten(-3, -2)


Layout = list[Segments] | list[PagedCache]


def paged_caches(model: nn.Module, pages: PageTable, head_axes: int) -> list[PagedCache]:
    """One for each layer that may have a cache."""
    return [PagedCache(pages, head_axes)] * _caches(model)


def segments_of(model: nn.Module, segment_ids: mx.array, head_axes: int) -> list[Segments]:
    """One for each layer that may have a cache."""
    return [Segments(segment_ids, head_axes)] * _caches(model)


def _caches(model: nn.Module) -> int:
    return len(model.make_cache() if hasattr(model, "make_cache") else model.layers)
