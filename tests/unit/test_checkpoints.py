"""Checkpoints that several processes write and any number read, whole or not at all."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bnf_core.config import DataConfig, TrainConfig
from bnf_core.errors import UserError
from bnf_core.processes import ALONE, Processes
from bnf_core.storage import checkpoints, shards
from bnf_core.storage.checkpoints import Change, Checkpoint, Checkpoints, changes, run_facts
from bnf_core.storage.digests import files_digest, model_digest, rows_digest
from bnf_core.storage.files import agreed, replacing
from bnf_core.storage.shards import Shard, State, StoredArrays, require_same_shapes, under
from bnf_core.storage.tensors import TensorWriter
from bnf_core.types import Array, Example
from conftest import slow


class Together(Processes):
    """Threads or processes that tell each other bytes through files."""

    def __init__(self, rank: int, count: int, barrier: Any, folder: Path):
        self.rank, self.count = rank, count
        self._barrier, self._folder, self._calls = barrier, folder, 0

    def gather_bytes(self, data: bytes) -> list[bytes]:
        self._calls += 1
        (self._folder / f"{self._calls}-{self.rank}").write_bytes(data)
        self._barrier.wait(60)
        return [(self._folder / f"{self._calls}-{rank}").read_bytes() for rank in range(self.count)]


@pytest.fixture
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Calls a function with each of several processes, as threads; returns what they return or raise."""

    def run(count: int, work: Callable[[Processes], Any]) -> list[Any]:
        barrier, folder = threading.Barrier(count), tmp_path_factory.mktemp("gathered")

        def call(rank: int) -> Any:
            try:
                return work(Together(rank, count, barrier, folder))
            except Exception as error:
                return error

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(call, range(count)))

    return run


def split(whole: Mapping[str, Array], processes: Processes) -> State:
    """What a process saves of the whole: an even share of rows, rounded up, as FSDP deals them; numbers and bytes
    are the first one's."""

    def piece(array: Array) -> Shard:
        share = -(-len(array) // processes.count)
        start = min(processes.rank * share, len(array))
        return Shard(array[start : start + share], start, array.shape)

    common = {n: a for n, a in whole.items() if not _is_split(a)} if processes.rank == 0 else {}
    return {n: piece(a) for n, a in whole.items() if _is_split(a)} | common


def _is_split(array: Array) -> bool:
    return array.ndim > 0 and array.dtype != np.uint8


def state(seed: int = 0) -> dict[str, Array]:
    """Rows that 3 or 4 processes share unevenly, or have none of, in every dtype that engines save."""
    rng = np.random.default_rng(seed)
    return {
        "weights/wide": rng.standard_normal((10, 3)).astype(np.float32),
        "weights/few": rng.standard_normal((3, 2, 2)).astype(np.float32),
        "weights/one": rng.standard_normal(1).astype(np.float16),
        "optimizer/precise": rng.standard_normal((5, 1)),
        "reference/rows": rng.integers(-(2**62), 2**62, 7),
        "reference/keys": rng.integers(0, 2**63, 6).astype(np.uint64),
        "optimizer/step": np.asarray(41 + seed, np.int64),
        "optimizer/rate": np.asarray(0.1, np.float32),
        "random/cpu": rng.integers(0, 256, 99).astype(np.uint8),
        "reference/none": np.zeros((0, 4), np.float32),
    }


def assert_same(arrays: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert set(arrays) == set(expected) and len(arrays) == len(expected)
    for name, value in expected.items():
        array = arrays[name]
        assert (array.dtype, array.shape) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(array, value, err_msg=name)


def newest(folder: Path, processes: Processes = ALONE) -> Checkpoint:
    found, refused = Checkpoints(folder, 2).newest(processes)
    assert found is not None and not refused, refused
    return found


def save(folder: Path, step: int, processes: Processes = ALONE, keep: int = 2) -> None:
    facts = {"seed": 0, "names": ["q_proj"]}
    position = {"epoch": 1, "rows": step}
    Checkpoints(folder, keep).save(step, split(state(step), processes), facts, position, processes=processes)


# Written by some, read by others


@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_any_number_of_processes_reads_what_any_number_wrote(
    tmp_path: Path, together: Callable[..., list[Any]], writers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK", 24)  # of which a piece has several, the last one short
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, 77, dtype))  # or memory may remember
    assert together(writers, lambda processes: save(tmp_path, 7, processes)) == [None] * writers
    files = sorted(path.name for path in (tmp_path / "step-000007").glob("*.safetensors"))
    assert files == [f"state-{rank:05d}-of-{writers:05d}.safetensors" for rank in range(1, writers + 1)]
    for readers in (1, 3):
        for found in together(readers, lambda processes: newest(tmp_path, processes)):
            assert (found.step, found.position) == (7, {"epoch": 1, "rows": 7})
            assert found.facts == {"seed": 0, "names": ["q_proj"]}
            assert_same(found.arrays, state(7))


def test_every_process_writes_its_own_rows_and_nothing_else(tmp_path: Path, together: Callable[..., list[Any]]) -> None:
    together(3, lambda processes: save(tmp_path, 1, processes))
    files = [load_file(path) for path in sorted((tmp_path / "step-000001").glob("*.safetensors"))]
    assert [len(file["weights/wide"]) for file in files] == [4, 4, 2]
    assert [len(file["weights/one"]) for file in files] == [1, 0, 0]
    assert ["random/cpu" in file for file in files] == [True, False, False]


def test_whoever_may_read_other_files_may_read_these(tmp_path: Path) -> None:
    save(tmp_path, 1)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "step-000001").iterdir()}
    assert len(modes) == 3 and len(set(modes.values())) == 1, modes


def test_arrays_are_saved_by_their_values_however_they_lie_in_memory(tmp_path: Path) -> None:
    grid = np.arange(24.0).reshape(4, 6)
    arrays = {"columns": grid.T, "every other": grid[:, ::2], "backwards": grid[::-1], "big-endian": grid.astype(">f8")}
    Checkpoints(tmp_path, 1).save(1, arrays | {"piece": Shard(grid.T[:6], 0, (6, 4))}, {})
    found = newest(tmp_path).arrays
    for name, value in (arrays | {"piece": grid.T}).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_piece_must_fit_into_the_whole() -> None:
    for array, start, shape in [
        (np.zeros((2, 3)), 0, (4, 2)),
        (np.zeros((2, 3)), 3, (4, 3)),
        (np.zeros((2, 3)), -1, (4, 3)),
        (np.zeros(()), 0, ()),
    ]:
        with pytest.raises(ValueError, match="does not fit into"):
            Shard(array, start, shape)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"a": Shard(np.zeros(2), 0, (5,))}, {"a": Shard(np.zeros(2), 3, (5,))}], r"\(5,\): rows 2 to 3 are"),
        ([{"a": Shard(np.zeros(2), 0, (5,))}, {"a": Shard(np.zeros(2), 2, (5,))}], "rows 4 to 5 are missing"),
        ([{"a": Shard(np.zeros(3), 0, (5,))}, {"a": Shard(np.zeros(3), 2, (5,))}], "row 2 is there twice"),
        ([{"a": np.zeros(3)}, {"a": np.zeros(3)}], "row 0 is there twice"),
        ([{"a": np.ones(())}, {"a": np.ones(())}], "row 0 is there twice"),
        ([{"a": Shard(np.zeros(2), 0, (4,))}, {"a": Shard(np.zeros(2, np.float32), 2, (4,))}], "not the same in all"),
        ([{"a": Shard(np.zeros(2), 0, (4,))}, {"a": Shard(np.zeros(2), 2, (5,))}], "not the same in all"),
    ],
)  # fmt: skip
def test_pieces_that_do_not_add_up_are_refused_before_they_count(
    tmp_path: Path, together: Callable[..., list[Any]], given: list[State], message: str
) -> None:
    def attempt(processes: Processes) -> None:
        Checkpoints(tmp_path, 1).save(1, given[processes.rank], {}, processes=processes)

    first, second = together(2, attempt)
    with pytest.raises(ValueError, match=message):
        raise first
    with pytest.raises(OSError, match=f"process 0: .*{message}"):
        raise second
    assert list(tmp_path.iterdir()) == []


# Memory


def peak(work: Callable[[], object]) -> int:
    """Bytes that the call held at most, beyond what was there before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_reading_and_writing_hold_one_array_at_a_time(
    tmp_path: Path, together: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK", 1 << 16)
    size = 4 << 20
    whole = {f"weights/{i}": np.full((1024, size // 4096), i, np.float32) for i in range(6)}

    def write(processes: Processes) -> None:
        Checkpoints(tmp_path, 1).save(1, split(whole, processes), {}, processes=processes)

    assert peak(lambda: together(2, write)) < size / 2
    arrays: Mapping[str, Array] = {}

    def read() -> None:
        nonlocal arrays
        arrays = under("weights", newest(tmp_path).arrays)
        assert [float(arrays[name][-1, -1]) for name in sorted(arrays)] == list(range(6))

    assert peak(read) < 1.2 * size
    shapes = {name.removeprefix("weights/"): array.shape for name, array in whole.items()}
    assert peak(lambda: ("0" in arrays, len(arrays), require_same_shapes(arrays, shapes))) < size / 10


def test_what_is_read_is_not_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    arrays = newest(tmp_path).arrays
    arrays["weights/wide"][:] = 0
    assert_same(arrays, state(1))


# What only grows


def grown(rows: int, start: int = 0) -> dict[str, Array]:
    numbers = np.arange(start, start + rows)
    return {"reference/keys": numbers.astype(np.uint64), "reference/log_odds": (numbers / 7).astype(np.float32)}


def test_what_only_grows_is_written_once(tmp_path: Path) -> None:
    """Rejects a checkpoint that holds all of it, and files that nobody needs any more."""
    run = Checkpoints(tmp_path, 2)
    sizes = []
    for step, rows in enumerate((1000, 1000, 3000, 3001), 1):
        run.save(step, {"weights/a": np.full(3, step)}, {}, growing=grown(rows))
        assert_same(newest(tmp_path).arrays, {"weights/a": np.full(3, step)} | grown(rows))
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")))
    assert sizes[0] > 12_000 and sizes[1] - sizes[0] < 6000 and 24_000 < sizes[2] - sizes[1] < 30_000
    assert sizes[3] - sizes[2] < 6000
    sums = (tmp_path / "step-000004" / "SHA256SUMS").read_text().splitlines()
    assert sum("  ../grown-" in line for line in sums) == 3


def test_a_run_that_goes_back_grows_from_there(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, 3)
    for step, rows in (1, 10), (2, 30):
        run.save(step, {}, {}, growing=grown(rows))
    (tmp_path / "step-000002" / "state.json").write_text("damaged")
    again = Checkpoints(tmp_path, 3)
    found, refused = again.newest()
    assert found is not None and found.step == 1 and len(refused) == 1
    other = {name: np.append(array, array[-1:]) for name, array in grown(10).items()}
    again.save(2, {}, {}, growing=other)
    assert_same(newest(tmp_path).arrays, other)
    assert len(list(tmp_path.glob("grown-*"))) == 2


def test_a_damaged_checkpoint_does_not_keep_a_run_from_growing(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, 3)
    for step, rows in (1, 10), (2, 30), (3, 40):
        run.save(step, {}, {}, growing=grown(rows))
        (tmp_path / "step-000001" / "state.json").write_text("damaged")
    assert_same(newest(tmp_path).arrays, grown(40))


def test_what_began_anew_is_written_anew(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, 1)
    run.save(1, {}, {}, growing=grown(10))
    run.save(2, {}, {}, growing=grown(12, start=5), generation=1)
    assert_same(newest(tmp_path).arrays, grown(12, start=5))
    run.save(3, {}, {}, growing=grown(4, start=5), generation=1)
    assert_same(newest(tmp_path).arrays, grown(4, start=5))
    assert len(list(tmp_path.glob("grown-*"))) == 1


def test_a_damaged_part_of_what_grew_is_noticed(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, 3)
    for step, rows in (1, 10), (2, 30):
        run.save(step, {}, {}, growing=grown(rows))
    latest = max(tmp_path.glob("grown-*"))
    latest.write_bytes(latest.read_bytes()[:-4])
    found, refused = Checkpoints(tmp_path, 3).newest()
    assert found is not None and found.step == 1 and latest.name in refused[0]


# Failures


@pytest.mark.parametrize("rank", [0, 2])
def test_a_full_disk_on_one_process_fails_all_and_keeps_the_last_checkpoint(
    tmp_path: Path, together: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    together(3, lambda processes: save(tmp_path, 1, processes, keep=1))

    def full(writer: TensorWriter, name: str, array: Array) -> None:
        add(writer, name, array)
        if writer._path.name.startswith(f"state-{rank + 1:05d}"):
            raise OSError("No space left on device (os error 28)")

    add = TensorWriter.add
    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "add", full)
        errors = together(3, lambda processes: save(tmp_path, 2, processes, keep=1))
    assert {type(error) for error in errors} == {OSError}
    assert str(errors[rank]) == "No space left on device (os error 28)"
    for other in set(range(3)) - {rank}:
        assert str(errors[other]) == f"process {rank}: No space left on device (os error 28)"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert_same(newest(tmp_path).arrays, state(1))
    together(3, lambda processes: save(tmp_path, 2, processes, keep=1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


@pytest.mark.parametrize("operation", ["mkdir", "rename"])
def test_an_error_of_the_first_process_alone_reaches_all(
    tmp_path: Path, together: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Making the folder and moving it are its own business; the others would wait for ever."""

    def refuse(path: Path, *rest: Any) -> None:
        if "step-" in Path(path).name:
            raise PermissionError(13, "Permission denied")
        original(path, *rest)

    original = getattr(os, operation)
    monkeypatch.setattr(os, operation, refuse)
    errors = together(2, lambda processes: save(tmp_path / "checkpoints", 1, processes))
    assert isinstance(errors[0], PermissionError) and "process 0: [Errno 13]" in str(errors[1])
    assert Checkpoints(tmp_path / "checkpoints", 1).steps() == []


def test_a_process_that_does_not_see_the_folder_says_so(tmp_path: Path, together: Callable[..., list[Any]]) -> None:
    """As on two machines with a disk each."""

    def elsewhere(processes: Processes) -> Path:
        return tmp_path / str(processes.rank)

    errors = together(2, lambda processes: save(elsewhere(processes), 1, processes))
    assert all("all processes of a run must share its folder" in str(error) for error in errors)
    save(tmp_path / "0", 1)
    errors = together(2, lambda processes: newest(elsewhere(processes), processes))
    for error in errors:
        with pytest.raises(UserError, match=r"not every process of this run sees .*step-000001"):
            raise error


def test_agreed_raises_the_own_error_where_there_is_one(together: Callable[..., list[Any]]) -> None:
    def work(processes: Processes) -> None:
        with agreed(processes):
            if processes.rank == 1:
                raise KeyError("mine")

    errors = together(3, work)
    assert [type(error) for error in errors] == [OSError, KeyError, OSError]
    assert together(3, lambda processes: agreed(processes).__enter__()) == [None] * 3
    with pytest.raises(KeyboardInterrupt), agreed(ALONE):
        raise KeyboardInterrupt


def test_several_processes_replace_a_folder(tmp_path: Path, together: Callable[..., list[Any]]) -> None:
    def write(processes: Processes) -> None:
        with replacing(tmp_path / "model", processes) as partial:
            time.sleep(0.1 * processes.rank)  # the first one must wait for all
            (partial / str(processes.rank)).write_text("new")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    together(3, write)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["0", "1", "2"]


def test_leftovers_make_room_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step-000002.partial").mkdir()
    (tmp_path / ".step-000002.partial" / "large").touch()
    write = checkpoints.write_state

    def check(path: Path, arrays: State) -> None:
        assert sorted(path.name for path in tmp_path.iterdir()) == [".step-000003.partial", "step-000001"]
        write(path, arrays)

    monkeypatch.setattr(checkpoints, "write_state", check)
    save(tmp_path, 3)


# Damage


def _replace_sums(folder: Path) -> None:
    """As a writer would have left it that gave one file less."""
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    (folder / "SHA256SUMS").write_text("".join(f"{line}\n" for line in sums if "00002-of" not in line))


def _older(folder: Path) -> None:
    about = json.loads((folder / "state.json").read_text()) | {"format": 1}
    (folder / "state.json").write_text(json.dumps(about))
    digest = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  state.json\n")


SHARD = "state-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / SHARD, 300), rf"{SHARD} \(300 bytes\) is damaged"),
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
        (lambda folder: shutil.copy(folder / SHARD.replace("2-", "3-"), folder / SHARD), f"{SHARD} .* is damaged"),
        (_replace_sums, f"{SHARD} .* is damaged"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "No such file.*SHA256SUMS"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (_older, "it has format 1, and this version of bnf-align reads format 2"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_on_all_processes_and_the_one_before_is_used(
    tmp_path: Path, together: Callable[..., list[Any]], damage: Callable[[Path], None], message: str
) -> None:
    for step in (1, 2):
        together(3, lambda processes, step=step: save(tmp_path, step, processes))
    damage(tmp_path / "step-000002")
    for found, refused in together(2, lambda processes: Checkpoints(tmp_path, 2).newest(processes)):
        assert found.step == 1 and len(refused) == 1
        with pytest.raises(ValueError, match=rf"step-000002 is refused: .*{message}"):
            raise ValueError(refused[0])
        assert_same(found.arrays, state(1))


def test_only_the_first_process_reads_all_to_verify(
    tmp_path: Path, together: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    together(2, lambda processes: save(tmp_path, 1, processes))
    read: list[str] = []
    digest = checkpoints._digest

    def note(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(checkpoints, "_digest", note)
    together(2, lambda processes: newest(tmp_path, processes))
    assert sorted(read) == sorted(set(read)) and len(read) == 3


def test_only_the_first_process_removes_old_ones(
    tmp_path: Path, together: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Checkpoints, "_prune", lambda self, step: calls.append(step))
    together(3, lambda processes: save(tmp_path, 1, processes))
    assert calls == [1]


def test_no_checkpoint_is_none_everywhere(tmp_path: Path, together: Callable[..., list[Any]]) -> None:
    assert together(2, lambda processes: Checkpoints(tmp_path / "no", 1).newest(processes)) == [(None, [])] * 2


# Real processes


def _save_and_die(folder: Path, gathered: Path, rank: int, barrier: Any, step: int, dying: int) -> None:
    """The process `dying` is killed in the middle of its file; the others are told, as a launcher would."""

    def die(path: Path, arrays: State) -> None:
        write(path, arrays)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    write = checkpoints.write_state
    if rank == dying:
        checkpoints.write_state = die  # type: ignore[assignment]
    save(folder, step, Together(rank, 2, barrier, gathered))


@pytest.fixture(scope="module")
def run_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, int, int], list[int]]]:
    context = multiprocessing.get_context("spawn")  # of the fork server there is one, which others want with frameworks

    def run(folder: Path, step: int, dying: int) -> list[int]:
        barrier, gathered = context.Barrier(2), tmp_path_factory.mktemp("gathered")
        started = [
            context.Process(target=_save_and_die, args=(folder, gathered, rank, barrier, step, dying))
            for rank in range(2)
        ]
        for process in started:
            process.start()
        started[dying].join(60)
        barrier.abort()
        for process in started:
            process.join(60)
        return [process.exitcode for process in started]  # type: ignore[misc]

    yield run


@pytest.mark.parametrize("dying", [0, slow(1)])
def test_a_process_killed_in_the_middle_leaves_the_last_checkpoint(
    tmp_path: Path, run_processes: Callable[..., list[int]], together: Callable[..., list[Any]], dying: int
) -> None:
    assert together(2, lambda processes: save(tmp_path, 1, processes)) == [None, None]
    codes = run_processes(tmp_path, 2, dying)
    assert codes[dying] == -signal.SIGKILL and codes[1 - dying] == 1
    assert Checkpoints(tmp_path, 2).steps() == [1]
    assert_same(newest(tmp_path).arrays, state(1))
    assert ((tmp_path / ".step-000002.partial").exists()) == (dying == 0)  # for nobody was left to remove it
    assert together(2, lambda processes: save(tmp_path, 3, processes)) == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]
    assert_same(newest(tmp_path).arrays, state(3))


# Names and shapes


def test_under_selects_by_the_whole_prefix(tmp_path: Path) -> None:
    arrays = {"a/x": np.ones(2), "ab/y": np.ones(3), "a/b/z": np.ones(4)}
    Checkpoints(tmp_path, 1).save(1, arrays, {})
    for given in (arrays, newest(tmp_path).arrays):
        assert {name: a.shape for name, a in under("a", given).items()} == {"x": (2,), "b/z": (4,)}
        assert {name: a.shape for name, a in under("b", under("a", given)).items()} == {"z": (4,)}
    stored = newest(tmp_path).arrays
    assert isinstance(stored, StoredArrays) and stored.shapes() == {name: a.shape for name, a in arrays.items()}
    assert "a/x" in stored and "x" not in stored
    with pytest.raises(KeyError):
        stored["x"]


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ({"q.lora_A.default.weight": (8, 32)}, {"q.lora_A.default.weight": (16, 32)},
         r"q.lora_A.default.weight has rank 8 in the checkpoint and 16 here \(lora.rank\)"),
        ({"q.lora_B.default.weight": (32, 8)}, {"q.lora_B.default.weight": (32, 16)}, "has rank 8 .* and 16 here"),
        ({"q.lora_a": (32, 8)}, {"q.lora_a": (32, 16)}, "has rank 8 in the checkpoint and 16 here"),
        ({"q.lora_b": (8, 32)}, {"q.lora_b": (16, 32)}, "has rank 8 in the checkpoint and 16 here"),
        ({"q.lora_a": (32, 8)}, {"q.lora_a": (64, 8)}, r"is of shape \(32, 8\) in the checkpoint and \(64, 8\) here"),
        ({"q.weight": (8, 32)}, {"q.weight": (16, 32)}, r"is of shape \(8, 32\)"),
        ({"q.lora_a": (8, 2)}, {"k.lora_a": (8, 2)}, "k.lora_a is trained here, and is not in the checkpoint"),
        ({"q.lora_a": (8, 2)}, {}, "q.lora_a is in the checkpoint, and is not trained here"),
    ],
)  # fmt: skip
def test_another_adapter_is_told_in_words(saved: Any, here: Any, message: str) -> None:
    arrays = {name: np.zeros(shape) for name, shape in saved.items()}
    require_same_shapes(arrays, saved)
    with pytest.raises(UserError, match=f"does not fit the model: .*{message}.*--overwrite"):
        require_same_shapes(arrays, here)


# What a run is made of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def facts(model: Path, rows: str = "rows", held_out: str | None = None, **overrides: Any) -> dict[str, Any]:
    data = {"path": "a.jsonl"} | {n: overrides.pop(n) for n in list(overrides) if n in DataConfig.__annotations__}
    return run_facts(TrainConfig("m", DataConfig(**data), max_steps=9, **overrides), model, rows, held_out)


def test_settings_that_do_not_change_the_result_are_free(model: Path) -> None:
    free = {
        "micro_batch_size": 3, "group_by_length": False, "packing": True, "gradient_checkpointing": True,
        "share_prompts": False,
        "report_to": ["wandb"], "sample_every": 5, "sample_count": 1, "sample_tokens": 2, "reference": "ref",
        "save_every": 7, "output": "elsewhere",
    }  # fmt: skip
    assert changes(facts(model), facts(model, **free)) == []
    assert changes(facts(model), facts(model, seed=1)) == [Change("seed", 0, 1)]
    assert TrainConfig("m", DataConfig("a")).flat().keys() >= checkpoints.FREE
    for name in ("hardware.backend", "hardware.device", "hardware.dtype", "fine_tune_type", "lora.rank"):
        assert name in facts(model), name


def test_rows_are_compared_by_content_and_streams_setting_by_setting(model: Path) -> None:
    before = facts(model, held_out="held out")
    assert changes(before, facts(model, held_out="held out", path="b.jsonl", max_length=9, valid="v.jsonl")) == []
    assert changes(before, facts(model, rows="other", held_out="held out", path="b.jsonl")) == [
        Change("data.path", "a.jsonl", "b.jsonl"),
        Change("training rows", "rows", "other"),
    ]
    assert changes(before, facts(model)) == [Change("held-out rows", "held out", None)]
    stream = facts(model, streaming=True)
    assert changes(stream, facts(model, streaming=True, path="b.jsonl", valid="v.jsonl")) == []
    for change in ({"max_length": 9}, {"shuffle_buffer": 3}, {"template": "plain"}, {"skip_bad_rows": True}):
        assert len(changes(stream, facts(model, streaming=True, **change))) == 1, change
    assert changes(stream, facts(model)) and changes(facts(model), stream)


def test_digests_tell_rows_and_files_apart(tmp_path: Path) -> None:
    row = Example((1, 2), (3,), True)
    assert rows_digest([row]) == rows_digest([Example((1, 2), (3,), True, source="elsewhere:3")])
    assert rows_digest([row]) != rows_digest([Example((1,), (2, 3), True)])
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_bytes(bytes(300_000))
    b.write_text("b")
    before = files_digest([a, b])
    assert before.startswith("2 files of 300,001 bytes, SHA-256 ")
    (tmp_path / "moved").mkdir()
    assert files_digest([Path(shutil.copy(path, tmp_path / "moved")) for path in (a, b)]) == before
    renamed = Path(shutil.copy(a, tmp_path / "c.jsonl"))
    assert before not in (files_digest([b, a]), files_digest([a]), files_digest([renamed, b]))
    for content in (b"1" + bytes(299_999), bytes(300_001)):
        a.write_bytes(content)
        assert files_digest([a, b]) != before


def test_the_model_is_told_by_its_weights(model: Path) -> None:
    save_file({"w": np.zeros(50_000, np.float32)}, model / "model.safetensors")
    before = model_digest(model)
    save_file({"w": np.full(50_000, 1e-9, np.float32)}, model / "model.safetensors")
    assert model_digest(model) != before
    save_file({"v": np.zeros(50_000, np.float32)}, model / "model.safetensors")
    assert model_digest(model) != before
    save_file({"w": np.zeros(50_000, np.float32)}, model / "model.safetensors")
    assert model_digest(model) == before
    (model / "config.json").write_text('{"rope_theta": 5}')
    assert model_digest(model) != before
