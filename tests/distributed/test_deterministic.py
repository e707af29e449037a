"""`deterministic`: the same bits in every arrangement, which they are not without it."""

import json
from pathlib import Path
from typing import Any

import pytest

from bnf_core.devices import require_cpu
from bnf_core.errors import UserError
from conftest import fast_of, fast_on, slow
from invariance import Runs, command, launch

SHORT = "--max-steps 3"
DETERMINISTIC = f"{SHORT} --deterministic true"
PACKED = "--micro-batch-size 8 --packing true --max-length 192"
ARRANGEMENTS = [
    "--micro-batch-size 8 --share-prompts false",
    "--micro-batch-size 3 --group-by-length false",
    "--micro-batch-size 2 --gradient-checkpointing true",
    PACKED,
]
TIMES = ("seconds", "tokens_per_second")
WAYS_OF = {"torch": "ddp", "mlx": "mlx"}


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_model, tmp_path_factory.mktemp("deterministic"))


@pytest.fixture(scope="module")
def runs_on_pairs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of an objective that is compared with a number of the whole step, on pairs."""
    return Runs(tiny_model, tmp_path_factory.mktemp("deterministic-kto"), "--objective kto --objective.beta 1")


def bits(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What a run reports, and every file of weights that it leaves. Checkpoints know the reference's rows in the order
    in which the processes met them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = {
        p.relative_to(run).as_posix(): p.read_bytes() for p in run.glob("*/*.safetensors") if "grown" not in p.name
    }
    assert files
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines], files


def trained(runs: Runs, backend: str, flags: str, kind: str = "lora") -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    words, output = runs.words(backend, kind, flags)
    assert command(words) == 0
    return bits(output)


def on_processes(runs: Runs, backend: str, flags: list[tuple[str, str]], count: int) -> list[Any]:
    lines, outputs = zip(*(runs.words(backend, kind, words) for kind, words in flags), strict=True)
    results = launch(WAYS_OF[backend], [("", line) for line in lines], [runs.folder] * count)
    assert {code for code, _ in results} == {0}, results
    return [bits(output) for output in outputs]


@pytest.mark.parametrize("flags", fast_of(ARRANGEMENTS[1:], PACKED))
def test_every_arrangement_gives_the_same_bits(runs: Runs, backend_name: str, flags: str) -> None:
    first, other = (trained(runs, backend_name, f"{each} {DETERMINISTIC}") for each in (ARRANGEMENTS[0], flags))
    assert other == first


def test_without_it_they_differ(runs: Runs, backend_name: str) -> None:
    first, *others = (trained(runs, backend_name, f"{flags} {SHORT}")[1] for flags in (ARRANGEMENTS[0], PACKED))
    assert all(other != first for other in others)


@fast_on("torch")
@pytest.mark.parametrize(
    ("kind", "flags"), [("lora", f"{ARRANGEMENTS[0]} {DETERMINISTIC}"), slow("full", f"{PACKED} {DETERMINISTIC}")]
)
def test_any_number_of_processes_gives_the_same_bits(runs: Runs, backend_name: str, kind: str, flags: str) -> None:
    """Three, which share no step of eight rows evenly; adapters and all weights."""
    together = on_processes(runs, backend_name, [(kind, flags)], 3)
    assert together == [trained(runs, backend_name, flags, kind)]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_bits_on_pairs(runs_on_pairs: Runs, backend_name: str) -> None:
    alone = trained(runs_on_pairs, backend_name, f"{ARRANGEMENTS[1]} {DETERMINISTIC}")
    assert on_processes(runs_on_pairs, backend_name, [("lora", f"{PACKED} {DETERMINISTIC}")], 2) == [alone]


def refused(runs: Runs, capsys: pytest.CaptureFixture[str], backend: str, flags: str) -> str:
    words, _ = runs.words(backend, "lora", f"{DETERMINISTIC} {flags}")
    assert command(words) == 2
    return capsys.readouterr().err


def test_what_cannot_be_had_is_refused(runs: Runs, capsys: pytest.CaptureFixture[str], backend_name: str) -> None:
    said = refused(runs, capsys, backend_name, "--lora.dropout 0.1")
    assert "lora.dropout is 0.1: expected 0 with deterministic" in said


@fast_on("torch")
def test_the_settings_that_are_set_aside_are_said(
    runs: Runs, capsys: pytest.CaptureFixture[str], backend_name: str
) -> None:
    trained(runs, backend_name, f"{PACKED} {DETERMINISTIC} --max-steps 1")
    said = " ".join(capsys.readouterr().out.split())
    assert "deterministic: each row is computed alone; micro_batch_size, auto_batch, packing" in said


def test_fsdp_and_other_devices_are_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_backend = pytest.importorskip("bnf_torch.backend")
    processes = pytest.importorskip("bnf_torch.processes")

    class Sharded(processes.TorchProcesses):  # type: ignore[name-defined, misc]
        rank, count, sharded = 0, 2, True

        def __init__(self) -> None:
            pass

    monkeypatch.setattr(torch_backend.TorchBackend, "processes", lambda self: Sharded())
    with pytest.raises(UserError, match="FSDP2 sums gradients in an order of its own: use DDP"):
        torch_backend.TorchBackend().load(tiny_model, device="cpu", deterministic=True)
    with pytest.raises(UserError, match="kept on the CPU alone: this run is on cuda"):
        require_cpu("cuda")
