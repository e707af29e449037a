"""A model folder, written tensor by tensor: no process holds more of the model than a layer beside its share."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from bnf_core.models.model_config import normalised_config
from bnf_core.models.model_folder import copy_companions
from bnf_core.processes import ALONE, Processes
from bnf_core.storage.files import agreed
from bnf_core.storage.tensors import BFLOAT16, INDEX, TensorWriter
from bnf_core.types import Array
from bnf_torch.model import QUANTIZED
from bnf_torch.processes import whole

LARGEST_FILE = 5 * 10**9  # bytes


def save_model(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    folder: Path,
    source: Path | None,
    dtype: torch.dtype,
    processes: Processes = ALONE,
) -> None:
    """Write a model folder: safetensors under the names of the family's own checkpoints, and what goes with them.

    Args:
        model: whose weights these are.
        tensors: by the names that the model has for them; sharded ones are gathered, so all processes must call this.
        folder: is there; the first process writes into it.
        source: the folder it is from, whose tokenizer and configuration stay as they are, but for keys that mlx-lm
            reads and transformers 5 leaves out.
        dtype: to write the weights in.
    Raises:
        OSError: the disk is full, or writing is not allowed; all processes raise.
    """
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    with agreed(processes):
        failure = _write_weights(model, buffers | dict(tensors), dtype, folder if processes.rank == 0 else None)
        if failure is not None:
            raise failure
        if processes.rank == 0:
            _write_rest(model, folder, source, str(dtype).removeprefix("torch."))


def _write_weights(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype, folder: Path | None
) -> Exception | None:
    """What went wrong in writing. It cannot be raised before the last tensor is gathered: others would wait for it.

    Args:
        folder: None: this process only takes part in gathering.
    """

    def of(tensor: Tensor) -> torch.dtype:
        return dtype if isinstance(tensor, torch.nn.Parameter) else tensor.dtype

    described = {name: torch.empty(t.shape, dtype=of(t), device="meta") for name, t in tensors.items()}
    groups = list(_by_layer(described))
    saved = [revert_weight_conversion(model, {name: described[name] for name in group}) for group in groups]
    together = revert_weight_conversion(model, described)
    if _shapes(together) != _shapes({name: t for group in saved for name, t in group.items()}):
        groups, saved = [list(described)], [together]  # something is made of several layers
    files = _files({name: t.nbytes for group in saved for name, t in group.items()})
    failure: Exception | None = None
    with ExitStack() as stack:
        opened: tuple[str, TensorWriter] | None = None
        for group in groups:
            gathered = {name: whole(tensors[name].detach()).to("cpu", of(tensors[name])) for name in group}
            if folder is None or failure is not None:
                continue
            try:
                for name, tensor in revert_weight_conversion(model, gathered).items():
                    file = next(file for file, names in files.items() if name in names)
                    if opened is None or opened[0] != file:
                        stack.close()
                        opened = file, stack.enter_context(TensorWriter(folder / file, files[file], {"format": "pt"}))
                    opened[1].add(name, _numpy(tensor))
            except Exception as error:
                failure = error
                stack.pop_all()
        try:
            stack.close()
            if folder is not None and failure is None and len(files) > 1:
                _write_index(folder, files, sum(t.nbytes for t in together.values()))
        except OSError as error:
            failure = error
    return failure


def _by_layer(names: Iterable[str]) -> Iterator[list[str]]:
    """The names of each decoder layer together, others alone."""

    def layer(name: str) -> str:
        numbered = re.match(r".*?\.\d+(?=\.)", name)
        return numbered[0] if numbered else name

    for _, group in groupby(names, layer):
        yield list(group)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _files(sizes: Mapping[str, int]) -> dict[str, set[str]]:
    """Which tensors each file holds, one file after another."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, more in sizes.items():
        if parts[-1] and size + more > LARGEST_FILE:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += more
    if len(parts) == 1:
        return {"model.safetensors": set(parts[0])}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": set(part) for i, part in enumerate(parts)}


def _write_index(folder: Path, files: Mapping[str, Iterable[str]], size: int) -> None:
    where = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _numpy(tensor: Tensor) -> Array:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(BFLOAT16)
    return tensor.numpy()


def _write_rest(model: PreTrainedModel, folder: Path, source: Path | None, dtype: str) -> None:
    """Configuration and tokenizer."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if source is not None:
        copy_companions(source, folder)
    config = normalised_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    for key in ("torch_dtype", *QUANTIZED):  # of the source: these are plain tensors
        config.pop(key, None)
    for part, own in ((config, model.config), (config.get("text_config"), model.config.get_text_config())):
        if isinstance(part, dict) and not own.tie_word_embeddings:
            part["tie_word_embeddings"] = False
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
