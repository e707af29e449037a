"""What an objective is: a pure function of the log-odds of the observed tokens, and what it needs.

Every objective here sees the policy through one number per token, its log-odds o, with p = σ(o). It is written once,
over the few array operations that NumPy, PyTorch and MLX share (`Ops`), and gives one loss for each of its units: a
row, a pair, or a prompt with all its completions. What a unit weighs is known before a batch is cut, so that the losses
of the parts add up to that of the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from bnf_core.errors import UserError
from bnf_core.types import Array, Batch, Unit

# What the losses of an objective on rows are divided by: all of the global batch, its chosen or its rejected ones, or
# both each by its own number. Those on pairs and prompts are divided by how many there are to compare.
Normaliser = Literal["rows", "chosen", "rejected", "labels"]
BaselineFrom = Literal["", "mismatched", "running"]  # see bnf_core.steps.baseline


class Ops(Protocol):
    """The array operations that an objective may use beside arithmetic and comparisons; float32 in a framework, float64
    in NumPy. Differentiable where nothing else is said."""

    def exp(self, x: Any) -> Any: ...
    def expm1(self, x: Any) -> Any: ...
    def log1p(self, x: Any) -> Any: ...
    def log(self, x: Any) -> Any: ...

    def softplus(self, x: Any) -> Any:
        """log(1 + eˣ), with all its digits at both ends."""
        ...

    def sigmoid(self, x: Any) -> Any:
        """With all its digits at both ends; need not be differentiable."""
        ...

    def where(self, condition: Any, a: Any, b: Any) -> Any: ...
    def minimum(self, a: Any, b: Any) -> Any: ...
    def maximum(self, a: Any, b: Any) -> Any: ...

    def take(self, x: Any, index: Any) -> Any:
        """x (S,) at index (U,) int: (U,)."""
        ...

    def row_sum(self, x: Any, grid: Any) -> Any:
        """Sums of x (N,) over each row of grid (S, L) int, which names elements of x, or N for none: (S,)."""
        ...

    def stop_gradient(self, x: Any) -> Any: ...


class Units(NamedTuple):
    """Which rows make up each unit of an objective, U of them, and what its loss weighs in that of the batch."""

    chosen: Any  # (U, K) int, the unit's chosen rows, or S for none
    rejected: Any  # (U,) int, its rejected row; of a row alone, that row
    # (U,) float, which add up to 1 (labels: 2) over a global batch with units of every kind, all of the weight 1
    weights: Any


class Drawn(NamedTuple):
    """What is known of tokens that a policy drew: float arrays (N,) of NumPy or a framework."""

    log_p: Any  # under that policy
    advantages: Any  # of the token's row


class Structure(NamedTuple):
    """How the tokens of a micro-batch make up its rows, and rows its units; arrays of NumPy or a framework."""

    grid: Any  # (S, L) int, the tokens of each row, or N for none
    tokens: Any  # (S,) float, how many that are
    labels: Any  # (S,) float, +1 chosen, −1 rejected
    baseline: Any  # () float, what the rewards of the whole step are compared with; 0 where nothing asks for it
    units: Any  # tuple[Units, ...], one for each term of the objective
    drawn: Drawn  # of use to objectives `on_policy` alone


class Seen(NamedTuple):
    """What an objective sees of a micro-batch: float arrays of NumPy or a framework."""

    log_odds: Any  # (N,) of the policy, differentiable
    other_entropy: Any  # (N,) nats, of the policy's other tokens, without gradient
    ref_log_odds: Any  # (N,) of the reference
    structure: Structure


class Rows(NamedTuple):
    """The rows of a micro-batch, or some of them: float arrays (S,) of NumPy or a framework."""

    log_p: Any  # Σ log p over a row's tokens
    log_ratio: Any  # Σ log(p / r)
    tokens: Any  # how many
    labels: Any  # +1 chosen, −1 rejected

    @property
    def mean_log_p(self) -> Any:
        return self.log_p / self.tokens


@dataclass(frozen=True)
class Objective:
    """One objective with its settings: a frozen dataclass whose fields they are, with their published defaults.

    A subclass gives the class variables and `losses`. What it says by `name` is listed by `bnf objectives`.
    """

    name: ClassVar[str]
    source: ClassVar[str]  # where it is from
    wants: ClassVar[str]  # what it does, in half a line
    formula: ClassVar[str]  # of one unit, in Unicode
    unit: ClassVar[Unit] = "row"
    normaliser: ClassVar[Normaliser] = "rows"
    needs_reference: ClassVar[bool] = True
    baseline_from: ClassVar[BaselineFrom] = ""
    takes_weights: ClassVar[bool] = True  # whether a unit may count more or less than others
    on_policy: ClassVar[bool] = False  # whether it learns from samples alone, by their advantages

    def losses(self, ops: Ops, seen: Seen, units: Units) -> Any:
        """The loss of each unit, (U,), differentiable in `seen.log_odds`."""
        raise NotImplementedError

    def rewards(self, rows: Rows) -> Any:
        """(S,) what TRL's trainers of this objective report as a row's reward."""
        return rows.log_ratio if self.needs_reference else rows.log_p

    def metrics(self, log_odds: Array, ref_log_odds: Array) -> dict[str, Array]:
        """What only this objective has to report, by name: numbers of each token, (N,) NumPy float64."""
        return {}

    def advantages(self, scores: Array) -> Array:
        """(k,) how much better each of a prompt's samples is than the others, of their scores (k,)."""
        return np.zeros(len(scores))

    @property
    def terms(self) -> "tuple[tuple[float, Objective], ...]":
        """An objective as a weighted sum: what weighs how much."""
        return ((1.0, self),)

    def __str__(self) -> str:
        """As `bnf_core.objectives.parse` reads it."""
        settings = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{self.name}({settings})" if settings else self.name

    def _require(self, holds: bool, setting: str, expected: str) -> None:
        if not holds:
            raise UserError(f"objective {self.name}: {setting} is {getattr(self, setting)}: expected {expected}")


@dataclass(frozen=True)
class Sum(Objective):
    """A weighted sum of objectives, each divided by its own number of units."""

    parts: tuple[tuple[float, Objective], ...]

    name = "sum"
    source = ""

    def __post_init__(self) -> None:
        units = {part.unit for _, part in self.parts}
        if {"pair", "prompt"} <= units:
            raise UserError(f"objective {self}: one part wants pairs, another whole prompts: expected one kind")
        if sum(bool(part.baseline_from) for _, part in self.parts) > 1:
            raise UserError(f"objective {self}: expected at most one part with a baseline of the whole step")

    @property
    def terms(self) -> tuple[tuple[float, Objective], ...]:
        return self.parts

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        return max((part.unit for _, part in self.parts), key=("row", "pair", "prompt").index)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return any(part.needs_reference for _, part in self.parts)

    @property
    def takes_weights(self) -> bool:  # type: ignore[override]
        return all(part.takes_weights for _, part in self.parts)

    @property
    def on_policy(self) -> bool:  # type: ignore[override]
        return any(part.on_policy for _, part in self.parts)

    def advantages(self, scores: Array) -> Array:
        """Of its first part that asks for them."""
        return next((part for _, part in self.parts if part.on_policy), self.parts[0][1]).advantages(scores)

    @property
    def baseline_from(self) -> BaselineFrom:  # type: ignore[override]
        return next((part.baseline_from for _, part in self.parts if part.baseline_from), "")

    def rewards(self, rows: Rows) -> Any:
        """Of its first part with a reference."""
        return next((part for _, part in self.parts if part.needs_reference), self.parts[0][1]).rewards(rows)

    def metrics(self, log_odds: Array, ref_log_odds: Array) -> dict[str, Array]:
        parts = [part.metrics(log_odds, ref_log_odds) for _, part in self.parts]
        return {name: value for metrics in parts for name, value in metrics.items()}

    def __str__(self) -> str:
        return " + ".join(f"{weight}*{part}" if weight != 1.0 else str(part) for weight, part in self.parts)


def weighted_losses(objective: Objective, ops: Ops, seen: Seen) -> list[tuple[Units, Any]]:
    """Of each term its units, and the part (U,) that each unit has in the loss of the global batch."""
    return [
        (units, weight * (units.weights * ops.where(units.weights == 0, 0.0, term.losses(ops, seen, units))))
        for (weight, term), units in zip(objective.terms, seen.structure.units, strict=True)
    ]


def batch_loss(objective: Objective, ops: Ops, seen: Seen) -> Any:
    """A micro-batch's part of the loss of its global batch, a scalar differentiable in `seen.log_odds`."""
    parts = [losses.sum() for _, losses in weighted_losses(objective, ops, seen)]
    return sum(parts[1:], start=parts[0])


# How tokens, rows and pairs are laid out


def structure(objective: Objective, batch: Batch, baseline: float = 0.0, multiple_of: int = 1) -> Structure:
    """Of a micro-batch, as NumPy arrays.

    Args:
        baseline: from `bnf_core.steps.baseline`.
        multiple_of: pad the longest row to a multiple of this, for frameworks that compile once for each shape.
    """
    n, s = len(batch.targets), len(batch.labels)
    counts = np.bincount(batch.sequence_ids, minlength=s)
    starts = np.cumsum(counts) - counts
    width = -(-int(counts.max(initial=0)) // multiple_of) * multiple_of
    column = np.arange(width)
    grid = np.where(column < counts[:, None], starts[:, None] + column, n)
    units = tuple(_units(term, batch) for _, term in objective.terms)
    return Structure(
        grid=grid.astype(np.int32),
        tokens=counts.astype(np.float32),
        labels=batch.labels.astype(np.float32),
        baseline=np.float32(baseline),
        units=units,
        drawn=Drawn(batch.drawn_log_p, batch.advantages[batch.sequence_ids]),
    )


def _units(term: Objective, batch: Batch) -> Units:
    counts, labels = batch.counts, batch.labels
    if term.unit == "row":
        of_label = {
            "rows": (counts.rows, counts.rows),
            "chosen": (counts.chosen, 0),
            "rejected": (0, counts.rejected),
            "labels": (counts.chosen, counts.rejected),
        }[term.normaliser]
        of_chosen, of_rejected = (1.0 / count if count else 0.0 for count in of_label)
        weights = np.where(labels > 0, of_chosen, of_rejected) * batch.weights.astype(np.float64)
        return Units(np.zeros((len(labels), 0), np.int32), np.arange(len(labels), dtype=np.int32), _float32(weights))
    if term.unit == "pair":
        pairs = batch.pairs
        # Both rows of a pair come from one row of the data, and have its weight.
        weights = batch.weights[pairs[:, 0]].astype(np.float64) * (1.0 / counts.pairs if counts.pairs else 0.0)
        return Units(pairs[:, :1], pairs[:, 1], _float32(weights))
    groups = batch.groups
    rejected = np.flatnonzero(labels < 0)
    chosen_of = [np.flatnonzero((labels > 0) & (groups == groups[row])) for row in rejected]
    rejected, chosen_of = rejected[[len(c) > 0 for c in chosen_of]], [c for c in chosen_of if len(c)]
    table = np.full((len(rejected), max(map(len, chosen_of), default=1)), len(labels), np.int32)
    for u, c in enumerate(chosen_of):
        table[u, : len(c)] = c
    weights = np.full(len(rejected), 1.0 / counts.compared if counts.compared else 0.0)
    return Units(table, rejected.astype(np.int32), _float32(weights))


def _float32(x: Any) -> Any:
    return np.asarray(x, np.float32)


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """A structure, or anything made of tuples and arrays, with each array as the function gives it."""
    if not isinstance(tree, tuple):
        return function(tree)
    parts = [mapped(function, x) for x in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


# What objectives are made of


def linearised(ops: Ops, value: Any, slope: Any, x: Any) -> Any:
    """`value` (a function of x) with the derivative `slope`, both taken as they stand.

    For where differentiating the value itself would lose digits, or divide infinities. Where x is infinite, nothing can
    be learned.
    """
    finite = ops.where((x > -1e30) & (x < 1e30), x, 0.0)
    return ops.stop_gradient(value) + ops.stop_gradient(slope) * (finite - ops.stop_gradient(finite))


def log_sigmoid(ops: Ops, x: Any) -> Any:
    """log σ(x), with slope σ(−x): of log-odds, log p."""
    here = ops.stop_gradient(x)
    return linearised(ops, -ops.softplus(-here), ops.sigmoid(-here), x)


def log_not_p(ops: Ops, log_odds: Any) -> Any:
    """log(1 − σ(o)), with slope −p."""
    o = ops.stop_gradient(log_odds)
    return linearised(ops, -ops.softplus(o), -ops.sigmoid(o), log_odds)


def log_ratio(ops: Ops, log_odds: Any, ref_log_odds: Any) -> Any:
    """log p − log r, which loses no digit where they are near: p / r = 1 + (1 − p)(e^{o − o_r} − 1)."""
    o = ops.stop_gradient(log_odds)
    near = ops.minimum(ops.maximum(o - ref_log_odds, -30.0), 30.0)
    up = ops.log1p(ops.sigmoid(-o) * ops.expm1(ops.maximum(near, 0.0)))
    down = -ops.log1p(ops.sigmoid(-ref_log_odds) * ops.expm1(ops.maximum(-near, 0.0)))
    far = ops.softplus(-ref_log_odds) - ops.softplus(-o)
    value = ops.where(near == o - ref_log_odds, ops.where(near > 0, up, down), far)
    value = ops.where(o == ref_log_odds, 0.0, value)  # infinities, too
    return linearised(ops, value, ops.sigmoid(-o), log_odds)


def log1mexp(ops: Ops, x: Any) -> Any:
    """log(1 − eˣ) of x < 0 (Mächler, 2012); x is taken to be at most −1e-38."""
    below = ops.minimum(ops.stop_gradient(x), -1e-38)
    small = ops.log(-ops.expm1(ops.maximum(below, -1.0)))
    value = ops.where(below > -0.6931, small, ops.log1p(-ops.exp(ops.minimum(below, -0.5))))
    # −eˣ / (1 − eˣ)
    return linearised(ops, value, ops.exp(below) / ops.expm1(below), x)


def sigmoid(ops: Ops, x: Any) -> Any:
    here = ops.stop_gradient(x)
    value = ops.sigmoid(here)
    return linearised(ops, value, value * ops.sigmoid(-here), x)


def rows_of(ops: Ops, seen: Seen, *, reference: bool) -> Rows:
    """Sums over the tokens of each row, (S,); without a reference `log_ratio` is not there to be used."""
    grid = seen.structure.grid
    ratio = ops.row_sum(log_ratio(ops, seen.log_odds, seen.ref_log_odds), grid) if reference else None
    return Rows(ops.row_sum(log_sigmoid(ops, seen.log_odds), grid), ratio, seen.structure.tokens, seen.structure.labels)


def some(ops: Ops, rows: Rows, index: Any) -> Rows:
    """The rows at index (U,)."""
    return Rows(*(None if x is None else ops.take(x, index) for x in rows))


def pairs_of(ops: Ops, seen: Seen, units: Units, *, reference: bool) -> tuple[Rows, Rows]:
    """The chosen and the rejected row of each pair, (P,) each."""
    rows = rows_of(ops, seen, reference=reference)
    return some(ops, rows, units.chosen[:, 0]), some(ops, rows, units.rejected)


def mean_over_tokens(ops: Ops, x: Any, seen: Seen) -> Any:
    """Means of x (N,) over the tokens of each row, (S,)."""
    return ops.row_sum(x, seen.structure.grid) / seen.structure.tokens
