"""Checkpoints: all it takes to go on with a run as if it had never stopped.

    <run>/checkpoints/step-000040/state.safetensors   trainable weights, optimizer, random numbers, reference
                                  state.json          step, and what the run is made of: settings, data, model
                                  SHA256SUMS          of both files, as `sha256sum -c` reads it

The schedule and the order of the data follow from the step and the settings, and need no state of their own.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy

from bnf_core.batching import Array, Example
from bnf_core.config import TrainConfig
from bnf_core.errors import UserError
from bnf_core.files import replacing

Facts = dict[str, Any]  # what a run is made of, by name: JSON values

FORMAT = 1
STATE, ABOUT, SUMS = "state.safetensors", "state.json", "SHA256SUMS"

# Settings that may differ after a resume: the weights a run ends with do not depend on them.
FREE = {"output", "overwrite", "resume", "resume_anyway", "eval_every", "save_every", "keep_checkpoints"}
FREE |= {"micro_batch_size"}  # changes the last bits only
# Settings that matter only through the rows and weights they lead to, which are compared themselves.
SOURCES = ("model", "data.", "valid")  # as the names begin


@dataclass(frozen=True)
class Piece:
    """A process's part of an array that is split along its first dimension."""

    array: Array  # (rows here, ...)
    start: int  # first row in the whole
    shape: tuple[int, ...]  # of the whole


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int  # optimizer steps taken
    facts: Facts
    arrays: dict[str, Array]


class Checkpoints:
    """The checkpoints of one run; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def save(self, step: int, arrays: Mapping[str, Array], facts: Facts) -> None:
        """Write a checkpoint, all or nothing, then remove those that are too many.

        Raises:
            OSError: it could not be written; those there are stay.
        """
        about = {"format": FORMAT, "step": step, "facts": facts}
        contents = {
            STATE: safetensors.numpy.save(dict(arrays)),
            ABOUT: (json.dumps(about, indent=2) + "\n").encode(),
        }
        sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
        with replacing(self.folder / f"step-{step:06d}") as partial:
            for name, content in (contents | {SUMS: sums.encode()}).items():
                (partial / name).write_bytes(content)
        self._prune(step)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is as it was written, and of each newer one why it is refused."""
        refused: list[str] = []
        for _, folder in reversed(self._by_step()):
            try:
                return _read(folder), refused
            except (OSError, ValueError, KeyError) as error:
                refused.append(f"checkpoint {folder} is refused: {error}")
        return None, refused

    def steps(self) -> list[int]:
        """The steps of all checkpoints, whole or not."""
        return [step for step, _ in self._by_step()]

    def _by_step(self) -> list[tuple[int, Path]]:
        found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in self.folder.glob("step-*"))
        return sorted((int(match[1]), path) for match, path in found if match)

    def _prune(self, step: int) -> None:
        """Later steps than the one just written were refused: this run has taken another way."""
        found = self._by_step()
        stay = [path for at, path in found if at <= step][-self.keep :]
        for path in [path for _, path in found if path not in stay] + list(self.folder.glob(".step-*")):
            shutil.rmtree(path, ignore_errors=True)


def _read(folder: Path) -> Checkpoint:
    """Raises OSError, ValueError or KeyError where anything is missing or not as it was written."""
    contents = {name: (folder / name).read_bytes() for name in (STATE, ABOUT)}
    lines = [line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines()]
    for name, content in contents.items():
        if [hashlib.sha256(content).hexdigest(), name] not in lines:
            raise ValueError(f"{name} ({len(content):,} bytes) is damaged: its SHA-256 is not the one in {SUMS}")
    about = json.loads(contents[ABOUT])
    if about["format"] != FORMAT:
        raise ValueError(f"it has format {about['format']}, and this version of bnf-align reads format {FORMAT}")
    return Checkpoint(folder, about["step"], about["facts"], safetensors.numpy.load(contents[STATE]))


def run_facts(config: TrainConfig, model: Path, rows: Sequence[Example], held_out: Sequence[Example] | None) -> Facts:
    """What decides a run's result. The tokenizer, template and length limit show in the tokenised rows."""
    settings = {name: value for name, value in _flat(config.as_dict()) if name not in FREE}
    return settings | {
        "training rows": _rows_digest(rows),
        "held-out rows": None if held_out is None else _rows_digest(held_out),
        "weights of the model": model_digest(model),
    }


def changes(before: Facts, now: Facts) -> list[str]:
    """`name: before → now` of each fact that differs; none where only names of the same content do."""
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if all(name.startswith(SOURCES) for name in changed):
        return []
    return [f"{name}: {before.get(name)} → {now.get(name)}" for name in changed]


def under(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Those of the arrays whose names begin with `prefix/`, by the rest of their names."""
    return {name.removeprefix(f"{prefix}/"): a for name, a in arrays.items() if name.startswith(f"{prefix}/")}


def require_same_shapes(saved: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError where saved weights are not of the names and shapes that the model has."""
    for name in sorted(saved.keys() | shapes.keys()):
        here, there = shapes.get(name, "absent"), saved[name].shape if name in saved else "absent"
        if here != there:
            raise UserError(f"the checkpoint does not fit the model: {name} is {there} in one and {here} in the other")


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _rows_digest(rows: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for e in rows:
        digest.update(repr((e.prompt_ids, e.completion_ids, e.label, e.group)).encode())
    return f"{len(rows):,} rows, SHA-256 {digest.hexdigest()[:16]}"


def model_digest(folder: Path, blocks: int = 16, block: int = 4096) -> str:
    """Of the configuration, and of every tensor's name, shape and some blocks of its bytes: reading whole
    checkpoints of many gigabytes would delay the start of every run, and training changes every block."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            digest.update(header)
            tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
            for name in sorted(tensors):
                start, end = (8 + size + offset for offset in tensors[name]["data_offsets"])
                step = max(block, (end - start) // blocks)
                for at in range(start, end, step):
                    file.seek(at)
                    digest.update(file.read(min(block, end - at)))
    return f"SHA-256 {digest.hexdigest()[:16]}"
