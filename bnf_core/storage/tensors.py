"""Safetensors files (huggingface.co/docs/safetensors): what their headers say, and tensors by their place in the file.

8 bytes     length of the header, little-endian
header      JSON: name → dtype, shape, data_offsets; and __metadata__
the rest    the tensors' bytes, row-major, little-endian
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from bnf_core.errors import UserError
from bnf_core.storage.files import sync
from bnf_core.types import Array

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of weights, by safetensors' names
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # which NumPy itself does not have
INDEX = "model.safetensors.index.json"  # says which file holds which tensor of a checkpoint
SERIES = re.compile(r"model-\d+-of-(\d+)\.safetensors")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}
CODES = {np.dtype(kind): code for code, kind in {"F64": "f8", "F32": "f4", "F16": "f2", "BOOL": "?"}.items()}
CODES |= {np.dtype(f"{kind.lower()}{size}"): f"{kind}{8 * size}" for kind in "IU" for size in (1, 2, 4, 8)}
CODES |= {BFLOAT16: "BF16"}  # safetensors' names by NumPy's


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, unread."""

    file: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int  # its first byte in the file
    end: int

    def float32(self) -> Array:
        """A floating-point tensor, widened.

        Raises:
            KeyError: it is of another dtype than those of FLOATS.
            OSError: the file cannot be read.
        """
        with self.file.open("rb") as opened:
            opened.seek(self.start)
            data = opened.read(self.end - self.start)
        return np.frombuffer(data, DTYPES[FLOATS[self.dtype]]).reshape(self.shape).astype(np.float32)


@dataclass(frozen=True)
class Header:
    raw: bytes  # as it is in the file
    tensors: Mapping[str, StoredTensor]


def read_header(file: Path) -> Header:
    """
    Raises:
        OSError, ValueError: the file cannot be read, or does not begin with a header.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        raw = opened.read(length)
    described = {name: value for name, value in json.loads(raw).items() if name != "__metadata__"}
    tensors = {}
    for name, about in described.items():
        start, end = (8 + length + offset for offset in about["data_offsets"])
        tensors[name] = StoredTensor(file, about["dtype"], tuple(about["shape"]), start, end)
    return Header(raw, tensors)


class TensorWriter:
    """A safetensors file, written tensor by tensor, of which none is kept. The header comes last, into room that was
    left for it. To be used in `with`; at its end everything is on the disk.

    Args:
        names: of all tensors to come.
        metadata: to be written with them; what is put in before the end is written, too.
    Raises:
        OSError: the disk is full, or writing is not allowed.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, Any]):
        self.metadata = dict(metadata)
        self._path, self._file = path, path.open("wb")
        # A name is there once, and once more in what is said of a shard; beside it are a dozen numbers.
        self._room = 8 * -(-sum(4 * len(json.dumps(name)) + 512 for name in [*names, *self.metadata]) // 8)
        self._file.seek(8 + self._room)
        self._header: dict[str, Any] = {}
        self._end = 0

    def add(self, name: str, array: Array) -> None:
        """In any memory layout; written row by row."""
        data = np.asarray(array, order="C")  # ascontiguousarray would give a number a dimension
        if data.dtype.byteorder == ">":
            data = data.astype(data.dtype.newbyteorder("<"))
        self._file.write(data.reshape(-1).view(np.uint8).data)
        ends = [self._end, self._end + data.nbytes]
        self._header[name] = {"dtype": CODES[data.dtype], "shape": list(data.shape), "data_offsets": ends}
        self._end = ends[1]

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            header = json.dumps({"__metadata__": self.metadata, **self._header}, separators=(",", ":")).encode()
            assert len(header) <= self._room, "a name that was not announced"
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        sync(self._path)


def require_whole(file: Path) -> None:
    """
    Raises:
        UserError: the header cannot be read, or the file is not exactly as long as the header says.
    """
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        size = f" ({file.stat().st_size:,} bytes)" if file.exists() else ""
        raise UserError(f"{file}{size} is not a whole safetensors file ({error}): copy or download it again") from error


def float_tensors(file: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a file that holds only floating-point ones, by name.

    Raises:
        UserError: the file is damaged, or a tensor is of another dtype.
    """
    require_whole(file)
    tensors = read_header(file).tensors
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{file}: {name} has dtype {tensor.dtype}: expected {', '.join(FLOATS)}")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint folder's weights: those that its index names, or without an index the only one,
    or a whole series. All `model*.safetensors` belong to it, because mlx-lm reads all, and transformers does not.

    Raises:
        UserError: one is missing, or there are others, such as those of an older save: it cannot be told which are the
            model.
    """
    files = sorted(folder.glob("model*.safetensors"))
    there = {path.name for path in files}
    index = folder / INDEX
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no index of weights: expected JSON with a weight_map: {error}") from error
        if absent := sorted(named - there):
            raise UserError(f"model {folder}: {INDEX} names {', '.join(absent)}, which is not there: copy it again")
        said = f"{INDEX} names {', '.join(sorted(named))}"
    else:
        series = [SERIES.fullmatch(name) for name in there]
        whole = {f"model-{i:05}-of-{len(there):05}.safetensors" for i in range(1, len(there) + 1)}
        named = there if len(there) < 2 or there == whole else set()
        said = f"there is no {INDEX}"
        if not named and all(series) and len({match[1] for match in series if match}) == 1:
            raise UserError(
                f"model {folder}: files of the series {', '.join(sorted(there))} are missing: copy it again"
            )
    if others := sorted(there - named):
        raise UserError(
            f"model {folder}: which files are the model cannot be told: {said}, and {', '.join(others)} are there. "
            "Files of an older save, or of another precision, have to go"
        )
    return files


def model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder's weight files, by name; only the headers are read.

    Raises:
        UserError: as `weight_files`; or a tensor is in two files.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, tensor in read_header(file).tensors.items():
            if name in found:
                raise UserError(
                    f"model {folder}: {name} is in {found[name].file.name} and in {file.name}: which is the model's "
                    "cannot be told. Copy it again"
                )
            found[name] = tensor
    return found


def rounded(x: Array, dtype: str) -> Array:
    """float32 to the nearest values of float32, float16 or bfloat16, ties to even; still float32."""
    return x.astype(DTYPES[dtype]).astype(np.float32)
