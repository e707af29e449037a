"""Safetensors files (huggingface.co/docs/safetensors): what their headers say, and tensors by their place in the file.

8 bytes     length of the header, little-endian
header      JSON: name → dtype, shape, data_offsets; and __metadata__
the rest    the tensors' bytes, row-major, little-endian
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from bnf_core.errors import UserError
from bnf_core.types import Array

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of weights, by safetensors' names
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # which NumPy itself does not have
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}


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


def model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder's weight files, by name; only the headers are read."""
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in read_header(file).tensors.items()}


def rounded(x: Array, dtype: str) -> Array:
    """float32 to the nearest values of float32, float16 or bfloat16, ties to even; still float32."""
    return x.astype(DTYPES[dtype]).astype(np.float32)
