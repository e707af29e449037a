"""The folder of one run: config.yaml, metrics.jsonl, adapter, run.png."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from bnf_core.config import TrainConfig
from bnf_core.errors import UserError


class RunFolder:
    """Raises UserError where the folder holds a run already and `overwrite` is not set."""

    def __init__(self, config: TrainConfig):
        self.path = Path(config.output)
        self.adapter = self.path / "adapter"
        self._metrics = self.path / "metrics.jsonl"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file: expected a folder")
        if self._metrics.exists():
            if not config.overwrite:
                raise UserError(f"{self.path} already holds a run: choose another --output, or pass --overwrite")
            self._metrics.unlink()
            shutil.rmtree(self.adapter, ignore_errors=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output {self.path}: {error.strerror}") from error
        (self.path / "config.yaml").write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl, on disk before the next step begins."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())
