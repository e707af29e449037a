"""Objectives worked by hand, their expressions and errors, and what they ask of the data."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from bnf_core.errors import UserError
from bnf_core.objectives import OBJECTIVES, Seen, batch_loss, parse, structure
from bnf_core.objectives.base import log_ratio
from bnf_core.objectives.numpy_ops import NumPyOps, float64
from bnf_core.processes import ALONE
from bnf_core.steps.baseline import Baseline
from bnf_core.steps.batching import MicroBatching, Rows, collate, micro_batches, require_learnable, require_units
from bnf_core.steps.metrics import Meter
from bnf_core.steps.mismatched import mismatched
from bnf_core.steps.reference import NoReference
from bnf_core.types import Batch, Drawn, Example, TokenScores

# One pair of one prompt; the chosen row has two tokens, the rejected one has one. A policy drew both.
PAIR = [
    Example((1,), (2, 3), True, 7, 9, "f:1", drawn=Drawn((-0.9375, -0.25), 1.5)),
    Example((1,), (4,), False, 7, 9, drawn=Drawn((-0.625,), -0.5)),
]
P, R = (0.5, 0.8, 0.25), (0.25, 0.8, 0.5)  # probabilities of the three tokens
CHOSEN, REJECTED = math.log(0.5 / 0.25), math.log(0.25 / 0.5)  # Σ log p/r


def loss(expression: str, rows: Sequence[Example] = PAIR, p: Sequence[float] = P, baseline: float = 0.0) -> float:
    batch = collate(rows, len(rows))
    o, r = (np.log(np.array(x) / (1 - np.array(x))) for x in (p, R))
    objective = parse(expression)
    where = float64(structure(objective, batch, baseline))
    return float(batch_loss(objective, NumPyOps(), Seen(o, np.zeros(3), r, where)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(p: float) -> float:
    return p / (1 - p)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        # t = 1 on the chosen tokens (p ≥ r), 0.5 on the rejected one.
        ("bnf", (-(math.log(0.5) + math.log(0.8)) / 2 + 0.5 * (math.log(0.25) + math.log(0.75))) / 2),
        ("nll", -(math.log(0.5) + math.log(0.8)) / 2),
        ("unlikelihood(alpha=2)", (-(math.log(0.5) + math.log(0.8)) / 2 - 2 * math.log(0.75)) / 2),
        ("dpo(beta=0.5)", -math.log(sigmoid(0.5 * (CHOSEN - REJECTED)))),
        ("ipo(beta=0.1)", (CHOSEN / 2 - REJECTED - 5) ** 2),
        ("kto(beta=0.5)", (1 - sigmoid(0.5 * CHOSEN) + 1 - sigmoid(-0.5 * REJECTED)) / 2),
        ("bco(beta=0.5)", -math.log(sigmoid(0.5 * CHOSEN)) - math.log(sigmoid(-0.5 * REJECTED))),
        ("npo(beta=0.5)", 4 * math.log(1 + 0.5**0.5)),
        ("simper", -math.sqrt(0.4) + 0.25),
        ("simpo(beta=2, gamma=0.5)", -math.log(sigmoid(math.log(0.4) - 2 * math.log(0.25) - 0.5))),
        ("alphapo(beta=1, gamma=0, alpha=-1)", -math.log(sigmoid(math.sqrt(0.4) - 0.25))),
        ("slic(delta=1, nll_weight=0)", 1 - math.log(0.4) + math.log(0.25)),
        ("cpo(beta=1, nll_weight=0)", -math.log(sigmoid(math.log(0.4 / 0.25)))),
        ("orpo(beta=1)", -math.log(0.4) / 2 - math.log(sigmoid(math.log(odds(math.sqrt(0.4)) / odds(0.25))))),
        ("asft(beta=1)", -math.log(0.4) / 2 - math.log(math.sqrt(0.4)) - math.log(0.75)),
        ("d2o(beta=1, alpha=2)", -math.log(sigmoid(CHOSEN - 2 * REJECTED))),
        # ρ is 1.28 and 1.03 of the chosen tokens, the first clipped; 0.47, clipped, of the rejected one.
        ("grpo(beta=0)", (-1.5 * (1.2 + 0.8 * math.exp(0.25)) / 2 + 0.5 * 0.8) / 2),
        (
            "grpo(beta=0, epsilon=0.6, epsilon_high=0.28)",
            (-1.5 * (0.5 * math.exp(0.9375) + 0.8 * math.exp(0.25)) / 2 + 0.5 * 0.25 * math.exp(0.625)) / 2,
        ),
        # KL is 0.5 − log 0.5 − 1, 0, and 2 − log 2 − 1.
        (
            "grpo(beta=1)",
            (-1.5 * (1.2 + 0.8 * math.exp(0.25)) / 2 + 0.4 + (math.log(2) - 0.5) / 2 + 1 - math.log(2)) / 2,
        ),
        ("f_dpo(beta=1, divergence=forward_kl)", -math.log(sigmoid(-0.5 + 2))),
        ("nll + 0.5*npo(beta=0.5)", -math.log(0.4) / 2 + 2 * math.log(1 + 0.5**0.5)),
    ],
)
def test_worked_by_hand(expression: str, expected: float) -> None:
    assert loss(expression) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if OBJECTIVES[name].takes_weights])
def test_a_weight_multiplies_the_loss_of_its_row_or_pair_and_no_count(name: str) -> None:
    def weighted(chosen: float, rejected: float) -> float:
        return loss(name, [replace(PAIR[0], weight=chosen), replace(PAIR[1], weight=rejected)])

    assert weighted(0.25, 0.25) == pytest.approx(loss(name) / 4, rel=1e-6)
    if OBJECTIVES[name].unit == "row":
        assert 0.25 * weighted(1, 0) + 2 * weighted(0, 1) == pytest.approx(weighted(0.25, 2), rel=1e-6)
        assert weighted(1, 0) + weighted(0, 1) == pytest.approx(loss(name), rel=1e-6)


def test_baselines_shift_rewards() -> None:
    kto = (1 - sigmoid(CHOSEN - 0.25) + 1 - sigmoid(0.25 - REJECTED)) / 2
    assert loss("kto(beta=1)", baseline=0.25) == pytest.approx(kto, rel=1e-12)


@pytest.mark.parametrize("far", [1e-8, 1e-3, 1.0, 29.0, 31.0, 300.0])
@pytest.mark.parametrize("at", [-40.0, -3.0, 0.0, 2.0, 40.0])
def test_log_ratios_keep_their_digits(at: float, far: float) -> None:
    """Rejects log p − log r as it stands, of which nothing is left at log-odds of 40."""
    from mpmath import exp, log1p, mp

    mp.dps = 60
    for o, r in ((at + far, at), (at, at + far)):
        expected = float(log1p(exp(-mp.mpf(r))) - log1p(exp(-mp.mpf(o))))
        assert log_ratio(NumPyOps(), np.array([o]), np.array([r]))[0] == pytest.approx(expected, rel=1e-9)


def test_a_clipped_token_is_let_go_on_the_far_side_alone() -> None:
    """By central differences; rejects a clip without the minimum, which lets go on both sides."""

    def slope(p: float, advantage: float) -> float:
        rows = [Example((1,), (2,), True, drawn=Drawn((math.log(0.5),), advantage))]
        objective, o, h = parse("grpo(beta=0)"), math.log(odds(p)), 1e-6
        where = float64(structure(objective, collate(rows, 1)))

        def at(o: float) -> float:
            return float(batch_loss(objective, NumPyOps(), Seen(np.array([o]), np.zeros(1), np.zeros(1), where)))

        return (at(o + h) - at(o - h)) / (2 * h)

    for p, advantage, let_go in ((0.7, 1, True), (0.3, 1, False), (0.3, -1, True), (0.7, -1, False), (0.5, 1, False)):
        expected = 0.0 if let_go else -advantage * p / 0.5 * (1 - p)
        assert slope(p, advantage) == pytest.approx(expected, abs=1e-8)


def test_advantages_are_scores_beside_those_of_the_prompt() -> None:
    right = np.array([1.0, 0.0, 0.0, 0.0])
    assert parse("grpo").advantages(right) == pytest.approx(np.array([0.75, -0.25, -0.25, -0.25]) / 0.5001)
    assert parse("0.5*bnf + grpo(scale=False)").advantages(right) == pytest.approx([0.75, -0.25, -0.25, -0.25])
    for objective in ("grpo", "grpo(scale=False)"):
        assert (parse(objective).advantages(np.ones(4)) == 0).all()
        assert (parse(objective).advantages(np.ones(1)) == 0).all()


def test_what_learns_from_samples_takes_no_other_rows() -> None:
    require_learnable(PAIR, parse("grpo"))
    with pytest.raises(UserError, match=r"learns from the policy's own samples.*f:1 is none"):
        require_learnable([replace(PAIR[0], drawn=None)], parse("bnf + 0.1*grpo"))


# Expressions


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_read_as_it_is_written(name: str) -> None:
    objective = parse(name)
    assert parse(str(objective)) == objective
    total = parse(f"{name} + 0.25*nll")
    assert parse(str(total)) == total and total.unit == objective.unit
    assert objective.name == name and objective.source and objective.wants and objective.formula


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("dop", "unknown objective 'dop': did you mean dpo?"),
        ("dpo(bta=1)", "unknown setting 'bta' of objective dpo: did you mean beta?"),
        ("simper(beta=1)", "unknown setting 'beta' of objective simper: it has none"),
        ("dpo(beta=0)", "beta is 0.0: expected a number above 0"),
        ("dpo(beta=large)", "dpo: beta is 'large': expected float"),
        ("dpo(robust=1)", "dpo: robust is 1: expected bool"),
        ("dpo(label_smoothing=0.5)", "expected a share from 0 up to 0.5"),
        ("f_dpo(divergence=kl)", "expected one of reverse_kl, forward_kl, js, alpha"),
        ("grpo(epsilon=1)", "epsilon is 1.0: expected a share from 0 up to 1"),
        ("dpo and bnf", "expected a name"),
        ("-1*dpo", "expected a name"),
        ("__import__('os')", "expected a name"),
        ("dpo(beta=open('x'))", "expected a name"),
        ("", "expected a name"),
        ("dpo + d2o", "expected one kind"),
        ("kto + bco", "at most one part with a baseline"),
    ],
)
def test_what_is_no_objective_is_refused(expression: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(expression)
    assert message in str(error.value)


# Pairs, from the data to the micro-batch


def pairs(count: int) -> list[Example]:
    return [
        Example((1, i // 4), tuple(range(1 + (3 * i) % 5)), label=i % 2 == 0, group=i // 4, pair=1 + i // 2)
        for i in range(2 * count)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 99])
def test_no_batch_parts_a_pair_and_none_is_lost(batch_size: int) -> None:
    rows = Rows(pairs(11), 0, "pair")
    steps = rows.steps_per_epoch(batch_size)
    taken = list(itertools.islice(rows.batches(batch_size), steps))
    assert [position["epoch"] for _, position in taken] == [0] * steps
    assert sorted(e.pair for batch, _ in taken for e in batch) == sorted(e.pair for e in pairs(11))
    for batch, _ in taken:
        assert len(batch) <= batch_size + 1 and all(sum(e.pair == f.pair for f in batch) == 2 for e in batch)
    for at in range(steps):
        resumed = next(rows.batches(batch_size, taken[at][1]))
        assert resumed == next(itertools.islice(rows.batches(batch_size), at + 1, None))


@pytest.mark.parametrize("unit", ["pair", "prompt"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("pack_to", [None, 12])
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("share", [False, True])
def test_no_micro_batch_parts_what_is_compared(
    unit: str, size: int, pack_to: int | None, processes: int, share: bool
) -> None:
    examples = pairs(7)
    batching = MicroBatching(size, pack_to, multiple_of=processes, share_prompts=share, unit=unit)
    parts = micro_batches(examples, batching)
    assert len(parts) % processes == 0
    assert sum(len(part.pairs) for part in parts) == 7 and sum(len(part.labels) for part in parts) == 14
    for part in parts:
        assert (part.labels[part.pairs[:, 0]] == 1).all() and (part.labels[part.pairs[:, 1]] == -1).all()
        assert (part.groups[part.pairs[:, 0]] == part.groups[part.pairs[:, 1]]).all()
        if unit == "pair" and pack_to is None:
            assert len(part.labels) <= max(size, 2)
    objective = parse("dpo" if unit == "pair" else "d2o")
    assert sum(loss_of(objective_part(part, objective)) for part in parts) == pytest.approx(
        loss_of(objective_part(collate(examples, 14), objective)), rel=1e-12
    )


def objective_part(batch: Batch, objective: object) -> tuple[Batch, object]:
    return batch, objective


def loss_of(part: tuple[Batch, object]) -> float:
    """Of log-odds that the token and its place in the row decide."""
    batch, objective = part
    places = np.concatenate([np.zeros(0), *(np.arange(n) for n in np.bincount(batch.sequence_ids))])
    o = np.sin(batch.targets + 2.0 * places + 3.0 * batch.labels[batch.sequence_ids])
    where = float64(structure(objective, batch))
    return float(batch_loss(objective, NumPyOps(), Seen(o, 0 * o, 0 * o, where)))


def test_rows_without_a_partner_are_named() -> None:
    lonely = Example((1,), (2,), True, source="feedback.jsonl:17")
    with pytest.raises(UserError, match=r"compares pairs.*1 of 5 rows.*feedback.jsonl:17"):
        require_units([*pairs(2), lonely], "pair")
    with pytest.raises(UserError, match=r"a prompt's chosen rows with rejected.*feedback.jsonl:17"):
        require_units([lonely], "prompt")


# Baselines


class Model:
    """An engine whose policy is 0.5 nats of log-odds above the reference on every token of token id 2."""

    processes = ALONE

    def evaluate(self, batch: Batch, ref_log_odds: np.ndarray) -> TokenScores:
        o = np.where(batch.targets == 2, 0.5, 0.0).astype(np.float32)
        return TokenScores(o, 0 * o)


def test_rows_are_matched_with_completions_of_other_prompts() -> None:
    rows = [Example((5, 6), (2,), True), Example((5, 6), (3, 3), False), Example((8,), (4, 4, 4), True)]
    # The longest row has four tokens: the prompt of the first two is cut to fit before the third completion.
    assert [(e.prompt_ids, e.completion_ids) for e in mismatched(rows)] == [
        ((6,), (4, 4, 4)),
        ((6,), (4, 4, 4)),
        ((8,), (2,)),
    ]
    assert mismatched(rows[:2]) == []


def test_rows_in_memory_have_one_mismatched_row_in_every_epoch() -> None:
    data = [Example((i // 2 + 1,), (10 + i, 10 + i), i % 2 == 0, group=i // 2) for i in range(8)]
    batches = Rows(data, seed=0, mismatched=True).batches(4)
    met: dict[int, set[Example]] = {}
    for rows, _ in itertools.islice(batches, 6):  # three epochs
        for row, other in zip(rows, mismatched(rows), strict=True):
            met.setdefault(row.completion_ids[0] - 10, set()).add(other)
    # The next row of another prompt, whichever rows share the step.
    expected = {i: (data[i].prompt_ids, data[(i // 2 * 2 + 2) % 8].completion_ids) for i in range(8)}
    assert {i: [(e.prompt_ids, e.completion_ids) for e in rows] for i, rows in met.items()} == {
        i: [row] for i, row in expected.items()
    }


def test_baselines_by_hand() -> None:
    rows = [Example((5,), (2, 2), True), Example((6,), (3,), False), Example((7,), (2,), False)]
    batches = [(batch, np.zeros(len(batch.targets), np.float32)) for batch in micro_batches(rows, MicroBatching(2))]
    up = math.log(2 * sigmoid(0.5))  # log p/r of a token 2

    def of(name: str) -> Baseline:
        return Baseline(parse(name), Model(), NoReference(), MicroBatching(2))

    assert of("dpo")(rows, batches) == 0.0
    assert of("kto")(rows, batches) == pytest.approx((0 + up + 2 * up) / 3, rel=1e-6)
    bco = of("bco")
    assert bco(rows, batches) == pytest.approx((2 * up + (0 + up) / 2) / 2, rel=1e-6)
    only_chosen = [(collate(rows[:1], 1), np.zeros(2, np.float32))]
    again = of("bco")
    again.load_state(bco.state())
    expected = (4 * up / 2 + up / 2) / 2  # two chosen rows by now, and both rejected ones
    assert bco(rows[:1], only_chosen) == again(rows[:1], only_chosen) == pytest.approx(expected, rel=1e-6)


# Metrics


def test_metrics_are_the_objectives_own() -> None:
    batch = collate(PAIR, 2)
    o, r = (np.log(np.array(x) / (1 - np.array(x))).astype(np.float32) for x in (P, R))

    def metrics(expression: str) -> dict[str, float | None]:
        meter = Meter(parse(expression))
        meter.add(batch, TokenScores(o, 0 * o), r)
        return meter.result()

    dpo = metrics("dpo(beta=0.5)")
    assert dpo["loss"] == pytest.approx(-math.log(sigmoid(0.5 * (CHOSEN - REJECTED))), rel=1e-6)
    assert dpo["rewards/chosen"] == pytest.approx(0.5 * CHOSEN, rel=1e-6) and "target_weight" not in dpo
    simpo = metrics("simpo(beta=2)")
    assert simpo["rewards/chosen"] == pytest.approx(math.log(0.4), rel=1e-6)
    assert simpo["log_odds_shift/chosen"] is None
    assert metrics("bnf + 0.1*dpo")["share_below_reference"] == pytest.approx(1 / 3)
