"""The folder of one run: config.yaml, metrics.jsonl, checkpoints, what was trained, run.png."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, Timeout
from safetensors import SafetensorError

from bnf_core.config import TrainConfig
from bnf_core.data.tokenization import save_stops
from bnf_core.errors import TrainingStopped, UserError
from bnf_core.models.adapters import CONFIG, with_base
from bnf_core.processes import ALONE, Processes
from bnf_core.protocol import Engine
from bnf_core.steps.metrics import Metrics, with_present_names
from bnf_core.storage.checkpoints import Checkpoints, Facts
from bnf_core.storage.files import lock, replace_file
from bnf_core.types import Array, Position


class RunFolder:
    """Everything is done while the folder is `held`. Nothing that is in it is touched before `start` or `go_on`; once a
    run is on its way, whatever cannot be written raises TrainingStopped, which names the checkpoint to resume from.
    Every process calls the same methods; the first one writes."""

    def __init__(self, config: TrainConfig, processes: Processes = ALONE, stops: Sequence[int] = ()):
        """
        Args:
            stops: token ids that end a completion, for whoever generates with what is trained; none: as the model says.
        """
        self.path = Path(config.output)
        self._stops = stops
        self.trained = self.path / ("model" if config.fine_tune_type == "full" else "adapter")
        self.processes = processes
        self._first = processes.rank == 0
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.keep_checkpoints)
        self._metrics = self.path / "metrics.jsonl"
        self._config = config

    @property
    def how_to_resume(self) -> str:
        return f"bnf {self._config.command} --config {self.path / 'config.yaml'} --resume"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the folder, which is made where it is not there. The system lets go of it when this
        run ends in whatever way. A file system without locks keeps nobody out.

        Raises:
            UserError: another run has the folder, or it cannot be made.
        """
        held: BaseFileLock | None = None
        taken = False
        if self._first:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"output {self.path} is a file: expected a folder")
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held = lock(self.path / ".lock", wait=False)
            except Timeout:
                taken = True
            except OSError as error:
                raise UserError(f"output {self.path}: {error.strerror}") from error
        try:
            if self.processes.any(taken):
                raise UserError(f"another run is writing to {self.path}: choose another --output, or wait for its end")
            yield
        finally:
            if held is not None:
                held.release()

    def start(self) -> None:
        """Begin a run, without what an earlier one left.

        Raises:
            UserError: it holds a run already, and the config says neither to overwrite nor to resume it.
        """
        self.processes.barrier()  # nobody writes before everybody has read what is there
        if not self._first:
            return
        held = self._metrics.exists() or bool(self.checkpoints.steps())
        if held:
            if self._config.resume and self.trained.exists():
                raise UserError(
                    f"{self.path} holds a run, but no checkpoint to resume: pass --overwrite to start it anew"
                )
            if not self._config.resume and not self._config.overwrite:
                raise UserError(
                    f"{self.path} already holds a run: choose another --output, or pass --overwrite, or --resume "
                    "to resume it"
                )
        try:
            if held:  # the metrics go last: as long as they are there, the folder counts as holding a run
                shutil.rmtree(self.checkpoints.folder, ignore_errors=True)
                for name in ("adapter", "model", "tensorboard", "samples", "sampler", "export"):
                    shutil.rmtree(self.path / name, ignore_errors=True)
                for name in ("samples.jsonl", "samples.md", "trackers.json", "metrics.jsonl"):
                    (self.path / name).unlink(missing_ok=True)
            self._write_config()
        except OSError as error:
            raise UserError(f"output {self.path}: {error.strerror}") from error

    def resume(self, step: int, engine: Engine) -> dict[int, Metrics]:
        """Cut the metrics back to that step, and write what is trained as it then was.

        Returns:
            The evaluations up to then, by step.
        """
        lines = []
        self.processes.barrier()
        if self._metrics.exists():
            for text in self._metrics.read_text(encoding="utf-8").splitlines():
                try:
                    line = with_present_names(json.loads(text))
                except ValueError:  # the last one, cut short
                    break
                if line["step"] > step:
                    break
                lines.append(line)
        self.processes.barrier()  # nobody writes before everybody has read
        with self.writing():
            if self._first:
                self._write_config()
                replace_file(self._metrics, "".join(json.dumps(line) + "\n" for line in lines))
            self.save_trained(engine)
        evaluations = [line for line in lines if line["kind"] == "eval"]
        return {e["step"]: {k: v for k, v in e.items() if k not in ("kind", "step")} for e in evaluations}

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl, on disk before the next step begins."""
        with self.writing(), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(
        self, step: int, engine: Engine, more: Mapping[str, Array], facts: Facts, position: Position | None
    ) -> None:
        """A checkpoint of the engine and `more` arrays, then what is trained."""
        arrays = engine.state() | dict(more)
        with self.writing():
            self.checkpoints.save(step, arrays, facts, position, processes=self.processes)
            self.save_trained(engine)

    def save_trained(self, engine: Engine) -> None:
        """Write the adapter or model, with the tokens that end its completions. A Hub model is named in it as the run
        names it: the backend knows the folder of a cache, which is nowhere else."""
        engine.save(self.trained)
        config = self.trained / CONFIG
        if self._first and config.is_file() and not Path(self._config.model).is_dir():
            replace_file(config, with_base(config.read_text(encoding="utf-8"), self._config.model))
        if self._first and self._stops:
            save_stops(self.trained, self._stops)

    def _write_config(self) -> None:
        """Without what is said anew each time."""
        settings = self._config.as_dict() | {"overwrite": False, "resume": False, "resume_anyway": False}
        replace_file(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns whatever a writer raises into TrainingStopped, which says how to resume."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:  # each library that writes has its own
            steps = self.checkpoints.steps()
            hint = f"when there is room, resume from step {steps[-1]}: {self.how_to_resume}" if steps else "start anew"
            raise TrainingStopped(f"{self.path} could not be written: {error}; {hint}") from error


def recorded_setting(folder: Path, name: str) -> Any:
    """A setting by its dotted name, as the run in a folder was given it; None: there is no run, or it has none."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        for key in name.split("."):
            settings = settings[key]
        return settings
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None
