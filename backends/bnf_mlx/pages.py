"""The grid of a batch cut into pages of one width, for models that count positions from the start of a row.

Such a model can be told one position for each row, that of its first token. So every segment is cut into pages, each
a row of a new grid, and attention looks up the pages before it: those of the shared prompt, then the segment's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnf_core.types import Array, Batch

# Keys and values of earlier pages are copied to the pages that look them up. A copy costs about so much of computing
# the token: two vectors of at most the hidden size, where a layer makes twenty.
COPY = 1 / 8
MOST_PAGES = 8  # that the longest segment is cut into


@dataclass(frozen=True)
class Pages:
    """R pages of W tokens, padded on the right."""

    input_ids: Array  # (R, W) int32
    offsets: Array  # (R,) int32, position of each page's first token in its sequence
    lengths: Array  # (R,) int32, tokens that are not padding
    table: Array  # (R, A) int32: the pages that each one sees, in order, itself the last; −1 for none
    positions: Array  # (N,) int64, `Batch.positions` in the flattened (R·W) grid


def pages(batch: Batch, multiple: int = 1) -> Pages:
    """Cut a batch into pages.

    Args:
        multiple: of the width, so that there are few shapes.
    """
    segments = _segments(batch)
    longest = max(len(columns) for _, columns, _ in segments)
    widths = {-(-longest // parts // multiple) * multiple for parts in range(1, MOST_PAGES + 1)}
    width = min(sorted(widths, reverse=True), key=lambda width: _cost(segments, width))
    columns_of_grid = batch.input_ids.shape[1]
    place = np.full(batch.input_ids.size, -1, np.int64)  # in the pages, of each token of the grid
    numbers: list[list[int]] = []  # of the pages of each segment
    seen: list[list[int]] = []  # of each page
    for row, columns, prefix in segments:
        first = len(seen)
        numbers.append(list(range(first, first + -(-len(columns) // width))))
        place[row * columns_of_grid + columns] = first * width + np.arange(len(columns))
        before = [] if prefix is None else numbers[prefix]
        seen += [[*before, *range(first, number + 1)] for number in numbers[-1]]
    taken = np.flatnonzero(place >= 0)
    flat = {name: np.zeros(len(seen) * width, np.int32) for name in ("input_ids", "position_ids")}
    for name, values in flat.items():
        values[place[taken]] = getattr(batch, name).ravel()[taken]
    table = np.full((len(seen), max(map(len, seen))), -1, np.int32)
    for page, others in enumerate(seen):
        table[page, -len(others) :] = others
    return Pages(
        input_ids=flat["input_ids"].reshape(-1, width),
        offsets=flat["position_ids"][::width].copy(),
        lengths=np.bincount(place[taken] // width, minlength=len(seen)).astype(np.int32),
        table=table,
        positions=place[batch.positions],
    )


Segment = tuple[int, Array, int | None]  # grid row, columns, and which segment of the list it goes on from


def _segments(batch: Batch) -> list[Segment]:
    """As far as they predict something: neither padding, nor the last token of a completion."""
    scored = np.zeros(batch.input_ids.shape, bool)
    scored.ravel()[batch.positions] = True
    found: list[Segment] = []
    for row, ids in enumerate(batch.segment_ids):
        index: dict[int, int] = {}
        for segment in np.unique(ids[scored[row]]).tolist():
            columns = np.flatnonzero(ids == segment)
            prefix = int(batch.prefix_ids[row, columns[0]])
            index[segment] = len(found)
            columns = columns[: 1 + np.flatnonzero(scored[row, columns])[-1]]
            found.append((row, columns, None if prefix == segment else index[prefix]))
    return found


def _cost(segments: Sequence[Segment], width: int) -> float:
    """Of computing pages of this width, in tokens."""
    counts = [-(-len(columns) // width) for _, columns, _ in segments]
    before = [0 if prefix is None else counts[prefix] for _, _, prefix in segments]
    most = max(b + c for b, c in zip(before, counts, strict=True)) - 1
    return sum(counts) * width * (1 + COPY * most)
