"""What rows, files, a model and a tokenizer are known by: digests of their content."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bnf_core.storage.tensors import read_header, weight_files
from bnf_core.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def rows_digest(rows: Iterable[Example]) -> str:
    """Of tokenised rows: all of them, in their order."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        digest.update(content(row))
        count += 1
    return named_digest(count, digest)


def content(row: Example) -> bytes:
    """What counts of a row."""
    parts = (row.prompt_ids, row.completion_ids, row.label, row.group)
    more = (*(() if row.trained is None else (row.trained,)), *(() if row.weight == 1 else (row.weight,)))
    return repr((*parts, *more)).encode()


def named_digest(rows: int, digest: "hashlib._Hash") -> str:
    return f"{rows:,} rows, SHA-256 {digest.hexdigest()[:16]}"


def files_digest(paths: Sequence[Path]) -> str:
    """Of files that are too large to read: their names, sizes and some blocks of their bytes, in the order given.

    Raises:
        OSError: one cannot be read.
    """
    digest, total = hashlib.sha256(), 0
    for path in paths:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(json.dumps([path.name, size]).encode())
            for block in _some_blocks(file, 0, size):
                digest.update(block)
            total += size
    return f"{len(paths):,} files of {total:,} bytes, SHA-256 {digest.hexdigest()[:16]}"


def model_digest(folder: Path) -> str:
    """Of the configuration, and of every tensor's name, shape and some blocks of its bytes: reading whole
    checkpoints of many gigabytes would delay the start of every run, and training changes every block."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        header = read_header(path)
        digest.update(header.raw)
        with path.open("rb") as file:
            for _, tensor in sorted(header.tensors.items()):
                for block in _some_blocks(file, tensor.start, tensor.end):
                    digest.update(block)
    return f"SHA-256 {digest.hexdigest()[:16]}"


def _some_blocks(file: BinaryIO, start: int, end: int, count: int = 16, size: int = 4096) -> Iterator[bytes]:
    """Evenly spread over a stretch of a file; all of it where it is short."""
    for at in range(start, end, max(size, (end - start) // count)):
        file.seek(at)
        yield file.read(min(size, end - at))


def tokenizer_digest(tokenizer: "Tokenizer") -> str:
    """Of everything that decides how text becomes tokens, the chat template excepted."""
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        content = json.loads(fast.to_str()) | {"padding": None, "truncation": None}  # settings of its last call
    else:
        content = tokenizer.get_vocab()
    return json_digest([content, tokenizer.special_tokens_map])


def json_digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


# The folder
