"""The order of rows in an epoch: of one source, or of several, of which each gives its share.

It depends on the data and the seed alone. A source's rows are dealt from one endless sequence, pass after pass, each in
an order of its own: of many, all are seen before any comes again; of few, each comes as often as any other, or once
more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnf_core.errors import UserError
from bnf_core.types import Array, Unit


@dataclass(frozen=True)
class Mixture:
    """How many rows of each source an epoch has."""

    names: Sequence[str]
    sizes: Sequence[int]  # rows that a source has; the sources' rows follow each other
    takes: Sequence[int]  # rows of an epoch

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        sizes: Sequence[int],
        weights: Sequence[float | None],
        rows: Sequence[int | None],
        unit: Unit = "row",
    ) -> "Mixture":
        """
        Args:
            weights: each source's share of as many rows as there are; or none has any.
            rows: how many rows of a source, where it has no weight; None: all, once.
            unit: what the loss compares: pairs are not parted, and so an epoch may have a row more of a source.
        Raises:
            UserError: the loss compares all rows of a prompt, and rows are to be left out or repeated.
        """
        total = sum(w for w in weights if w)
        if total:
            ends = np.round(np.cumsum([(w or 0.0) / total for w in weights]) * sum(sizes)).astype(int).tolist()
            takes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        else:
            takes = [size if count is None else count for size, count in zip(sizes, rows, strict=True)]
        if unit == "pair":
            takes = [take + take % 2 for take in takes]
        if unit == "prompt" and takes != list(sizes):
            raise UserError(
                "this objective compares all rows of a prompt, which the weight or rows of a source would part: leave "
                "them out, or take another objective"
            )
        return cls(names, sizes, takes)

    @property
    def rows(self) -> int:
        """Of an epoch."""
        return sum(self.takes)

    def epoch(self, epoch: int, seed: int, keys: Array) -> tuple[Array, Array]:
        """The rows of an epoch, (rows,) int64 each: their numbers, and what rows of one unit and pass have alike.

        Args:
            keys: what the rows of one unit have alike, of all rows of all sources.
        """
        found, passes, begin = [], [], 0
        for source, (size, take) in enumerate(zip(self.sizes, self.takes, strict=True)):
            at = epoch * take
            while at < (epoch + 1) * take:
                number, first = divmod(at, size)
                last = min(size, first + (epoch + 1) * take - at)
                order = np.random.Generator(np.random.PCG64([seed, source, number])).permutation(size)
                order = begin + order[np.argsort(first_of_unit(keys[begin + order]), kind="stable")]
                found.append(order[first:last])
                passes.append(np.full(last - first, number))
                at += last - first
            begin += size
        shuffled = epoch_order(self.rows, epoch, seed)
        rows, number_of_pass = np.concatenate(found)[shuffled], np.concatenate(passes)[shuffled]
        _, units = np.unique(keys[rows], return_inverse=True)
        return rows, units * (int(number_of_pass.max()) + 1) + number_of_pass

    def drawn(self, epoch: int, rows: Array) -> dict[str, int]:
        """How many rows each source has given, by its name, after so many epochs and these rows of the next."""
        ends = np.cumsum(self.sizes)
        counts = np.bincount(np.searchsorted(ends, rows, "right"), minlength=len(self.sizes)).tolist()
        return {n: epoch * t + c for n, t, c in zip(self.names, self.takes, counts, strict=True)}


def epoch_order(num_rows: int, epoch: int, seed: int) -> Array:
    """The order of rows in one epoch, (num_rows,) int64: the same on every backend and machine."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)


def first_of_unit(keys: Array, most: int | None = None) -> Array:
    """For each row the first place of its unit, which are rows of one key, but never more than `most`: (rows,)."""
    by_key = np.argsort(keys, kind="stable")
    begins = np.diff(keys[by_key], prepend=keys[by_key[:1]] + 1) != 0
    place = np.arange(len(keys))
    starts = np.maximum.accumulate(np.where(begins, place, 0))
    if most is not None:
        starts = place - (place - starts) % most
    first = np.empty_like(by_key)
    first[by_key] = by_key[starts]
    return first
