"""Two processes on the CPU (gloo) take the steps that one takes, by DDP and by FSDP2, as users launch them: slow, for
nothing that a launcher starts can be shared. `test_invariance` has the same runs in forked processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file

import forked
import torch_worker
from bnf_core.storage.checkpoints import Checkpoints
from invariance import BASE, Runs, free_ports

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parents[1].joinpath("torch_worker.py")
CONFIG = ROOT / "recipes" / "configs" / "accelerate" / "fsdp.yaml"
CASES: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora"},
    "dora": {"type": "dora"},
    "full": {"type": "full"},
    "packed": {"type": "full", "packing": True, "gradient_checkpointing": True},
    "half": {"type": "full", "dtype": "bfloat16"},
}
# Before the first step every token is as likely as under the reference: which is higher the last bit decides.
ON_AN_EDGE = {"share_below_reference", "rewards/accuracies", "preference_accuracy"}


LAUNCHERS = {
    "ddp": "torch.distributed.run --nproc-per-node 2 --master-port PORT",
    "fsdp": f"accelerate.commands.launch --config_file {CONFIG} --num_processes 2 --main_process_port PORT",
}


@dataclass(frozen=True)
class Launched:
    """What came of two processes that a launcher started, and of the run that was to have no end."""

    run: Path
    code: int
    output: str
    workers: list[int]


def launch(kind: str, model: Path, folder: Path, cases: dict[str, dict[str, Any]], stop: signal.Signals) -> Launched:
    """Every case in one pair of processes, whose imports cost most of the time, then a run of the command line that
    ends by Ctrl-C, or because its second process is killed."""
    arranged = Runs(model, folder)
    words, run = arranged.words("torch", "lora", f"{BASE} --save-every null --epochs 100000")
    port = str(free_ports(1)[0])
    launcher = [sys.executable, "-m", *LAUNCHERS[kind].replace("PORT", port).split()]
    process = subprocess.Popen(
        [*launcher, str(WORKER), str(model), str(folder), json.dumps(cases), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_lines(run, 2, process)
        workers = children(process.pid)
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)
        else:
            os.kill(workers[1], stop)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    return Launched(run, process.returncode, output, workers)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_lines(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    log, deadline = run / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and log.read_bytes().count(b"\n") >= count):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def launched(tiny_model: Path, folder: Path) -> dict[str, Launched]:
    """Every case on two processes of each kind; and full fine-tuning begun alone, resumed on two."""
    torch_worker.train(tiny_model, {"type": "full", "steps": torch_worker.STEPS // 2}, folder / "first half")
    cases = CASES | {"resumed": {"type": "full", "resume": str(folder / "first half" / "checkpoints")}}
    stops = {"ddp": signal.SIGINT, "fsdp": signal.SIGKILL}
    for kind in stops:
        (folder / kind).mkdir()
    return {kind: launch(kind, tiny_model, folder / kind, cases, stop) for kind, stop in stops.items()}


@pytest.fixture(scope="module")
def runs(tiny_model: Path, folder: Path, launched: dict[str, Launched]) -> Path:
    """Every case, alone as well."""
    for name, case in CASES.items():
        torch_worker.train(tiny_model, case, folder / "alone" / name)
    return folder


def steps(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "steps.json").read_text())


def trained(folder: Path) -> dict[str, np.ndarray]:
    tensors = load_file(next((folder / "trained").glob("*model.safetensors")))
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def require_same_steps(one: list[dict[str, float]], two: list[dict[str, float]], tolerance: float) -> None:
    assert len(one) == len(two)
    for number, (a, b) in enumerate(zip(one, two, strict=True)):
        assert a.keys() == b.keys()
        for metric in a.keys() - ON_AN_EDGE:
            assert b[metric] == pytest.approx(a[metric], rel=tolerance, abs=tolerance), (number, metric)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one(runs: Path, kind: str, name: str) -> None:
    """Each epoch ends in a batch of three, so that one process has fewer sequences, and with packing even none.
    Rejects the mean of the processes' means, a dropped tail, a loss that is not multiplied by the number of processes,
    gradients that are not summed, or summed once a micro-batch too often."""
    alone, together = steps(runs / "alone" / name), steps(runs / kind / name)
    if name == "half":  # FSDP rounds weights before they are gathered, otherwise they are before each product
        assert len(together) == torch_worker.STEPS and all(np.isfinite(step["norm"]) for step in together)
        for metric in ("loss", "norm"):
            assert together[0][metric] == pytest.approx(alone[0][metric], rel=1e-2)
        return
    require_same_steps(alone, together, 2e-5)
    one, two = trained(runs / "alone" / name), trained(runs / kind / name)
    assert one.keys() == two.keys()
    difference = np.concatenate([(two[key] - one[key]).ravel() for key in one])
    # Where a gradient is all but zero, Adam divides its round-off by itself.
    assert np.abs(difference).max() < torch_worker.OPTIMIZER.learning_rate * 0.1
    assert abs(difference.mean()) < 1e-6 and np.abs(difference).mean() < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_of_one_process_is_gone_on_with_on_two(runs: Path, kind: str) -> None:
    whole = steps(runs / "alone" / "full")
    require_same_steps(whole[torch_worker.STEPS // 2 :], steps(runs / kind / "resumed"), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_is_gone_on_with_on_one(
    runs: Path, tiny_model: Path, tmp_path: Path, kind: str, name: str
) -> None:
    folder = runs / kind / name / "checkpoints"
    middle = sorted(folder.glob("step-*"))[torch_worker.STEPS // 2 - 1]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / middle.name).symlink_to(middle)
    torch_worker.train(tiny_model, CASES[name] | {"resume": str(tmp_path / "checkpoints")}, tmp_path / "out")
    whole = steps(runs / kind / name)
    require_same_steps(whole[torch_worker.STEPS // 2 :], steps(tmp_path / "out"), 2e-5)


@pytest.mark.slow
def test_fsdp_shards_what_is_saved_and_ddp_does_not(runs: Path) -> None:
    """Rejects a model that is not sharded, but kept whole by every process."""
    sizes = {}
    for kind in ("ddp", "fsdp"):
        last = sorted((runs / kind / "full" / "checkpoints").glob("step-*"))[-1]
        sizes[kind] = [path.stat().st_size for path in sorted(last.glob("state-*.safetensors"))]
    assert len(sizes["ddp"]) == len(sizes["fsdp"]) == 2
    assert sizes["ddp"][1] < 0.2 * sizes["ddp"][0]
    assert 0.8 * sizes["fsdp"][0] < sizes["fsdp"][1] < 1.2 * sizes["fsdp"][0]


@pytest.mark.slow
def test_ctrl_c_in_the_launcher_saves(launched: dict[str, Launched]) -> None:
    run, output = launched["ddp"].run, launched["ddp"].output
    checkpoint, refused = Checkpoints(run / "checkpoints", 9).newest()
    assert checkpoint is not None and checkpoint.step >= 2 and refused == [], output
    assert len((run / "metrics.jsonl").read_text().splitlines()) == checkpoint.step


@pytest.mark.slow
def test_when_a_process_is_killed_the_launcher_ends_the_others(launched: dict[str, Launched]) -> None:
    end = launched["fsdp"]
    assert len(end.workers) == 2 and end.code != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in end.workers), end.output


def endless(model: Path, folder: Path) -> None:
    torch_worker.train(model, {"type": "lora", "steps": 1_000_000}, folder)


def test_when_a_process_is_killed_and_nobody_watches_the_others_end_by_themselves(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As between machines. Rejects waiting for it until some timeout of many minutes."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    shared |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    said = tmp_path / "said"
    one, two = (
        forked.start(
            endless, tiny_model, tmp_path, environment=shared | {"RANK": rank, "LOCAL_RANK": rank}, output=output
        )
        for rank, output in (("0", said), ("1", None))
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "checkpoints").glob("step-*")):
        assert one.is_alive() and time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)
    two.kill()
    assert forked.ended(one, 60) != 0 and "TrainingStopped: another process of this run has ended" in said.read_text()
