"""However a run is arranged, it takes one road: the command line in each arrangement on both backends, and the judge
tried on the classical bugs."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import invariance
import numpy as np
import pytest
from conftest import BACKENDS
from invariance import ALLOWED, PATCHES, TRAINING, Trajectory, complaints, finish, launch

from bnf_recipes import cli

PACKED = "--packing true --max-length 128"
UNSORTED = "--micro-batch-size 3 --group-by-length false"
CHECKPOINTED = "--micro-batch-size 4 --gradient-checkpointing true"
ARRANGEMENTS = [
    ("lora", "--micro-batch-size 1"),
    ("lora", UNSORTED),
    ("lora", CHECKPOINTED),
    ("lora", f"--micro-batch-size 8 {PACKED}"),
    ("full", UNSORTED),
    ("full", f"--micro-batch-size 2 {PACKED} --gradient-checkpointing true"),
]
EVERY_ARRANGEMENT = [
    (kind, f"--micro-batch-size {size} {sort} {packing} {checkpointing}")
    for kind, size, sort, packing, checkpointing in itertools.product(
        ["lora", "dora", "full"],
        [1, 2, 4, 8],
        ["", "--group-by-length false"],
        ["", PACKED],
        ["", "--gradient-checkpointing true"],
    )
]
# Each bug in one of these arrangements.
ALONE = {
    "mean of means": UNSORTED,
    "dropped tail": UNSORTED,
    "dropped micro-batch": UNSORTED,
    "padding seen": CHECKPOINTED,
    "padding trained": CHECKPOINTED,
    "packed rows see each other": f"--micro-batch-size 8 {PACKED}",
}
# On two processes: several micro-batches each; a second process that has nothing to do; all weights.
SEVERAL = "--micro-batch-size 2 --gradient-checkpointing true"
SHARED = [("lora", SEVERAL), ("lora", "--packing true --max-length 1024"), ("full", UNSORTED)]
PAIR = ["per-rank mean", "averaged gradients"]
# How the processes of a backend share the work, and the environment that says so.
WAYS = {
    "ddp": ("torch", {}),
    "fsdp": ("torch", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
    "mlx": ("mlx", {}),
}

Train = Callable[..., Trajectory]
Judge = Callable[[str, str, Trajectory], list[str]]
Pair = Callable[[str], dict[tuple[str, str, str], Trajectory]]
Words = Callable[[str, str, str], tuple[list[str], Path]]


@pytest.fixture(scope="module")
def words(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Words:
    """A command line, and its run folder."""
    rows = invariance.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")

    def words(backend: str, kind: str, flags: str) -> tuple[list[str], Path]:
        output = tmp_path_factory.mktemp("run") / "run"
        line = ["train", "--model", str(tiny_model), "--data", str(rows), "--output", str(output), *TRAINING]
        return [*line, "--backend", backend, "--fine-tune-type", kind, *flags.split()], output

    return words


@pytest.fixture(scope="module")
def train(words: Words) -> Train:
    """Runs in this process; each once."""
    known: dict[tuple[str, ...], Trajectory] = {}

    def train(backend: str, kind: str, flags: str, patch: str = "") -> Trajectory:
        key = (backend, kind, flags, patch)
        if key not in known:
            line, output = words(backend, kind, flags)
            with pytest.MonkeyPatch.context() as m, PATCHES[patch]():
                m.setenv("LD_PRELOAD", "")  # or on Linux MLX's command would replace this process
                assert cli.run(line) == 0
            known[key] = Trajectory.read(output)
        return known[key]

    return train


@pytest.fixture(scope="module")
def judge(train: Train) -> Judge:
    """Complaints of a run when compared with the base arrangement, one micro-batch of eight rows, sorted and padded."""

    def judge(backend: str, kind: str, other: Trajectory) -> list[str]:
        return complaints(train(backend, kind, "--micro-batch-size 8"), other, start(train, backend, kind))

    return judge


def start(train: Train, backend: str, kind: str) -> Trajectory:
    """The weights before the first step: those of a step too small to be seen."""
    return train(backend, kind, "--micro-batch-size 8 --max-steps 1 --optimizer.learning_rate 1e-30")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_there_is_something_to_see(train: Train, backend_name: str, kind: str) -> None:
    base = train(backend_name, kind, "--micro-batch-size 8")
    way = np.abs(base.flat - start(train, backend_name, kind).flat)
    allowed = ALLOWED["weights"] * np.finfo(np.float32).eps * np.sqrt(len(base.loss))  # of the farthest
    assert way.max() > 0.05 and np.median(way[way > 0]) > 100 * allowed * way.max()
    assert len(set(base.tokens[:3])) == 3 and base.tokens[:3].sum() == base.tokens[3:].sum(), "two whole epochs"
    if kind == "lora":
        assert (base.grad_norm > 1.6).any() and (base.grad_norm < 1.6).any(), "steps are clipped, and are not"


@pytest.mark.parametrize(("kind", "flags"), ARRANGEMENTS)
def test_one_trajectory(train: Train, judge: Judge, backend_name: str, kind: str, flags: str) -> None:
    assert judge(backend_name, kind, train(backend_name, kind, flags)) == []


def test_the_order_of_rows_within_a_step_is_nothing(train: Train, judge: Judge, backend_name: str) -> None:
    other = train(backend_name, "lora", "--micro-batch-size 3 --group-by-length false", "permuted")
    assert judge(backend_name, "lora", other) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "flags"), EVERY_ARRANGEMENT)
def test_one_trajectory_in_every_arrangement(
    train: Train, judge: Judge, backend_name: str, kind: str, flags: str
) -> None:
    assert judge(backend_name, kind, train(backend_name, kind, flags)) == []


@pytest.mark.parametrize("bug", ALONE)
def test_a_bug_is_caught(train: Train, judge: Judge, backend_name: str, bug: str) -> None:
    assert judge(backend_name, "lora", train(backend_name, "lora", ALONE[bug], bug))


# Two processes


@pytest.fixture(scope="module")
def pair(words: Words) -> Pair:
    """Runs on two processes by kind, flags and bug; for each way of sharing the work all in one pair of processes, of
    which the imports are most of the time."""
    known: dict[str, dict[tuple[str, str, str], Trajectory]] = {}

    def pair(way: str) -> dict[tuple[str, str, str], Trajectory]:
        if way not in known:
            backend, environment = WAYS[way]
            keys = [(kind, flags, "") for kind, flags in SHARED] + [("lora", SEVERAL, bug) for bug in PAIR]
            lines, outputs = zip(*(words(backend, kind, flags) for kind, flags, _ in keys), strict=True)
            jobs = [[bug, line] for (_, _, bug), line in zip(keys, lines, strict=True)]
            for code, output in finish(launch(backend, [invariance.__file__, json.dumps(jobs)], **environment)):
                assert code == 0, output
                assert "on 2 processes" in output or "run folder" not in output, "the first one says so"
            known[way] = dict(zip(keys, map(Trajectory.read, outputs), strict=True))
        return known[way]

    return pair


PAIRS = [
    pytest.param(way, marks=mark.marks) for mark in BACKENDS for way, (name, _) in WAYS.items() if name in mark.values
]


@pytest.mark.parametrize("way", PAIRS)
@pytest.mark.parametrize(("kind", "flags"), SHARED)
def test_two_processes_take_the_same_road(
    judge: Judge,
    pair: Pair,
    way: str,
    kind: str,
    flags: str,
) -> None:
    assert judge(WAYS[way][0], kind, pair(way)[kind, flags, ""]) == []


@pytest.mark.parametrize("way", PAIRS)
@pytest.mark.parametrize("bug", PAIR)
def test_a_bug_of_two_processes_is_caught(judge: Judge, pair: Pair, way: str, bug: str) -> None:
    assert judge(WAYS[way][0], "lora", pair(way)["lora", SEVERAL, bug])


# The judge


def test_the_judge_finds_what_is_large_in_one_place_and_small_everywhere() -> None:
    draw = np.random.default_rng(0)
    n, steps = 4096, np.linspace(-1.0, 3.0, 6)
    begin, way = draw.normal(0, 0.1, n), draw.normal(0, 0.025, n)
    eps = float(np.finfo(np.float32).eps)
    unit = eps * np.abs(way).max() * np.sqrt(6)

    def run(weights: np.ndarray, loss: float = 0.0, norm: float = 0.0, tokens: int = 7) -> Trajectory:
        return Trajectory(steps + loss, 2 + norm + 0 * steps, np.full(6, tokens), {"w": weights})

    start, base = run(begin), run(begin + way)
    noise = draw.normal(0, 4 * unit, n)
    assert complaints(base, base, start) == []
    assert complaints(base, run(begin + way + noise, loss=eps, norm=eps), start) == []
    assert complaints(base, run(begin + way + noise, loss=1e-4), start)
    assert complaints(base, run(begin + way + noise, norm=1e-4), start)
    assert complaints(base, run(begin + way + noise, tokens=8), start)
    assert complaints(base, replace(base, weights={"v": begin}), start)
    assert complaints(base, replace(base, loss=steps[:5]), start)
    assert complaints(base, run(np.full(n, np.nan)), start), "what is no number is not near"
    (place,) = complaints(base, run(begin + way + 300 * unit * (np.arange(n) == 5)), start)
    assert place.startswith("weights: off by 300 units")
    # One part in a million: far below what any single weight may differ by.
    (bias,) = complaints(base, run(begin + way + noise + unit), start)
    assert bias.startswith("mean: off by 1") and np.abs(noise + unit).max() < 20 * unit
    (lag,) = complaints(base, run(begin + way * (1 - 2e-6) + noise), start)
    assert lag.startswith("lead: off by -")
