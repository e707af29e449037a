"""A run that was stopped and resumed ends as one that was not, to the last bit, however it was stopped."""

import errno
import hashlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from test_train import QUIET, config

import bnf_align.commands.train as module
import forked
from bnf_align import cli
from bnf_align.arguments import parse
from bnf_align.commands.train import train
from bnf_align.run.run_folder import RunFolder
from bnf_core.config import LoraConfig, OptimizerConfig, TrainConfig
from bnf_core.errors import TrainingStopped, UserError
from bnf_core.steps import batching
from bnf_core.steps import steps as plan
from bnf_core.steps.metrics import SHIFT_CHOSEN, SHIFT_REJECTED, with_present_names
from bnf_core.storage import checkpoints
from bnf_core.storage.checkpoints import Checkpoints
from bnf_core.storage.digests import rows_digest
from bnf_core.storage.shards import REFERENCE, StoredArrays, write_state
from bnf_core.storage.tensors import TensorWriter
from conftest import fast_on, slow

TIMES = ("seconds", "tokens_per_second")
STATE = "state-00001-of-00001.safetensors"
STEPS = 6  # two epochs of 12 rows in batches of 5, 5 and 2


def settings(model: Path, data: Path, output: Path, backend: str, **overrides: Any) -> TrainConfig:
    """With dropout, and micro-batches small enough that rows meet other rows in the second epoch."""
    common = {"lora": LoraConfig(rank=4, alpha=8, dropout=0.2), "micro_batch_size": 2, "eval_every": 2}
    return config(model, data, output, backend, **(common | overrides))


@pytest.fixture(scope="module")
def whole(tiny_model: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The uninterrupted run of a backend."""
    folders: dict[str, Path] = {}

    def run(backend: str) -> Path:
        if backend not in folders:
            output = tmp_path_factory.mktemp("whole") / backend
            folders[backend] = train(settings(tiny_model, feedback, output, backend), QUIET).folder
        return folders[backend]

    return run


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in with_present_names(line).items() if name not in TIMES} for line in lines]


def assert_same(run: Path, expected: Path) -> None:
    """Metrics, adapter and everything in the last checkpoint."""
    assert metrics(run) == metrics(expected)
    adapters = [next((folder / "adapter").glob("*.safetensors")) for folder in (run, expected)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    ends = [Checkpoints(folder / "checkpoints", 2).newest()[0] for folder in (run, expected)]
    assert ends[0] is not None and ends[1] is not None and ends[0].step == ends[1].step
    assert ends[0].arrays.keys() == ends[1].arrays.keys()
    for name, value in ends[1].arrays.items():
        np.testing.assert_array_equal(ends[0].arrays[name], value, err_msg=name)


def resumed(run: TrainConfig, **changes: Any) -> str:
    """Resume, and return what was printed."""
    console = Console(file=io.StringIO(), width=400)
    train(replace(run, overwrite=False, resume=True, **changes), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the run receive SIGTERM in the middle of that step."""

    def arm(stop: int) -> None:
        def rate(step: int, *rest: Any) -> float:
            if step + 1 == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(step, *rest)

        monkeypatch.setattr(plan, "learning_rate", rate)

    original = plan.learning_rate
    return arm


@pytest.fixture(scope="module")
def stopped_once() -> dict[str, Path]:
    """Folders of runs that were stopped, by what is said of them: each is made once, and copied."""
    return {}


@pytest.fixture
def stopped(
    tiny_model: Path,
    feedback: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    stop_after: Callable[[int], None],
    stopped_once: dict[str, Path],
) -> Callable[..., TrainConfig]:
    """A run that was stopped after four steps and keeps the checkpoints of the last two."""

    def run(backend: str = "torch", **overrides: Any) -> TrainConfig:
        made = settings(tiny_model, feedback, tmp_path / "run", backend, **({"save_every": 1} | overrides))
        key = f"{backend} {overrides}"
        if key not in stopped_once:
            there = tmp_path_factory.mktemp("stopped") / "run"
            stop_after(4)
            with pytest.raises(TrainingStopped, match="interrupted after step 4"):
                train(replace(made, output=str(there)), QUIET)
            stop_after(0)
            stopped_once[key] = there
        shutil.copytree(stopped_once[key], made.output)
        return made

    return run


# The same bits


@fast_on("torch")
def test_a_run_stopped_after_every_step_ends_as_one_that_was_not(
    tiny_model: Path,
    feedback: Path,
    tmp_path: Path,
    backend_name: str,
    whole: Callable[[str], Path],
    stop_after: Callable[[int], None],
) -> None:
    run, expected = settings(tiny_model, feedback, tmp_path / "run", backend_name), whole(backend_name)
    for step in range(1, STEPS):
        stop_after(step)
        with pytest.raises(TrainingStopped, match=f"interrupted after step {step};.* --resume"):
            train(replace(run, resume=step > 1), QUIET)
        logged = metrics(tmp_path / "run")
        assert logged == metrics(expected)[: len(logged)] and logged[-1]["step"] == step
    stop_after(0)
    assert f"resuming after step {STEPS - 1}" in resumed(run)
    assert_same(tmp_path / "run", expected)


@fast_on("mlx")
def test_dropout_and_the_second_epoch_are_put_to_the_test(
    tiny_model: Path, feedback: Path, tmp_path: Path, backend_name: str, whole: Callable[[str], Path]
) -> None:
    """What the bit-for-bit tests rely on: dropout changes the run, and every row's reference is kept."""
    plain = train(
        settings(tiny_model, feedback, tmp_path / "plain", backend_name, lora=LoraConfig(rank=4, alpha=8)), QUIET
    )
    runs = (plain.folder, whole(backend_name))
    losses = [[line["loss"] for line in metrics(run) if line["kind"] == "train"] for run in runs]
    assert losses[0] != losses[1]
    end = Checkpoints(whole(backend_name) / "checkpoints", 2).newest()[0]
    assert end is not None and len(set(end.arrays["reference/keys"].tolist())) == 12


@pytest.mark.parametrize(
    ("backend_name", "objective"),
    [
        ("mlx", "bco"),
        slow("torch", "bco"),
        slow("torch", "bnf + 0.5*kto"),
        slow("mlx", "bnf + 0.5*kto"),
    ],
)
def test_what_an_objective_compares_with_runs_on(
    tiny_model: Path,
    feedback: Path,
    tmp_path: Path,
    backend_name: str,
    objective: str,
    stopped: Callable[..., TrainConfig],
) -> None:
    """BCO's moving average is in the checkpoint, KTO's baseline comes from the batch. Rejects an average begun anew."""
    whole = settings(tiny_model, feedback, tmp_path / "whole", backend_name, objective=objective, save_every=1)
    train(whole, QUIET)
    resumed(stopped(backend_name, objective=objective))
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(
    whole: Callable[[str], Path], tiny_model: Path, feedback: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole("torch"), tmp_path / "run")
    resumed(settings(tiny_model, feedback, tmp_path / "run", "torch"))
    assert_same(tmp_path / "run", whole("torch"))


def test_an_interrupt_during_an_evaluation_stops_it_and_no_evaluation_is_done_twice(
    tiny_model: Path, feedback: Path, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    run = settings(tiny_model, feedback, tmp_path / "run", "torch")
    calls = []

    def evaluator(_: object) -> dict[str, float | None]:
        calls.append(1)
        if len(calls) == 2:  # after step 2
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        return {}

    began = time.monotonic()
    with pytest.raises(TrainingStopped, match="interrupted after step 2"):
        train(run, QUIET, evaluator)
    assert time.monotonic() - began < 25
    result = train(replace(run, resume=True), QUIET, evaluator)
    assert len(calls) == 2 + 3  # steps 0 and 2, cut short; then 2, 4 and 6
    assert_same(tmp_path / "run", whole("torch"))
    assert result.before is not None and result.before["log_odds_shift/chosen"] == 0.0
    assert result.after is not None and result.after["log_odds_shift/chosen"] != 0.0


def test_only_the_last_checkpoints_are_kept(stopped: Callable[..., TrainConfig]) -> None:
    run = stopped(keep_checkpoints=3)
    assert sorted(path.name for path in (Path(run.output) / "checkpoints").glob("step-*")) == [
        "step-000002", "step-000003", "step-000004",
    ]  # fmt: skip


# Killed


def _train(run: TrainConfig) -> None:
    train(run, QUIET)


def _train_until(run: TrainConfig, operation: int, count: Any) -> None:
    """Die at that operation on files: before it, or in the middle of it where it writes."""

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count.value += 1
            if count.value == operation:
                if original is write_bytes:
                    write_bytes(arguments[0], arguments[1][: len(arguments[1]) // 2])
                elif original is add:
                    add(*arguments)
                    arguments[0]._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    write_bytes, add = Path.write_bytes, TensorWriter.add
    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    Path.write_bytes = dying(write_bytes)  # type: ignore[method-assign]
    TensorWriter.add = dying(add)  # type: ignore[method-assign]
    train(run, QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 30])
def test_killed_at_random_moments(
    tiny_model: Path,
    feedback: Path,
    tmp_path: Path,
    backend_name: str,
    kills: int,
) -> None:
    run = settings(tiny_model, feedback, tmp_path / "run", backend_name, epochs=8, eval_every=10, save_every=1)
    whole = replace(run, output=str(tmp_path / "whole"))
    train(whole, QUIET)
    lines = len(metrics(Path(whole.output)))
    rng, killed = random.Random(0), 0
    moments = sorted(rng.randrange(1, lines) for _ in range(kills))
    for attempt, moment in enumerate(moments):
        process = forked.start(_train, replace(run, resume=attempt > 0))
        log = tmp_path / "run" / "metrics.jsonl"
        while process.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") >= moment):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        killed += forked.ended(process) == -signal.SIGKILL
    assert killed >= kills * 0.75
    resumed(run)
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("every", [199, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_operation_on_files(tiny_model: Path, feedback: Path, tmp_path: Path, every: int) -> None:
    run = settings(tiny_model, feedback, tmp_path / "whole", "torch", max_steps=3, valid=None, save_every=1)

    def attempt(output: str, operation: int, **changes: Any) -> tuple[int, int]:
        count = forked.context().Value("i", 0)
        process = forked.start(_train_until, replace(run, output=output, **changes), operation, count)
        return forked.ended(process), count.value

    code, operations = attempt(run.output, 0)
    assert code == 0 and operations > 60
    for operation in range(1, operations + 1, every):
        output = tmp_path / str(operation)
        assert attempt(str(output), operation)[0] == -signal.SIGKILL
        assert attempt(str(output), 0, resume=True)[0] == 0, operation
        assert_same(output, tmp_path / "whole")


def test_the_command_line_killed_then_terminated(tiny_model: Path, feedback: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    words = ["train", "--model", tiny_model, "--data", feedback, "--backend", "torch", "--device", "cpu"]
    words += ["--batch-size", 5, "--epochs", 8, "--save-every", 3, "--dropout", "0.1"]
    here, there, said = tmp_path / "run", tmp_path / "whole", tmp_path / "said"
    log = here / "metrics.jsonl"

    def stopped(number: signal.Signals, *more: object) -> int:
        """The exit code of a command that gets a signal once it has logged ten lines more."""
        lines = 10 + (log.read_bytes().count(b"\n") if log.exists() else 0)
        process = forked.start(cli.run, [str(word) for word in (*words, "--output", here, *more)], output=said)
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_bytes().count(b"\n") >= lines):
            assert process.is_alive() and time.monotonic() < deadline, said.read_text()
            time.sleep(0.002)
        assert process.pid is not None
        os.kill(process.pid, number)
        return forked.ended(process)

    assert stopped(signal.SIGKILL) == -signal.SIGKILL
    code, error = stopped(signal.SIGTERM, "--resume"), said.read_text()
    assert code == 1 and "interrupted after step" in error and "Traceback" not in error
    resume = shlex.split(error.rpartition("bnf train ")[2])
    for line in (resume, ["--config", f"{here}/config.yaml", "--output", str(there)]):
        train(parse(TrainConfig, "train", line), QUIET)
    assert_same(here, there)


# Damaged


def _cut(folder: Path) -> None:
    os.truncate(folder / STATE, (folder / STATE).stat().st_size - 1)


def _flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


DAMAGE = {
    "batching": _cut,
    "empty": lambda folder: os.truncate(folder / STATE, 0),
    "bit of a weight": _flip(STATE),
    "bit of a setting": _flip("state.json"),
    "bit of a sum": _flip("SHA256SUMS"),
    "no state": lambda folder: (folder / STATE).unlink(),
    "no sums": lambda folder: (folder / "SHA256SUMS").unlink(),
}


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    stopped: Callable[..., TrainConfig], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = stopped()
    for name, damage in DAMAGE.items():
        shutil.copytree(Path(run.output) / "checkpoints", tmp_path / name)
        damage(tmp_path / name / "step-000004")
        found, (message,) = Checkpoints(tmp_path / name, 1).newest()
        assert found is not None and found.step == 3 and "step-000004 is refused" in message, name
    _cut(Path(run.output) / "checkpoints" / "step-000004")
    printed = resumed(run)
    assert f"step-000004 is refused: {STATE} (" in printed and "resuming after step 3" in printed
    assert_same(Path(run.output), whole("torch"))


def test_a_damaged_checkpoint_does_not_crowd_out_new_ones(
    stopped: Callable[..., TrainConfig], stop_after: Callable[[int], None]
) -> None:
    run = stopped(save_every=2)  # steps 2 and 4
    _cut(Path(run.output) / "checkpoints" / "step-000004")
    stop_after(3)
    with pytest.raises(TrainingStopped, match="after step 3"):
        resumed(run, keep_checkpoints=1)
    assert Checkpoints(Path(run.output) / "checkpoints", 1).steps() == [3]


def test_without_a_usable_checkpoint_nothing_is_thrown_away(stopped: Callable[..., TrainConfig]) -> None:
    run = stopped()
    before = metrics(Path(run.output))
    for folder in (Path(run.output) / "checkpoints").glob("step-*"):
        _cut(folder)
    with pytest.raises(UserError, match=r"no checkpoint of .* can be used: pass --overwrite"):
        resumed(run)
    shutil.rmtree(Path(run.output) / "checkpoints")
    with pytest.raises(UserError, match="holds a run, but no checkpoint"):
        resumed(run)
    assert metrics(Path(run.output)) == before and (Path(run.output) / "adapter").exists()


def test_without_a_checkpoint_a_run_starts_from_the_beginning_and_says_so(
    tiny_model: Path, feedback: Path, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    run = settings(tiny_model, feedback, tmp_path / "run", "torch")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n{"kind": "tra')  # killed early
    assert "no checkpoint in" in resumed(run)
    assert_same(tmp_path / "run", whole("torch"))


# Changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2, epsilon=1e-5)},
         "optimizer.learning_rate: 0.005 → 0.001"),
        ({"seed": 1}, "seed: 0 → 1"),
        slow({"batch_size": 4}, "batch_size: 5 → 4"),
        slow({"epochs": 3}, "epochs: 2 → 3"),
    ],
)  # fmt: skip
def test_changed_settings_are_listed_and_refused_unless_told(
    stopped: Callable[..., TrainConfig], change: dict[str, Any], message: str
) -> None:
    run = stopped()
    kept = metrics(Path(run.output))
    with pytest.raises(UserError, match="another run") as refusal:
        resumed(run, **change)
    assert [line.strip() for line in str(refusal.value).splitlines()[1:-1]] == [message]
    assert metrics(Path(run.output)) == kept
    printed = resumed(run, resume_anyway=True, **change)
    assert "resuming after step 4" in printed and f"changed: {message}" in printed
    assert metrics(Path(run.output))[: len(kept)] == kept


def test_changed_data_is_refused_and_a_moved_file_is_not(
    stopped: Callable[..., TrainConfig], feedback: Path, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    run = stopped()
    moved, other = tmp_path / "moved.jsonl", tmp_path / "other.jsonl"
    shutil.copy(feedback, moved)
    rows = feedback.read_text().splitlines()
    other.write_text("\n".join([rows[0].replace("true", "false"), *rows[1:]]) + "\n")
    data = replace(run.data, path=str(other))
    with pytest.raises(
        UserError, match=r"data\.path: .*feedback\.jsonl → .*other\.jsonl\n +training rows: 12 rows"
    ) as e:
        resumed(run, data=data)
    assert "held-out" not in str(e.value)
    with pytest.raises(UserError, match="held-out rows: 12 rows"):
        resumed(run, valid=str(other))
    resumed(run, data=replace(run.data, path=str(moved)), valid=str(moved))
    assert_same(Path(run.output), whole("torch"))


def test_a_changed_model_is_refused_and_a_moved_one_is_not(
    stopped: Callable[..., TrainConfig], tiny_model: Path, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    run = stopped()
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tiny_model / "model.safetensors")
    name = sorted(weights)[-1]
    changed = weights | {name: np.nextafter(weights[name], np.float32(9))}
    save_file(changed, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights of the model: SHA-256"):
        resumed(run, model=str(tmp_path / "model"))
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    resumed(run, model=str(tmp_path / "model"))
    assert_same(Path(run.output), whole("torch"))


# What a checkpoint knew of its run before there were other objectives, templates of one's own and a date.
FACTS_OF_OLD = """
model data.path data.template data.max_length data.skip_bad_rows data.streaming data.shuffle_buffer valid valid_fraction
hardware.backend hardware.device hardware.dtype hardware.load_in_4bit fine_tune_type lora.rank lora.alpha lora.dropout
lora.targets adapter optimizer.learning_rate optimizer.schedule optimizer.warmup_steps optimizer.beta1 optimizer.beta2
optimizer.epsilon optimizer.weight_decay optimizer.max_grad_norm epochs max_steps batch_size seed
""".split()
FACTS_OF_OLD += ["training rows", "held-out rows", "weights of the model"]


@fast_on("mlx")
def test_a_run_of_an_older_version_is_resumed_to_the_bit(
    stopped: Callable[..., TrainConfig], backend_name: str, whole: Callable[[str], Path]
) -> None:
    """What such a run folder holds was compared with one that commit 6746c8c wrote."""
    run = stopped(backend_name)
    for folder in (Path(run.output) / "checkpoints").glob("step-*"):
        about = json.loads((folder / "state.json").read_text())
        assert about["format"] == 2 and set(FACTS_OF_OLD) <= about["facts"].keys()
        # What only grows was in the state itself, whole.
        grown = [folder.parent / file["file"] for file in about.pop("grown")]
        stored = StoredArrays.open([folder / STATE], grown)
        assert grown and any(name.startswith(REFERENCE) for name in stored)
        write_state(folder / STATE, {name: np.array(stored[name]) for name in stored})
        about["facts"] = {name: about["facts"][name] for name in FACTS_OF_OLD}
        (folder / "state.json").write_text(json.dumps(about))
        sums = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in (STATE, "state.json")]
        (folder / "SHA256SUMS").write_text("".join(sums))
    log = Path(run.output) / "metrics.jsonl"
    for now, then in ((SHIFT_CHOSEN, "log_odds_shift/good"), (SHIFT_REJECTED, "log_odds_shift/bad")):
        log.write_text(log.read_text().replace(now, then))
    assert "resuming after step 4" in resumed(run)
    assert_same(Path(run.output), whole(backend_name))


def test_another_shape_or_backend_never_fits(stopped: Callable[..., TrainConfig]) -> None:
    run = stopped()
    for change in ({"lora": LoraConfig(rank=2)}, {"lora": LoraConfig(targets=["q_proj"])}):
        with pytest.raises(UserError, match="the checkpoint does not fit the model: base_model"):
            resumed(run, resume_anyway=True, **change)


def test_resume_excludes_overwrite(tiny_model: Path, feedback: Path, tmp_path: Path) -> None:
    run = settings(tiny_model, feedback, tmp_path / "run", "torch")
    with pytest.raises(ValueError, match="overwrite is True: expected false with resume"):
        replace(run, resume=True, overwrite=True)
    with pytest.raises(ValueError, match="resume_anyway is True: expected resume as well"):
        replace(run, resume_anyway=True)


# A full disk


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tiny_model: Path, feedback: Path, tmp_path: Path, whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(tiny_model, feedback, tmp_path / "run", "torch", save_every=2, keep_checkpoints=1)

    def full(writer: TensorWriter, name: str, array: np.ndarray) -> None:
        if "step-000004" in str(writer._path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(writer, name, array)

    add = TensorWriter.add
    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "add", full)
        with pytest.raises(TrainingStopped, match=r"No space left.*from step 2: bnf train --config .* --resume"):
            train(run, QUIET)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000002"]
    assert "resuming after step 2" in resumed(run)
    assert_same(tmp_path / "run", whole("torch"))


@fast_on("torch")
def test_a_file_that_the_system_cuts_short_is_noticed_by_every_writer(
    tiny_model: Path, feedback: Path, tmp_path: Path, backend_name: str, whole: Callable[[str], Path]
) -> None:
    """The real thing, without a full disk: no file may grow beyond a limit that the weights exceed."""
    run = settings(tiny_model, feedback, tmp_path / "run", backend_name, save_every=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = []

    def evaluator(_: object) -> dict[str, float | None]:
        calls.append(1)
        if len(calls) == 2:  # after step 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
        return {}

    try:
        with pytest.raises(TrainingStopped, match=r"File too large.*from step 2"):
            train(run, QUIET, evaluator)
        engine = module.registry.get(backend_name).load(tiny_model, device="cpu", fine_tune_type="lora", lora=run.lora)
        (weights,) = (tmp_path / "run" / "adapter").glob("*.safetensors")
        kept = weights.read_bytes()
        with pytest.raises(TrainingStopped, match=r"(File too large|Unable to write).*from step 2"):
            RunFolder(run).resume(2, engine)
        assert weights.read_bytes() == kept
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumed(run)
    assert_same(tmp_path / "run", whole(backend_name))


# The core


def test_every_setting_is_compared_or_named_as_free(tiny_model: Path, tmp_path: Path) -> None:
    rows = [batching.Example((1, 2), (3,), True), batching.Example((1,), (2, 3), True)]
    run = config(tiny_model, tmp_path, tmp_path, "torch")
    facts = checkpoints.run_facts(run, tiny_model, rows_digest(rows), None)
    assert set(run.flat()) >= checkpoints.FREE and not checkpoints.FREE & facts.keys()
    assert {"lora.dropout", "optimizer.max_grad_norm", "hardware.dtype", "seed", "max_steps"} <= facts.keys()
    assert facts == json.loads(json.dumps(facts))
    for other in (
        rows[::-1],
        rows[:1],
        [replace(rows[0], label=False), rows[1]],
        [replace(rows[0], completion_ids=(4,)), rows[1]],
        [batching.Example((1, 2, 3), (), True), rows[1]],
    ):
        assert checkpoints.changes(facts, checkpoints.run_facts(run, tiny_model, rows_digest(other), None))


def test_the_sums_are_in_the_format_of_sha256sum(tmp_path: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    Checkpoints(tmp_path, 1).save(7, {"a": np.arange(3)}, {})
    folder = tmp_path / "step-000007"
    subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


def test_the_new_folder_is_on_disk_before_it_takes_the_old_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        events.append(f"rename {Path(target).name}")
        rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    Checkpoints(tmp_path / "checkpoints", 1).save(1, {"a": np.arange(3)}, {})
    at = events.index("rename step-000001")
    assert set(events[:at]) == {
        f"sync {STATE}", "sync state.json", "sync SHA256SUMS", "sync .step-000001.partial",
    }  # fmt: skip
    assert events[at + 1 :] == ["sync checkpoints"]


def test_a_folder_lost_between_two_renames_is_put_back(tmp_path: Path) -> None:
    from bnf_core.storage.files import replacing

    (tmp_path / ".adapter.replaced").mkdir()
    (tmp_path / ".adapter.replaced" / "weights").write_text("old")
    with pytest.raises(OSError), replacing(tmp_path / "adapter"):
        raise OSError(errno.ENOSPC, "full")
    assert (tmp_path / "adapter" / "weights").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    with replacing(tmp_path / "adapter") as partial:
        assert (tmp_path / "adapter" / "weights").read_text() == "old"  # until the new ones are complete
        (partial / "weights").write_text("new")
    assert (tmp_path / "adapter" / "weights").read_text() == "new"
