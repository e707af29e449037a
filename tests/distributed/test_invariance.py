"""However a run is arranged, it takes one road: the command line in each arrangement on both backends, and the judge
tried on the classical bugs."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import BACKENDS, fast_of, fast_on, slow
from invariance import ALLOWED, BASE, UNSHARED, WAYS, Runs, Trajectory, complaints, launch, ways, write_turns

PACKED = "--packing true --max-length 192"
UNSORTED = "--micro-batch-size 3 --group-by-length false"
CHECKPOINTED = "--micro-batch-size 4 --gradient-checkpointing true"
ARRANGEMENTS = [
    ("lora", UNSORTED),
    ("lora", CHECKPOINTED),
    ("full", f"--micro-batch-size 2 {PACKED} --gradient-checkpointing true"),
    slow("lora", "--micro-batch-size 1"),
    slow("lora", f"{CHECKPOINTED} {UNSHARED}"),
    slow("lora", f"--micro-batch-size 8 {PACKED}"),
    slow("full", UNSORTED),
]
EVERY_ARRANGEMENT = [
    (kind, f"--micro-batch-size {size} {sort} {packing} {sharing} {checkpointing}")
    for kind, size, sort, packing, sharing, checkpointing in itertools.product(
        ["lora", "dora", "full"],
        [1, 2, 4, 8],
        ["", "--group-by-length false"],
        ["", PACKED],
        ["", UNSHARED],
        ["", "--gradient-checkpointing true"],
    )
]
# Each bug in one of these arrangements.
ALONE = {
    "mean of means": UNSORTED,
    "dropped tail": UNSORTED,
    "dropped micro-batch": UNSORTED,
    "padding seen": f"{CHECKPOINTED} {UNSHARED}",
    "padding trained": f"{CHECKPOINTED} {UNSHARED}",
    "completions see each other": CHECKPOINTED,
    "packed rows see each other": f"--micro-batch-size 8 {PACKED} {UNSHARED}",
}
# On each backend; fast on one of them, in turn.
EACH_BUG = [
    pytest.param(name, bug, marks=marks if i % 2 == j else [*marks, pytest.mark.slow])
    for i, bug in enumerate(ALONE)
    for j, (name, marks) in enumerate((param.values[0], list(param.marks)) for param in BACKENDS)
]
# On two processes: several micro-batches each; a second process that has nothing to do; all weights.
SEVERAL = "--micro-batch-size 2 --gradient-checkpointing true"
SHARED = [("lora", SEVERAL), ("lora", f"--micro-batch-size 8 {PACKED}"), ("full", UNSORTED)]
PAIR = ["averaged gradients", "per-rank mean"]
FAST_BUG = {"fsdp": PAIR[0], "mlx": PAIR[1]}
FAST_KINDS = {"ddp": [], "fsdp": ["lora"], "mlx": ["lora", "kto"]}
Key = tuple[str, str, str]  # kind, or another objective; flags; bug
Pair = Callable[[str, Key], Trajectory]


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_model, tmp_path_factory.mktemp("invariance"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_there_is_something_to_see(runs: Runs, backend_name: str, kind: str) -> None:
    base = runs.train(backend_name, kind)
    way = np.abs(base.flat - runs.start(backend_name, kind).flat)
    allowed = ALLOWED["weights"] * np.finfo(np.float32).eps * np.sqrt(len(base.loss))  # of the farthest
    assert way.max() > 0.05 and np.median(way[way > 0]) > 100 * allowed * way.max()
    assert len(set(base.tokens[:3])) == 3 and base.tokens[:3].sum() == base.tokens[3:].sum(), "two whole epochs"
    if kind == "lora":
        assert (base.grad_norm > 1.6).any() and (base.grad_norm < 1.6).any(), "steps are clipped, and are not"


@pytest.mark.parametrize(("kind", "flags"), ARRANGEMENTS)
def test_one_trajectory(runs: Runs, backend_name: str, kind: str, flags: str) -> None:
    assert runs.complaints(backend_name, kind, runs.train(backend_name, kind, flags)) == []


@fast_on("torch")
def test_the_order_of_rows_within_a_step_is_nothing(runs: Runs, backend_name: str) -> None:
    other = runs.train(backend_name, "lora", "--micro-batch-size 3 --group-by-length false", "permuted")
    assert runs.complaints(backend_name, "lora", other) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "flags"), EVERY_ARRANGEMENT)
def test_one_trajectory_in_every_arrangement(runs: Runs, backend_name: str, kind: str, flags: str) -> None:
    assert runs.complaints(backend_name, kind, runs.train(backend_name, kind, flags)) == []


@pytest.mark.parametrize(("backend_name", "bug"), EACH_BUG)
def test_a_bug_is_caught(runs: Runs, backend_name: str, bug: str) -> None:
    assert runs.complaints(backend_name, "lora", runs.train(backend_name, "lora", ALONE[bug], bug))


# Two processes


def on_each_way(names: list[str], fast: Mapping[str, list[str]]) -> list[Any]:
    """Each name on each way; slow, but for those that are fast on it."""
    return [
        pytest.param(
            *way.values, name, marks=[*way.marks, *([] if name in fast.get(way.values[0], ()) else [pytest.mark.slow])]
        )
        for way in ways()
        for name in names
    ]


def beside(way: str, key: Key) -> list[Key]:
    """All runs of the fast tests if it is one of them, or of the slow ones."""
    fast = [(kind, SEVERAL, "") for kind in FAST_KINDS[way]]
    fast += [("lora", SEVERAL, FAST_BUG[way])] if way in FAST_BUG else []
    every: list[Key] = [*((*shared, "") for shared in SHARED), *(("lora", SEVERAL, bug) for bug in PAIR)]
    every += [(name, SEVERAL, "") for name in ("dpo", "kto")]
    return fast if key in fast else [other for other in every if other not in fast]


@pytest.fixture(scope="module")
def pair(runs: Runs, objective_runs: Callable[[str], Runs]) -> Pair:
    """For each way of sharing the work, the runs of the fast tests in one pair of processes, and those of the slow ones
    in another."""
    known: dict[tuple[str, Key], Trajectory] = {}

    def pair(way: str, key: Key) -> Trajectory:
        if (way, key) not in known:
            backend = WAYS[way][0]
            arranged = {
                (kind, flags, bug): objective_runs(kind).words(backend, "lora", flags)
                if kind in OBJECTIVES
                else runs.words(backend, kind, flags)
                for kind, flags, bug in beside(way, key)
            }
            jobs = [(bug, words) for (_, _, bug), (words, _) in arranged.items()]
            (code, output), (other_code, other_output) = launch(way, jobs, [runs.folder] * 2)
            assert code == other_code == 0, output + other_output
            assert output.count("on 2 processes") == len(jobs)
            known.update({(way, key): Trajectory.read(output) for key, (_, output) in arranged.items()})
        return known[way, key]

    return pair


@pytest.mark.parametrize("way", ways("fsdp", "mlx"))
@pytest.mark.parametrize(("kind", "flags"), fast_of(SHARED, SHARED[0]))
def test_two_processes_take_the_same_road(runs: Runs, pair: Pair, way: str, kind: str, flags: str) -> None:
    assert runs.complaints(WAYS[way][0], kind, pair(way, (kind, flags, ""))) == []


@pytest.mark.parametrize(("way", "bug"), on_each_way(PAIR, {way: [bug] for way, bug in FAST_BUG.items()}))
def test_a_bug_of_two_processes_is_caught(runs: Runs, pair: Pair, way: str, bug: str) -> None:
    assert runs.complaints(WAYS[way][0], "lora", pair(way, ("lora", SEVERAL, bug)))


# Other objectives: on pairs, and compared with a number of the whole step

OBJECTIVES = {
    "dpo": "--objective dpo --objective.beta 1",
    "kto": "--objective kto --objective.beta 1",
    "bco": "--objective bco --objective.beta 1",
    "simpo": "--objective simpo",
}
CUTS = ["--micro-batch-size 1", UNSORTED, f"--micro-batch-size 2 {UNSHARED}", f"--micro-batch-size 8 {PACKED}"]


@pytest.fixture(scope="module")
def objective_runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    known: dict[str, Runs] = {}

    def runs(name: str) -> Runs:
        if name not in known:
            known[name] = Runs(tiny_model, tmp_path_factory.mktemp(name), OBJECTIVES[name])
        return known[name]

    return runs


@pytest.mark.parametrize(
    ("name", "flags"), [slow("dpo", CUTS[3]), ("kto", UNSORTED), *(slow("dpo", flags) for flags in CUTS[1:3])]
)
def test_other_objectives_take_one_trajectory(
    objective_runs: Callable[[str], Runs], backend_name: str, name: str, flags: str
) -> None:
    runs = objective_runs(name)
    assert runs.complaints(backend_name, "lora", runs.train(backend_name, "lora", flags)) == []


@pytest.mark.slow
@pytest.mark.parametrize("flags", CUTS)
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_other_objectives_take_one_trajectory_in_every_cut(
    objective_runs: Callable[[str], Runs], backend_name: str, name: str, kind: str, flags: str
) -> None:
    runs = objective_runs(name)
    assert runs.complaints(backend_name, kind, runs.train(backend_name, kind, flags)) == []


@fast_on("mlx")
@pytest.mark.parametrize("bug", ["mean of means", "pairs parted", "dropped tail"])
def test_a_bug_of_other_objectives_is_caught(
    objective_runs: Callable[[str], Runs], backend_name: str, bug: str
) -> None:
    runs = objective_runs("dpo")
    uneven = "--micro-batch-size 4 --group-by-length false"  # three pairs as one and two
    assert runs.complaints(backend_name, "lora", runs.train(backend_name, "lora", uneven, bug))


@pytest.mark.parametrize(("way", "name"), on_each_way(["kto", "dpo"], FAST_KINDS))
def test_two_processes_take_the_same_road_with_other_objectives(
    objective_runs: Callable[[str], Runs], pair: Pair, way: str, name: str
) -> None:
    assert objective_runs(name).complaints(WAYS[way][0], "lora", pair(way, (name, SEVERAL, ""))) == []


# Rows with turns that are not trained

TURNS = [f"--micro-batch-size 8 {PACKED}", *map(slow, (UNSORTED, CHECKPOINTED, "--micro-batch-size 1"))]


@pytest.fixture(scope="module")
def turns(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_model, tmp_path_factory.mktemp("turns"), rows=write_turns)


@pytest.mark.parametrize("flags", TURNS)
def test_rows_with_turns_that_are_not_trained_take_one_trajectory(turns: Runs, backend_name: str, flags: str) -> None:
    assert turns.complaints(backend_name, "lora", turns.train(backend_name, "lora", flags)) == []


@fast_on("torch")
def test_turns_that_are_trained_by_mistake_are_seen(turns: Runs, backend_name: str) -> None:
    assert turns.complaints(backend_name, "lora", turns.train(backend_name, "lora", BASE, "turns trained"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ways())
def test_two_processes_take_the_same_road_with_turns_that_are_not_trained(turns: Runs, way: str) -> None:
    """Bit-for-bit the same with tokens that are kept on the disk and with each process's own."""
    backend = WAYS[way][0]
    kept, own = (turns.words(backend, "lora", f"{SEVERAL} --data.cache {keeps}") for keeps in ("true", "false"))
    results = launch(way, [("", kept[0]), ("", own[0])], [turns.folder] * 2)
    assert [code for code, _ in results] == [0, 0], results
    first, second = Trajectory.read(kept[1]), Trajectory.read(own[1])
    assert turns.complaints(backend, "lora", first) == []
    assert first.loss.tolist() == second.loss.tolist() and first.flat.tolist() == second.flat.tolist()


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
    (place,) = complaints(base, run(begin + way + 600 * unit * (np.arange(n) == 5)), start)
    assert place.startswith("weights: off by 600 units")
    # One part in a million: far below what any single weight may differ by.
    (bias,) = complaints(base, run(begin + way + noise + unit), start)
    assert bias.startswith("mean: off by 1") and np.abs(noise + unit).max() < 20 * unit
    (lag,) = complaints(base, run(begin + way * (1 - 2e-6) + noise), start)
    assert lag.startswith("lead: off by -")
