"""MLX's affine quantisation, undone: what the packed weights of a checkpoint stand for.

Each row of a matrix is cut into groups of 32, 64 or 128 values, and each group has a scale and a bias:

    w = scale · q + bias        q an unsigned integer of 2, 3, 4, 5, 6 or 8 bits

A checkpoint holds three tensors a layer: `weight`, (..., words) uint32, with the q of a row one after the other, lowest
bits first, across the borders of words; `scales` and `biases`, (..., groups), in floating point. The keys of
config.json are those of mlx-lm (`mlx_lm/utils.py`, load_model).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnf_core.errors import UserError
from bnf_core.storage.tensors import rounded
from bnf_core.types import Array

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's layers are packed: `group_size` and `bits`, for some layers others."""

    folder: Path
    group_size: int
    bits: int
    layers: Mapping[str, Mapping[str, Any]]  # by the layer's path

    def of(self, layer: str) -> tuple[int, int]:
        """`group_size` and `bits` of one layer.

        Raises:
            UserError: it is in another mode than affine.
        """
        own = self.layers.get(layer, {})
        if own.get("mode", "affine") != "affine":
            raise _unknown_mode(self.folder, own["mode"], layer)
        return own.get("group_size", self.group_size), own.get("bits", self.bits)

    def dequantize(self, layer: str, packed: Array, scales: Array, biases: Array, dtype: str) -> Array:
        """The weights of one layer; see `dequantize`.

        Raises:
            UserError: the tensors are not packed as the config says.
        """
        group_size, bits = self.of(layer)
        if packed.shape[-1] * 32 != scales.shape[-1] * group_size * bits:
            raise UserError(
                f"{self.folder}: {layer} has {packed.shape[-1]} words and {scales.shape[-1]} groups a row, which is "
                f"not {bits} bits in groups of {group_size}, as config.json says; convert the model again"
            )
        return dequantize(packed, scales, biases, group_size=group_size, bits=bits, dtype=dtype)


def quantization_of(folder: Path) -> Quantization | None:
    """How a checkpoint folder is quantised by MLX, or None: it is not.

    Raises:
        UserError: in another mode than affine, or with settings that MLX does not have.
    """
    path = folder / "config.json"
    settings = _settings(json.loads(path.read_text(encoding="utf-8")), str(path))
    if settings is None:
        return None
    if (mode := settings.get("mode", "affine")) != "affine":
        raise _unknown_mode(folder, mode)
    layers = {k: v for k, v in settings.items() if isinstance(v, dict)}
    return Quantization(folder, settings["group_size"], settings["bits"], layers)


def bits_per_weight(config: Mapping[str, Any], name: str) -> float | None:
    """What a weight of most layers takes by a config, with its group's scale, and in the affine mode its bias; None:
    MLX did not quantise it.

    Raises:
        UserError: settings that MLX does not have.
    """
    settings = _settings(config, name)
    if settings is None:
        return None
    scales = 2 * 16 if settings.get("mode", "affine") == "affine" else 8
    return float(settings["bits"] + scales / settings["group_size"])


def _settings(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    settings = config.get("quantization")
    if not isinstance(settings, dict):
        return None
    group_size, bits = settings.get("group_size"), settings.get("bits")
    if bits not in BITS or not isinstance(group_size, int):
        raise UserError(
            f"{name} says {bits} bits in groups of {group_size}: expected {', '.join(map(str, BITS))} bits and a number"
        )
    return settings


def dequantize(packed: Array, scales: Array, biases: Array, *, group_size: int, bits: int, dtype: str) -> Array:
    """scale · q + bias, with the product and the sum rounded to `dtype` each: to the bit what `mx.dequantize` gives
    on the CPU.

    Args:
        packed: (..., in · bits / 32) uint32.
        scales, biases: (..., in / group_size) float32, holding values of `dtype`.
        dtype: float32, float16 or bfloat16.
    Returns:
        (..., in) float32, holding values of `dtype`.
    """
    q = unpack(packed, bits).reshape(*scales.shape, group_size).astype(np.float32)
    product = rounded(scales[..., None] * q, dtype)
    return rounded(product + biases[..., None], dtype).reshape(*packed.shape[:-1], -1)


def unpack(packed: Array, bits: int) -> Array:
    """(..., words) uint32 to (..., words · 32 / bits) uint8: eight values lie in `bits` bytes."""
    octets = np.ascontiguousarray(packed, "<u4").view(np.uint8).reshape(*packed.shape[:-1], -1, bits)
    words = np.zeros((*octets.shape[:-1], 8), np.uint8)
    words[..., :bits] = octets
    values: Array = words.view("<u8") >> (np.arange(8, dtype=np.uint64) * np.uint64(bits))
    return (values & np.uint64(2**bits - 1)).astype(np.uint8).reshape(*packed.shape[:-1], -1)


def _unknown_mode(folder: Path, mode: object, layer: str = "this model") -> UserError:
    return UserError(
        f"{folder}: {layer} is quantised in MLX's mode {mode}, and PyTorch reads affine only: use --backend mlx, or "
        f"make a plain model of it with `python -m mlx_lm convert --hf-path {folder} -d --mlx-path NEW_FOLDER`"
    )
