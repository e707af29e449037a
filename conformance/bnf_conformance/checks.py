"""What a backend must get right, level by level; SPEC.md says it in prose.

L0: single tokens on dense logits. L1: sequences and batches. L2: the loss fused with the head. Each check asks
the backend once, measures every quantity against the float64 expectation and yields a `Measurement`; passing
means error ≤ tolerance. Nothing here knows a framework.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnf_conformance import objectives, vectors
from bnf_conformance.tolerances import BITS, LEAST_EXPONENT, Tolerances
from bnf_conformance.vectors import Case
from bnf_core import oracle
from bnf_core.protocol import Losses
from bnf_core.types import Batch

Float = NDArray[np.float64]
Yardstick = dict[str, float]  # error of the framework's own cross-entropy, by quantity
MicroBatches = list[tuple[NDArray[Any], Batch, NDArray[Any]]]

# Float32 whatever the inputs; every other quantity comes in their dtype.
VALUES = ("log_odds", "other_entropy", "token_loss", "loss", "sequence_loss")
CAPABILITIES = ("dense", "batch", "fused", "train_head", "cross_entropy", "log_odds", "objective")


@dataclass(frozen=True)
class Measurement:
    """The worst element of one quantity; it passes where error ≤ tolerance."""

    quantity: str
    error: float  # relative to the quantity's scale; inf where something is NaN or infinities differ
    tolerance: float
    ulps: float | None = None  # the same in units in the last place of the quantity's dtype, at its scale
    cross_entropy: float | None = None  # error of the framework's own cross-entropy on the same inputs
    note: str = ""  # which variant was worst


@dataclass(frozen=True)
class NotSupported:
    """A quantity that the backend says it does not have."""

    quantity: str
    lacks: str


Outcome = Measurement | NotSupported


class Worst(NamedTuple):
    error: float
    ulps: float


@dataclass(frozen=True)
class Subject:
    """What is checked: losses in one dtype, with what they may miss by and what they say they lack."""

    losses: Losses
    dtype: str
    tolerances: Tolerances = field(default_factory=Tolerances)
    lacks: frozenset[str] = frozenset()

    def worst(self, level: str, quantity: str, got: ArrayLike, expected: ArrayLike, scale: ArrayLike) -> Worst:
        """max |got − expected| / max(scale, atol / rtol); equal elements count 0 whatever their scale.

        Raises:
            ValueError: `got` has another shape.
        """
        rtol, atol = self.tolerances(level, quantity, self.dtype)
        x, e = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        if x.shape != e.shape:
            raise ValueError(f"{quantity}: expected shape {e.shape}, the backend returned {x.shape}")
        if x.size == 0:
            return Worst(0.0, 0.0)
        scale = np.broadcast_to(np.maximum(np.asarray(scale, np.float64), atol / rtol if atol else 0.0), x.shape)
        with np.errstate(invalid="ignore", divide="ignore"):
            miss = np.where(x == e, 0.0, np.abs(x - e))
            both = [np.where(miss == 0, 0.0, miss / unit) for unit in (scale, self._ulp(quantity, scale))]
        return Worst(*(float(np.where(np.isnan(each), np.inf, each).max()) for each in both))

    def measure(
        self,
        level: str,
        quantity: str,
        got: ArrayLike,
        expected: ArrayLike,
        scale: ArrayLike,
        *,
        cross_entropy: float | None = None,
        note: str = "",
    ) -> Measurement:
        error, ulps = self.worst(level, quantity, got, expected, scale)
        rtol, _ = self.tolerances(level, quantity, self.dtype)
        return Measurement(quantity, error, rtol, ulps, cross_entropy, note)

    def holds(self, quantity: str, holds: bool, note: str = "") -> Measurement:
        """A rule without numbers."""
        return Measurement(quantity, 0.0 if holds else np.inf, 0.0, note="" if holds else note)

    def in_dtype(self, *gradients: ArrayLike) -> Iterator[Measurement]:
        """Gradients in half precision must hold its values, or something else was computed."""
        if self.dtype != "float32":
            holds = all(np.array_equal(vectors.rounded(g, self.dtype), g, equal_nan=True) for g in gradients)
            yield self.holds("gradient_dtype", holds, f"gradients hold values that are no {self.dtype}")

    def _ulp(self, quantity: str, scale: Float) -> Float:
        dtype = "float32" if quantity in VALUES else self.dtype
        exponent = np.frexp(np.where(np.isfinite(scale), scale, 1.0))[1] - 1
        return np.ldexp(1.0, np.maximum(exponent, LEAST_EXPONENT[dtype]) - (BITS[dtype] - 1))


def _float(x: ArrayLike) -> Float:
    return np.asarray(x, np.float64)


# L0 -----------------------------------------------------------------------------------------------------------


def tokens(subject: Subject, case: Case) -> Iterator[Outcome]:
    """Log-odds, entropy and loss of single tokens, their gradient, and the target t that the gradient implies."""
    targets, reference, weights = case["targets"], case["ref_log_odds"], _float(case["weights"])
    arguments = case["logits"], targets, reference, case["weights"]
    result = subject.losses.dense(*arguments, dtype=subject.dtype)
    for quantity in ("log_odds", "other_entropy"):
        yield subject.measure("L0", quantity, getattr(result, quantity), case[quantity], np.abs(case[quantity]))
    likely = ~np.isneginf(case["log_odds"])  # cross-entropy of a banned token is infinite, which is no error
    yardstick = _cross_entropy(subject, "L0", case["logits"][likely], targets[likely])
    grad, expected = _float(result.grad_logits), case["grad_logits"]
    yield from _accuracy(subject, "L0", result.token_loss, grad, case["token_loss"], expected, targets, yardstick)

    # The backend's values and gradients must tell one story: π − gradient is a distribution with t(y) = min(1, p/r),
    # p taken from the log-odds that the backend itself reports.
    with np.errstate(invalid="ignore"):
        log_p = -np.logaddexp(0.0, -_float(result.log_odds))
        target = np.exp(np.minimum(0.0, log_p + np.logaddexp(0.0, -_float(reference))))
    target = np.where(np.isneginf(result.log_odds), 0.0, target)
    implied = np.exp(log_p) - grad[np.arange(len(targets)), targets] / weights
    yield subject.measure("L0", "dynamic_target", implied, target, 1.0)
    total, largest = grad.sum(1), np.abs(expected).max(1)
    yield subject.measure("L0", "dynamic_target_sum", total, np.zeros_like(total), largest)

    yield from subject.in_dtype(grad)
    again = subject.losses.dense(*arguments, dtype=subject.dtype)
    yield subject.measure("L0", "repeat", again.grad_logits, grad, largest[:, None])


def hopeless_to_saturated(subject: Subject, case: Case) -> Iterator[Outcome]:
    """Thousands of tokens from hopeless to certain, where a subtraction of probabilities leaves no digit: within
    tolerance, and never less accurate than the framework's own cross-entropy on the same logits."""
    logits, targets, reference = case["logits"], case["targets"], case["ref_log_odds"]
    result = subject.losses.dense(logits, targets, reference, np.ones_like(reference), dtype=subject.dtype)
    expected = oracle.token_loss(logits, targets, reference)
    yardstick = _cross_entropy(subject, "saturation", logits, targets)
    got = result.token_loss, result.grad_logits
    for m in _accuracy(subject, "saturation", *got, *expected, targets, yardstick):
        yield m
        if m.quantity in yardstick:
            yield Measurement(f"{m.quantity}_vs_cross_entropy", m.error, yardstick[m.quantity])
        else:
            yield NotSupported(f"{m.quantity}_vs_cross_entropy", "cross_entropy")


def _accuracy(
    subject: Subject,
    level: str,
    loss: ArrayLike,
    grad: ArrayLike,
    expected_loss: Float,
    expected: Float,
    targets: NDArray[Any],
    yardstick: Yardstick,
) -> Iterator[Measurement]:
    """Token losses (N,) and their gradient (N, V), all of it and at the observed tokens alone."""
    at = np.arange(len(targets)), targets
    largest, observed = np.abs(expected).max(1, keepdims=True), expected[at]
    for quantity, got, e, scale in (
        ("token_loss", loss, expected_loss, np.abs(expected_loss)),
        ("gradient", grad, expected, largest),
        ("observed_gradient", np.asarray(grad)[at], observed, np.abs(observed)),
    ):
        yield subject.measure(level, quantity, got, e, scale, cross_entropy=yardstick.get(quantity))


def _cross_entropy(subject: Subject, level: str, logits: NDArray[Any], targets: NDArray[Any]) -> Yardstick:
    """What the framework's own cross-entropy misses by, measured as the BNF loss is."""
    if "cross_entropy" in subject.lacks or not len(targets):
        return {}
    got = subject.losses.cross_entropy(logits, targets, dtype=subject.dtype)
    measured = _accuracy(subject, level, *got, *_certain(logits, targets), targets, {})
    return {m.quantity: m.error for m in measured}


def _certain(logits: ArrayLike, targets: ArrayLike) -> tuple[Float, Float]:
    """Cross-entropy is BNF against a reference that gives the token no probability: t = 1."""
    return oracle.token_loss(logits, targets, np.full(np.shape(targets), -np.inf))


def malformed_tokens(subject: Subject, case: Case) -> Iterator[Outcome]:
    """Input that has no meaning is an error, not a number."""
    z, y, o, w = (case[name] for name in ("logits", "targets", "ref_log_odds", "weights"))
    malformed = {
        "a vocabulary of one token": (z[:, :1], np.zeros_like(y), o, w),
        "fewer targets than rows": (z, y[1:], o, w),
        "fewer references than rows": (z, y, o[1:], w),
    }
    yield _refused(partial(subject.losses.dense, dtype=subject.dtype), malformed)


def _refused(call: Callable[..., object], malformed: dict[str, tuple[Any, ...]]) -> Measurement:
    """How many malformed inputs are not answered by a ValueError."""
    accepted = []
    for what, arguments in malformed.items():
        try:
            call(*arguments)
            accepted.append(f"accepts {what}")
        except ValueError:
            pass
        except Exception as error:
            accepted.append(f"{type(error).__name__}, not ValueError, on {what}")
    return Measurement("refused", float(len(accepted)), 0.0, note=", ".join(accepted))


# L1 -----------------------------------------------------------------------------------------------------------


def batches(subject: Subject, case: Case) -> Iterator[Outcome]:
    """Sequence and batch losses and the gradient, over micro-batches of uneven size: which tokens count, with which
    sign, divided by what."""
    micro_batches = vectors.micro_batches(case)
    result = subject.losses.batch(micro_batches, dtype=subject.dtype)
    if len(result.grad_logits) != len(micro_batches):
        raise ValueError(f"expected {len(micro_batches)} gradients, the backend returned {len(result.grad_logits)}")
    yardstick = {} if "cross_entropy" in subject.lacks else _batch_cross_entropy(subject, micro_batches)
    e = np.abs(case["sequence_loss"])
    for quantity, got, scale in (("loss", result.loss, e.mean()), ("sequence_loss", result.sequence_loss, e)):
        yield subject.measure("L1", quantity, got, case[quantity], scale, cross_entropy=yardstick.get(quantity))
    errors, strays = [], []
    for m, ((_, batch, _), grad) in enumerate(zip(micro_batches, result.grad_logits, strict=True)):
        expected = case[f"grad_logits_{m}"]
        largest = np.abs(expected).max(2, keepdims=True)
        ce = yardstick.get("gradient")
        errors.append(subject.measure("L1", "gradient", grad, expected, largest, cross_entropy=ce))
        unscored = np.delete(np.asarray(grad).reshape(-1, expected.shape[2]), batch.positions, axis=0)
        strays.append(subject.measure("L1", "unscored_gradient", unscored, np.zeros(unscored.shape), 1.0))
    yield max(errors, key=lambda m: m.error)
    yield max(strays, key=lambda m: m.error)
    yield from subject.in_dtype(*result.grad_logits)


def _batch_cross_entropy(subject: Subject, micro_batches: MicroBatches) -> Yardstick:
    """The framework's own cross-entropy of the scored tokens, averaged in float64 as the batch's loss is."""
    logits = np.concatenate([z.reshape(-1, z.shape[-1])[batch.positions] for z, batch, _ in micro_batches])
    targets, weights = (
        np.concatenate([getattr(batch, name) for _, batch, _ in micro_batches]) for name in ("targets", "coefficients")
    )
    starts = np.cumsum([0] + [len(batch.labels) for _, batch, _ in micro_batches])
    rows = np.concatenate(
        [batch.sequence_ids + start for start, (_, batch, _) in zip(starts, micro_batches, strict=False)]
    )
    (loss, grad), (e_loss, e_grad) = (
        subject.losses.cross_entropy(logits, targets, dtype=subject.dtype),
        _certain(logits, targets),
    )
    # labels · means, but for a factor of the number of sequences, which no relative error sees
    sums, e_sums = (np.bincount(rows, weights=weights * _float(x)) for x in (loss, e_loss))
    return {
        "loss": subject.worst("L1", "loss", sums.sum(), e_sums.sum(), np.abs(e_sums).sum()).error,
        "sequence_loss": subject.worst("L1", "sequence_loss", sums, e_sums, np.abs(e_sums)).error,
        "gradient": subject.worst("L1", "gradient", grad, e_grad, np.abs(e_grad).max(1, keepdims=True)).error,
    }


# L2 -----------------------------------------------------------------------------------------------------------


def fused_head(subject: Subject, case: Case) -> Iterator[Outcome]:
    """The loss from hidden states and head: value, statistics and both gradients, for every chunk size, head frozen
    and trained. In half precision the tolerances leave no room for logits that were rounded to it."""
    yardstick = {} if "cross_entropy" in subject.lacks else _head_cross_entropy(subject, case)
    worst: dict[str, Measurement] = {}
    for chunk in case.fields["chunk_tokens"]:
        for train_head in (False, True):
            if train_head and "train_head" in subject.lacks:
                continue
            note = f"chunk_tokens={chunk}, head {'trained' if train_head else 'frozen'}"
            for m in _fused(subject, case, chunk, train_head, yardstick, note):
                if m.quantity not in worst or m.error > worst[m.quantity].error:
                    worst[m.quantity] = m
    yield from worst.values()
    if "train_head" in subject.lacks:
        yield NotSupported("grad_head", "train_head")


def _fused(
    subject: Subject, case: Case, chunk: int | None, train_head: bool, yardstick: Yardstick, note: str
) -> Iterator[Measurement]:
    inputs = [case[name] for name in ("hidden", "head_weight", "targets", "ref_log_odds", "coefficients")]
    fused = partial(subject.losses.fused, dtype=subject.dtype, train_head=train_head, chunk_tokens=chunk)
    result, again = fused(*inputs), fused(*inputs)
    total = np.abs(case["coefficients"] * case["token_loss"]).sum()
    ce = yardstick.get("loss")
    yield subject.measure("L2", "loss", result.loss, case["loss"], total, cross_entropy=ce, note=note)
    for quantity in ("log_odds", "other_entropy", "token_loss"):
        got, expected, ce = getattr(result, quantity), case[quantity], yardstick.get(quantity)
        yield subject.measure("L2", quantity, got, expected, np.abs(expected), cross_entropy=ce, note=note)
    if not train_head:
        yield subject.holds("frozen_head", result.grad_head is None, "a frozen head has a gradient")
    for quantity in ("grad_hidden", "grad_head") if train_head else ("grad_hidden",):
        grad, expected, ce = getattr(result, quantity), case[quantity], yardstick.get(quantity)
        if grad is None:
            raise ValueError(f"no {quantity} ({note})")
        largest = np.abs(expected).max(1, keepdims=True)
        yield subject.measure("L2", quantity, grad, expected, largest, cross_entropy=ce, note=note)
        yield from subject.in_dtype(grad)
        yield subject.measure("L2", "repeat", getattr(again, quantity), _float(grad), largest, note=note)


def _head_cross_entropy(subject: Subject, case: Case) -> Yardstick:
    """The framework's own cross-entropy, not fused: on logits rounded to the dtype, all else in float64."""
    hidden, head, targets = _float(case["hidden"]), _float(case["head_weight"]), case["targets"]
    c, logits = _float(case["coefficients"]), hidden @ head.T
    in_dtype = vectors.rounded(logits, subject.dtype).astype(np.float32)
    result: Yardstick = {}
    expected = _certain(logits, targets)
    got = subject.losses.cross_entropy(in_dtype, targets, dtype=subject.dtype)
    (loss, grad), (e_loss, e_grad) = ([_float(x) for x in pair] for pair in (got, expected))
    grad, e_grad = grad * c[:, None], e_grad * c[:, None]
    for quantity, x, e, scale in (
        ("loss", c @ loss, c @ e_loss, np.abs(c) @ e_loss),
        ("token_loss", loss, e_loss, np.abs(e_loss)),
        ("grad_hidden", grad @ head, e_grad @ head, None),
        ("grad_head", grad.T @ hidden, e_grad.T @ hidden, None),
    ):
        scale = np.abs(e).max(1, keepdims=True) if scale is None else scale
        result[quantity] = subject.worst("L2", quantity, x, e, scale).error
    return result


def malformed_heads(subject: Subject, case: Case) -> Iterator[Outcome]:
    """Input that has no meaning is an error, not a number."""
    h, head, y, o, c = (case[name] for name in ("hidden", "head_weight", "targets", "ref_log_odds", "coefficients"))
    malformed = {
        "a vocabulary of one token": (h, head[:1], np.zeros_like(y), o, c),
        "a head of another width": (h, head[:, 1:], y, o, c),
        "fewer targets than states": (h, head, y[1:], o, c),
        "fewer references than states": (h, head, y, o[1:], c),
        "fewer coefficients than states": (h, head, y, o, c[1:]),
    }
    yield _refused(partial(subject.losses.fused, dtype=subject.dtype, train_head=False), malformed)


def log_odds_of_head(subject: Subject, case: Case) -> Iterator[Outcome]:
    """Log-odds from hidden states and head, and the vector-Jacobian product with a cotangent: all that an objective
    needs of a model."""
    worst: dict[str, Measurement] = {}
    hidden, head, targets = _float(case["hidden"]), _float(case["head_weight"]), case["targets"]
    cotangent = _float(case["coefficients"])
    others = hidden @ head.T
    at = np.arange(len(targets)), targets
    others[at] = -np.inf
    q = np.exp(others - others.max(1, keepdims=True))
    grad = -cotangent[:, None] * q / q.sum(1, keepdims=True)
    grad[at] = cotangent
    expected = {"grad_hidden": grad @ head, "grad_head": grad.T @ hidden}
    for chunk in case.fields["chunk_tokens"]:
        for train_head in (False, True):
            if train_head and "train_head" in subject.lacks:
                continue
            note = f"chunk_tokens={chunk}, head {'trained' if train_head else 'frozen'}"
            for m in _vjp(subject, case, chunk, train_head, expected, note):
                if m.quantity not in worst or m.error > worst[m.quantity].error:
                    worst[m.quantity] = m
    yield from worst.values()
    if "train_head" in subject.lacks:
        yield NotSupported("grad_head", "train_head")


def _vjp(
    subject: Subject, case: Case, chunk: int | None, train_head: bool, expected: dict[str, Float], note: str
) -> Iterator[Measurement]:
    inputs = [case[name] for name in ("hidden", "head_weight", "targets", "coefficients")]
    result = subject.losses.log_odds(*inputs, dtype=subject.dtype, train_head=train_head, chunk_tokens=chunk)
    for quantity in ("log_odds", "other_entropy"):
        e = case[quantity]
        yield subject.measure("L2", quantity, getattr(result, quantity), e, np.abs(e), note=note)
    for quantity in ("grad_hidden", "grad_head") if train_head else ("grad_hidden",):
        grad, e = getattr(result, quantity), expected[quantity]
        if grad is None:
            raise ValueError(f"no {quantity} ({note})")
        yield subject.measure("L2", quantity, grad, e, np.abs(e).max(1, keepdims=True), note=note)
        yield from subject.in_dtype(grad)


# L3 -----------------------------------------------------------------------------------------------------------


def objective(subject: Subject, case: Case) -> Iterator[Outcome]:
    """An objective's loss of a batch, and its gradient in the log-odds."""
    inputs = objectives.inputs(case)
    loss, grad = subject.losses.objective(*inputs)
    e_loss, e_grad = objectives.expected(*inputs)
    yield subject.measure("L3", "loss", loss, e_loss, max(abs(e_loss), 0.1))
    yield subject.measure("L3", "gradient", grad, e_grad, np.abs(e_grad))


def saturated_objective(subject: Subject, case: Case) -> Iterator[Outcome]:
    """Log-odds from hopeless to saturated leave the loss and its gradient finite."""
    loss, grad = subject.losses.objective(*objectives.inputs(case))
    yield subject.holds("finite", bool(np.isfinite(loss) and np.isfinite(grad).all()), "NaN or infinite")


# The suite ----------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """One check, what it needs of a backend, and the cases that it runs on."""

    name: str
    run: Callable[[Subject, Case], Iterator[Outcome]]
    needs: str  # of CAPABILITIES
    cases: list[Case]


def suite() -> list[Check]:
    """Every check."""
    stored = vectors.load()
    at = {level: [case for case in stored if case.level == level] for level in vectors.DESCRIPTIONS}
    plain = {case.name: [case] for case in stored}  # what the malformed inputs are made from
    return [
        Check("L0 tokens", tokens, "dense", at["L0"]),
        Check("L0 hopeless to saturated", hopeless_to_saturated, "dense", [vectors.hopeless_to_saturated()]),
        Check("L0 malformed input", malformed_tokens, "dense", plain["n7_v17_float32"]),
        Check("L1 batches", batches, "batch", at["L1"]),
        Check("L2 fused head", fused_head, "fused", at["L2"]),
        Check("L2 malformed input", malformed_heads, "fused", plain["head_v257_float32"]),
        Check("L2 log odds", log_odds_of_head, "log_odds", at["L2"]),
        Check("L3 objectives", objective, "objective", objectives.cases()),
        Check("L3 saturated objectives", saturated_objective, "objective", objectives.extremes()),
    ]
