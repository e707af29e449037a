"""Two processes on the CPU (gloo) take the steps that one takes, by DDP and by FSDP2, as users launch them."""

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

pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file

import torch_worker

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parents[1].joinpath("torch_worker.py")
ACCELERATE = ROOT / "recipes" / "configs" / "accelerate"
CASES: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora"},
    "dora": {"type": "dora"},
    "full": {"type": "full"},
    "packed": {"type": "full", "packing": True, "gradient_checkpointing": True},
    "half": {"type": "full", "dtype": "bfloat16"},
}
# Before the first step every token is as likely as under the reference: which is higher the last bit decides.
ON_AN_EDGE = {"share_below_reference", "rewards/accuracies", "preference_accuracy"}


def start(kind: str, *command: str) -> subprocess.Popen[str]:
    """Two processes, DDP or FSDP2: one through torchrun, the other through accelerate and a configuration of ours."""
    port, launch = free_port(), [sys.executable, "-m"]
    if kind == "ddp":
        launch += ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    else:
        config = str(ACCELERATE / "fsdp.yaml")
        launch += ["accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
        launch += ["--main_process_port", port]
    return popen([*launch, *command])


def popen(command: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case alone and on two processes of each kind; and full fine-tuning begun alone, gone on with on two."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, case in CASES.items():
        torch_worker.train(tiny_model, case, folder / "alone" / name)
    first = torch_worker.STEPS // 2
    torch_worker.train(tiny_model, {"type": "full", "steps": first}, folder / "first half")
    cases = CASES | {"resumed": {"type": "full", "resume": str(folder / "first half" / "checkpoints")}}
    started = [
        start(kind, str(WORKER), str(tiny_model), str(folder / kind), json.dumps(cases)) for kind in ("ddp", "fsdp")
    ]
    for process in started:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
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


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_of_one_process_is_gone_on_with_on_two(runs: Path, kind: str) -> None:
    whole = steps(runs / "alone" / "full")
    require_same_steps(whole[torch_worker.STEPS // 2 :], steps(runs / kind / "resumed"), 2e-5)


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


def test_fsdp_shards_what_is_saved_and_ddp_does_not(runs: Path) -> None:
    """Rejects a model that is not sharded, but kept whole by every process."""
    sizes = {}
    for kind in ("ddp", "fsdp"):
        last = sorted((runs / kind / "full" / "checkpoints").glob("step-*"))[-1]
        sizes[kind] = [path.stat().st_size for path in sorted(last.glob("state-*.safetensors"))]
    assert len(sizes["ddp"]) == len(sizes["fsdp"]) == 2
    assert sizes["ddp"][1] < 0.2 * sizes["ddp"][0]
    assert 0.8 * sizes["fsdp"][0] < sizes["fsdp"][1] < 1.2 * sizes["fsdp"][0]


ENDLESS = json.dumps({"lora": {"type": "lora", "steps": 1_000_000}})


def wait_for_a_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not list((folder / "lora" / "checkpoints").glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_when_a_process_is_killed_the_launcher_ends_the_others(tiny_model: Path, tmp_path: Path) -> None:
    launcher = start("ddp", str(WORKER), str(tiny_model), str(tmp_path), ENDLESS)
    wait_for_a_checkpoint(tmp_path, launcher)
    workers = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), output


def test_when_a_process_is_killed_and_nobody_watches_the_others_end_by_themselves(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As between machines. Rejects waiting for it until some timeout of many minutes."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    command = [sys.executable, str(WORKER), str(tiny_model), str(tmp_path), ENDLESS]
    one, two = (popen(command, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01")
    wait_for_a_checkpoint(tmp_path, one)
    two.kill()
    output, _ = one.communicate(timeout=60)
    two.communicate()
    assert one.returncode != 0 and "TrainingStopped: another process of this run has ended" in output, output
