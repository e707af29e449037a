"""Arrays on disk that several processes wrote, each its own part of them, and that any number of processes may read."""

import errno
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors import safe_open

from bnf_core.errors import UserError
from bnf_core.storage.tensors import TensorWriter
from bnf_core.types import Array

BLOCK = 1 << 24  # bytes of a piece to hold at a time while an array is put together
RANK_AXIS = {"lora_A": 0, "lora_B": 1, "lora_a": 1, "lora_b": 0}  # of PEFT's matrices and of mlx-lm's

# What an engine's and a reference's arrays are kept under in a checkpoint: `weights/…`.
WEIGHTS, OPTIMIZER, REFERENCE = "weights", "optimizer", "reference"
REFERENCE_WEIGHTS = "reference_weights"  # those of a reference that was refreshed
BASELINE = "baseline"  # what an objective compares rewards with, where that runs on


@dataclass(frozen=True)
class Shard:
    """One process's part of an array that is split along its first dimension.

    Raises:
        ValueError: it does not fit into the whole.
    """

    array: Array  # (rows here, ...); there may be none
    start: int  # its first row in the whole
    shape: tuple[int, ...]  # of the whole

    def __post_init__(self) -> None:
        here = self.array.shape
        if not here or here[1:] != tuple(self.shape[1:]) or not 0 <= self.start <= self.shape[0] - here[0]:
            raise ValueError(f"a piece of shape {here} from row {self.start} does not fit into {self.shape}")


# What one process saves. Every row of every array is saved by exactly one process: what all have alike, one of them
# gives; what each has of its own, such as the state of its random numbers, are the rows of one array.
State = Mapping[str, Array | Shard]
V = TypeVar("V")


class Taken(Mapping[str, Array | Shard]):
    """Arrays of a model, each copied when it is asked for, as it then is: what is saved one by one is not in memory
    twice."""

    def __init__(self, take: Mapping[str, Callable[[], Array | Shard]]):
        self._take = dict(take)

    def __getitem__(self, name: str) -> Array | Shard:
        return self._take[name]()

    def __contains__(self, name: object) -> bool:  # Mapping's own would copy the array
        return name in self._take

    def __iter__(self) -> Iterator[str]:
        return iter(self._take)

    def __len__(self) -> int:
        return len(self._take)


def joined(*states: State) -> State:
    """All their arrays; none is copied before it is asked for."""
    return Taken({name: partial(state.__getitem__, name) for state in states for name in state})


def write_state(path: Path, state: State) -> None:
    """Write one process's arrays to the disk, one after another.

    Raises:
        OSError: the disk is full, writing is not allowed, or this process does not see the folder.
    """
    if not path.parent.is_dir():
        message = "this process does not see it: all processes of a run must share its folder"
        raise FileNotFoundError(errno.ENOENT, message, str(path.parent))
    pieces: dict[str, Any] = {}
    with TensorWriter(path, state, {"pieces": ""}) as file:
        for name in state:
            value = state[name]
            if isinstance(value, Shard):
                pieces[name] = {"start": value.start, "shape": list(value.shape)}
                value = value.array
            file.add(name, value)
        file.metadata["pieces"] = json.dumps(pieces)


class _Part(NamedTuple):
    """Some rows of an array, or all, in one file."""

    file: Path
    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]  # of the whole
    rows: range  # of the whole; a number counts as one row


class StoredArrays(Mapping[str, Array]):
    """Arrays by name, each read and put together when it is asked for, and then not kept: reading them one by one
    takes the memory of one."""

    def __init__(self, parts: Mapping[str, Sequence[_Part]]):
        self._parts = parts

    @classmethod
    def open(cls, files: Iterable[Path], grown: Sequence[Path] = ()) -> "StoredArrays":
        """Those of all the files; only the headers are read.

        Args:
            grown: more files, of arrays whose rows go on from one to the next.
        Raises:
            ValueError: rows of an array are missing, or there twice.
        """
        parts: dict[str, list[_Part]] = {}
        for path in files:
            with safe_open(path, "np") as file:
                pieces = json.loads((file.metadata() or {}).get("pieces", "{}"))
                for name in file.keys():  # noqa: SIM118, for it is no mapping
                    here = file.get_slice(name)
                    shape = tuple(here.get_shape())
                    rows = range(_rows(shape))
                    if name in pieces:
                        start, shape = pieces[name]["start"], tuple(pieces[name]["shape"])
                        rows = range(start, start + len(rows))
                    parts.setdefault(name, []).append(_Part(path, name, here.get_dtype(), shape, rows))
        parts |= _going_on(grown)
        for found in parts.values():
            _require_every_row_once(found)
        return cls({name: [part for part in found if part.rows] or found[:1] for name, found in parts.items()})

    def __getitem__(self, name: str) -> Array:
        parts = self._parts[name]
        if len(parts) == 1:
            with safe_open(parts[0].file, "np") as file:
                whole: Array = file.get_tensor(parts[0].name)
                return whole
        return self.rows(name, 0, _rows(parts[0].shape))

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Some rows of an array that has a first dimension; no others are read."""
        parts = self._parts[name]
        with safe_open(parts[0].file, "np") as file:
            dtype = file.get_slice(parts[0].name)[:0].dtype
        found = np.empty((stop - start, *parts[0].shape[1:]), dtype)
        at_a_time = max(1, BLOCK // max(1, found[:1].nbytes))
        for part in parts:
            first, last = max(start, part.rows.start), min(stop, part.rows.stop)
            if first >= last:
                continue
            with safe_open(part.file, "np") as file:
                stored = file.get_slice(part.name)
                for at in range(first, last, at_a_time):
                    end = min(at + at_a_time, last)
                    found[at - start : end - start] = stored[at - part.rows.start : end - part.rows.start]
        return found

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the array
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def renamed(self, names: Mapping[str, str]) -> "StoredArrays":
        """Some of them under other names, {new: old}."""
        return StoredArrays({new: self._parts[old] for new, old in names.items()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: parts[0].shape for name, parts in self._parts.items()}


def _going_on(files: Sequence[Path]) -> dict[str, list[_Part]]:
    parts: dict[str, list[_Part]] = {}
    for path in files:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118, for it is no mapping
                here, before = file.get_slice(name), parts.setdefault(name, [])
                start = before[-1].rows.stop if before else 0
                shape = tuple(here.get_shape())
                before.append(_Part(path, name, here.get_dtype(), shape, range(start, start + shape[0])))
    return {
        name: [part._replace(shape=(found[-1].rows.stop, *part.shape[1:])) for part in found]
        for name, found in parts.items()
    }


def rows_of(arrays: Mapping[str, Array], name: str, start: int, stop: int) -> Array:
    """Some rows of one of the arrays; of those on the disk no others are read."""
    return arrays.rows(name, start, stop) if isinstance(arrays, StoredArrays) else arrays[name][start:stop]


def _rows(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


def _require_every_row_once(parts: Sequence[_Part]) -> None:
    name, shape = parts[0].name, parts[0].shape
    kinds = {(part.dtype, part.shape) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"{name} is not the same in all files: {sorted(kinds)}")
    end = 0
    for rows in sorted((part.rows for part in parts if part.rows), key=lambda rows: rows.start):
        if rows.start != end:
            what = f"rows {end} to {rows.start} are missing" if rows.start > end else f"row {rows.start} is there twice"
            raise ValueError(f"{name} of shape {shape}: {what}")
        end = rows.stop
    if end != _rows(shape):
        raise ValueError(f"{name} of shape {shape}: rows {end} to {_rows(shape)} are missing")


def put_under(prefix: str, arrays: Mapping[str, V]) -> dict[str, V]:
    """The same by the names `prefix/…`, from which `under` brings them back."""
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def under(prefix: str, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    """Those of the arrays whose names begin with `prefix/`, by the rest of their names; none is read before it is
    asked for."""
    names = {name.removeprefix(f"{prefix}/"): name for name in arrays if name.startswith(f"{prefix}/")}
    if isinstance(arrays, StoredArrays):
        return arrays.renamed(names)
    return {short: arrays[name] for short, name in names.items()}


def shapes_of(arrays: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """Of those on the disk only the headers have been read."""
    return arrays.shapes() if isinstance(arrays, StoredArrays) else {name: a.shape for name, a in arrays.items()}


def require_same_shapes(saved: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError where saved weights are not of the names and shapes that the model has."""
    stored = shapes_of(saved)
    for name in sorted(stored.keys() | shapes.keys()):
        there, here = stored.get(name), shapes.get(name)
        if here != there:
            raise UserError(
                f"the checkpoint does not fit the model: {name} {_difference(name, there, here)}. What is trained "
                "cannot change within a run: restore the settings it began with, or start a new one with --overwrite"
            )


def _difference(name: str, there: tuple[int, ...] | None, here: tuple[int, ...] | None) -> str:
    if here is None:
        return "is in the checkpoint, and is not trained here"
    if there is None:
        return "is trained here, and is not in the checkpoint"
    axis = next((axis for part, axis in RANK_AXIS.items() if part in name.split(".")), None)
    if axis is not None and len(there) == len(here) == 2 and there[1 - axis] == here[1 - axis]:
        return f"has rank {there[axis]} in the checkpoint and {here[axis]} here (lora.rank)"
    return f"is of shape {there} in the checkpoint and {here} here"
