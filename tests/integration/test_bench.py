"""Benchmarks: contenders that take turns, figures that an interrupted measurement goes on from, and ratios."""

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from rich.console import Console

from benchmarks import figures as bench
from benchmarks import growth as bench_growth
from benchmarks import loss as bench_loss
from benchmarks import same_bits as bench_same_bits
from benchmarks import step as bench_step
from benchmarks.figures import FLOOR, Case, Figures, MeasureConfig, Measurement, lines
from benchmarks.interleaved import ContenderFailed, Work, apart, repeated, rounds
from benchmarks.loss import BenchLossConfig
from benchmarks.same_bits import SameBitsConfig
from bnf_core import oracle
from bnf_core.config import DataConfig, HardwareConfig
from bnf_core.errors import UserError
from bnf_core.steps.batching import pairs
from bnf_core.types import Example
from conftest import fast_on

QUIET = Console(quiet=True)


# Taking turns


def test_contenders_take_turns_and_never_run_together() -> None:
    log: list[str] = []
    running = threading.Lock()

    def contender(name: str) -> Work:
        def work(pause: Callable[[], None]) -> None:
            while True:
                assert running.acquire(blocking=False)
                log.append(name)
                running.release()
                pause()

        return work

    taken = rounds({name: contender(name) for name in "abc"})
    found = [next(taken) for _ in range(9)]
    taken.close()
    assert all(list(each) == ["a", "b", "c"] for each in found)
    warming_up, *orders = ("".join(log[at : at + 3]) for at in range(0, len(log), 3))
    assert warming_up == "abc" and all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 3  # nobody always follows the same other


def test_a_process_of_its_own_gives_a_number_or_says_why_not() -> None:
    assert apart("a", math.sqrt, 4.0) == 2.0
    for job, argument, reason in ((math.sqrt, -1.0, "ValueError"), (os._exit, 3, "ended with code 3")):
        with pytest.raises(ContenderFailed, match=f"a: .*{reason}"):
            apart("a", job, argument)


def test_only_a_contenders_own_work_is_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.interleaved.time.perf_counter", lambda: clock[0])

    def contender(seconds: float) -> Work:
        def job() -> None:
            clock[0] += seconds

        return repeated(job, 2)

    taken = rounds({"fast": contender(1.0), "slow": contender(10.0)})
    assert next(taken) == {"fast": 2.0, "slow": 20.0}
    taken.close()


def test_processor_seconds_leave_out_waiting() -> None:
    taken = rounds({"sleeps": repeated(lambda: time.sleep(0.2))}, cpu=True)
    assert next(taken)["sleeps"] < 0.1
    taken.close()


def test_leaving_ends_the_work_and_lets_it_clean_up() -> None:
    cleaned: list[str] = []

    def work(pause: Callable[[], None]) -> None:
        try:
            while True:
                pause()
        except Exception:
            cleaned.append("caught")  # nothing of the kind: the end is no error of the contender's
        finally:
            cleaned.append("done")

    taken = rounds({"a": work})
    next(taken)
    taken.close()
    assert cleaned == ["done"]
    assert not any(thread.name == "a" for thread in threading.enumerate())


def test_a_failure_and_an_early_end_name_the_contender(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(pause: Callable[[], None]) -> None:
        print("noise of a trainer")
        pause()
        raise RuntimeError("out of\nmemory")

    with pytest.raises(ContenderFailed, match="a: RuntimeError: out of memory"):
        next(rounds({"a": fails}))
    with pytest.raises(ContenderFailed, match="b: came to its end"):
        next(rounds({"b": lambda pause: pause()}))
    assert capsys.readouterr().out == ""


# Figures


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that is three times slower in the second round: the ratio of medians would be 1."""
    figures = Figures(
        "ours",
        {"ours": 50.0, "peer": 100.0, "unknown": None},
        rounds=[
            {FLOOR: 1.0, "ours": 2.0, "peer": 4.0, "unknown": 1.0},
            {FLOOR: 3.0, "ours": 6.0, "peer": 12.0, "unknown": 3.0},
            {FLOOR: 2.0, "ours": 12.0, "peer": 6.0, "unknown": 1.0},
        ],
    )
    found = {line.name: line for line in lines(figures)}
    peer = found["peer"]
    assert (peer.seconds, peer.fastest, peer.slowest) == (6.0, 4.0, 12.0)
    assert (peer.ratio, peer.ratio_spread, peer.floors) == (0.5, (0.5, 2.0), 4.0)
    assert peer.memory_ratio == 0.5
    assert found["ours"].ratio is None and found[FLOOR].ratio is None and found[FLOOR].floors == 1.0
    assert found["unknown"].memory is None and found["unknown"].memory_ratio is None
    assert lines(Figures("ours")) == []


def test_a_contender_can_be_compared_with_another_of_ours() -> None:
    figures = Figures(
        "bnf",
        {"bnf": 1.0, "bnf --objective dpo": 3.0, "peer DPO": 6.0},
        rounds=[{"bnf": 1.0, "bnf --objective dpo": 2.0, "peer DPO": 8.0}],
        beside={"peer DPO": "bnf --objective dpo"},
    )
    found = {line.name: line for line in lines(figures)}
    assert found["peer DPO"].ratio == 0.25 and found["peer DPO"].memory_ratio == 0.5
    assert found["bnf --objective dpo"].ratio == 0.5 and found["bnf"].ratio is None


def test_peers_are_compared_with_ours_of_their_objective() -> None:
    assert bench_step.ours_like("TRL DPO, reference precomputed") == "bnf --objective dpo"
    assert bench_step.ours_like("TRL KTO") == "bnf --objective kto"
    assert bench_step.ours_like("TRL KTO, apo_zero_unpaired") == "bnf --objective apo_zero_unpaired"
    for name in ("TRL SFT", "bnf", bench_step.FIRST_EPOCH, "bnf --objective dpo", FLOOR):
        assert bench_step.ours_like(name) == "bnf"


def test_a_table_says_what_to_install() -> None:
    command = "pip install 'bnf-align[bench]'"
    console = Console(width=100)
    with console.capture() as shown:
        console.print(bench.table("case", Figures("ours", rounds=[{"ours": 1.0}], notes={"peer": command})))
    assert command in shown.get()


def quick(name: str = "x") -> Work:
    return repeated(lambda: None)


def measured(path: Path, contenders: dict[str, Work | str], **settings: Any) -> tuple[Measurement, bool, list[str]]:
    asked: list[str] = []

    def memory(name: str) -> float:
        asked.append(name)
        if name == "dies":
            raise ContenderFailed(name, "killed")
        return 1.0

    config = MeasureConfig(output=str(path), **({"rounds": 3} | settings))
    measurement = Measurement(config, "test", {"setting": "1"}, QUIET)
    return measurement, measurement.run(Case("case", contenders, memory, "a")), asked


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    contenders: dict[str, Work | str] = {"a": quick(), "b": quick(), "dies": quick(), "absent": "not installed"}
    first, whole, asked = measured(path, contenders, rounds=1)
    assert whole and asked == ["a", "b", "dies"]
    kept = first.cases["case"].rounds
    second, whole, asked = measured(path, contenders, rounds=3)
    assert whole and asked == []  # memory is known, of the dead as well
    assert second.cases["case"].rounds[:1] == kept and len(second.cases["case"].rounds) == 3
    assert list(kept[0]) == ["a", "b"]
    assert second.cases["case"].notes == {"dies": "killed", "absent": "not installed"}
    assert json.loads(path.read_text())["cases"]["case"]["rounds"] == second.cases["case"].rounds


def test_seconds_are_those_of_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.interleaved.time.perf_counter", lambda: clock[0])

    def job() -> None:
        clock[0] += 3.0

    measurement = Measurement(MeasureConfig(output=str(tmp_path / "figures.json")), "test", {}, QUIET)
    measurement.run(Case("case", {"a": repeated(job, 4)}, lambda name: 0.0, times=4))
    assert measurement.cases["case"].rounds == [{"a": 3.0}] * 5


def test_nothing_is_begun_after_the_minutes_are_over(tmp_path: Path) -> None:
    measurement, whole, asked = measured(tmp_path / "figures.json", {"a": quick()}, minutes=0.0)
    assert not whole and asked == [] and measurement.cases["case"].rounds == []


def test_figures_of_something_else_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    measured(path, {"a": quick()})
    before = path.read_bytes()
    with pytest.raises(UserError, match="setting: 1 → 2"):
        Measurement(MeasureConfig(output=str(path)), "test", {"setting": "2"}, QUIET)
    assert path.read_bytes() == before
    Measurement(MeasureConfig(output=str(path), overwrite=True), "test", {"setting": "2"}, QUIET)
    path.write_text("[]")
    with pytest.raises(UserError, match="holds no figures"):
        Measurement(MeasureConfig(output=str(path)), "test", {}, QUIET)


def test_a_contender_that_fails_while_it_is_timed_is_left_out(tmp_path: Path) -> None:
    def fails_later(pause: Callable[[], None]) -> None:
        pause()
        pause()
        raise ValueError("no more")

    measurement, whole, _ = measured(tmp_path / "figures.json", {"a": quick(), "weak": fails_later})
    figures = measurement.cases["case"]
    assert whole and all(list(taken) == ["a"] for taken in figures.rounds) and len(figures.rounds) == 3
    assert "no more" in figures.notes["weak"]


def test_page_and_picture_hold_every_contender() -> None:
    figures = Figures("a", {"a": 2.0**20, "b": 2.0**21}, {"c": "not installed"}, [{"a": 1.0, "b": 2.0}])
    page = bench.page({"torch": "2"}, {"a case": figures}, "bnf bench-x", "resident")
    assert "| b | 2 (2–2) |  | 0.5 (0.5–0.5) | 2 | 0.5 |" in page and "- c: not installed" in page
    names = [text.get_text() for axes in bench.bars({"a case": figures}, "").axes for text in axes.get_yticklabels()]
    assert {"a", "b"} <= set(names)


# The three commands


@fast_on("mlx")
def test_the_loss_is_measured_on_each_backend(
    tmp_path: Path, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_loss, "apart", lambda name, job, *args: job(*args))  # a process takes seconds
    config = BenchLossConfig(
        tokens=[8],
        hidden=4,
        vocab=32,
        hardware=HardwareConfig(backend_name, "cpu", "float32"),
        measure=MeasureConfig(rounds=2, output=str(tmp_path / "loss.json")),
    )
    measurement = bench_loss.bench_loss(config, QUIET)
    assert list(measurement.cases) == ["8 tokens, head frozen", "8 tokens, head trained"]
    for figures in measurement.cases.values():
        assert {FLOOR, "linear_bnf_loss", "unfused BNF", "unfused cross-entropy"} <= set(figures.rounds[0])
        assert len(figures.rounds) == 2 and all(taken > 0 for each in figures.rounds for taken in each.values())
    assert (tmp_path / "loss.md").exists() and (tmp_path / "loss.png").exists()


def test_trls_chunked_loss_is_the_cross_entropy_that_ours_is_measured_beside() -> None:
    """Rejects a peer that computes another loss, or no gradient."""
    torch, losses = pytest.importorskip("torch"), bench_step._module("torch", "losses")
    pytest.importorskip("trl.kernels")
    draw = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*shape, generator=draw).requires_grad_() for shape in ((6, 4), (40, 4)))
    targets = torch.randint(40, (6,), generator=draw)
    found, expected = (
        torch.autograd.grad(loss(hidden, head), (hidden, head))
        for loss in (
            losses.Benchmark("cpu", "float32")._trl(targets),
            lambda h, w: torch.nn.functional.cross_entropy(h @ w.T, targets),
        )
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_same_steps_twice_end_with_the_same_bits(tiny_model: Path, feedback: Path, tmp_path: Path) -> None:
    """On a CPU with and without deterministic algorithms; an operation without one is named, and steps that differ are
    told from those that do not."""
    torch = pytest.importorskip("torch")
    config = SameBitsConfig(
        str(tiny_model),
        DataConfig(str(feedback)),
        HardwareConfig("torch", "cpu", "float32"),
        rows=4,
        steps=3,
        output=str(tmp_path / "same.json"),
    )
    found = bench_same_bits.same_bits(config, QUIET)
    assert [one.same for one in found.values()] == [True, True]
    assert all(one.seconds and one.seconds > 0 for one in found.values())
    assert not torch.are_deterministic_algorithms_enabled()
    assert json.loads((tmp_path / "same.json").read_text())["found"]["as it is"]["same"] is True
    with mock.patch.object(bench_same_bits, "digest", lambda _: os.urandom(8)):
        assert bench_same_bits.same_bits(config, QUIET)["as it is"].same is False
    with mock.patch.object(bench_same_bits, "trained", mock.Mock(side_effect=RuntimeError("cumsum does not have"))):
        assert bench_same_bits.same_bits(config, QUIET)["deterministic algorithms"].note == "cumsum does not have"


def test_the_author_s_form_is_bnf_up_to_its_epsilon(backend_name: str) -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 1, (6, 12)), rng.integers(12, size=6)
    reference = rng.normal(-2, 1, 6)
    expected, _ = oracle.token_loss(logits, targets, reference)
    dense_form = bench_step._module(backend_name, "losses").dense_form
    if backend_name == "torch":
        import torch

        arrays = [torch.tensor(x) for x in (logits, targets, 1 / (1 + np.exp(-reference)))]
    else:
        import mlx.core as mx

        arrays = [mx.array(x) for x in (logits.astype(np.float32), targets, 1 / (1 + np.exp(-reference)))]  # type: ignore[misc]
    np.testing.assert_allclose(dense_form(*arrays).tolist(), expected, rtol=1e-4)


def step_config(model: Path, feedback: Path, backend: str, path: Path, **settings: Any) -> bench_step.BenchStepConfig:
    return bench_step.BenchStepConfig(
        str(model),
        DataConfig(str(feedback)),
        hardware=HardwareConfig(backend, "cpu", "float32"),
        measure=MeasureConfig(rounds=2, output=str(path)),
        **settings,
    )


@fast_on("torch")
def test_a_step_is_measured_on_each_backend(
    tiny_model: Path, feedback: Path, tmp_path: Path, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_step, "peak_memory", lambda config, rows, name: 1.0)
    peers = {"torch": "TRL DPO, reference precomputed", "mlx": "mlx-lm-lora DPO"}[backend_name]
    few = ["bnf", peers]  # each more takes seconds
    config = step_config(tiny_model, feedback, backend_name, tmp_path / "step.json", rows=4, contenders=few)
    measurement = bench_step.bench_step(config, QUIET)
    (figures,) = measurement.cases.values()
    assert list(figures.rounds[0])[:3] == [FLOOR, bench_step.OURS, bench_step.FIRST_EPOCH]
    assert {f"bnf --objective {name}" for name in bench_step.OBJECTIVES} <= set(figures.rounds[0])
    assert peers in figures.notes or peers in figures.rounds[0]


@fast_on("torch")
def test_the_first_epoch_computes_the_reference_in_every_step(
    tiny_model: Path, feedback: Path, tmp_path: Path, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnf_core.steps.reference import ReferenceCache

    computed: list[int] = []
    learn = ReferenceCache._learn
    monkeypatch.setattr(ReferenceCache, "_learn", lambda self, batch: computed.append(1) or learn(self, batch))
    rows = [bench_growth.random_row(i, 4, 3, 300) for i in range(2)]
    config = step_config(tiny_model, feedback, backend_name, tmp_path / "step.json", rows=2)
    settings = bench_step.train_config(config, tiny_model)
    for forget, expected in ((False, 1), (True, 3)):
        computed.clear()
        taken = rounds({"bnf": bench_step.ours(settings, rows, 9, forget=forget)})
        next(taken), next(taken)
        taken.close()
        assert len(computed) == expected


def test_rows_are_pairs_drawn_by_the_seed() -> None:
    rows = [Example((i,), (1,), label=label, group=i) for i in range(6) for label in (True, False)]
    lonely = [Example((9,), (1,), label=True, group=9)]
    chosen = bench_step.choose(lonely + rows, 8, 0)
    assert [row.label for row in chosen] == [True, False] * 4
    assert all(a.group == b.group for a, b in zip(chosen[::2], chosen[1::2], strict=True))
    assert [row.pair for row in chosen] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert chosen == bench_step.choose(rows, 8, 0) and chosen != bench_step.choose(rows, 8, 1)
    with pytest.raises(UserError, match="needs 7 prompts"):
        bench_step.choose(rows, 14, 0)


def test_peers_get_pairs_of_one_prompt() -> None:
    rows = [Example((i,), (10 * i + label,), label=bool(label), group=i) for label in (0, 1) for i in (1, 2)]
    assert [(a.completion_ids, b.completion_ids) for a, b in pairs(rows)] == [((11,), (10,)), ((21,), (20,))]
    for bad in (rows[:3], [rows[0], rows[1], rows[2], rows[2]]):
        with pytest.raises(ValueError, match="one good and one bad"):
            pairs(bad)


@pytest.mark.slow
def test_growth_is_measured_and_fitted(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_growth, "peak_memory", lambda config, rows, name: float(sum(map(len, rows))))
    monkeypatch.setattr(bench_loss, "apart", lambda name, job, *args: job(*args))
    config = bench_growth.BenchGrowthConfig(
        str(tiny_model),
        hardware=HardwareConfig("torch", "cpu", "float32"),
        lengths=[8, 16],
        completions=[1, 2],
        vocabularies=[16, 32],
        measure=MeasureConfig(rounds=1, output=str(tmp_path / "growth.json")),
    )
    cases = bench_growth.bench_growth(config, QUIET).cases
    growth = bench_growth.Growth.of(cases[bench_growth.LENGTH])
    assert growth.sizes == [8, 16] and growth.memory == [32.0, 64.0]
    groups = cases[bench_growth.COMPLETIONS]
    assert list(groups.rounds[0]) == ["1", "2", "2" + bench_growth.EACH]  # a single one has nobody to share with
    assert bench_growth.Growth.of(groups).memory == [256.0, 512.0]
    assert bench_growth.Growth.of(groups, bench_growth.EACH).sizes == [2]
    page = (tmp_path / "growth.md").read_text().splitlines()
    one, two = (
        next(row.split(" | ") for row in page if row.startswith(f"| {k} | ") and row.count("|") == 7) for k in "12"
    )
    taken = groups.rounds[0]
    assert one[3:] == ["", "", " |"] and two[5] == f"{taken['2' + bench_growth.EACH] / taken['2']:.2f} |"
    assert (tmp_path / "growth.png").exists()


def test_what_no_time_was_left_for_is_said(tmp_path: Path) -> None:
    """Rejects a picture that ends in an error where nothing was measured."""
    measured = Figures(memory={"8": 1e6, "16": 2e6}, rounds=[{"8": 0.5, "16": 1.0}])
    cases = {bench_growth.LENGTH: measured, bench_growth.VOCABULARY: Figures(memory={"8": 1e6})}
    bench_growth.picture(cases).savefig(tmp_path / "growth.png")
    page = bench_growth.page({}, cases, "command", "resident")
    assert "time ∝ size^1.00" in page and "not measured, for no time was left." in page


def test_the_exponent_is_that_of_a_power_law() -> None:
    sizes = [128, 256, 512, 1024]
    assert bench_growth.exponent(sizes, [3 * n**1.7 for n in sizes]) == pytest.approx(1.7)
    assert np.isnan(bench_growth.exponent([1], [1.0]))


def test_random_rows_of_a_group_share_the_prompt_only() -> None:
    a, b, c = (bench_growth.random_row(group, 20, 5, 100, number) for group, number in ((0, 0), (0, 1), (1, 0)))
    assert a.prompt_ids == b.prompt_ids != c.prompt_ids
    assert a.completion_ids != b.completion_ids and len(a) == 25 and (a.label, b.label) == (True, False)
