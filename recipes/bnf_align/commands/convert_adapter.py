"""`bnf convert-adapter`: a LoRA or DoRA adapter of PEFT as one of mlx-lm, or the other way round."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bnf_core.errors import UserError
from bnf_core.models.adapters import CONFIG, Adapter, Layout, matrix_shapes, read_adapter, write_adapter
from bnf_core.models.model_folder import resolve_model
from bnf_core.storage.files import replacing

OTHER: dict[Layout, Layout] = {"peft": "mlx", "mlx": "peft"}


@dataclass
class ConvertAdapterConfig:
    """Turn an adapter of PEFT into one of mlx-lm, or the other way round."""

    adapter: str
    """A folder with adapter_config.json; its layout says which way to convert."""
    model: str
    """The model that it is for: a checkpoint folder or a Hub model."""
    output: str
    """The folder to write."""
    force: bool = False
    """Replace an adapter that is there."""


def convert_adapter(adapter: Path, model: str, output: Path, *, force: bool = False) -> Adapter:
    """Write the adapter in the layout that it is not in. The numbers stay as they are, but for half precision, which
    becomes float32; only matrices are transposed.

    Args:
        adapter: a folder with adapter_config.json and safetensors, as PEFT, mlx-lm or `bnf train` write it.
        model: the model that it is for, a folder or a Hub id; quantised or not does not matter.
        output: the folder to make.
        force: replace an adapter that is there.
    Returns:
        What was converted.
    Raises:
        UserError: no adapter or not a whole one, one of another model, something that the other layout cannot hold,
            or `output` is taken.
    """
    require_free(output, CONFIG, force, keep=adapter)
    shapes = matrix_shapes(resolve_model(model))
    found = read_adapter(adapter, shapes)
    try:
        with replacing(output) as partial:
            write_adapter(found, partial, OTHER[found.layout], model, shapes)
    except OSError as error:
        raise UserError(f"{output} could not be written: {error}") from error
    return found


def require_free(output: Path, mark: str, force: bool, *, keep: Path) -> None:
    """Whether a folder may be written.

    Args:
        mark: the file that a folder of this kind has: with `force` no other kind is replaced.
        keep: a folder that is read.
    Raises:
        UserError: it may not.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if output.resolve() == keep.resolve():
        raise UserError(f"{output} is what is read: choose another --output")
    if not (output / mark).is_file():
        raise UserError(f"{output} exists and holds something else (it has no {mark}): choose another --output")
    if not force:
        raise UserError(f"{output} exists: choose another --output, or --force to replace it")


Config = ConvertAdapterConfig
POSITIONAL = ("--adapter", "--output")


def run(config: ConvertAdapterConfig, console: Console) -> int:
    found = convert_adapter(Path(config.adapter), config.model, Path(config.output), force=config.force)
    way = "PEFT → mlx-lm" if found.layout == "peft" else "mlx-lm → PEFT"
    console.print(
        f"{way}  {len(found.modules)} modules of rank {found.rank}\nadapter  {config.output}", highlight=False
    )
    return 0
