"""Finished runs as a report shows them: what was trained on what, metrics, rows, samples, single tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout

from bnf_align.run import row_counts, token_log
from bnf_align.run.pictures import read_metrics
from bnf_align.run.scoring import shown
from bnf_core.errors import UserError
from bnf_core.storage.files import lock

# Settings that say what was trained on what, by their dotted names.
SETTINGS = {
    "model": "model",
    "data": "data.path",
    "held out": "valid",
    "objective": "objective",
    "trained": "fine_tune_type",
    "learning rate": "optimizer.learning_rate",
    "schedule": "optimizer.schedule",
    "rows a step": "batch_size",
    "seed": "seed",
    "backend": "hardware.backend",
}
HELD_OUT = ("data.path", "valid", "valid_fraction")  # what makes the held-out rows of two runs the same


@dataclass(frozen=True)
class Run:
    """
    Args:
        name: its folder's, as short as tells it from the others.
        lines: of metrics.jsonl.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    lines: list[dict[str, Any]]

    def setting(self, dotted: str) -> Any:
        """None: it has none."""
        value: Any = self.settings
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def about(self) -> dict[str, str]:
        return {name: _in_words(self.setting(dotted)) for name, dotted in SETTINGS.items()}

    @property
    def train(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("kind") == "train"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("kind") == "eval"]

    @property
    def steps(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    def metrics(self) -> dict[str, tuple[str, str]]:
        """By name, before and after."""
        if not self.evaluations:
            return {}
        first, last = self.evaluations[0], self.evaluations[-1]
        return {name: (shown(first.get(name)), shown(last.get(name))) for name in last if name not in ("kind", "step")}

    @cached_property
    def rows(self) -> dict[str, row_counts.Counts]:
        return row_counts.read(self.folder)

    @cached_property
    def tokens(self) -> list[token_log.Line]:
        return token_log.read(self.folder / token_log.NAME)

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Of each prompt its first and its last completion."""
        path = self.folder / "samples.jsonl"
        lines = (
            [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n") if text] if path.exists() else []
        )
        found: dict[str, dict[str, Any]] = {}
        for line in sorted(lines, key=lambda line: int(line["step"])):
            found.setdefault(line["prompt"], {**line, "before": line["completion"]})["after"] = line["completion"]
        return list(found.values())

    def coloured(self, count: int = 6) -> list[dict[str, Any]]:
        """Some held-out completions, each token with how far it went from the first to the last evaluation."""
        if len(self.tokens) < 2:
            return []
        first, last = self.tokens[0]["rows"], self.tokens[-1]["rows"]
        found = []
        for before, after in list(zip(first, last, strict=True))[:count]:
            shifts = [b - a for a, b in zip(before["log_odds"], after["log_odds"], strict=True)]
            found.append({"label": after["label"], "tokens": list(zip(after["tokens"], shifts, strict=True))})
        return found


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """
    Raises:
        UserError: a folder without a run, one that is being written, or runs that cannot be compared.
    """
    names = _short(folders)
    runs = [_read(folder, name) for folder, name in zip(folders, names, strict=True)]
    for run in runs[1:]:
        for dotted in HELD_OUT:
            a, b = runs[0].setting(dotted), run.setting(dotted)
            if a != b:
                raise UserError(
                    f"{runs[0].folder} and {run.folder} cannot be compared, for their held-out rows differ: {dotted} "
                    f"is {_in_words(a)} and {_in_words(b)}. Report each by itself"
                )
    return runs


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Expected a run of `bnf train` or the folder of an experiment")
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder}: no metrics.jsonl. Expected the folder of a run, or of an experiment")
    _require_finished(folder)
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'} cannot be read: {error}. Expected what `bnf train` wrote") from error
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder}: metrics.jsonl is empty: the run has not taken a step")
    return Run(name, folder, settings if isinstance(settings, dict) else {}, lines)


def _require_finished(folder: Path) -> None:
    try:
        held = lock(folder / ".lock", wait=False)
    except Timeout as error:
        raise UserError(f"{folder}: a run is writing to it. Wait for its end") from error
    except OSError:  # a folder that may only be read
        return
    held.release()


def _short(folders: Sequence[Path]) -> list[str]:
    """Each by its last part, or by as many as tell them apart."""
    for parts in range(1, 10):
        names = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(folders):
            return names
    raise UserError("the same run is given twice: name each once")


def _in_words(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        rest = ", ".join(f"{k}={v}" for k, v in value.items() if k != "name")
        return f"{value.get('name', '')}{f' ({rest})' if rest else ''}".strip()
    return f"{value:g}" if isinstance(value, float) else str(value)
