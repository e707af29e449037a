"""Checkpoints: all it takes to resume a run as if it had never stopped.

    <run>/checkpoints/step-000040/
      state-00001-of-00002.safetensors   each process's part of the trainable weights, optimizer, random numbers,
      state-00002-of-00002.safetensors   reference
      state.json                         step, place in the data, and what the run is made of: settings, data, model
      SHA256SUMS                         of all these, as `sha256sum -c` reads it
    <run>/checkpoints/grown-….safetensors  what arrays that only grow have had added since the checkpoint before: the
                                         reference of the rows met so far

The schedule and the order of the data follow from the step and the settings, and need no state of their own.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from bnf_core.config import SamplingConfig, TrainConfig
from bnf_core.errors import UserError
from bnf_core.processes import ALONE, Processes
from bnf_core.storage.digests import model_digest
from bnf_core.storage.files import agreed, replacing, sync
from bnf_core.storage.shards import State, StoredArrays, write_state
from bnf_core.types import Array

Facts = dict[str, Any]  # what a run is made of, by name: JSON values
MODEL_WEIGHTS = "weights of the model"  # the name of one of them


class Change(NamedTuple):
    """A fact that is not what it was; None: it was not there, or no longer is."""

    name: str
    before: Any
    now: Any


FORMAT = 2
ABOUT, SUMS = "state.json", "SHA256SUMS"

# Settings that may differ after a resume: the weights a run ends with do not depend on them.
FREE = {"output", "overwrite", "resume", "resume_anyway", "eval_every", "save_every", "keep_checkpoints"}
FREE |= {"report_to", "sample_every", "sample_count", "sample_tokens", "profile", "push_to_hub", "hub_private_repo"}
FREE |= {"reference", "data.cache"}  # the same values, wherever they come from
FREE |= {f"sample.{f.name}" for f in fields(SamplingConfig)}
# Of the last bits only.
FREE |= {"micro_batch_size", "auto_batch", "group_by_length", "packing", "share_prompts", "gradient_checkpointing"}
FREE |= {"hardware.attention_masks", "hardware.compile"}
# Of a run that samples its rows, which are drawn by some of these.
FREE_ONLINE = {name for name in FREE if name.partition(".")[0] not in ("sample", "sample_tokens")}
FREE_ONLINE |= {
    "sample_batch_size",
    "sampler",
    "sampler_kind",
    "judge_workers",
    "judge_seconds",
    "max_failed",
    "eval_samples",
}
# Settings that matter only through the rows and weights they lead to, which are compared themselves.
SOURCES = ("model", "data.", "valid")  # as the names begin
STREAM_SOURCES = ("model", "data.path", "valid")  # of a stream, files are compared, not rows: in full


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int  # optimizer steps taken
    facts: Facts
    position: dict[str, int] | None  # where the data resume, if that does not follow from the step
    arrays: Mapping[str, Array]  # whole; each is read when it is asked for, and then not kept


class Checkpoints:
    """The checkpoints of one run; the newest `keep` stay. Where several processes share the run, all call `save` and
    `newest` together, and see the same folder."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep
        self._grown: list[dict[str, Any]] = []  # files, in their order, and how far each array goes in them
        self._generation = 0

    def save(
        self,
        step: int,
        arrays: State,
        facts: Facts,
        position: Mapping[str, int] | None = None,
        *,
        growing: Mapping[str, Array] | None = None,
        generation: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        """Write a checkpoint, all or nothing, then remove those that are too many. Each process writes its own arrays
        and holds no second copy of them; facts, position and what grows are the first one's.

        Args:
            growing: 1-D arrays that have what they had in the checkpoint before, and perhaps more at their ends: only
                that is written.
            generation: another number than before where they do not, but began anew.
        Raises:
            OSError: a process could not write; all raise, and the checkpoints there are stay.
            ValueError: the processes' arrays do not add up.
        """
        first = processes.rank == 0
        with agreed(processes):
            if first:
                for leftover in self.folder.glob(".step-*"):  # of a save that was killed: it takes room
                    shutil.rmtree(leftover, ignore_errors=True)
        with replacing(self.folder / f"step-{step:06d}", processes) as partial:
            names = _state_files(processes.count)
            with agreed(processes):
                write_state(partial / names[processes.rank], arrays)
                digest = _digest(partial / names[processes.rank])
            digests = [data.decode() for data in processes.gather_bytes(digest.encode())]
            with agreed(processes):
                if first:
                    StoredArrays.open(partial / name for name in names)  # raises where they do not add up
                    self._grow(step, growing or {}, generation)
                    about = {
                        "format": FORMAT,
                        "step": step,
                        "processes": processes.count,
                        "position": None if position is None else dict(position),
                        "facts": facts,
                        "grown": self._grown,
                    }
                    (partial / ABOUT).write_bytes((json.dumps(about, indent=2) + "\n").encode())
                    sums = [*zip(digests, names, strict=True), (_digest(partial / ABOUT), ABOUT)]
                    sums += [(file["sha256"], f"../{file['file']}") for file in self._grown]
                    (partial / SUMS).write_bytes("".join(f"{digest}  {name}\n" for digest, name in sums).encode())
        if first:
            self._prune(step)

    def newest(self, processes: Processes = ALONE) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is as it was written, and of each newer one why it is refused. The first process
        reads and decides for all.

        Raises:
            UserError: not every process sees the checkpoint that the first one sees.
        """
        decision = b""
        with agreed(processes):
            if processes.rank == 0:
                decision = json.dumps(self._newest_whole()).encode()
        name, refused = json.loads(processes.gather_bytes(decision)[0])
        if name is None:
            return None, refused
        folder = self.folder / name
        if processes.any(not folder.is_dir()):
            raise UserError(f"not every process of this run sees {folder}: `output` must be a folder that all share")
        self._grown, self._generation = _about(folder).get("grown", []), 0
        return _open(folder), refused

    def _grow(self, step: int, growing: Mapping[str, Array], generation: int) -> None:
        """Write what the arrays have had added."""
        ends = self._grown[-1]["ends"] if self._grown else {}
        if generation != self._generation or any(len(growing.get(name, ())) < end for name, end in ends.items()):
            self._grown, ends = [], {}
        self._generation = generation
        added = {name: array[ends.get(name, 0) :] for name, array in growing.items()}
        if not any(map(len, added.values())):
            return
        partial = self.folder / ".grown.partial"
        write_state(partial, added)
        digest = _digest(partial)
        name = f"grown-{step:06d}-{digest[:8]}.safetensors"
        partial.replace(self.folder / name)
        sync(self.folder)
        ends = {name: len(array) for name, array in growing.items()}
        self._grown = [*self._grown, {"file": name, "sha256": digest, "ends": ends}]

    def steps(self) -> list[int]:
        """The steps of all checkpoints, whole or not."""
        return [step for step, _ in self._by_step()]

    def _newest_whole(self) -> tuple[str | None, list[str]]:
        """The name of its folder, and why newer ones are refused."""
        refused: list[str] = []
        for _, folder in reversed(self._by_step()):
            try:
                _verify(folder)
                _open(folder)
                return folder.name, refused
            except (OSError, ValueError, KeyError) as error:
                refused.append(f"checkpoint {folder} is refused: {error}")
        return None, refused

    def _by_step(self) -> list[tuple[int, Path]]:
        found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in self.folder.glob("step-*"))
        return sorted((int(match[1]), path) for match, path in found if match)

    def _prune(self, step: int) -> None:
        """Later steps than the one just written were refused: this run has taken another way."""
        found = self._by_step()
        stay = [path for at, path in found if at <= step][-self.keep :]
        for path in [path for _, path in found if path not in stay]:
            shutil.rmtree(path, ignore_errors=True)
        needed = {name for path in stay for name in _grown_files(path)}
        for path in self.folder.glob("grown-*.safetensors"):
            if path.name not in needed:
                path.unlink(missing_ok=True)


def _state_files(count: int) -> list[str]:
    return [f"state-{rank + 1:05d}-of-{count:05d}.safetensors" for rank in range(count)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path) -> None:
    """Raises OSError, ValueError or KeyError where anything is missing or not as it was written."""
    lines = [line.partition("  ") for line in (folder / SUMS).read_text().splitlines()]
    sums = {name: digest for digest, _, name in lines}

    def verify(name: str) -> None:
        path = folder / name
        if not path.exists():
            raise ValueError(f"{name} is missing")
        if _digest(path) != sums.get(name):
            size = path.stat().st_size
            raise ValueError(f"{name} ({size:,} bytes) is damaged: its SHA-256 is not the one in {SUMS}")

    verify(ABOUT)
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    if about["format"] != FORMAT:
        raise ValueError(f"it has format {about['format']}, and this version of bnf-align reads format {FORMAT}")
    for name in [*_state_files(about["processes"]), *(f"../{file['file']}" for file in about.get("grown", []))]:
        verify(name)


def _grown_files(folder: Path) -> list[str]:
    """What a checkpoint needs beside it; a damaged one needs nothing."""
    try:
        return [file["file"] for file in _about(folder).get("grown", [])]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _about(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / ABOUT).read_text(encoding="utf-8")))


def _open(folder: Path) -> Checkpoint:
    about = _about(folder)
    grown = [folder.parent / file["file"] for file in about.get("grown", [])]
    arrays = StoredArrays.open((folder / name for name in _state_files(about["processes"])), grown)
    return Checkpoint(folder, about["step"], about["facts"], about["position"], arrays)


def run_facts(config: TrainConfig, model: Path, rows: str, held_out: str | None) -> Facts:
    """What decides a run's result.

    Args:
        config: the settings.
        model: the folder of the model that training starts from.
        rows: digest of the training rows: `rows_digest`, in which the tokenizer, template and length limit show, or,
            of a stream, `files_digest` with whatever else makes rows of the files.
        held_out: digest of the held-out rows; None: there are none.
    """
    free = FREE if config.command == "train" else FREE_ONLINE
    settings = {name: value for name, value in config.flat().items() if name not in free}
    settings = {name: value for name, value in settings.items() if not f"{name}.".startswith("objective.")}
    settings["objective"] = str(config.make_objective())  # however it was written
    return settings | {"training rows": rows, "held-out rows": held_out, MODEL_WEIGHTS: model_digest(model)}


def changes(before: Facts, now: Facts) -> list[Change]:
    """The facts that differ; none where only names of the same content do."""
    unknown = {"objective": "bnf", "deterministic": False, "balance_labels": False, "router_aux_loss": 0.0}  # earlier
    before = unknown | dict(before)
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if before.get("data.streaming") or now.get("data.streaming"):
        same_content = all(name in STREAM_SOURCES for name in changed)
    else:
        same_content = all(name.startswith(SOURCES) for name in changed)
    return [] if same_content else [Change(name, before.get(name), now.get(name)) for name in changed]
