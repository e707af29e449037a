"""The backends on inputs nobody chose: drawn by Hypothesis, held against the oracle and against themselves.

The draws are the same in every run. With BNF_PROPERTY_EXAMPLES=2000 in the environment there are others, and more.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import wrong_backends as wrong
from bnf_conformance import checks, vectors
from bnf_conformance.checks import Measurement, Outcome, Subject
from bnf_conformance.tolerances import Tolerances
from bnf_conformance.vectors import Case
from bnf_core import oracle, registry
from bnf_core.protocol import DenseResult, Losses
from wrong_backends import OracleLosses

MORE = int(os.environ.get("BNF_PROPERTY_EXAMPLES", "0"))
INF = np.float32(np.inf)


# Draws --------------------------------------------------------------------------------------------------------
#
# Numbers that every dtype can represent, so that a cast loses nothing: few bits, or extreme.

ORDINARY = st.integers(-64, 64).map(lambda i: i / 8)
LOGITS = st.one_of(ORDINARY, ORDINARY, st.sampled_from([-np.inf, -9984.0, 9984.0, -80.0, 80.0]))
FINE = st.one_of(st.floats(-30, 30, width=32), LOGITS)  # float32 alone
DTYPES = st.sampled_from(vectors.ALL)
WEIGHTS = st.builds(lambda m, e, s: s * m * 2.0**e, st.integers(1, 15), st.integers(-8, 2), st.sampled_from([-1, 1]))


def arrays(shape: tuple[int, ...], elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=elements)


class Tokens(NamedTuple):
    """Arguments of `dense` after the dtype."""

    dtype: str
    logits: np.ndarray
    targets: np.ndarray
    ref_log_odds: np.ndarray
    weights: np.ndarray


@st.composite
def tokens(
    draw: st.DrawFn, dtypes: st.SearchStrategy[str] = DTYPES, logits: st.SearchStrategy[float] | None = None
) -> Tokens:
    dtype, n, vocab = draw(dtypes), draw(st.integers(1, 5)), draw(st.integers(2, 20))
    if logits is None:
        logits = FINE if dtype == "float32" else LOGITS
    z = draw(arrays((n, vocab), logits))
    z[np.isneginf(z).all(1), 0] = 0.0  # some token must be possible
    targets = draw(hnp.arrays(np.int32, n, elements=st.integers(0, vocab - 1)))
    return Tokens(dtype, z, targets, draw(references(oracle.log_odds(z, targets))), draw(arrays((n,), WEIGHTS)))


@st.composite
def references(draw: st.DrawFn, policy: np.ndarray) -> np.ndarray:
    """From hopeless to saturated, each a tie, near the policy or far from it."""
    far = st.one_of(st.floats(-60, 60, width=32), st.sampled_from([-np.inf, np.inf, -200.0, 200.0]))
    near = [np.float32(o) + draw(st.sampled_from([0, 1e-6, -1e-6, 0.5, -2, 9])) for o in np.clip(policy, -200, 200)]
    choices = [draw(st.one_of(far, st.just(float(o)))) for o in near]
    return np.asarray(choices, np.float32)


class Heads(NamedTuple):
    dtype: str
    inputs: dict[str, np.ndarray]
    chunk_tokens: int | None


@st.composite
def heads(draw: st.DrawFn) -> Heads:
    dtype, n, vocab, dim = (draw(s) for s in (DTYPES, st.integers(1, 9), st.integers(2, 20), st.integers(1, 6)))
    scale = draw(st.sampled_from([0.125, 1.0, 4.0]))  # logits of up to 8 · 8 · 6 · 4
    hidden, head = (draw(arrays((rows, dim), ORDINARY)) for rows in (n, vocab))
    hidden = hidden * np.float32(scale)
    targets = draw(hnp.arrays(np.int32, n, elements=st.integers(0, vocab - 1)))
    policy = oracle.log_odds(hidden.astype(np.float64) @ head.T.astype(np.float64), targets)
    inputs = {"hidden": hidden, "head_weight": head, "targets": targets}
    inputs |= {"ref_log_odds": draw(references(policy)), "coefficients": draw(arrays((n,), WEIGHTS))}
    return Heads(dtype, inputs, draw(st.one_of(st.none(), st.integers(1, n + 2))))


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, Case]:
    """Sequences, dealt to micro-batches in order, and to the rows of each in any way."""
    dtype, count = draw(DTYPES), draw(st.integers(1, 7))
    lengths = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=count, max_size=count))
    labels = draw(st.lists(st.sampled_from([1, -1]), min_size=count, max_size=count))
    edges = sorted(draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    bins = []
    for start, end in zip([0, *edges], [*edges, count], strict=True):
        cuts = sorted(draw(st.sets(st.integers(start + 1, end - 1)))) if end - start > 1 else []
        bins.append([list(range(a, b)) for a, b in zip([start, *cuts], [*cuts, end], strict=True)])
    sizes = [sum(len(row) for row in rows) for rows in bins]
    name, vocab = f"drawn {draw(st.integers(0, 999))}", draw(st.integers(2, 9))
    dtypes = vectors.FLOAT32 if dtype == "float32" else vectors.ALL
    return dtype, vectors.batch_case(name, "drawn", dtypes, lengths, labels, sizes, vocab, bins)


# Properties ---------------------------------------------------------------------------------------------------


def dense(losses: Losses, x: Tokens) -> DenseResult:
    return losses.dense(*x[1:], dtype=x.dtype)


def all_pass(outcomes: Iterable[Outcome]) -> None:
    for m in outcomes:
        assert isinstance(m, Measurement) and m.error <= m.tolerance, m


def same(x: Tokens, got: DenseResult, expected: DenseResult) -> None:
    """Equal but for twice what each may be off."""
    tolerances, twice = Tolerances(), []
    largest = np.abs(expected.grad_logits).max(1, keepdims=True)
    for quantity, scale in (("log_odds", None), ("other_entropy", None), ("token_loss", None), ("gradient", largest)):
        name = "grad_logits" if quantity == "gradient" else quantity
        a, b = getattr(got, name), getattr(expected, name)
        rtol, atol = tolerances("L0", quantity, x.dtype)
        limit = 2 * np.maximum(rtol * (np.abs(b) if scale is None else scale), atol)
        with np.errstate(invalid="ignore"):
            twice.append((quantity, bool(((a == b) | (np.abs(a - b) <= limit)).all())))
    assert all(holds for _, holds in twice), twice


def tokens_are_the_oracles(losses: Losses, x: Tokens) -> None:
    all_pass(checks.tokens(Subject(losses, x.dtype), vectors.token_case("drawn", "", (x.dtype,), *x[1:])))


def heads_are_the_oracles(losses: Losses, x: Heads) -> None:
    """Gradients relative to the sum of what is added up in them, which a drawn head may well cancel to nothing."""
    subject, e = Subject(losses, x.dtype), vectors.head_case("drawn", "", (x.dtype,), x.inputs, [x.chunk_tokens])
    hidden, head, *_, coefficients = (a.astype(np.float64) for a in x.inputs.values())
    grad = np.abs(oracle.token_loss(hidden @ head.T, x.inputs["targets"], x.inputs["ref_log_odds"])[1])
    grad *= np.abs(coefficients)[:, None]
    scales = {name: np.abs(e[name]) for name in ("log_odds", "other_entropy", "token_loss")}
    # A sum of few tokens: what each may be off by, twice the tolerance of a sum of many, of which 1 is the floor.
    scales["loss"] = 2 * (np.abs(coefficients) * np.maximum(e["token_loss"], 1.0)).sum()
    # What is below float32's smallest normal number may be flushed to 0 before it is multiplied.
    flushed = 1.2e-38 / 2e-5
    scales["grad_hidden"] = np.maximum((grad @ np.abs(head)).max(1, keepdims=True), flushed * np.abs(head).sum())
    scales["grad_head"] = np.maximum((grad.T @ np.abs(hidden)).max(1, keepdims=True), flushed * np.abs(hidden).sum())
    for train_head in (False, True):
        inputs = x.inputs.values()
        got = losses.fused(*inputs, dtype=x.dtype, train_head=train_head, chunk_tokens=x.chunk_tokens)
        quantities = [name for name in scales if train_head or name != "grad_head"]
        all_pass(subject.measure("L2", q, getattr(got, q), e[q], scales[q], note=str(train_head)) for q in quantities)


def batches_are_the_oracles(losses: Losses, x: tuple[str, Case]) -> None:
    all_pass(checks.batches(Subject(losses, x[0]), x[1]))


def a_shift_of_all_logits_changes_nothing(losses: Losses, x: tuple[Tokens, float]) -> None:
    unshifted, shift = x
    same(
        unshifted,
        dense(losses, unshifted._replace(logits=unshifted.logits + np.float32(shift))),
        dense(losses, unshifted),
    )


def a_permutation_of_the_vocabulary_permutes_the_gradient(losses: Losses, x: tuple[Tokens, Any]) -> None:
    plain, random = x
    order = list(range(plain.logits.shape[1]))
    random.shuffle(order)  # new token v is the old order[v]
    place = np.argsort(order).astype(np.int32)
    got = dense(losses, plain._replace(logits=plain.logits[:, order], targets=place[plain.targets]))
    back = got.grad_logits[:, place]
    same(plain, DenseResult(got.log_odds, got.other_entropy, got.token_loss, back), dense(losses, plain))


def weights_scale_the_gradient_and_nothing_else(losses: Losses, x: tuple[Tokens, float]) -> None:
    plain, factor = x
    got = dense(losses, plain._replace(weights=plain.weights * np.float32(factor)))
    once = dense(losses, plain)
    for name in ("log_odds", "other_entropy", "token_loss"):
        np.testing.assert_array_equal(getattr(got, name), getattr(once, name))
    # Powers of 2 are exact, but where numbers are so small that they lose bits.
    normal = np.abs(once.grad_logits) > 2.0 ** (-13 if plain.dtype == "float16" else -120)
    np.testing.assert_array_equal(got.grad_logits[normal], factor * once.grad_logits[normal])


def tokens_know_nothing_of_each_other(losses: Losses, x: Tokens) -> None:
    parts = [dense(losses, Tokens(x.dtype, *(a[i : i + 1] for a in x[1:]))) for i in range(len(x.targets))]
    names = ("log_odds", "other_entropy", "token_loss", "grad_logits")
    same(x, dense(losses, x), DenseResult(*(np.concatenate([getattr(p, n) for p in parts]) for n in names)))


def fused_sums_add_up(losses: Losses, x: Heads) -> None:
    """Losses and gradients of the head of two parts of a batch are those of the whole."""

    def fused(part: slice) -> tuple[float, np.ndarray]:
        whole = ("head_weight",)
        inputs = [a if name in whole else a[part] for name, a in x.inputs.items()]
        r = losses.fused(*inputs, dtype="float32", train_head=True, chunk_tokens=x.chunk_tokens)
        assert r.grad_head is not None
        return r.loss, r.grad_head

    n = len(x.inputs["targets"])
    if n < 2:
        return
    parts = [fused(slice(0, n // 2)), fused(slice(n // 2, n))]
    loss, grad = fused(slice(0, n))
    assert abs(loss - sum(part[0] for part in parts)) <= 1e-4 * max(sum(abs(part[0]) for part in parts), 1e-6)
    size = np.maximum(sum(np.abs(part[1]) for part in parts).max(), 1e-30)
    assert np.abs(grad - parts[0][1] - parts[1][1]).max() <= 1e-4 * size


def without_a_reference_it_is_cross_entropy(losses: Losses, x: Tokens) -> None:
    result = dense(
        losses, x._replace(ref_log_odds=np.full(len(x.targets), -INF), weights=np.ones(len(x.targets), np.float32))
    )
    loss, grad = losses.cross_entropy(x.logits, x.targets, dtype=x.dtype)
    np.testing.assert_allclose(result.token_loss, loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.grad_logits, grad, rtol=0, atol=1e-5)


EXACT = tokens(st.just("float32"), LOGITS)  # sums with the shifts below are exact
PROPERTIES: dict[Callable[..., None], st.SearchStrategy[Any]] = {
    tokens_are_the_oracles: tokens(),
    heads_are_the_oracles: heads(),
    batches_are_the_oracles: batches(),
    a_shift_of_all_logits_changes_nothing: st.tuples(EXACT, st.sampled_from([-16.0, 1.0, 512.0, -9984.0])),
    a_permutation_of_the_vocabulary_permutes_the_gradient: st.tuples(tokens(), st.randoms()),
    weights_scale_the_gradient_and_nothing_else: st.tuples(tokens(), st.sampled_from([2.0, -1.0, -0.5])),
    tokens_know_nothing_of_each_other: tokens(),
    fused_sums_add_up: heads(),
    without_a_reference_it_is_cross_entropy: tokens(st.just("float32"), ORDINARY),
}


def hold(check: Callable[..., None], losses: Losses, *, shrink: bool = True, examples: int = 20) -> None:
    phases = [phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)]
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @settings(
        max_examples=MORE or examples,
        derandomize=not MORE,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=health,
    )
    @given(PROPERTIES[check])
    def run(x: Any) -> None:
        check(losses, x)

    run()


@pytest.fixture(scope="module", params=["torch", "mlx"])
def losses(request: pytest.FixtureRequest) -> Iterator[Losses]:
    if absent := registry.missing(request.param):
        pytest.skip(f"{', '.join(absent)} not installed")
    yield registry.get(request.param).losses("cpu")


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_backends_have_the_property(losses: Losses, check: Callable[..., None]) -> None:
    hold(check, losses, examples=10)


@pytest.mark.slow
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_backends_have_the_property_on_many_draws(losses: Losses, check: Callable[..., None]) -> None:
    hold(check, losses, examples=400)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_the_oracle_has_the_property(check: Callable[..., None]) -> None:
    hold(check, OracleLosses())


@pytest.mark.parametrize(
    ("check", "mistake"),
    [
        (tokens_are_the_oracles, wrong.EpsilonForm),
        (tokens_are_the_oracles, wrong.LiteralForm),
        (tokens_are_the_oracles, wrong.MissingStopGradient),
        (tokens_are_the_oracles, wrong.IgnoredDtype),
        (heads_are_the_oracles, wrong.LastChunkDropped),
        (heads_are_the_oracles, wrong.RoundedLogits),
        (batches_are_the_oracles, wrong.MeanOfMeans),
        (batches_are_the_oracles, wrong.GridRowsAsSequences),
        (batches_are_the_oracles, wrong.ShiftedMask),
        (a_shift_of_all_logits_changes_nothing, wrong.NoShift),
        (a_permutation_of_the_vocabulary_permutes_the_gradient, wrong.TokenZeroIsPadding),
        (weights_scale_the_gradient_and_nothing_else, wrong.SquaredWeights),
        (tokens_know_nothing_of_each_other, wrong.Normalised),
        (fused_sums_add_up, wrong.NormalisedHead),
        (without_a_reference_it_is_cross_entropy, wrong.SwappedPolicyAndReference),
    ],
    ids=lambda x: x.__name__,
)
def test_a_wrong_backend_has_not(check: Callable[..., None], mistake: type[OracleLosses]) -> None:
    with pytest.raises(AssertionError):
        hold(check, mistake(), shrink=False)


def test_every_property_has_a_backend_without_it() -> None:
    mark = next(m for m in test_a_wrong_backend_has_not.pytestmark if m.name == "parametrize")
    assert {check for check, _ in mark.args[1]} == set(PROPERTIES)
