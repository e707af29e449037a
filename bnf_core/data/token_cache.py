"""Tokens on disk, made once on each machine by whichever process comes first, and mapped by all that come after.

    ~/.cache/bnf-align/tokens/     or $BNF_CACHE/tokens
      KEY.lock                     held by the process that makes it
      KEY/index.json               what it is of, by what versions it was made, and how long each column is
          tokens.bin, ends.bin, …  the columns of a table, little-endian, one number after the other
          ….txt                    digests of some of its rows, such as those that are not held out

KEY is of everything that decides tokens: the data, the tokenizer, the chat template and the settings.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import Timeout

from bnf_core.config import DataConfig
from bnf_core.data.rendering import asks_for_date, chat_of
from bnf_core.data.sources import Source
from bnf_core.data.table import DTYPES, About, Builder, Columns, Part
from bnf_core.storage.digests import files_digest, json_digest, tokenizer_digest
from bnf_core.storage.files import lock, replacing
from bnf_core.types import Array

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

FORMAT = 1
INDEX, PROMPTS = "index.json", "prompts"
LIBRARIES = ("transformers", "tokenizers", "jinja2")  # that have a part in making tokens
# Settings by which no token changes, or that are here in another form.
ELSEWHERE = ("path", "chat_template", "date", "cache", "streaming", "shuffle_buffer")


def cache_folder() -> Path:
    """Where tokens are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("BNF_CACHE") or Path(home) / "bnf-align").expanduser() / "tokens"


def made_of(source: Source, config: DataConfig, tokenizer: "Tokenizer") -> dict[str, Any]:
    """All that decides the tokens of a split: the content of its files is known by names, sizes, times of the last
    change and some blocks of bytes, so that none has to be read.

    Raises:
        OSError: a file cannot be read.
    """
    stamps = [(str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in source.files]
    chat = chat_of(config)
    return {
        "data": source.name,
        "files": [*stamps, files_digest(source.files)],
        "tokenizer": tokenizer_digest(tokenizer),
        "chat template": json_digest([tokenizer.chat_template, chat.template]),
        "date": config.date if asks_for_date(tokenizer, chat) else None,
        **{name: value for name, value in asdict(config).items() if name not in ELSEWHERE},
    }


class TokenCache:
    """The tables in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def table(self, of: Mapping[str, Any], make: Callable[[], "Making"], say: Callable[[str], None]) -> Columns:
        """Those that were made of the same before, or made now, while other processes wait.

        Args:
            of: what `made_of` says.
            make: reads the data, when they have to be.
            say: what a person should know.
        Raises:
            OSError: nothing can be written, or locked, here; nothing half-written is left.
        """
        key = hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:24]
        place = self.folder / key
        if (found := self._found(place, say)) is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key}.lock"
        try:
            held = lock(path, wait=False)
        except Timeout:
            say(f"waiting for the process that is making the tokens in {place}")
            held = lock(path, wait=True)
        if not held.is_locked:
            raise OSError(f"the file system of {self.folder} has no locks")
        try:
            if (found := self._found(place, lambda message: None)) is None:
                with replacing(place) as partial:
                    _write(partial, of, make())
                found = _open(place)
        finally:  # `with` would take the lock a second time, and let go of it once
            held.release()
        return found

    def entries(self) -> list["Entry"]:
        """All that is there, whole or not, the one first that was used last.

        Raises:
            OSError: it cannot be read.
        """
        found = []
        for path in self.folder.glob("*"):
            with suppress(FileNotFoundError):  # made or removed meanwhile
                found += [Entry.of(path)] if path.is_dir() else []
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def remove(self, entry: "Entry") -> bool:
        """Whether it was removed: not while it is being made. Who has mapped it keeps what is there.

        Raises:
            OSError: it is not allowed.
        """
        try:
            held = lock(self.folder / f"{entry.folder.name.strip('.').partition('.')[0]}.lock", wait=False)
        except Timeout:
            return False
        try:
            gone = self.folder / f".{entry.folder.name.strip('.')}.removed"  # a kill leaves nothing half there
            entry.folder.rename(gone)
            shutil.rmtree(gone)
        finally:
            held.release()
        return True

    def _found(self, place: Path, say: Callable[[str], None]) -> Columns | None:
        if not place.exists():
            return None
        try:
            columns = _open(place)
            with suppress(OSError):  # another user's
                os.utime(place / INDEX)  # by which `Entry.used` goes
            return columns
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"the tokens in {place} are made again: {error}")
            return None


@dataclass(frozen=True)
class Entry:
    """One table on the disk, for a person."""

    folder: Path
    data: str  # nothing: it is not whole
    rows: int
    tokens: int
    size: int  # bytes
    used: float  # when it was last opened, in seconds since 1970

    @classmethod
    def of(cls, folder: Path) -> "Entry":
        size = sum(file.stat().st_size for file in folder.iterdir())
        try:
            path = folder / INDEX
            index, used = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
            rows, tokens = (index["bytes"][name] // np.dtype(DTYPES[name]).itemsize for name in ("ends", "tokens"))
            return cls(folder, index["of"]["data"], rows, tokens, size, used)
        except (OSError, ValueError, KeyError, TypeError):
            return cls(folder, "", 0, 0, size, folder.stat().st_mtime)


class Making:
    """What a table is made of.

    Args:
        groups: of all rows that were read, also of those that turn out bad.
        parts: the rows as tokens, in order; asking for one may raise whatever makes them bad.
        about: complete once `parts` is at its end.
    """

    def __init__(self, groups: Sequence[int], parts: Iterator[Part], about: About) -> None:
        self.prompts = np.fromiter(dict.fromkeys(groups), "<i8")
        self.parts, self.about = parts, about

    def columns(self) -> Columns:
        """In memory."""
        builder = Builder()
        parts = [builder.add(part) for part in self.parts]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in DTYPES}
        return self._named(builder, arrays)

    def write(self, folder: Path) -> Columns:
        """Into a file for each column, and none of it kept."""
        builder = Builder()
        with ExitStack() as stack:
            files = {name: stack.enter_context(_file(folder, name).open("wb")) for name in DTYPES}
            for part in self.parts:
                for name, array in builder.add(part).items():
                    files[name].write(array.data)
        _file(folder, PROMPTS).write_bytes(self.prompts.data)
        return self._named(builder, {})

    def _named(self, builder: Builder, arrays: Mapping[str, Array]) -> Columns:
        self.about.unwritten = sorted(builder.unwritten)
        return Columns(arrays, list(builder.names), builder.digest, self.prompts, self.about)


def _write(folder: Path, of: Mapping[str, Any], rows: Making) -> None:
    columns = rows.write(folder)
    index = {
        "format": FORMAT,
        "made_by": _versions(),
        "of": dict(of),
        "bytes": {name: _file(folder, name).stat().st_size for name in (*DTYPES, PROMPTS)},
        "names": columns.names,
        "digest": columns.digest,
        "about": asdict(columns.about),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, default=str) + "\n", encoding="utf-8")


def _open(folder: Path) -> Columns:
    """
    Raises:
        OSError, ValueError, KeyError, TypeError: it is not as it was written, or was written by another version.
    """
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    made_by, here = index["made_by"], _versions()
    if index["format"] != FORMAT or made_by != here:
        changed = [
            f"{name} {made_by.get(name)}, now {here.get(name)}" for name in here if made_by.get(name) != here[name]
        ]
        raise ValueError(f"another version wrote them ({', '.join(changed) or 'format ' + str(index['format'])})")
    for name, size in index["bytes"].items():
        if (found := _file(folder, name).stat().st_size) != size:
            raise ValueError(f"{name} has {found:,} bytes, expected {size:,}")
    arrays = {name: _mapped(_file(folder, name), dtype) for name, dtype in DTYPES.items()}
    prompts = _mapped(_file(folder, PROMPTS), "<i8")
    return Columns(arrays, index["names"], index["digest"], prompts, About(**index["about"]), folder)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _mapped(path: Path, dtype: str) -> Array:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)  # which cannot be mapped
    return np.memmap(path, dtype, "r").view(np.ndarray)


def _versions() -> dict[str, str]:
    """Of what makes tokens: of this package its text, which is more exact than its number."""
    own = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    return {"bnf_core.data": own.hexdigest()[:16]} | {name: version(name) for name in LIBRARIES}
