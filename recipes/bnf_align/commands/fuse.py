"""`bnf fuse`: a model and its adapter as one model folder, of the library whose layout the adapter has.

The product is added in float32 and rounded once, to the dtype that is written.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bnf_align.commands.convert_adapter import require_free
from bnf_core import registry
from bnf_core.config import DType
from bnf_core.data.tokenization import listed_stops, save_stops
from bnf_core.errors import UserError
from bnf_core.models.adapters import adapter_layout
from bnf_core.models.model_folder import resolve_model
from bnf_core.storage.files import replacing
from bnf_core.storage.tensors import FLOATS, model_tensors


@dataclass
class FuseConfig:
    """Make one model of a model and its adapter: PEFT's adapters by PyTorch, mlx-lm's by MLX."""

    model: str
    """A checkpoint folder or a Hub model."""
    adapter: str
    """An adapter folder."""
    output: str
    """The folder to write."""
    dequantize: bool = False
    """With MLX: write plain weights of a quantised model. PyTorch always does."""
    dtype: DType = "auto"
    """Of the weights written; `auto` is the checkpoint's own."""
    force: bool = False
    """Replace a model that is there."""


def fuse(
    model: str, adapter: Path, output: Path, *, dequantize: bool = False, dtype: DType = "auto", force: bool = False
) -> str:
    """Write the fused model; a PEFT adapter by PyTorch, an mlx-lm adapter by MLX.

    Args:
        model: a folder or a Hub id.
        dequantize: of a quantised model with an mlx-lm adapter: write plain weights. Otherwise the fused layers are
            quantised again, as the model's are. PyTorch always writes plain weights.
        dtype: of the weights written, or of the scales of quantised ones; `auto` is the checkpoint's own.
        force: replace a model that is in `output`.
    Returns:
        The layout of the adapter.
    Raises:
        UserError: no such model or adapter, an adapter of another model, or `output` is taken.
    """
    source = resolve_model(model)
    layout = adapter_layout(adapter)
    for read in (source, adapter):
        require_free(output, "config.json", force, keep=read)
    try:
        with replacing(output) as partial:
            write_fused(source, adapter, partial, dequantize=dequantize, dtype=dtype)
    except OSError as error:
        raise UserError(f"{output} could not be written: {error}") from error
    return layout


def write_fused(model: Path, adapter: Path, folder: Path, *, dequantize: bool, dtype: DType) -> None:
    """The same of a checkpoint folder, into a folder that is there.

    Raises:
        UserError: the adapter does not fit the model, or its backend is not installed.
        OSError: the folder cannot be written.
    """
    backend = registry.for_layout(adapter_layout(adapter))
    backend.fuse(model, adapter, folder, dtype=stored_dtype(model) if dtype == "auto" else dtype, dequantize=dequantize)
    if stops := listed_stops(adapter):
        save_stops(folder, stops)


def stored_dtype(model: Path) -> str:
    """Of most tensors of a checkpoint that are in floating point."""
    counts = Counter(tensor.dtype for tensor in model_tensors(model).values())
    return FLOATS[max(FLOATS, key=lambda name: counts[name])]


Config = FuseConfig
POSITIONAL = ("--adapter", "--output")


def run(config: FuseConfig, console: Console) -> int:
    fuse(
        config.model,
        Path(config.adapter),
        Path(config.output),
        dequantize=config.dequantize,
        dtype=config.dtype,
        force=config.force,
    )
    console.print(f"model  {config.output}", highlight=False, markup=False)
    return 0
