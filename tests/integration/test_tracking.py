"""Trackers, each with its real client and offline: what was logged is read back from what it wrote."""

import json
import math
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bnf_align import cli
from bnf_align.run import tracking
from bnf_align.run.tracking import Trackers, check_trackers, open_trackers
from bnf_core.errors import UserError
from conftest import fast_on

SETTINGS = {"model": "tiny", "max_steps": None, "lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}}
FLAT = {"model": "tiny", "max_steps": None, "lora.rank": 4, "lora.targets": "q_proj, v_proj"}

Points = list[tuple[int, float]]


def train(run_folder: Path, name: str, start: int, stop: int, loss: float) -> None:
    """What a training loop does: a step at a time, an evaluation at the end."""
    run_folder.mkdir(exist_ok=True)
    with open_trackers([name], run_folder, SETTINGS, start, Console()) as trackers:
        for step in range(start + 1, stop + 1):
            trackers.log("train", step, {"loss": loss + step, "rewards/rejected": None})
        trackers.log("eval", stop, {"rewards/margins": np.float32(0.5), "note": "text"})


# TensorBoard


def read_tensorboard(run_folder: Path) -> dict[str, Points]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    return {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_numbers_and_only_them(tmp_path: Path) -> None:
    train(tmp_path / "run", "tensorboard", 0, 2, 0.5)
    found = read_tensorboard(tmp_path / "run")
    assert found == {"train/loss": [(1, 1.5), (2, 2.5)], "eval/rewards/margins": [(2, 0.5)]}


def test_tensorboard_replaces_the_steps_that_are_done_again(tmp_path: Path) -> None:
    train(tmp_path / "run", "tensorboard", 0, 4, 0.0)
    train(tmp_path / "run", "tensorboard", 2, 3, 10.0)
    found = read_tensorboard(tmp_path / "run")
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 13.0)]
    assert found["eval/rewards/margins"] == [(3, 0.5)]


def test_tensorboard_forgets_a_run_that_is_started_anew(tmp_path: Path) -> None:
    train(tmp_path / "run", "tensorboard", 0, 4, 0.0)
    train(tmp_path / "run", "tensorboard", 0, 1, 10.0)
    assert read_tensorboard(tmp_path / "run")["train/loss"] == [(1, 11.0)]


def test_tensorboard_shows_hyper_parameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    train(tmp_path / "run", "tensorboard", 0, 1, 0.0)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["lora.rank"].number_value == 4 and values["lora.targets"].string_value == "q_proj, v_proj"


def test_a_step_is_on_disk_before_the_next(tmp_path: Path) -> None:
    trackers = open_trackers(["tensorboard"], tmp_path, SETTINGS, 0, Console())
    trackers.log("train", 1, {"loss": 1.0})
    assert read_tensorboard(tmp_path)["train/loss"] == [(1, 1.0)]
    trackers.close()


@fast_on("mlx")
def test_a_run_sends_what_it_writes(backend_name: str, tiny_model: Path, feedback: Path, tmp_path: Path) -> None:
    """On each backend, through a checkpoint: TensorBoard and metrics.jsonl hold the same numbers."""
    words = [
        "train",
        "--model",
        tiny_model,
        "--data",
        feedback,
        "--output",
        tmp_path / "run",
        "--valid-fraction",
        "0.2",
    ]
    words += ["--backend", backend_name, "--device", "cpu", "--batch-size", "4", "--save-every", "1"]
    words += ["--report-to", "tensorboard", "--sample-every", "1", "--sample-tokens", "3"]
    assert cli.run([str(word) for word in [*words, "--max-steps", "2"]]) == 0
    assert cli.run([str(word) for word in [*words, "--max-steps", "3", "--resume", "--resume-anyway"]]) == 0
    expected: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        step, kind = line.pop("step"), line.pop("kind")
        for name, value in line.items():
            if value is not None:
                expected.setdefault(f"{kind}/{name}", {})[step] = value
    assert {"train/loss", "train/grad_norm", "eval/rewards/margins"} <= set(expected)
    found = read_tensorboard(tmp_path / "run")
    assert {tag: dict(points) for tag, points in found.items()} == {
        tag: pytest.approx(values, rel=1e-6) for tag, values in expected.items()
    }
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]
    lines = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted({json.loads(line)["step"] for line in lines}) == [0, 1, 2, 3]


# Weights & Biases


def read_wandb(folder: Path) -> list[Any]:
    """The records of an offline run's file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # as at the end of a process: its service has then written everything
    (path,) = folder.glob("run-*.wandb")
    data, at, records, whole = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for a header: padding
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(whole))
            whole = b""
    return records


def wandb_history(records: list[Any]) -> list[dict[str, float]]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def wandb_run(records: list[Any]) -> Any:
    return next(record.run for record in records if record.WhichOneof("record_type") == "run")


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "arithmetic")
    for name in ("WANDB_DIR", "WANDB_NAME", "WANDB_ENTITY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    run_folder = tmp_path / "mine"
    train(run_folder, "wandb", 0, 2, 0.5)
    (first,) = (run_folder / "wandb").glob("offline-run-*")
    records = read_wandb(first)
    run = wandb_run(records)
    assert (run.project, run.display_name) == ("arithmetic", "mine")
    assert {u.key: json.loads(u.value_json) for u in run.config.update if u.key in FLAT} == FLAT
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in wandb_history(records)]
    assert rows == [
        {"train/loss": 1.5, "train/global_step": 1},
        {"train/loss": 2.5, "train/global_step": 2},
        {"eval/rewards/margins": 0.5, "train/global_step": 2},
    ]
    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert any(m.glob_name == "*" and m.step_metric == "train/global_step" for m in metrics)

    first.rename(tmp_path / "first")  # W&B names these folders by the second, and two in one would be the same
    monkeypatch.delenv("WANDB_PROJECT")  # the run knows its own
    train(run_folder, "wandb", 1, 2, 10.0)
    (second,) = (run_folder / "wandb").glob("offline-run-*")
    records = read_wandb(second)
    again = wandb_run(records)
    assert (again.run_id, again.project) == (run.run_id, "arithmetic")
    assert wandb_history(records)[0]["train/loss"] == 12.0  # step 2 once more: never dropped for going back

    second.rename(tmp_path / "second")
    train(run_folder, "wandb", 0, 1, 0.0)
    (third,) = (run_folder / "wandb").glob("offline-run-*")
    assert wandb_run(read_wandb(third)).run_id != run.run_id  # from the beginning: another run
    assert wandb_run(read_wandb(third)).project == "bnf-align"


@pytest.mark.slow
def test_wandb_without_a_login_says_what_to_do(tmp_path: Path) -> None:
    """In a process of its own: W&B reads the environment once."""
    code = f"""
from pathlib import Path
from rich.console import Console
from bnf_core.errors import UserError
from bnf_align.run.tracking import open_trackers
try:
    open_trackers(["wandb"], Path({str(tmp_path)!r}), {{}}, 0, Console())
except UserError as error:
    print(error)
"""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "WANDB_MODE": "online",
        "NETRC": str(tmp_path / "no"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert "wandb cannot start" in done.stdout and "wandb login" in done.stdout, done.stderr
    assert "leave wandb out of report_to" in done.stdout


# Trackio

TRACKIO = """
import sys
sys.path[:0] = [{tests!r}, {helpers!r}]
from pathlib import Path
from test_tracking import train
for folder, start, stop, loss in {calls}:
    train(Path({root!r}) / folder, "trackio", start, stop, loss)
"""


@pytest.mark.slow
def test_trackio_goes_on_with_the_same_run(tmp_path: Path) -> None:
    """In a process of its own: Trackio settles its folder when it is imported."""
    calls = [("a/mine", 0, 2, 0.5), ("b/mine", 0, 1, 5.0), ("a/mine", 1, 2, 10.0)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    code = TRACKIO.format(
        tests=str(Path(__file__).parent), helpers=str(Path(__file__).parents[1]), calls=calls, root=str(tmp_path)
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "TRACKIO_PROJECT": "arithmetic"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run finished") == len(calls)  # not once more at exit
    with sqlite3.connect(tmp_path / "trackio" / "arithmetic.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = database.execute("select config from configs").fetchall()
    names = {
        f: json.loads((tmp_path / f / "trackers.json").read_text())["trackio"]["name"] for f in ("a/mine", "b/mine")
    }
    assert names["a/mine"] != names["b/mine"]
    found = [(step, json.loads(metrics)) for name, step, metrics in rows if name == names["a/mine"]]
    assert found == [
        (1, {"train/loss": 1.5}),
        (2, {"train/loss": 2.5}),
        (2, {"eval/rewards/margins": 0.5}),
        (2, {"train/loss": 12.0}),
        (2, {"eval/rewards/margins": 0.5}),
    ]
    assert len(configs) == 2  # two runs, not three
    assert all(json.loads(config)["lora.rank"] == 4 for (config,) in configs)


# What goes wrong


def test_an_unknown_tracker_names_those_that_exist() -> None:
    with pytest.raises(UserError, match="unknown tracker 'tensorbord': expected tensorboard, wandb, trackio"):
        check_trackers(["wandb", "tensorbord"])


def test_a_package_that_is_absent_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.TensorBoard, "package", "no_such_package")
    with pytest.raises(UserError, match=r"pip install no_such_package, or all trackers: pip install 'bnf-align\[tra"):
        check_trackers(["tensorboard"])


def test_a_folder_of_runs_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs_of_wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tracking.Wandb, "package", "runs_of_wandb")
    with pytest.raises(UserError, match="not installed"):
        check_trackers(["wandb"])


class Broken:
    identity: tracking.Identity = {}  # noqa: RUF012

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError("[the network] is down")

    def close(self, succeeded: bool) -> None:
        raise ConnectionError("still down")


class Recorder:
    identity: tracking.Identity = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed: list[bool] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def close(self, succeeded: bool) -> None:
        self.closed.append(succeeded)


def test_a_tracker_that_fails_is_reported_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    trackers, recorder = Trackers(Console()), Recorder()
    trackers.add("broken", Broken())
    trackers.add("recorder", recorder)
    with trackers:
        for step in range(3):
            trackers.log("train", step, {"loss": 1.0})
    assert capsys.readouterr().out.count("broken failed") == 1
    assert recorder.steps == [0, 1, 2] and recorder.closed == [True]


def test_a_full_disk_does_not_stop_tensorboard_or_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    trackers = open_trackers(["tensorboard"], tmp_path, SETTINGS, 0, Console())
    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
    with trackers:
        for step in range(50):  # more than any queue of the client holds
            trackers.log("train", step, {"loss": 1.0})
    assert capsys.readouterr().out.count("No space left") == 1


def test_a_run_that_fails_is_marked_so() -> None:
    trackers, recorder = Trackers(Console()), Recorder()
    trackers.add("recorder", recorder)
    with pytest.raises(ArithmeticError), trackers:
        raise ArithmeticError
    assert recorder.closed == [False]


def test_a_tracker_that_cannot_start_closes_those_that_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Recorder()

    def start(*_: object) -> Recorder:
        return opened

    def refuse(*_: object) -> Recorder:
        raise RuntimeError("no login")

    monkeypatch.setattr(tracking, "check_trackers", lambda names: None)
    monkeypatch.setattr(tracking, "TRACKERS", {"good": start, "bad": refuse})
    with pytest.raises(UserError, match="bad cannot start: no login"):
        open_trackers(["good", "bad"], tmp_path, {}, 0, Console())
    assert opened.closed == [False]


def test_numbers_that_are_not_finite_arrive(tmp_path: Path) -> None:
    with open_trackers(["tensorboard"], tmp_path, SETTINGS, 0, Console()) as trackers:
        trackers.log("train", 1, {"loss": math.inf})
    assert read_tensorboard(tmp_path)["train/loss"] == [(1, math.inf)]


def test_a_broken_memory_is_named(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(UserError, match=r"trackers\.json: not a JSON object"):
        open_trackers(["tensorboard"], tmp_path, SETTINGS, 1, Console())


def test_no_client_is_loaded_before_it_is_wanted() -> None:
    code = "import sys, bnf_align.run.tracking; print(sorted({'wandb', 'trackio', 'tensorboardX'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_trace_of_a_few_steps(
    backend_name: str, tiny_model: Path, feedback: Path, tmp_path: Path, capsys: Any
) -> None:
    """PyTorch leaves one that has the matrix products of the recorded steps; MLX without Metal says so."""
    words = ["train", "--model", tiny_model, "--data", feedback, "--output", tmp_path / "run", "--profile", "true"]
    words += ["--backend", backend_name, "--device", "cpu", "--batch-size", "2", "--max-steps", "4"]
    code = cli.run([str(word) for word in words])
    if backend_name == "mlx":
        said = " ".join("".join(capsys.readouterr()).split())
        assert code == 2 and ("records traces on Metal alone" in said or "MTL_CAPTURE_ENABLED=1" in said)
        return
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert code == 0 and sum(event["name"] == "Optimizer.step#AdamW.step" for event in events) == 2
