"""The reference's log-odds in a folder, one float32 per completion token, for any number of runs.

    ref/index.json                 what the reference is of, and the shards with their SHA-256
        shard-00000.safetensors    keys (R,) uint64, lengths (R,) int32, log_odds (Σ lengths,) float32

A row is known by `Example.key`, a hash of its tokens. So neither order, epochs, duplicates nor batching matter, and a
folder can serve any part of the data it was made of, or grow by more. Among ten million rows, two of one 64-bit key
have odds of 3 in a million.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from bnf_core.config import DataConfig, HardwareConfig
from bnf_core.data.rendering import asks_for_date, chat_of
from bnf_core.data.table import column
from bnf_core.errors import UserError
from bnf_core.processes import ALONE, Processes
from bnf_core.storage.digests import json_digest, model_digest, tokenizer_digest
from bnf_core.storage.files import agreed, replace_file
from bnf_core.storage.tensors import read_header
from bnf_core.types import Array, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Fingerprint = dict[str, str]  # what the reference depends on, by name

FORMAT = 1
INDEX = "index.json"
DATE = "data.date"  # in a fingerprint


# What a reference is of


def fingerprint(
    model: Path, tokenizer: "Tokenizer", data: DataConfig, hardware: HardwareConfig, dtype: str
) -> Fingerprint:
    """What the log-odds of a row of feedback depend on besides the row. Both backends compute the same: they are no
    part of it.

    Args:
        model: the checkpoint folder.
        tokenizer: and its chat template.
        data: how rows become tokens.
        hardware: how the weights are loaded.
        dtype: of the loaded weights, such as `Engine.dtype`: float32, bfloat16 or float16.
    """
    chat = chat_of(data)
    template = chat.template or tokenizer.chat_template
    given = {DATE: data.date if asks_for_date(tokenizer, chat) else None}
    given["data.template_kwargs"] = json.dumps(data.template_kwargs, sort_keys=True) if data.template_kwargs else None
    return {
        "model": model_digest(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "chat template": json_digest(template) if template else "none",
        **{name: value for name, value in given.items() if value is not None},
        "data.template": data.template,
        "data.max_length": str(data.max_length),
        "dtype": f"{dtype}, 4-bit weights" if hardware.load_in_4bit else dtype,
    }


def recorded_date(folder: str | Path) -> str | None:
    """The day that the chat template was told when a reference was made; None: there is no reference, or its template
    asks for none."""
    try:
        date: str | None = _read_index(Path(folder).expanduser())["fingerprint"].get(DATE)
    except (UserError, AttributeError, KeyError):
        return None  # whoever opens it says what is wrong with it
    return date


def differences(stored: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """`name (there, here)` of every part that differs."""
    names = [name for name in {**stored, **expected} if stored.get(name) != expected.get(name)]
    return [f"{name} ({stored.get(name)}; this run's: {expected.get(name)})" for name in names]


class StoredReference:
    """A folder of log-odds, read as they are asked for; 24 bytes a row stay in memory.

    Shards that are not as they were written are left out and named in `damaged`.

    Raises:
        UserError: the folder holds no reference cache that can be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = _read_index(folder)
        self.fingerprint: Fingerprint = self.index["fingerprint"]
        self.shards: list[dict[str, Any]] = []
        self.damaged: list[str] = []
        keys, numbers, offsets, lengths = ([np.zeros(0, t)] for t in (np.uint64, np.int32, np.int64, np.int32))
        for shard in self.index["shards"]:
            try:
                rows = _read_shard(folder / shard["file"], shard["sha256"])
            except (OSError, ValueError) as error:
                self.damaged.append(f"{folder / shard['file']}: {error}")
                continue
            keys.append(rows[0])
            numbers.append(np.full(len(rows[0]), len(self.shards), np.int32))
            offsets.append(rows[1])
            lengths.append(rows[2])
            self.shards.append(shard)
        order = np.argsort(np.concatenate(keys), kind="stable")
        self.keys: Array = np.concatenate(keys)[order]  # (R,) uint64, ascending
        self._shard, self._offset, self._length = (np.concatenate(a)[order] for a in (numbers, offsets, lengths))

    def __contains__(self, key: int) -> bool:
        return _holds(self.keys, key)

    def __getitem__(self, key: int) -> Array:
        """(tokens of the completion,) float32; the row must be there."""
        at = int(np.searchsorted(self.keys, np.uint64(key)))
        path = self.folder / self.shards[self._shard[at]]["file"]
        count = int(self._length[at])
        try:
            values = np.fromfile(path, "<f4", count, offset=int(self._offset[at]))
        except OSError as error:
            raise UserError(f"{path} can no longer be read: {error.strerror or error}") from error
        if len(values) < count:
            raise UserError(f"{path} was cut short while it was in use: run `bnf reference` again, then resume")
        return values

    def require(self, examples: Sequence[Example]) -> None:
        """Raises UserError, with how many are missing and where the first is from, unless all rows are there."""
        keys = column(examples, "key")
        missing = np.flatnonzero(~np.isin(keys, self.keys))
        if len(missing):
            made_of = "; ".join(f"{name}: {rows}" for name, rows in self.index["data"].items()) or "no data to the end"
            raise UserError(
                f"the reference cache {self.folder} lacks {len(missing):,} of {len(keys):,} rows, the first is "
                f"{examples[int(missing[0])].source or f'row {missing[0]}'}. It is of {made_of}. Run `bnf reference` "
                f"with this data and --output {self.folder}, which adds what is missing"
            )


def open_reference(folder: str | Path, expected: Mapping[str, str]) -> StoredReference:
    """The reference cache in a folder, whole and fit for this run.

    Args:
        expected: this run's `fingerprint`.
    Raises:
        UserError: there is none, a shard is damaged, or it is of another model, tokenizer, ….
    """
    stored = StoredReference(Path(folder).expanduser())
    _require_same(stored, expected, "make one for this run with `bnf reference` and another --output")
    if stored.damaged:
        raise UserError(
            f"the reference cache {stored.folder} is damaged: {'; '.join(stored.damaged)}. Run the `bnf reference` "
            "that made it again: it computes those rows anew and keeps the others"
        )
    return stored


class ReferenceWriter:
    """Makes a folder for StoredReference, or goes on with one: whatever is in it is not asked for again.

    Each shard is whole before the index names it, so a kill loses the shard being computed and nothing else. Rows that
    are there are left out before the others are cut into shards: made in one go or in several, the files are the same.

    Args:
        folder: made where it is not there.
        fingerprint: what the log-odds are of.
        made_by: for information, such as the backend.
        shard_rows: rows of a shard.
        overwrite: begin anew, whatever reference cache is there.
        processes: all make the same calls, on a file system that all see.
    Raises:
        UserError: the folder holds another reference cache, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Fingerprint,
        made_by: Mapping[str, str],
        *,
        shard_rows: int,
        overwrite: bool = False,
        processes: Processes = ALONE,
    ):
        self.folder = folder
        self.shard_rows = shard_rows
        self.keys: Array = np.zeros(0, np.uint64)  # of the rows that are stored, ascending
        self.damaged: list[str] = []  # shards whose rows are to be computed again
        self._index: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": dict(fingerprint),
            "made_by": dict(made_by),
            "data": {},
            "rows": 0,
            "shards": [],
        }
        self._processes = processes
        with agreed(processes):  # all have read what is there before the first one touches it
            self._read(overwrite)
        try:
            self._first(self._prepare)
        except OSError as error:
            raise UserError(f"output {folder} cannot be written: {error.strerror or error}") from error

    def windows(self, examples: Iterable[Example], name: str) -> Iterator[list[Example]]:
        """The rows to be computed, each once, a shard's at a time; `write` a window before asking for the next.

        Args:
            examples: all rows.
            name: where they are from; once all are stored, the index says so.
        """
        window: dict[int, Example] = {}
        count, total = 0, 0
        for example in examples:
            key = example.key
            count, total = count + 1, (total + key) % 2**64
            if key not in window and not _holds(self.keys, key):
                window[key] = example
            if len(window) == self.shard_rows:
                yield list(window.values())
                window = {}
        if window:
            yield list(window.values())
        self._index["data"] |= {name: f"{count:,} rows, sum of keys {total:016x}"}
        self._first(self._write_index)

    def write(self, state: Mapping[str, Array]) -> None:
        """Add a shard, a `ReferenceCache.state`.

        Raises:
            OSError: it could not be written; all shards before it stay.
        """
        self._first(lambda: self._add_shard(state))
        self.keys = np.sort(np.concatenate([self.keys, state["keys"]]), kind="stable")

    def _first(self, work: Callable[[], None]) -> None:
        """Only the first process writes; where it cannot, all raise."""
        with agreed(self._processes):
            if self._processes.rank == 0:
                work()

    def _read(self, overwrite: bool) -> None:
        """Learn what is in the folder, or refuse what is not for us to change."""
        if (self.folder / INDEX).exists() and overwrite:
            _read_index(self.folder)
        elif (self.folder / INDEX).exists():
            stored = StoredReference(self.folder)
            _require_same(stored, self._index["fingerprint"], "choose another --output, or pass --overwrite")
            self.keys, self.damaged = stored.keys, stored.damaged
            self._index |= {"made_by": stored.index["made_by"], "shards": stored.shards}
            self._index["data"] = {} if stored.damaged else stored.index["data"]
        elif held := sorted(path.name for path in self.folder.glob("shard-*")):
            raise UserError(f"output {self.folder} holds {held[0]}, but no {INDEX}: choose another --output")

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_index()
        for path in self.folder.glob("*"):  # what a kill has left, or what is overwritten
            if re.fullmatch(r"\.?shard-\d+\.safetensors(\.partial)?", path.name) and path.name not in self._files():
                path.unlink()

    def _add_shard(self, state: Mapping[str, Array]) -> None:
        taken = self._files()
        name = next(name for name in map(_shard_name, range(len(taken) + 1)) if name not in taken)
        content = safetensors.numpy.save(dict(state))
        replace_file(self.folder / name, content)
        sizes = {"rows": len(state["keys"]), "tokens": len(state["log_odds"])}
        shard = {"file": name, **sizes, "sha256": hashlib.sha256(content).hexdigest()}
        self._index["shards"] = sorted([*self._index["shards"], shard], key=lambda s: (len(s["file"]), s["file"]))
        self._write_index()

    def _files(self) -> set[str]:
        return {shard["file"] for shard in self._index["shards"]}

    def _write_index(self) -> None:
        self._index["rows"] = sum(shard["rows"] for shard in self._index["shards"])
        replace_file(self.folder / INDEX, json.dumps(self._index, indent=2) + "\n")


def _holds(keys: Array, key: int) -> bool:
    """Whether ascending keys have this one."""
    at = int(np.searchsorted(keys, np.uint64(key)))
    return at < len(keys) and int(keys[at]) == key


def _require_same(stored: StoredReference, expected: Mapping[str, str], remedy: str) -> None:
    if different := differences(stored.fingerprint, expected):
        raise UserError(
            f"the reference cache {stored.folder} is of another {' and another '.join(different)}: change it back, "
            f"or {remedy}"
        )


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder} is not a reference cache: it has no {INDEX}. Make one with `bnf reference`")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise UserError(
                f"{path} has format {index['format']}, and this version of bnf-align reads format {FORMAT}: make it "
                "again with `bnf reference`"
            )
        for shard in index["shards"]:
            if not re.fullmatch(r"shard-\d+\.safetensors", shard["file"]) or not isinstance(shard["sha256"], str):
                raise ValueError(f"{shard} is no shard")
        if not (isinstance(index["fingerprint"], dict) and isinstance(index["data"], dict)):
            raise ValueError("fingerprint and data must be objects")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the index of a reference cache ({type(error).__name__}: {error}): name another folder"
        ) from error
    return dict(index)


def _read_shard(path: Path, sha256: str) -> tuple[Array, Array, Array]:
    """Keys, byte offsets of the log-odds in the file, and lengths, (R,) each.

    Raises:
        OSError, ValueError: it is not there, or not as it was written.
    """
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"its SHA-256 is not the one in {INDEX}")
    with safetensors.safe_open(path, framework="numpy") as tensors:
        keys, lengths = tensors.get_tensor("keys"), tensors.get_tensor("lengths")
    first = read_header(path).tensors["log_odds"].start
    offsets = first + 4 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    return keys, offsets, lengths
