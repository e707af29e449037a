"""The folder of one run: config.yaml, metrics.jsonl, checkpoints, what was trained, run.png."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from bnf_core.config import TrainConfig
from bnf_core.data.tokenization import save_stops
from bnf_core.errors import TrainingStopped, UserError
from bnf_core.models.adapters import CONFIG, with_base
from bnf_core.processes import ALONE, Processes
from bnf_core.protocol import Engine
from bnf_core.steps.metrics import Metrics, with_present_names
from bnf_core.storage.checkpoints import Checkpoints, Facts
from bnf_core.storage.files import held, replace_file
from bnf_core.storage.shards import joined
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

    @property
    def how_to_go_on(self) -> str:
        """After a failure: from the newest checkpoint, if there is one."""
        steps = self.checkpoints.steps()
        return f"Resume from step {steps[-1]}: {self.how_to_resume}" if steps else "There is no checkpoint: start anew"

    def held(self) -> AbstractContextManager[None]:
        """Within it other runs are kept out of the folder, which is made where it is not there.

        Raises:
            UserError: another run has the folder, or it cannot be made.
        """
        return held(self.path, "run", self.processes)

    def start(self) -> None:
        """Begin a run, without what an earlier one left.

        Raises:
            UserError: it holds a run already, and the config says neither to overwrite nor to resume it.
        """
        self.processes.barrier()  # nobody writes before everybody has read what is there
        if not self._first:
            return
        occupied = self._metrics.exists() or bool(self.checkpoints.steps())
        if occupied:
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
            if occupied:  # the metrics go last: as long as they are there, the folder counts as holding a run
                shutil.rmtree(self.checkpoints.folder, ignore_errors=True)
                for name in ("adapter", "model", "tensorboard", "samples", "sampler", "export"):
                    shutil.rmtree(self.path / name, ignore_errors=True)
                for name in (
                    "samples.jsonl",
                    "samples.md",
                    "tokens.jsonl",
                    "rows.json",
                    "trackers.json",
                    "metrics.jsonl",
                ):
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
        self,
        step: int,
        engine: Engine,
        more: Mapping[str, Array],
        growing: Mapping[str, Array],
        generation: int,
        facts: Facts,
        position: Position | None,
    ) -> None:
        """A checkpoint of the engine, `more` arrays and what is `growing`, then what is trained."""
        arrays = joined(engine.state(), more)
        with self.writing():
            self.checkpoints.save(
                step, arrays, facts, position, growing=growing, generation=generation, processes=self.processes
            )
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
            hint = f"When there is room, {self.how_to_go_on[0].lower()}{self.how_to_go_on[1:]}"
            raise TrainingStopped(f"{self.path} could not be written: {error}. {hint}") from error


def recorded_setting(folder: Path, name: str) -> Any:
    """A setting by its dotted name, as the run in a folder was given it; None: there is no run, or it has none."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        for key in name.split("."):
            settings = settings[key]
        return settings
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None
