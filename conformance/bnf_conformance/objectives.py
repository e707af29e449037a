"""What each objective must give: its formula as the paper has it, in complex arithmetic, loop by loop.

It shares no code with `bnf_core.objectives`. A loss f of one real number x has the derivative Im f(x + ih) / h, which
loses no digit however small h is (Squire and Trapp, SIAM Review 40, 1998): so the formula alone gives the gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bnf_conformance.vectors import FLOAT32, Case, Draw
from bnf_core.objectives import OBJECTIVES, Objective, parse
from bnf_core.steps.batching import collate
from bnf_core.types import Batch, Drawn, Example

Array = NDArray[Any]
STEP = 1e-30  # h

# Beside every objective at its defaults: settings that take another path through it.
VARIANTS = (
    "dpo(label_smoothing=0.1)",
    "dpo(label_smoothing=0.1, robust=True)",
    "cpo(label_smoothing=0.1)",
    "f_dpo(divergence=reverse_kl)",
    "f_dpo(divergence=js)",
    "f_dpo(divergence=alpha, alpha=0.3)",
    "kto(desirable_weight=1.5, undesirable_weight=0.5)",
    "alphapo(alpha=-0.25)",
    "grpo(beta=0, epsilon=0.1, epsilon_high=0.3)",
    "bnf + 0.2*dpo",
)


class Rows(NamedTuple):
    """A batch's rows, one to an entry of every list."""

    log_p: list[complex]  # Σ log p over the row's tokens
    log_r: list[float]
    length: list[int]
    chosen: list[bool]
    pairs: list[tuple[int, int]]  # chosen, rejected
    group: list[int]
    weight: list[float]
    baseline: float

    @property
    def ratio(self) -> list[complex]:
        return [p - r for p, r in zip(self.log_p, self.log_r, strict=True)]

    @property
    def pair_weight(self) -> list[float]:
        return [self.weight[w] for w, _ in self.pairs]

    def of(self, chosen: bool) -> list[float]:
        """The weights of the chosen rows, or of the rejected ones."""
        return [w for w, c in zip(self.weight, self.chosen, strict=True) if c == chosen]

    @property
    def mean(self) -> list[complex]:
        return [p / n for p, n in zip(self.log_p, self.length, strict=True)]


def _sigmoid(x: complex) -> complex:
    return 1 / (1 + np.exp(-x))


def _minus_log_sigmoid(x: complex) -> complex:
    return np.log(1 + np.exp(-x))


def _mean(values: list[Any], weights: list[float] | None = None) -> Any:
    """Of values that count by their weights: Σ weight · value, divided by how many there are."""
    weights = [1.0] * len(values) if weights is None else weights
    return sum(w * value for w, value in zip(weights, values, strict=True)) / len(values) if values else 0.0


def _odds(mean: complex) -> complex:
    """log p / (1 − p) of a mean log-probability."""
    return mean - np.log(1 - np.exp(mean))


def _dpo(x: Rows, *, beta: float, label_smoothing: float, robust: bool) -> complex:
    e, losses = label_smoothing, []
    for w, j in x.pairs:
        h = beta * (x.ratio[w] - x.ratio[j])
        if robust:
            losses.append(((1 - e) * _minus_log_sigmoid(h) - e * _minus_log_sigmoid(-h)) / (1 - 2 * e))
        else:
            losses.append((1 - e) * _minus_log_sigmoid(h) + e * _minus_log_sigmoid(-h))
    return _mean(losses, x.pair_weight)


def _f_dpo(x: Rows, *, beta: float, divergence: str, alpha: float) -> complex:
    slope: Callable[[complex], complex] = {
        "reverse_kl": lambda u: np.log(u) + 1,
        "forward_kl": lambda u: -1 / u,
        "js": lambda u: np.log(2 * u / (1 + u)),
        "alpha": lambda u: (1 - u ** (alpha - 1)) / (1 - alpha),
    }[divergence]
    f = [slope(np.exp(ratio)) for ratio in x.ratio]
    return _mean([_minus_log_sigmoid(beta * f[w] - beta * f[j]) for w, j in x.pairs], x.pair_weight)


def _ipo(x: Rows, *, beta: float) -> complex:
    per_token = [ratio / n for ratio, n in zip(x.ratio, x.length, strict=True)]
    return _mean([(per_token[w] - per_token[j] - 1 / (2 * beta)) ** 2 for w, j in x.pairs], x.pair_weight)


def _kto(
    x: Rows, *, beta: float, desirable_weight: float, undesirable_weight: float, z: float | None = None
) -> complex:
    z = x.baseline if z is None else z
    losses = []
    for ratio, chosen in zip(x.ratio, x.chosen, strict=True):
        if chosen:
            losses.append(desirable_weight * (1 - _sigmoid(beta * (ratio - z))))
        else:
            losses.append(undesirable_weight * (1 - _sigmoid(beta * (z - ratio))))
    return _mean(losses, x.weight)


def _apo(x: Rows, **settings: float) -> complex:
    return _kto(x._replace(baseline=0.0), **settings)


def _bco(x: Rows, *, beta: float) -> complex:
    rewards = [beta * (ratio - x.baseline) for ratio in x.ratio]
    chosen = [_minus_log_sigmoid(r) for r, c in zip(rewards, x.chosen, strict=True) if c]
    rejected = [_minus_log_sigmoid(-r) for r, c in zip(rewards, x.chosen, strict=True) if not c]
    return _mean(chosen, x.of(True)) + _mean(rejected, x.of(False))


def _slic(x: Rows, *, delta: float, nll_weight: float) -> complex:
    losses = []
    for w, j in x.pairs:
        margin = delta - x.log_p[w] + x.log_p[j]
        losses.append((margin if np.real(margin) > 0 else 0.0) - nll_weight * x.log_p[w])
    return _mean(losses, x.pair_weight)


def _orpo(x: Rows, *, beta: float) -> complex:
    ratio = [_odds(x.mean[w]) - _odds(x.mean[j]) for w, j in x.pairs]
    losses = [-x.mean[w] + beta * _minus_log_sigmoid(o) for (w, _), o in zip(x.pairs, ratio, strict=True)]
    return _mean(losses, x.pair_weight)


def _cpo(x: Rows, *, beta: float, nll_weight: float, label_smoothing: float) -> complex:
    e, losses = label_smoothing, []
    for w, j in x.pairs:
        h = beta * (x.log_p[w] - x.log_p[j])
        losses.append((1 - e) * _minus_log_sigmoid(h) + e * _minus_log_sigmoid(-h) - nll_weight * x.mean[w])
    return _mean(losses, x.pair_weight)


def _simpo(x: Rows, *, beta: float, gamma: float) -> complex:
    losses = [_minus_log_sigmoid(beta * x.mean[w] - beta * x.mean[j] - gamma) for w, j in x.pairs]
    return _mean(losses, x.pair_weight)


def _alphapo(x: Rows, *, beta: float, gamma: float, alpha: float) -> complex:
    reward = [beta * (1 - np.exp(mean) ** -alpha) / alpha for mean in x.mean]
    return _mean([_minus_log_sigmoid(reward[w] - reward[j] - gamma) for w, j in x.pairs], x.pair_weight)


def _npo(x: Rows, *, beta: float) -> complex:
    rejected = [ratio for ratio, chosen in zip(x.ratio, x.chosen, strict=True) if not chosen]
    return _mean([2 / beta * np.log(1 + np.exp(ratio) ** beta) for ratio in rejected], x.of(False))


def _asft(x: Rows, *, beta: float) -> complex:
    chosen = [mean for mean, c in zip(x.mean, x.chosen, strict=True) if c]
    rejected = [mean for mean, c in zip(x.mean, x.chosen, strict=True) if not c]
    liked = _mean([-mean + beta * _minus_log_sigmoid(_odds(mean)) for mean in chosen], x.of(True))
    return liked + _mean([beta * _minus_log_sigmoid(-_odds(mean)) for mean in rejected], x.of(False))


def _simper(x: Rows) -> complex:
    chosen = [np.exp(mean) for mean, c in zip(x.mean, x.chosen, strict=True) if c]
    rejected = [np.exp(mean) for mean, c in zip(x.mean, x.chosen, strict=True) if not c]
    return _mean(rejected, x.of(False)) - _mean(chosen, x.of(True))


def _d2o(x: Rows, *, beta: float, alpha: float) -> complex:
    losses = []
    for j, (group, chosen) in enumerate(zip(x.group, x.chosen, strict=True)):
        others = [w for w, g in enumerate(x.group) if g == group and x.chosen[w]]
        if not chosen and others:
            losses.append(_minus_log_sigmoid(beta * _mean([x.ratio[w] for w in others]) - alpha * x.ratio[j]))
    return _mean(losses)


# Of the rows' likelihoods.
ROWS: Mapping[str, Callable[..., complex]] = {
    "dpo": _dpo,
    "f_dpo": _f_dpo,
    "ipo": _ipo,
    "kto": _kto,
    "apo_zero_unpaired": _apo,
    "bco": _bco,
    "slic": _slic,
    "orpo": _orpo,
    "cpo": _cpo,
    "simpo": _simpo,
    "alphapo": _alphapo,
    "npo": _npo,
    "asft": _asft,
    "simper": _simper,
    "d2o": _d2o,
}


class Tokens(NamedTuple):
    """A batch's tokens, one to an entry of every array (N,)."""

    log_odds: Array  # complex
    ref_log_odds: Array
    other_entropy: Array
    chosen: Array  # whether the row is
    drawn_log_p: Array  # under the policy that drew the token
    advantage: Array  # of the row


def _bnf(x: Tokens) -> Array:
    p = 1 / (1 + np.exp(-x.log_odds))
    t = np.minimum(1.0, np.real(p) * (1 + np.exp(-x.ref_log_odds)))  # a constant to the gradient
    loss = -t * np.log(p) - (1 - t) * (np.log(1 - p) - x.other_entropy)
    return np.where(x.chosen, loss, -loss)


def _nll(x: Tokens) -> Array:
    return np.where(x.chosen, np.log(1 + np.exp(-x.log_odds)), 0.0)


def _unlikelihood(x: Tokens, *, alpha: float) -> Array:
    p = 1 / (1 + np.exp(-x.log_odds))
    return np.where(x.chosen, -np.log(p), -alpha * np.log(1 - p))


def _grpo(x: Tokens, *, beta: float, epsilon: float, epsilon_high: float, scale: bool) -> Array:
    losses = []
    for o, o_ref, old, advantage in zip(x.log_odds, x.ref_log_odds, x.drawn_log_p, x.advantage, strict=True):
        p, r = 1 / (1 + np.exp(-o)), 1 / (1 + np.exp(-o_ref))
        ratio = p / np.exp(old)
        clip = complex(max(1 - epsilon, min(1 + epsilon_high, ratio.real)), ratio.imag)
        if not 1 - epsilon <= ratio.real <= 1 + epsilon_high:
            clip = clip.real
        surrogate = min(ratio * advantage, clip * advantage, key=np.real)
        losses.append(-surrogate + beta * (r / p - np.log(r / p) - 1))
    return np.array(losses)


# Of each token by itself.
TOKENS: Mapping[str, Callable[..., Array]] = {"bnf": _bnf, "nll": _nll, "unlikelihood": _unlikelihood, "grpo": _grpo}


def expected(
    objective: Objective,
    log_odds: Array,
    other_entropy: Array,
    ref_log_odds: Array,
    batch: Batch,
    baseline: float,
    *,
    changed: Callable[[Rows], Rows] = lambda rows: rows,
    altered: Callable[[Tokens], Tokens] = lambda tokens: tokens,
) -> tuple[float, Array]:
    """The loss of a whole batch, and its gradient (N,) in the log-odds, float64.

    Args:
        changed, altered: what a formula sees instead of the rows or tokens: how wrong backends are made, to test the
            suite with.
    """
    with np.errstate(all="ignore"):  # a formula as it stands may overflow, and then shows it
        return _expected(objective, log_odds, other_entropy, ref_log_odds, batch, baseline, changed, altered)


def _expected(
    objective: Objective,
    log_odds: Array,
    other_entropy: Array,
    ref_log_odds: Array,
    batch: Batch,
    baseline: float,
    changed: Callable[[Rows], Rows],
    altered: Callable[[Tokens], Tokens],
) -> tuple[float, Array]:
    o, r = log_odds.astype(np.float64), ref_log_odds.astype(np.float64)
    total, grad = 0.0, np.zeros(len(o))
    for weight, term in objective.terms:
        settings = asdict(term)
        if term.name in TOKENS:
            chosen = (batch.labels > 0)[batch.sequence_ids]
            counted = int((batch.labels > 0).sum()) if term.name == "nll" else len(batch.labels)
            share = (batch.weights / np.bincount(batch.sequence_ids))[batch.sequence_ids] / counted
            tokens = Tokens(
                o + 1j * STEP,
                r,
                other_entropy.astype(np.float64),
                chosen,
                batch.drawn_log_p.astype(np.float64),
                batch.advantages.astype(np.float64)[batch.sequence_ids],
            )
            losses = share * TOKENS[term.name](altered(tokens), **settings)
            total += weight * float(losses.real.sum())
            grad += weight * losses.imag / STEP
            continue
        loss = ROWS[term.name]
        log_p = np.bincount(batch.sequence_ids, weights=-np.log1p(np.exp(-o)))
        rows = Rows(
            log_p=list(log_p.astype(complex)),
            log_r=list(np.bincount(batch.sequence_ids, weights=-np.log1p(np.exp(-r)))),
            length=np.bincount(batch.sequence_ids).tolist(),
            chosen=(batch.labels > 0).tolist(),
            pairs=[(int(w), int(j)) for w, j in batch.pairs],
            group=batch.groups.tolist(),
            weight=batch.weights.tolist(),
            baseline=baseline,
        )
        total += weight * float(np.real(loss(changed(rows), **settings)))
        slopes = []
        for row in range(len(rows.log_p)):
            moved = [x + 1j * STEP * (i == row) for i, x in enumerate(rows.log_p)]
            slopes.append(float(np.imag(loss(changed(rows._replace(log_p=moved)), **settings))) / STEP)
        grad += weight * np.array(slopes)[batch.sequence_ids] / (1 + np.exp(o))  # ∂ log p / ∂o = 1 − p
    return total, grad


def batch_of(case: Case) -> Batch:
    """The rows of a case: pairs side by side, two prompts that have two pairs each, and lengths that differ."""
    lengths, weights = case["completion_lengths"].tolist(), case["weights"].tolist()
    groups = [i // 4 if i < 8 else i // 2 for i in range(len(lengths))]
    drawn = np.split(case["drawn_log_p"], np.cumsum(lengths)[:-1])
    examples = [
        Example(
            (1, 2),
            tuple(range(3, 3 + n)),
            i % 2 == 0,
            groups[i],
            pair=1 + i // 2,
            weight=weights[i],
            drawn=Drawn(tuple(drawn[i].tolist()), float(case["advantages"][i])),
        )
        for i, n in enumerate(lengths)
    ]
    return collate(examples, len(examples))


def cases() -> list[Case]:
    """Every objective on ordinary log-odds, where the policy is the reference still, and with weights."""
    kinds = ("ordinary", "first step", "weighted")
    return [
        _case(expression, kind)
        for expression in (*OBJECTIVES, *VARIANTS)
        for kind in (kinds if parse(expression).takes_weights else kinds[:2])
    ]


def extremes() -> list[Case]:
    """Every objective from hopeless to saturated."""
    return [_case(expression, "extreme") for expression in (*OBJECTIVES, *VARIANTS)]


def _case(expression: str, kind: str) -> Case:
    draw = Draw(f"objectives {'ordinary' if kind == 'weighted' else kind}")
    lengths = (1 + draw.below(24, 12)).astype(np.int32)
    lengths[:2] = 1, 180
    n = int(lengths.sum())
    reach = 64.0 if kind == "extreme" else 4.0
    log_odds = draw.values(reach, n, bits=20) + np.float32(1.5)
    ref_log_odds = log_odds + (0 if kind == "first step" else draw.values(reach / 4, n, bits=20))
    entropy = np.abs(draw.values(2.0, n, bits=20))
    drawn = -np.logaddexp(0, -log_odds.astype(np.float64))
    drawn += 0 if kind == "first step" else draw.values(0.5, n, bits=20)  # some ratios are clipped
    arrays = {
        "log_odds": log_odds.astype(np.float32),
        "other_entropy": entropy,
        "ref_log_odds": ref_log_odds.astype(np.float32),
        "completion_lengths": lengths,
        "weights": _weights(len(lengths)) if kind == "weighted" else np.ones(len(lengths), np.float32),
        "drawn_log_p": np.minimum(drawn, 0).astype(np.float32),
        "advantages": ((draw.below(17, len(lengths)) - 8.0) / 4).astype(np.float32),  # from −2 to 2
    }
    fields = {"objective": expression, "baseline": 0.0 if kind == "first step" else 0.375}
    description = "weighted rows" if kind == "weighted" else f"{kind} log-odds"
    return Case(f"{expression}, {kind}", "L3", description, FLOAT32, arrays, fields)


def _weights(rows: int) -> Array:
    """From 0 to 2, a pair's rows the same."""
    return (Draw("weights of pairs").below(33, rows // 2) / 16).repeat(2).astype(np.float32)


def inputs(case: Case) -> tuple[Objective, Array, Array, Array, Batch, float]:
    """What `Losses.objective` and `expected` are given."""
    numbers = case["log_odds"], case["other_entropy"], case["ref_log_odds"]
    return parse(case.fields["objective"]), *numbers, batch_of(case), case.fields["baseline"]
