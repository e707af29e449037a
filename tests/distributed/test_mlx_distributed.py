"""Data parallelism on MLX: two processes of mlx.launch, over the ring backend, do what one does."""

# ruff: noqa: E402  (imports follow the check that MLX is installed)

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import forked
from bnf_align import cli
from bnf_align.run.interrupts import Interrupts
from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.errors import TrainingStopped
from bnf_core.processes import ALONE
from bnf_core.steps import loop
from bnf_core.steps.batching import MicroBatching, Rows
from bnf_core.steps.reference import ReferenceCache
from bnf_core.steps.steps import Step, my_share, steps
from bnf_core.storage.checkpoints import Checkpoints
from bnf_core.storage.shards import Shard
from bnf_core.types import Example, TokenScores
from bnf_mlx import processes as module
from bnf_mlx.backend import MLXBackend
from invariance import BASE, Runs, free_ports

NUM_STEPS, RATE = 6, 1e-3
KINDS = ["lora", "full"]
# Without compiling, or each process would call a C++ compiler for mlx-lm's fused activations; with what pytest puts on
# the path of this process.
QUICK = {"MLX_DISABLE_COMPILE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
LAUNCHER = Path(sys.executable).with_name("mlx.launch")


def examples() -> list[Example]:
    """Seven rows, in batches of three: the third holds one, and one of two processes has nothing to do."""
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(1, 300, n).tolist())  # noqa: E731
    return [Example(draw(p), draw(c), i % 2 == 0) for i, (p, c) in enumerate([(3, 9), (5, 2), (9, 4)] * 2 + [(2, 5)])]


def run(model: Path, kind: Any, output: Path, die_at: int = -1) -> None:
    """One process of a run; leaves its norms and what it is to save in `output/kind`, and the trained weights."""
    output = output / kind
    output.mkdir(exist_ok=True)
    settings = OptimizerConfig(learning_rate=RATE, warmup_steps=0)
    engine: Any = MLXBackend().load(
        model, device="cpu", fine_tune_type=kind, lora=LoraConfig(rank=4), optimizer=settings, seed=5
    )
    us = engine.processes
    batching = MicroBatching(1, multiple_of=us.count)
    reference = ReferenceCache(engine.reference_log_odds)
    reference.fill(my_share(examples(), batching, us), us)  # before the first step, for where all weights are trained
    plan = steps(
        Rows(examples(), 0),
        batch_size=3,
        num_steps=NUM_STEPS,
        optimizer=settings,
        batching=batching,
        reference=reference,
        processes=us,
    )
    norms, tokens = [], []

    def done(step: Step, stats: list[TokenScores], norm: float) -> None:
        norms.append(norm)
        tokens.append(sum(len(s.log_odds) for s in stats))
        if die_at == step.number and us.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.train(engine, plan, done, 1.0)
    state = {name: x.array if isinstance(x, Shard) else x for name, x in engine.state().items()}
    np.savez(output / f"rank{us.rank}.npz", **state, norms=norms, tokens=tokens)
    engine.model.eval()
    np.save(output / f"logits{us.rank}.npy", np.array(engine.model(mx.arange(1, 60)[None])))
    engine.save(output / "trained")


@pytest.fixture(scope="module")
def pairs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of mlx.launch leave, for each kind; then, in the folder `run`, the command line's run without
    end that Ctrl-C ended."""
    if not LAUNCHER.exists():
        pytest.skip("mlx.launch is not installed")
    folder = tmp_path_factory.mktemp("pairs")
    words, endless = Runs(tiny_model, folder).words("mlx", "lora", f"{BASE} --save-every null --epochs 100000")
    command = [LAUNCHER, "-n", "2", "--backend", "ring", "--starting-port", neighbouring_ports(), "--", sys.executable]
    process = subprocess.Popen(
        [*map(str, [*command, Path(__file__).resolve(), tiny_model, folder]), *words],
        env=os.environ | QUICK,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log, deadline = endless / "metrics.jsonl", time.monotonic() + 200
        while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        (folder / "output").write_text(process.communicate(timeout=60)[0])
    finally:
        process.kill()
        process.wait()
    endless.rename(folder / "run")
    return folder


def neighbouring_ports() -> int:
    """The first of two."""
    for port in range(20000 + os.getpid() % 20000, 60000, 2):
        try:
            for p in (port, port + 1):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", p))
        except OSError:
            continue
        return port
    raise AssertionError("no free ports")


@pytest.mark.slow
def test_ctrl_c_in_the_launcher_saves(pairs: Path) -> None:
    checkpoint, refused = Checkpoints(pairs / "run" / "checkpoints", 9).newest()
    assert checkpoint is not None and checkpoint.step >= 2 and refused == [], (pairs / "output").read_text()
    assert len((pairs / "run" / "metrics.jsonl").read_text().splitlines()) == checkpoint.step


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(tiny_model, pairs, tmp_path, kind):
    pair, alone = pairs / kind, tmp_path / kind
    run(tiny_model, kind, tmp_path)
    expected, first, second = (np.load(path) for path in (alone / "rank0.npz", pair / "rank0.npz", pair / "rank1.npz"))
    assert set(second) == {"norms", "tokens", "random/key"} and set(first) == set(expected)
    np.testing.assert_array_equal(first["tokens"] + second["tokens"], expected["tokens"])
    assert 0 in (*first["tokens"], *second["tokens"]), "a process with nothing to do is put to the test"
    np.testing.assert_array_equal(first["norms"], second["norms"])
    np.testing.assert_allclose(first["norms"], expected["norms"], rtol=1e-4)
    assert not np.array_equal(first["random/key"], second["random/key"]), "each process drops values of its own"
    weights = [name for name in expected if name.startswith("weights/")]
    for name in weights:
        difference = np.abs(first[name] - expected[name])
        assert difference.max() < RATE / 10 and difference.mean() < RATE / 1000, name
    logits = [np.load(pair / f"logits{rank}.npy") for rank in (0, 1)]
    np.testing.assert_array_equal(*logits)  # what only the first saves, the second has to the bit
    trained = {"adapter": pair / "trained"} if kind == "lora" else {}
    engine: Any = MLXBackend().load(tiny_model if trained else pair / "trained", device="cpu", **trained)
    np.testing.assert_array_equal(np.array(engine.model(mx.arange(1, 60)[None])), logits[0])


def dies(model: Path, folder: Path) -> None:
    run(model, "lora", folder, die_at=2)


def test_when_a_process_dies_the_others_stop(tiny_model, tmp_path):
    hosts, said = tmp_path / "hosts.json", tmp_path / "said"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    ranks = [
        forked.start(
            dies,
            tiny_model,
            tmp_path,
            environment=QUICK | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
            output=said if rank == 0 else None,
        )
        for rank in (0, 1)
    ]
    try:
        assert forked.ended(ranks[1], 60) == -signal.SIGKILL
        died = time.monotonic()
        code = forked.ended(ranks[0], 60)
        assert "another process of this run has ended" in said.read_text() and code == 1, said.read_text()
        assert time.monotonic() - died < 60, "within a minute"
    finally:
        for process in ranks:
            process.kill()
            process.join()


def launches(said: Path) -> None:
    """A launcher that passes on no signal, and the run that it launched."""
    if os.fork():
        signal.pause()
    with Interrupts() as interrupts:
        module.end_with_parent(0.01)
        said.write_text(str(os.getpid()))
        while not interrupts.received:
            time.sleep(0.01)
        print("a word to nobody", flush=True)
        said.with_name("ended").touch()
    os._exit(0)


def test_a_launcher_that_ends_ends_its_processes(tmp_path):
    """Rejects processes that train on, and those that an unread word kills before they have saved."""
    launcher = forked.start(launches, tmp_path / "pid")
    wait_for(tmp_path / "pid")
    launcher.terminate()
    launcher.join()
    wait_for(tmp_path / "ended")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and (path.name != "pid" or path.read_text())):
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


class Group:
    """Of two processes, this being the first."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


def test_what_does_not_arrive_whole_is_not_believed(monkeypatch):
    """MLX's ring returns what is in memory when a process dies meanwhile: nothing, or what came before."""
    us, arrived = module.MLXProcesses(Group()), []

    def all_gather(x: Any, group: Any) -> Any:
        arrived.append(mx.concatenate([x, x]))
        return arrived[-1]

    monkeypatch.setattr(mx.distributed, "all_gather", all_gather)
    assert us.gather_bytes(b"abc") == [b"abc", b"abc"] and us.gather_bytes(b"") == [b"", b""]
    lengths, data = arrived[:2]
    for at_lengths, at_data in (
        (mx.zeros_like(lengths), data),
        (lengths, data),
        (None, mx.zeros_like(data)),
        (None, data),
    ):
        answers = iter([at_lengths, at_data])

        def late(x: Any, group: Any) -> Any:
            answer = next(answers)  # noqa: B023
            return mx.concatenate([x, x]) if answer is None else answer

        monkeypatch.setattr(mx.distributed, "all_gather", late)
        with pytest.raises(TrainingStopped, match="did not arrive"):
            us.gather_bytes(b"abc")


def test_alone_nothing_is_sent_and_gradients_travel_in_buckets(monkeypatch):
    assert module.processes() is ALONE
    arrays = {
        name: mx.arange(size, dtype=mx.float32).reshape(-1, 2) for name, size in zip("abcd", (2, 4, 6, 8), strict=True)
    }
    assert module.sum_over(ALONE, arrays) is arrays
    sent = []

    def all_sum(x: Any, group: Any) -> Any:
        sent.append(x.size)
        return x * 2

    two = module.MLXProcesses(Group())
    monkeypatch.setattr(two, "gather_bytes", lambda data: [data, data])
    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    monkeypatch.setattr(module, "BUCKET_BYTES", 24)
    summed = module.sum_over(two, arrays)
    assert sent == [6, 6, 8] and list(summed) == list(arrays)
    for name, array in arrays.items():
        assert mx.array_equal(summed[name], 2 * array)


if __name__ == "__main__":
    for kind in KINDS:
        run(Path(sys.argv[1]), kind, Path(sys.argv[2]))
    sys.exit(cli.run(sys.argv[3:]))
