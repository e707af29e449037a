"""What a backend must get right, level by level.

L0: single tokens on dense logits. L1: sequences and batches. L2: the loss fused with the head. Each check asks
the backend once, measures every quantity against the float64 expectation and yields a `Measurement`; passing
means error ≤ tolerance. Nothing here knows a framework.
"""

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnf_conformance import vectors
from bnf_conformance.vectors import Case
from bnf_core import oracle
from bnf_core.protocol import Losses

Float = NDArray[np.float64]

TOLERANCES = Path(__file__).parent / "tolerances.toml"


@dataclass(frozen=True)
class Measurement:
    """The worst element of one quantity; it passes where error ≤ tolerance."""

    quantity: str
    error: float  # relative to the quantity's scale; inf where shapes differ, something is NaN or infinities differ
    tolerance: float
    note: str = ""  # which variant was worst


@cache
def _tolerances() -> dict[str, Any]:
    return tomllib.loads(TOLERANCES.read_text("utf-8"))


def tolerance(level: str, quantity: str, dtype: str) -> tuple[float, float]:
    """(rtol, atol) of one quantity."""
    entries = _tolerances()[level][quantity]
    entry = entries.get(dtype) or entries["any"]
    return entry["rtol"], entry["atol"]


def worst_error(got: ArrayLike, expected: Float, scale: ArrayLike, atol_over_rtol: float = 0.0) -> float:
    """max |got − expected| / max(scale, atol / rtol); equal elements count 0 whatever their scale."""
    x = np.asarray(got, np.float64)
    if x.shape != np.shape(expected):
        raise ValueError(f"expected shape {np.shape(expected)}, the backend returned {x.shape}")
    if x.size == 0:
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(x == expected, 0.0, np.abs(x - expected) / np.maximum(scale, atol_over_rtol))
    return float(np.where(np.isnan(error), np.inf, error).max())


def _measure(
    level: str, quantity: str, dtype: str, got: ArrayLike, expected: Float, scale: ArrayLike, note: str = ""
) -> Measurement:
    rtol, atol = tolerance(level, quantity, dtype)
    floor = atol / rtol if atol else 0.0
    return Measurement(quantity, worst_error(got, expected, scale, floor), rtol, note)


# L0 -----------------------------------------------------------------------------------------------------------


def tokens(losses: Losses, case: Case, dtype: str) -> Iterator[Measurement]:
    """Log-odds, entropy and loss of single tokens, their gradient, and the target t that the gradient implies."""
    rows, targets = np.arange(len(case["targets"])), case["targets"]
    weights, expected = case["weights"].astype(np.float64), case["grad_logits"]
    result = losses.dense(case["logits"], targets, case["ref_log_odds"], case["weights"], dtype=dtype)
    for quantity in ("log_odds", "other_entropy", "token_loss"):
        got = getattr(result, quantity)
        yield _measure("L0", quantity, dtype, got, case[quantity], np.abs(case[quantity]))
    grad, largest = result.grad_logits, np.abs(expected).max(1)
    yield _measure("L0", "gradient", dtype, grad, expected, largest[:, None])
    observed = expected[rows, targets]
    grad_observed = np.asarray(grad, np.float64)[rows, targets]
    yield _measure("L0", "observed_gradient", dtype, grad_observed, observed, np.abs(observed))

    # The backend's values and gradients must tell one story: π − gradient is a distribution with t(y) = min(1, p/r),
    # p taken from the log-odds that the backend itself reports.
    o, o_ref = np.asarray(result.log_odds, np.float64), case["ref_log_odds"].astype(np.float64)
    log_p = -np.logaddexp(0.0, -o)
    with np.errstate(invalid="ignore"):
        target = np.exp(np.minimum(0.0, log_p + np.logaddexp(0.0, -o_ref)))
    target = np.where(np.isneginf(o), 0.0, target)
    yield _measure("L0", "dynamic_target", dtype, np.exp(log_p) - grad_observed / weights, target, 1.0)
    total = np.asarray(grad, np.float64).sum(1)
    yield _measure("L0", "dynamic_target_sum", dtype, total, np.zeros_like(total), largest)


def hopeless_to_saturated(losses: Losses, case: Case, dtype: str) -> Iterator[Measurement]:
    """Thousands of tokens from hopeless to certain, where a subtraction of probabilities leaves no digit: within
    tolerance, and never less accurate than the framework's own cross-entropy on the same logits."""
    logits, targets, ref_log_odds = case["logits"], case["targets"], case["ref_log_odds"]
    result = losses.dense(logits, targets, ref_log_odds, np.ones_like(ref_log_odds), dtype=dtype)
    bnf = _accuracy(result.token_loss, result.grad_logits, logits, targets, ref_log_odds, dtype)
    # Cross-entropy is BNF against a reference that gives the token no probability: t = 1.
    no_reference = np.full_like(ref_log_odds, -np.inf)
    ce_loss, ce_grad = losses.cross_entropy(logits, targets, dtype=dtype)
    ce = _accuracy(ce_loss, ce_grad, logits, targets, no_reference, dtype)
    yield from bnf
    for mine, yardstick in zip(bnf, ce, strict=True):
        yield Measurement(f"{mine.quantity}_vs_cross_entropy", mine.error, yardstick.error)


def _accuracy(
    loss: ArrayLike, grad: ArrayLike, logits: Float, targets: NDArray[Any], ref_log_odds: Float, dtype: str
) -> list[Measurement]:
    expected_loss, expected = oracle.token_loss(logits, targets, ref_log_odds)
    at = np.arange(len(targets)), targets
    return [
        _measure("saturation", "token_loss", dtype, loss, expected_loss, np.abs(expected_loss)),
        _measure("saturation", "gradient", dtype, grad, expected, np.abs(expected).max(1, keepdims=True)),
        _measure("saturation", "observed_gradient", dtype, np.asarray(grad)[at], expected[at], np.abs(expected[at])),
    ]


# L1 -----------------------------------------------------------------------------------------------------------


def batches(losses: Losses, case: Case, dtype: str) -> Iterator[Measurement]:
    """Sequence and batch losses and the gradient, over micro-batches of uneven size: which tokens count, with which
    sign, divided by what."""
    micro_batches = vectors.micro_batches(case)
    result = losses.batch(micro_batches, dtype=dtype)
    sequence_loss = case["sequence_loss"]
    yield _measure("L1", "loss", dtype, result.loss, case["loss"], np.abs(sequence_loss).mean())
    yield _measure("L1", "sequence_loss", dtype, result.sequence_loss, sequence_loss, np.abs(sequence_loss))
    if len(result.grad_logits) != len(micro_batches):
        raise ValueError(f"expected {len(micro_batches)} gradients, the backend returned {len(result.grad_logits)}")
    errors, strays = [], []
    for m, ((_, batch, _), grad) in enumerate(zip(micro_batches, result.grad_logits, strict=True)):
        expected = case[f"grad_logits_{m}"]
        errors.append(_measure("L1", "gradient", dtype, grad, expected, np.abs(expected).max(2, keepdims=True)))
        unscored = np.delete(np.asarray(grad).reshape(-1, expected.shape[2]), batch.positions, axis=0)
        strays.append(_measure("L1", "unscored_gradient", dtype, unscored, np.zeros(unscored.shape), 1.0))
    yield max(errors, key=lambda m: m.error)
    yield max(strays, key=lambda m: m.error)


# L2 -----------------------------------------------------------------------------------------------------------


def fused_head(losses: Losses, case: Case, dtype: str) -> Iterator[Measurement]:
    """The loss from hidden states and head: value, statistics and both gradients, for every chunk size, head frozen
    and trained. In half precision the tolerances leave no room for logits that were rounded to it."""
    worst: dict[str, Measurement] = {}
    for chunk in case.fields["chunk_tokens"]:
        for train_head in (False, True):
            note = f"chunk_tokens={chunk}, head {'trained' if train_head else 'frozen'}"
            for m in _fused(losses, case, dtype, chunk, train_head, note):
                if m.quantity not in worst or m.error > worst[m.quantity].error:
                    worst[m.quantity] = m
    yield from worst.values()


def _fused(
    losses: Losses, case: Case, dtype: str, chunk: int | None, train_head: bool, note: str
) -> Iterator[Measurement]:
    inputs = [case[name] for name in ("hidden", "head_weight", "targets", "ref_log_odds", "coefficients")]
    result = losses.fused(*inputs, dtype=dtype, train_head=train_head, chunk_tokens=chunk)
    total = np.abs(case["coefficients"] * case["token_loss"]).sum()
    yield _measure("L2", "loss", dtype, result.loss, case["loss"], total, note)
    for quantity in ("log_odds", "other_entropy", "token_loss"):
        expected = case[quantity]
        yield _measure("L2", quantity, dtype, getattr(result, quantity), expected, np.abs(expected), note)
    for quantity, grad in (("grad_hidden", result.grad_hidden), ("grad_head", result.grad_head)):
        if quantity == "grad_head" and not train_head:
            if grad is not None:
                raise ValueError("a frozen head must have no gradient")
            continue
        if grad is None:
            raise ValueError(f"no {quantity} ({note})")
        expected = case[quantity]
        yield _measure("L2", quantity, dtype, grad, expected, np.abs(expected).max(1, keepdims=True), note)


# The suite ----------------------------------------------------------------------------------------------------

Check = Callable[[Losses, Case, str], Iterator[Measurement]]


def suite() -> list[tuple[str, Check, list[Case]]]:
    """Every check, by name, with the cases that it runs on."""
    stored = vectors.load()
    at = {level: [case for case in stored if case.level == level] for level in vectors.DESCRIPTIONS}
    return [
        ("L0 tokens", tokens, at["L0"]),
        ("L0 hopeless to saturated", hopeless_to_saturated, [vectors.hopeless_to_saturated()]),
        ("L1 batches", batches, at["L1"]),
        ("L2 fused head", fused_head, at["L2"]),
    ]
