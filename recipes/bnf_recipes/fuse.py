"""`bnf fuse`: a model and its adapter as one model folder, of the library whose layout the adapter has.

The product is added in float32 and rounded once, to the dtype that is written.
"""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bnf_core.adapters import WEIGHTS, adapter_layout
from bnf_core.config import DType
from bnf_core.errors import UserError
from bnf_core.families import normalised_config
from bnf_core.files import replacing
from bnf_core.model_folder import resolve_model
from bnf_recipes.convert_adapter import require_free

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names


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
    dtype_name = _own_dtype(source) if dtype == "auto" else dtype
    try:
        with replacing(output) as partial:
            if layout == "peft":
                _fuse_torch(source, adapter, partial, dtype_name)
            else:
                _fuse_mlx(source, adapter, partial, dtype_name, dequantize)
    except OSError as error:
        raise UserError(f"{output} could not be written: {error}") from error
    return layout


def _fuse_torch(model: Path, adapter: Path, output: Path, dtype: str) -> None:
    import torch

    from bnf_torch.adapter import load_adapter
    from bnf_torch.model import DTYPES, load_model, save_model

    adapted: Any = load_adapter(load_model(model, torch.device("cpu"), torch.float32), adapter)
    fused = adapted.merge_and_unload()
    save_model(fused, {name: p.detach().to(DTYPES[dtype]) for name, p in fused.named_parameters()}, output, model)


def _fuse_mlx(model: Path, adapter: Path, output: Path, dtype: str, dequantize: bool) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import dequantize_model, save_model

    from bnf_mlx.model import DTYPES, cast_weights, load_model, resolve_device

    device = resolve_device("auto")
    with mx.stream(device):
        loaded = load_model(model, device, None)
        try:
            load_adapters(loaded, str(adapter))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{adapter}: this adapter does not fit the model: {reason}") from error
        expected = dict(tree_flatten(loaded.trainable_parameters()))
        if absent := sorted(expected.keys() - set(mx.load(str(adapter / WEIGHTS["mlx"])))):
            raise UserError(f"{adapter}: {len(absent)} tensors are missing, the first is {absent[0]}")
        fused = []
        for name, module in loaded.named_modules():
            if not hasattr(module, "fuse"):
                continue
            packed = module.get("linear", module.get("embedding"))
            module.set_dtype(mx.float32)  # the scales of packed weights as well
            whole = module.fuse(dequantize=True)
            whole.set_dtype(DTYPES[dtype])
            if "scales" in packed and not dequantize:
                whole = whole.to_quantized(group_size=packed.group_size, bits=packed.bits, mode=packed.mode)
            fused.append((name, whole))
        loaded.update_modules(tree_unflatten(fused))
        if dequantize:
            cast_weights(loaded, mx.float32)
            dequantize_model(loaded)
        cast_weights(loaded, DTYPES[dtype])
        save_model(output, loaded)
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, output / path.name)
    config = normalised_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    if dequantize:
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _own_dtype(model: Path) -> str:
    """Of most tensors of a checkpoint that are in floating point."""
    counts: Counter[str] = Counter()
    for file in sorted(model.glob("model*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            counts.update(tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118
    return FLOATS[max(FLOATS, key=lambda name: counts[name])]
