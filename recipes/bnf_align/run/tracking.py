"""Trackers: a run's metrics in TensorBoard, Weights & Biases or Trackio, through their own clients.

What a client reads from its environment, such as WANDB_MODE or TRACKIO_SPACE_ID, means here what it means there.
"""

import importlib.util
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from rich.console import Console
from rich.markup import escape

from bnf_core.config import flat
from bnf_core.errors import UserError
from bnf_core.storage.files import replace_file

PROJECT = "bnf-align"  # where WANDB_PROJECT or TRACKIO_PROJECT name no other
STEP = "train/global_step"  # as in transformers' runs, so that both fit into one chart

Settings = Mapping[str, bool | int | float | str | None]
Identity = dict[str, str]


class Tracker(Protocol):
    """One place where metrics go. Its methods may raise anything."""

    identity: Identity
    """What finds this run again when it goes on; empty where the run folder is enough."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, succeeded: bool) -> None: ...


class Trackers:
    """The trackers of one run. A failure of one is reported once, and the run goes on."""

    def __init__(self, console: Console):
        self._console = console
        self._trackers: dict[str, Tracker] = {}
        self._failed: set[str] = set()

    def add(self, name: str, tracker: Tracker) -> None:
        self._trackers[name] = tracker

    def log(self, kind: Literal["train", "eval"], step: int, metrics: Mapping[str, object]) -> None:
        """Send what is a number, as `train/loss` or `eval/rewards/margins`.

        Args:
            step: optimizer steps done.
            metrics: by name, without the prefix; what is no number, such as None, is left out.
        """
        numbers = {f"{kind}/{k}": float(v) for k, v in metrics.items() if isinstance(v, Real)}
        for name, tracker in self._trackers.items():
            self._attempt(name, partial(tracker.log, step, numbers))

    def close(self, succeeded: bool = True) -> None:
        """Send what is still waiting, and mark the run as finished or failed."""
        for name, tracker in self._trackers.items():
            self._attempt(name, partial(tracker.close, succeeded))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(succeeded=kind is None)

    def _attempt(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # each client raises its own; none is worth a run
            if name not in self._failed:
                message = f"{name} failed, and the run continues; metrics.jsonl holds everything: {error}"
                self._console.print(f"[yellow]{escape(message)}[/yellow]", highlight=False, soft_wrap=True)
            self._failed.add(name)


class TensorBoard:
    """Event files in `tensorboard/` of the run folder, each step on disk before the next.

    The writer is tensorboardX's, without its SummaryWriter: that one leaves writing to a thread, and once this thread
    has died of a full disk, the bounded queue before it blocks the training loop for ever.
    """

    package = "tensorboardX"

    def __init__(self, run_folder: Path, settings: Settings, start: int, known: Identity):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import hparams

        self.identity: Identity = {}
        folder = run_folder / "tensorboard"
        if not start:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        # The name ends in a time finer than its own of seconds: files of one second would overwrite each other, and
        # readers take them in the order of their names.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if start:  # readers drop what they have from this step on: it is about to come again
            self._write(start + 1, session_log=SessionLog(status=SessionLog.START))
        else:
            shown = ("train/loss", "eval/loss", "eval/preference_accuracy")
            for summary in hparams(dict(settings), dict.fromkeys(shown))[:2]:  # the third would say that it is over
                self._write(0, summary=summary)
        self._writer.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in metrics.items():
            self._write(step, summary=scalar(name, value))
        self._writer.flush()

    def close(self, succeeded: bool) -> None:
        self._writer.close()

    def _write(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **what))


class Wandb:
    """A run of Weights & Biases; its files are in `wandb/` of the run folder unless WANDB_DIR says otherwise."""

    package = "wandb"

    def __init__(self, run_folder: Path, settings: Settings, start: int, known: Identity):
        import wandb

        self._run = wandb.init(
            id=known.get("id"),
            resume="allow" if known else None,
            project=known.get("project") or os.environ.get("WANDB_PROJECT") or PROJECT,
            entity=known.get("entity") or None,
            name=None if known or os.environ.get("WANDB_NAME") else run_folder.resolve().name,
            dir=os.environ.get("WANDB_DIR") or run_folder,
            config=dict(settings),
            reinit="create_new",  # a run that the caller may have open is none of ours
            settings=wandb.Settings(console="off"),  # it would log every redrawing of the progress bar
        )
        # W&B's own step cannot go back, which a run that goes on from a checkpoint has to.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        found = {"id": self._run.id, "project": self._run.project, "entity": self._run.entity}
        self.identity: Identity = {} if self._run.disabled else found

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, STEP: step})

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class Trackio:
    """A run of Trackio, in TRACKIO_DIR or wherever its other variables say."""

    package = "trackio"

    def __init__(self, run_folder: Path, settings: Settings, start: int, known: Identity):
        import trackio

        # Trackio finds a run by its name, so two folders of one name need two.
        name = f"{run_folder.resolve().name}-{secrets.token_hex(4)}"
        self.identity = known or {"project": os.environ.get("TRACKIO_PROJECT") or PROJECT, "name": name}
        self._run = trackio.init(
            project=self.identity["project"],
            name=self.identity["name"],
            config=dict(settings),
            resume="allow",
            embed=False,  # no dashboard opens in a notebook
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, succeeded: bool) -> None:
        import trackio

        trackio.finish()  # of the run itself, Trackio would not notice, and finish it once more at exit


TRACKERS: dict[str, type[TensorBoard] | type[Wandb] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse, before anything else is done, what `open_trackers` could not open.

    Raises:
        UserError: no such tracker, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"report_to: unknown tracker {name!r}: expected {', '.join(TRACKERS)}")
        package = TRACKERS[name].package
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # no origin: a folder `wandb` of offline runs, not the package
            raise UserError(
                f"report_to: {name} needs the package {package}, which is not installed: "
                f"pip install {package}, or all trackers: pip install 'bnf-align[tracking]'"
            )


def open_trackers(
    names: Sequence[str], run_folder: Path, settings: Mapping[str, Any], start: int, console: Console
) -> Trackers:
    """Open the trackers of a run, in one process of it.

    Args:
        names: of TRACKERS.
        run_folder: an existing folder; `trackers.json` in it remembers which runs are this one.
        settings: the run's config, shown as its hyper-parameters; nested ones become `lora.rank`.
        start: steps done. Above 0 the trackers go on with the runs they know, from the step after; at 0 they
            begin new ones, whatever the folder holds of an earlier run.
        console: for warnings.
    Raises:
        UserError: as check_trackers, or a tracker cannot start, as W&B without a login.
    """
    check_trackers(names)
    memory = run_folder / "trackers.json"
    known = _remembered(memory) if start else {}
    shown = {name: _shown(value) for name, value in flat(settings)}
    trackers = Trackers(console)
    for name in dict.fromkeys(names):
        try:
            tracker = TRACKERS[name](run_folder, shown, start, known.get(name, {}))
            trackers.add(name, tracker)
            known[name] = tracker.identity
            replace_file(memory, json.dumps(known, indent=2) + "\n")
        except Exception as error:  # each client raises its own
            trackers.close(succeeded=False)
            raise UserError(f"{name} cannot start: {error}. Mend that, or leave {name} out of report_to") from error
    return trackers


def _remembered(path: Path) -> dict[str, Identity]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not a JSON object: {error}. Remove it to begin new runs in the trackers") from error


def _shown(value: object) -> bool | int | float | str | None:
    """A setting as TensorBoard can show it: lists it cannot."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
