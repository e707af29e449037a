"""How much memory training takes of decoders whose layers the formulae of `Architecture` do not know: from what a
layer of each kind keeps, as a backend measures it."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from bnf_core.models.architecture import Grid, Training

ROWS = 2, 3  # that are measured: of one alone a framework may take copies


@dataclass(frozen=True)
class Held:
    """Bytes of a layer: those of each row, and those of any number of rows."""

    rows: float
    once: float

    def of(self, rows: int) -> float:
        return self.rows * rows + self.once

    def without(self, other: "Held") -> "Held":
        return Held(self.rows - other.rows, self.once - other.once)


@dataclass(frozen=True)
class Layers:
    """A decoder as it is trained, whose layers a backend can measure. What was measured is remembered."""

    kinds: tuple[int, ...]  # of each layer, the first layer that is like it
    hidden: int  # D
    vocab: int  # V
    parameters: int
    linear_parameters: int  # of linear layers, but the head
    trained: int  # parameters
    peak: Callable[[Mapping[int, int], int, int], float]
    """Bytes at the peak of a forward and backward pass, beside weights and their gradients, over so many rows of so
    many tokens each, by a model that has layers in some places alone: in each place that of some number."""
    widest: int  # tokens in a row that is measured; what a longer one takes two shorter ones tell
    how: str  # in words
    scattered: Callable[[int, int], float] = lambda rows, width: 0.0
    """Bytes of so many rows of so many tokens that layers keep, with LoRA, in blocks that an allocator may leave holes
    beside."""
    _found: dict[tuple[int, int], tuple[Held, Held]] = field(default_factory=dict, repr=False)

    def trained_parameters(self, training: Training) -> int:
        return self.trained

    def step(self, grid: Grid) -> tuple[float, float]:
        """Bytes of a grid: what the layers keep for the backward pass, and what there is beside that at its peak."""
        held = {kind: self._held(kind, grid.width) for kind in set(self.kinds)}
        kept = [held[kind][0].of(grid.rows) for kind in self.kinds]
        # The backward pass of a layer begins with what it and those before it keep.
        most = max(
            so_far + held[kind][1].of(grid.rows) for so_far, kind in zip(accumulate(kept), self.kinds, strict=True)
        )
        return sum(kept), most - sum(kept)

    def _held(self, kind: int, width: int) -> tuple[Held, Held]:
        """What a layer of a kind keeps, and what its backward pass takes beside that."""
        if (kind, width) not in self._found:
            long = width > self.widest
            self._found[kind, width] = self._extended(kind, width) if long else self._measured(kind, width)
        return self._found[kind, width]

    def _extended(self, kind: int, width: int) -> tuple[Held, Held]:
        shorter = zip(self._held(kind, self.widest // 2), self._held(kind, self.widest), strict=True)
        kept, beside = (Held(_grown(half.rows, whole.rows, width / self.widest), whole.once) for half, whole in shorter)
        return kept, beside

    def _measured(self, kind: int, width: int) -> tuple[Held, Held]:
        """By what a second layer of a kind adds. Where there is none, the only one takes the place of another, too."""
        if len(self.kinds) == 1:
            return self._rows({0: 0}, width), Held(0.0, 0.0)
        second = next((i for i, other in enumerate(self.kinds) if other == kind and i != kind), None)
        place = (kind + 1) % len(self.kinds) if second is None else second
        one = self._rows({kind: kind}, width)
        two = self._rows({kind: kind, place: kind if second is None else second}, width)
        kept = two.without(one)
        return kept, one.without(kept)

    def _rows(self, places: Mapping[int, int], width: int) -> Held:
        few, many = ROWS
        less, more = (self.peak(places, count, width) for count in ROWS)
        each = (more - less) / (many - few)
        return Held(each, less - few * each)


def _grown(half: float, whole: float, times: float) -> float:
    """What grows like a · x + b · x², at `times` a width, by what it is at half of it and at it."""
    square = 2 * whole - 4 * half
    return (whole - square) * times + square * times**2


def kinds_of(layers: Sequence[Hashable]) -> tuple[int, ...]:
    """Of each layer, the first one that is equal to it."""
    first: dict[Hashable, int] = {}
    return tuple(first.setdefault(layer, i) for i, layer in enumerate(layers))
