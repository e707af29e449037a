"""What a GGUF file says of itself, as github.com/ggml-org/ggml specifies it, read in place and without its weights.

magic, version, counts      "GGUF", uint32, uint64 tensors, uint64 metadata entries
metadata                    name, type, value; strings and arrays begin with their lengths
tensors                     name, dimensions, type, offset from where the data begin
data                        from the next multiple of `general.alignment` on

The package gguf reads the same, but makes an array of every word of a vocabulary: 17 seconds for Gemma's.
"""

import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnf_core.errors import UserError

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)


@dataclass(frozen=True)
class GGUFHeader:
    """
    Args:
        metadata: single values by name; of arrays, how many elements they have.
        types: how many tensors there are of each of ggml's types, by its number.
        size: bytes that the file must have.
    """

    metadata: dict[str, Any]
    types: Counter[int]
    size: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))


class _Cursor:
    """A place in the file, from which values are read one after another."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        self.at += length
        if self.at > len(self.data):
            raise struct.error("a string goes on beyond the end")
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        element, count = self.number("I"), self.number("Q")
        if element in NUMBERS:
            self.at += count * struct.calcsize(NUMBERS[element])
        else:
            for _ in range(count):
                self.value(element)
        return count


def read_gguf_header(path: Path, block_sizes: dict[int, tuple[int, int]]) -> GGUFHeader:
    """
    Args:
        block_sizes: of each of ggml's types, how many weights a block has, and how many bytes that takes.
    Raises:
        UserError: not a GGUF, one of another version, cut short, or with tensors of an unknown type.
    """
    require_gguf(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            header = _read(_Cursor(data), path, block_sizes)
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} ({len(data):,} bytes) is cut short or damaged: its header cannot be read to the end "
                f"({error}). Copy or download it again"
            ) from error
        if len(data) < header.size:
            raise UserError(
                f"{path} is cut short: it has {len(data):,} bytes, and its tensors end at {header.size:,}. "
                "Copy or download it again"
            )
    return header


def require_gguf(path: Path) -> None:
    """
    Raises:
        UserError: the file does not begin as a GGUF does.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'")


def _read(cursor: _Cursor, path: Path, block_sizes: dict[int, tuple[int, int]]) -> GGUFHeader:
    cursor.at = 4
    version = cursor.number("I")
    if version not in VERSIONS:
        known = " or ".join(map(str, VERSIONS))
        raise UserError(f"{path} is a GGUF of version {version}: expected version {known}, little-endian")
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(entries):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.number("I"))
    types: Counter[int] = Counter()
    end = 0
    for _ in range(tensors):
        name, weights = cursor.string(), 1
        for _ in range(cursor.number("I")):
            weights *= cursor.number("Q")
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind not in block_sizes:
            raise UserError(f"{path}: tensor {name} is of ggml's type {kind}, which the package gguf does not know")
        block, size = block_sizes[kind]
        types[kind] += 1
        end = max(end, offset + weights // block * size)
    alignment = metadata.get("general.alignment", 32)
    return GGUFHeader(metadata, types, -(-cursor.at // alignment) * alignment + end)
