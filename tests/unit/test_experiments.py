"""Experiments: what is asked, which rows there are, what the numbers of results mean."""

import importlib.util
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnf_align.experiments import EXPERIMENTS, experiment, pictures, tables, tasks
from bnf_align.experiments.cells import VERSION
from bnf_align.experiments.outcome import Outcome, collapsed, line_of, read
from bnf_align.experiments.rows import Mix, feedback
from bnf_align.experiments.runner import Plan, choose_rates
from bnf_align.experiments.scales import SCALES
from bnf_align.experiments.statistics import gini, interval, separation
from bnf_align.experiments.subjects import WordProblem, WordProblems
from bnf_align.word_problems import OPERATIONS, Problem, draw, solve
from bnf_core.data.records import parse_row
from bnf_core.errors import UserError
from bnf_core.objectives import parse
from bnf_core.steps.balance import balanced
from bnf_core.storage.digests import json_digest
from bnf_core.types import Example

ROOT = Path(__file__).parents[2]
DIDACTIC = SCALES["didactic"]

# Tasks


def test_no_calculation_is_in_two_parts() -> None:
    found = {
        part: {solve(p) for p in tasks.problems(150, random.Random(0), part)} for part in ("train", "valid", "test")
    }
    assert (
        not found["train"] & found["valid"]
        and not found["train"] & found["test"]
        and not found["valid"] & found["test"]
    )


def test_held_out_parts_have_every_operation_alike() -> None:
    """Rejects a split by chance, of which one part asked for twice as many sums as the other: what helps there did not
    help here. And one of calculations that nobody asks for, or not of all."""
    rng = random.Random(0)
    assert {solve(draw(rng)) for _ in range(20_000)} == tasks.parts().keys()
    counts = {
        (part, operation): sum(tasks.parts()[worked] == part and f" {operation} " in worked for worked in tasks.parts())
        for part in ("train", "valid", "test")
        for operation in OPERATIONS
    }
    for operation in OPERATIONS:
        assert 0 <= counts["valid", operation] - counts["test", operation] <= 1
        assert counts["test", operation] == len([w for w in tasks.parts() if f" {operation} " in w]) // 4


def test_right_answers_are_right_and_wrong_ones_wrong() -> None:
    rng = random.Random(1)
    for problem in tasks.problems(100, rng, "train"):
        assert tasks.is_right(problem, tasks.right(problem))
        assert tasks.right(problem) != tasks.wrong(problem, rng)


def test_the_pretraining_text_misreads_four_of_eight_kinds() -> None:
    rng = random.Random(2)
    asked = tasks.problems(2000, rng, "train")
    right = {
        words: [tasks.is_right(p, tasks.as_pretrained(p, rng)) for p in asked if words in p.question]
        for words in (*tasks.MISREAD, "buys")
    }
    assert all(np.mean(right[words]) < 0.4 for words in tasks.MISREAD)
    assert np.mean(right["buys"]) > 0.8


def test_answers_that_are_misplaced_look_alike_and_are_wrong() -> None:
    rng = random.Random(4)
    for name in ("sort", "reverse", "largest"):
        for task in tasks.others(name, 50, rng, held_out=True):
            wrong = tasks.misplaced(task, rng)
            assert not task.is_right(wrong) and len(wrong) == len(task.answer)
    asked = tasks.questions("sort", 30, random.Random(5))
    assert all(one.is_right(" ".join(sorted(one.question.split()[1:]))) for one in asked)


def test_the_policys_own_answers_have_a_learning_rate_of_their_own() -> None:
    plan = Plan("on_policy", experiment("on_policy"), "didactic", 1, 1, [1e-3, 1e-2], 4, 8)
    offline = [c for c in plan.sweep() if c.answers == "start"]
    assert [(c.objective, c.learning_rate) for c in offline] == [("bnf", 1e-3), ("bnf", 1e-2)]
    assert {c.answers for c in plan.sweep()} == {"start", "policy"} and plan.start().answers == "policy"


@pytest.mark.parametrize("name", tasks.OTHERS)
def test_held_out_tasks_are_not_pretrained(name: str) -> None:
    known, asked = (tasks.others(name, 20, random.Random(3), held_out=held_out) for held_out in (False, True))
    assert not {t.question for t in known} & {t.question for t in asked}


def test_answers_of_the_other_tasks() -> None:
    for name, answer in (("sort", sorted), ("reverse", lambda d: d[::-1])):
        for task in tasks.others(name, 20, random.Random(4), held_out=True):
            assert task.answer.split() == list(answer(task.question.split()[1:]))
    for task in tasks.others("largest", 20, random.Random(4), held_out=True):
        assert task.answer == max(task.question.split()[-4:])
    for task in tasks.others("calculate", 10, random.Random(4), held_out=True):
        assert eval(task.question) == int(task.answer)


# Rows


def counted(mix: Mix, count: int = 200) -> tuple[int, int, int]:
    """Rows in pairs, chosen and rejected rows by themselves."""
    rows = feedback(DIDACTIC, WordProblems(), count, random.Random(0), mix)
    pairs = [row for row in rows if "chosen" in row]
    singles = [row["label"] for row in rows if "label" in row]
    return 2 * len(pairs), sum(singles), len(singles) - sum(singles)


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (Mix(), (200, 0, 0)),
        (Mix(paired=0.25), (50, 75, 75)),
        (Mix(paired=0.0, chosen=0.05), (0, 10, 190)),
    ],
)
def test_every_mix_has_its_exact_shares(mix: Mix, expected: tuple[int, int, int]) -> None:
    assert counted(mix) == expected


def right_share(mix: Mix) -> float:
    rows = feedback(DIDACTIC, WordProblems(), 400, random.Random(5), mix)
    by_prompt = {p.question: p for p in tasks.problems(400, random.Random(5), "train")}
    said = [(row["prompt"][0]["content"], row["chosen"][0]["content"]) for row in rows]
    return float(np.mean([tasks.is_right(by_prompt[q], a) if q in by_prompt else np.nan for q, a in said]))


def test_flipped_and_contradicted_rows() -> None:
    assert right_share(Mix()) == 1.0
    assert right_share(Mix(flipped=0.4)) == pytest.approx(0.6)
    rows = feedback(DIDACTIC, WordProblems(), 400, random.Random(5), Mix(contradicted=0.4))
    both = {str((row["prompt"], row["chosen"], row["rejected"])) for row in rows}
    again = {str((row["prompt"], row["rejected"], row["chosen"])) for row in rows}
    assert len(both & again) == 80  # 40% of 200 pairs: 40 of them both ways round


def test_grades_say_how_near_a_number_is() -> None:
    rows = feedback(DIDACTIC, WordProblems(), 300, random.Random(6), Mix(paired=0.0, graded=True))
    labels = np.array([row["label"] for row in rows])
    assert (labels == 1.0).sum() == 150 and labels.min() == -1.0
    assert 20 < ((labels < 1) & (labels > 0)).sum() < 130  # wrong by little
    ten = WordProblem(Problem("?", 7, "+", 3))
    assert [ten.grade(f"= {x}") for x in (10, 9, 15, 20, 80)] == pytest.approx([1.0, 0.8, 0.0, -1.0, -1.0])
    parsed = [one for row in rows for one in parse_row(row, "rows:1")]
    assert [one.weight * (1 if one.label else -1) for one in parsed] == pytest.approx(list(labels))


def test_balanced_rows_weigh_alike() -> None:
    rows = balanced([Example((1,), (2,), i < 5) for i in range(100)])
    weights = [sum(row.weight for row in rows if row.label is label) for label in (True, False)]
    assert weights == pytest.approx([50.0, 50.0])


# Statistics


def test_gini() -> None:
    assert gini([1.0, 1.0, 1.0]) == pytest.approx(0.0)
    assert gini([0.0, 0.0, 0.0, 1.0]) == pytest.approx(0.75)
    assert gini([1.0, 2.0, 3.0]) == pytest.approx(2 / 9)
    assert gini([]) == gini([0.0]) == 0.0


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(60):
        values = rng.normal(size=(20, 1)) + rng.normal(size=(1, 40)) + rng.normal(size=(20, 40))
        found = interval(values, seed=trial)
        held += found.low <= 0 <= found.high
    assert 51 <= held <= 60  # 95% of 60, less what few seeds cost a bootstrap


def test_an_interval_of_questions_that_stand_or_fall_together() -> None:
    """Four copies of each question say no more than one. Rejects drawing them one by one."""
    values = np.random.default_rng(0).random((5, 20))
    copies, groups = np.repeat(values, 4, axis=1), np.repeat(np.arange(20), 4)
    one, four, apart = interval(values), interval(copies, groups=groups), interval(copies)
    assert (one.low, one.high) == pytest.approx((four.low, four.high))
    assert apart.high - apart.low < 0.8 * (one.high - one.low)


def test_an_interval_of_differences_is_narrower_than_of_what_they_have_alike() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(200)
    a, b = ((rng.random((10, 200)) < hard + extra).astype(float) for extra in (0.0, 0.02))
    paired, alone = interval(b - a), interval(a)
    assert paired.high - paired.low < alone.high - alone.low


def test_how_well_numbers_are_told_apart() -> None:
    rng = np.random.default_rng(2)
    below = rng.normal(size=400)
    assert separation(below + 100, below).mean() == 1.0
    assert separation(below, below).mean() == pytest.approx(0.5)
    found = separation(rng.normal(size=400) + 1, below)
    assert found.mean() == pytest.approx(0.76, abs=0.04)  # Φ(1/√2)
    assert interval(found[None]).excludes_zero and np.std(found) > 0


# Results


def cell(method: str = "BNF", seed: int = 0, rate: float = 1e-3, right: int = 5, **changed: Any) -> dict[str, Any]:
    point = {"step": 0, "log_p_chosen": -1.0, "log_p_rejected": -2.0, "perplexity": 3.0}
    kinds: dict[str, Any] = {"chosen": [0.5, 1.0], "rejected": [-0.5, -1.0]}
    found = {
        "cell": {"setting": "pairs", "method": method, "objective": method, "learning_rate": rate, "seed": seed},
        "diverged": None,
        "correct": [1] * right + [0] * (10 - right),
        "groups": list(range(10)),
        "others": {"sort": [1, 1, 0, 0]},
        "text": [1.0, 1.2],
        "moved_chosen": [0.1, 0.2],
        "moved_rejected": [-0.1, -0.3],
        "grad_norms": [0.5, 0.7],
        "gini": 0.4,
        "path": [point],
        "shift_at": kinds,
        "gradient_at": {"start": kinds, "end": kinds},
    }
    return found | changed


def test_a_line_of_results() -> None:
    own, beside = [cell(seed=s, right=8) for s in range(3)], [cell(seed=s, right=5) for s in range(3)]
    line = line_of(own, beside, cell(right=4))
    assert line.numbers["accuracy"].mean == pytest.approx(0.8)
    assert line.numbers["beside"].mean == pytest.approx(0.3)
    assert line.numbers["gain"].mean == pytest.approx(0.4)
    assert line.numbers["surprise"].mean == pytest.approx(1.0)
    assert line.numbers["largest_grad_norm"].mean == pytest.approx(0.7)
    assert (line.seeds, line.collapsed) == (3, 0)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, False),
        ({"diverged": 7}, True),
        ({"text": [1.0 + np.log(2.1), 1.2 + np.log(2.1)]}, True),
        ({"text": [1.0 + np.log(1.9), 1.2 + np.log(1.9)]}, False),
        ({"right": 2}, True),
        ({"right": 3}, False),
    ],
)
def test_what_a_collapse_is(changed: dict[str, Any], expected: bool) -> None:
    assert collapsed(cell(**changed), cell(right=5)) is expected


def test_the_sweep_takes_the_best_rate_that_does_not_collapse() -> None:
    start = cell(right=5)
    results = [cell("bnf", rate=r, right=n) for r, n in ((1e-4, 6), (1e-3, 8), (3e-3, 8))]
    results.append(cell("bnf", rate=1e-2, right=10, diverged=3))
    sweep, rates = choose_rates(results, start)
    assert rates == {"bnf": 1e-3}
    assert [line["learning_rate"] for line in sweep if line["taken"]] == [1e-3]
    assert [line["collapsed"] for line in sweep] == [0, 0, 0, 1]


def test_results_are_read_back(tmp_path: Path) -> None:
    outcome = Outcome("stability", "claim", {}, {"accuracy": 0.5}, [], [line_of([cell()], [cell()], cell())])
    path = tmp_path / "results.json"
    path.write_text(outcome.to_json())
    assert read(path) == outcome


def test_what_is_counted_is_said(tmp_path: Path) -> None:
    apart = {"chosen": [-1.0, -2.0], "rejected": [-1.5, -3.0]}
    own = [cell(log_p_a_token=apart)]
    sweep = [{"objective": "BNF", "learning_rate": 1e-3, "accuracy": 0.6, "collapsed": 0, "seeds": 1, "taken": True}]
    start = {"accuracy": 0.5, "others": 0.9, "perplexity": 3.0}
    line = line_of(own, own, cell())
    assert line.numbers["separated"].mean == pytest.approx(0.75)
    for scale, counted in (("didactic", "right answers"), ("gsm8k", "right solutions preferred")):
        made = Outcome("solutions", "claim", {"scale": scale}, start, sweep, [line])
        text = tables.markdown(made)
        assert f"| learning rate | {counted} |" in text and f"50% {counted}" in text
        assert ("beside any" in text) == ("A right solution is preferred where" in text) == (scale == "gsm8k")


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 2)])
def test_a_picture_is_as_wide_as_its_panels(count: int, columns: int) -> None:
    """Rejects a lone panel beside an empty half, which a page shows at half its size."""
    figure = pictures.panels(Outcome("stability", "claim", {}, {}, [], []), *[lambda axes, _: None] * count)
    assert figure.get_figwidth() == columns * pictures.PANEL[0]
    assert len(figure.axes) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not the results"), ("[]", "not the results"), ('{"format": 99}', "version 99, expected 1")],
)
def test_other_results_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read(path)
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none.json")


def test_pages_of_what_was_seen(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("evidence_pages", ROOT / "docs" / "evidence_pages.py")
    assert spec is not None and spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    facts: dict[str, Any] = {"seeds": 2, "sweep_seeds": 1, "cpu_hours": 0.1, "backend": "torch", "scale": "didactic"}
    facts["versions"] = {"numpy": "2.4"}
    start = {"accuracy": 0.5, "others": 0.9, "perplexity": 3.0}
    sweep = [{"objective": "BNF", "learning_rate": 1e-3, "accuracy": 0.6, "collapsed": 0, "seeds": 1, "taken": True}]
    made = Outcome("tax", "It costs little.", facts, start, sweep, [line_of([cell()], [cell()], cell())], "", "It did.")
    (tmp_path / "tax").mkdir()
    (tmp_path / "tax" / "results.json").write_text(made.to_json())
    (tmp_path / "tax" / "result.png").write_bytes(b"")
    shutil.copy(ROOT / "docs" / "evidence" / "index.md", tmp_path)
    for _ in range(2):  # the second time over the first
        assert pages.write(tmp_path, tmp_path) == [made]
    index, page = (tmp_path / "index.md").read_text(), (tmp_path / "tax.md").read_text()
    assert index.count("| [Tax](tax.md) | It costs little. | It did. |") == 1 and "Nothing has been run" not in index
    assert "![tax: result](tax_result.png)" in page and "**60%**" in page and (tmp_path / "tax.json").exists()
    larger = replace(
        made, facts=facts | {"scale": "smollm2", "methods": ["BNF", "NLL on right ones"]}, seen="It did too."
    )
    (tmp_path / "tax" / "results.json").write_text(larger.to_json())
    pages.write(tmp_path, tmp_path)  # beside the first
    index, page = (tmp_path / "index.md").read_text(), (tmp_path / "tax_smollm2.md").read_text()
    assert index.index("[Tax](tax.md)") < index.index(
        "| [Tax, smollm2](tax_smollm2.md) | It costs little. | It did too."
    )
    assert "`bnf experiment tax --scale smollm2 --methods 'BNF,NLL on right ones' --seeds 2 --sweep-seeds 1`" in page


# Experiments


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_whole(name: str) -> None:
    found = experiment(name)
    plan = Plan(name, found, found.scales[0], 2, 1, [1e-3], 4, 8)
    rates = {method.rate_of: 1e-3 for method in found.methods.values()}
    cells = plan.cells(rates)
    assert {c.method for c in plan.sweep()} == rates.keys()
    assert found.claim.endswith(".") and found.pictures
    assert {c.part for c in cells} == {"test"} and {c.part for c in plan.sweep()} == {"valid"}
    assert not {c.seed for c in cells} & {c.seed for c in plan.sweep()}
    assert len({c.digest for c in cells}) == len(cells) or name in ("balance",)
    for c in cells:
        parse(c.objective)


def test_experiments_share_what_they_have_in_common() -> None:
    rates = {method.objective: 1e-3 for method in experiment("stability").methods.values()}
    digests = [
        {c.digest for c in Plan(name, experiment(name), "didactic", 2, 1, [1e-3], 4, 8).cells(rates)}
        for name in ("stability", "shifts", "tax")
    ]
    assert digests[0] == digests[1] == digests[2]
    a = Plan("stability", experiment("stability"), "didactic", 1, 1, [1e-3], 4, 8).cells(rates)[0]
    assert replace(a, setting="other", method="other").digest == a.digest
    assert replace(a, seed=1).digest != a.digest
    before = {k: v for k, v in asdict(a).items() if k not in ("method", "setting", "answers", "task", "share")}
    assert before["mix"].pop("graded") is False
    assert a.digest == json_digest(before | {"version": VERSION})[-16:]  # results that are there stay good
    assert len({a.digest, replace(a, answers="policy").digest, replace(a, task="sort").digest}) == 3
