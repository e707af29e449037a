"""What goes wrong around a run ends it early, with one message that says what, and touches nothing that is there."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forked
import tiny
from bnf_align import cli
from bnf_align.arguments import parse
from bnf_align.run.run_folder import RunFolder
from bnf_core.config import TrainConfig
from bnf_core.storage.checkpoints import Checkpoints
from conftest import fast_on
from invariance import BASE, WAYS, Runs, Trajectory, command, launch, ways, write_rows


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_model, tmp_path_factory.mktemp("faults"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


Refuses = Callable[..., None]


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Refuses:
    """That a command is refused as bad input, in one message with these words, and a folder is left as it is."""

    def refuses(words: list[str], folder: Path, *expected: str, code: int = 2) -> None:
        before = contents(folder)
        capsys.readouterr()
        assert command(words) == code
        error = " ".join(capsys.readouterr().err.split())
        assert error.startswith("bnf: ") and error.count("bnf: ") == 1 and "Traceback" not in error
        assert all(re.search(word, error) for word in expected), error
        assert contents(folder) == before

    return refuses


def changed(words: list[str], **settings: object) -> list[str]:
    """The same command with other settings; the last of a kind wins."""
    return words + [str(word) for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]


# One process


@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        ("lora", "false"),
        ("full", "true"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("lora", "true"), ("full", "false"))),
    ],
)
def test_a_tokenizer_with_more_tokens_than_the_model(
    runs: Runs, backend_name: str, kind: str, packing: str, tmp_path: Path, refuses: Refuses
) -> None:
    small = tiny.make_model(tmp_path / "small", vocab_size=64)
    words, run = runs.words(backend_name, kind, f"{BASE} --max-steps 1")
    assert command(words) == 0
    refuses(changed(words, model=small, packing=packing, overwrite="true"), run, "tokenizer", "64", r"token.* \d+")


@fast_on("mlx")
def test_a_checkpoint_of_another_rank(runs: Runs, backend_name: str, refuses: Refuses) -> None:
    words, run = runs.words(backend_name, "lora", f"{BASE} --max-steps 1")
    assert command(words) == 0
    again = changed(words, rank=8, resume="true")
    refuses(again, run, "step-000001 is of another run", "lora.rank: 4 → 8", "--resume-anyway")
    refuses(changed(again, resume_anyway="true"), run, "has rank 4 in the checkpoint and 8 here")


@fast_on("mlx")
def test_a_saved_adapter_of_another_rank(runs: Runs, backend_name: str, refuses: Refuses) -> None:
    words, run = runs.words(backend_name, "lora", f"{BASE} --max-steps 1")
    assert command(words) == 0
    path = run / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config.get("lora_parameters", config)["rank" if "lora_parameters" in config else "r"] = 8
    path.write_text(json.dumps(config))
    evaluate = ["evaluate", "--model", str(runs.model), "--adapter", str(run / "adapter"), "--data", str(runs.rows)]
    refuses(
        [*evaluate, "--backend", backend_name, "--device", "cpu"], run, str(run / "adapter"), "does not fit the model"
    )


@fast_on("torch")
def test_a_reference_of_another_model(runs: Runs, backend_name: str, tmp_path: Path, refuses: Refuses) -> None:
    other, stored = tiny.make_model(tmp_path / "other", seed=1), tmp_path / "reference"
    make = ["reference", "--model", str(other), "--data", str(runs.rows), "--output", str(stored)]
    assert command([*make, "--backend", backend_name, "--device", "cpu", "--dtype", "float32"]) == 0
    words, run = runs.words(backend_name, "lora", f"{BASE} --max-steps 1")
    assert command(words) == 0
    refuses(changed(words, reference=stored, overwrite="true"), run, str(stored), "model", "bnf reference")
    refuses(changed(words, reference=stored, overwrite="true"), stored)


def test_a_folder_that_another_run_writes_to(runs: Runs, tmp_path: Path, refuses: Refuses) -> None:
    pytest.importorskip("peft")
    words, run = runs.words("torch", "lora", f"{BASE} --save-every 1")
    process = forked.start(cli.run, changed(words, epochs=100_000), output=tmp_path / "said")
    try:
        log, deadline = run / "metrics.jsonl", time.monotonic() + 200
        while not (log.exists() and log.read_bytes().count(b"\n") >= 1):
            assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)  # so that the folder stays as it is
        for setting in ("overwrite", "resume"):
            refuses(changed(words, **{setting: "true"}), run, f"another run is writing to {run}", "--output")
    finally:
        process.kill()
        process.join()
    assert command(changed(words, overwrite="true", max_steps=1)) == 0, "a killed run holds nothing"


def out_of_memory(backend: str, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Have the device's memory be full, in the framework's own words, once so many micro-batches have been trained."""
    calls = iter(range(1000))
    if backend == "torch":
        import torch

        from bnf_torch.scored import ScoredModel as place

        error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        name = "forward"
    else:
        from bnf_mlx.scored import MicroStep as place  # type: ignore[assignment]

        error, name = RuntimeError("[metal::malloc] Attempting to allocate 99 bytes"), "__call__"
    right = getattr(place, name)

    def wrong(self: Any, *args: Any, **inputs: Any) -> Any:
        if (backend == "mlx" or self.training or torch.is_grad_enabled()) and next(calls) >= after:
            raise error
        return right(self, *args, **inputs)

    monkeypatch.setattr(place, name, wrong)


@fast_on("torch")
def test_a_full_device(runs: Runs, backend_name: str, monkeypatch: pytest.MonkeyPatch, refuses: Refuses) -> None:
    """Is named with the plan's figures and what to try; the last checkpoint stays good."""
    words, run = runs.words(backend_name, "full", f"{BASE} --save-every 1")
    with monkeypatch.context() as patch:
        out_of_memory(backend_name, patch, 3)
        refuses(
            words, run.parent / "nothing", "memory of cpu is full", "allocate", r"takes 0\.\d\d GiB", "weights 0",
            "--micro-batch-size 4, then --gradient-checkpointing true", "--resume", code=1,
        )  # fmt: skip
    checkpoint, refused = Checkpoints(run / "checkpoints", 9).newest()
    assert checkpoint is not None and checkpoint.step == 3 and refused == []


# Two processes


@pytest.mark.slow
@pytest.mark.parametrize("way", ways())
def test_two_processes(runs: Runs, way: str, tmp_path: Path) -> None:
    """In one pair of processes, whose imports cost most of the time, one after another: a run that one of them is told
    to end; one that goes on after it was ended on one process; data that differ; a folder that another run has; and a
    run of which one process is killed."""
    backend, _ = WAYS[way]
    kind = "full" if way == "fsdp" else "lora"
    folders = tmp_path / "first", tmp_path / "second"
    for shift, folder in enumerate(folders):
        folder.mkdir()
        write_rows(folder / "rows.jsonl", shift)
    ended, ended_run = runs.words(backend, "full", f"{BASE} --save-every null")
    alone, alone_run = runs.words(backend, kind, f"{BASE} --save-every null")
    differ, differ_run = runs.words(backend, kind, BASE)
    taken, taken_run = runs.words(backend, kind, BASE)
    killed, killed_run = runs.words(backend, kind, f"{BASE} --save-every 2")
    assert command(alone, "ended") == 1

    jobs = [
        ("ended", ended),
        ("", changed(alone, resume="true")),
        ("", changed(differ, data="rows.jsonl")),
        ("", taken),
        ("killed", killed),
    ]
    with RunFolder(parse(TrainConfig, "train", taken[1:])).held():
        results = launch(way, jobs, folders)
    outputs = [output for _, output in results]
    assert [code for code, _ in results] == [2, -signal.SIGKILL], outputs
    assert [re.findall(r"EXIT CODE (\d)", output) for output in outputs] == [
        ["1", "0", "2", "2", "1"],
        ["1", "0", "2", "2"],
    ]
    assert not any("Traceback" in output for output in outputs), outputs
    for output in outputs:
        said = [" ".join(part.split()) for part in re.split(r"EXIT CODE \d", output)]
        assert f"interrupted after step 4; what is trained so far is in {ended_run}" in said[0]
        assert "the processes of this run see different training rows" in said[2] and "21 rows, SHA-256" in said[2]
        assert f"another run is writing to {taken_run}" in said[3]
        if output is outputs[0]:
            assert "resuming after step 4" in said[1]
            assert "another process of this run has ended" in said[4] and "--resume" in said[4]

    assert not (differ_run / "metrics.jsonl").exists() and contents(taken_run).keys() == {".lock"}
    for words, run, step in (ended, ended_run, 4), (killed, killed_run, 2):
        checkpoint, refused = Checkpoints(run / "checkpoints", 9).newest()
        assert checkpoint is not None and checkpoint.step == step and refused == []
        assert command(changed(words, resume="true")) == 0
    for run, trained in (ended_run, "full"), (alone_run, kind), (killed_run, kind):
        assert runs.complaints(backend, trained, Trajectory.read(run)) == []
