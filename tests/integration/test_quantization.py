"""MLX's quantised checkpoints in PyTorch: the same weights to the bit, the same model to round-off."""

# ruff: noqa: E402  (imports follow the check that MLX is installed)

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
pytest.importorskip("torch")
from mlx_lm import convert

from bnf_align import cli
from bnf_core.errors import UserError
from bnf_core.models.quantization import dequantize, unpack
from bnf_core.protocol import Engine
from bnf_core.steps.batching import collate
from bnf_core.types import Example
from bnf_torch.model import load_model, resolve_device, resolve_dtype


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_values_are_unpacked_across_words(bits: int) -> None:
    """Packed here bit by bit, as one long binary number a row."""
    values = np.random.default_rng(bits).integers(2**bits, size=(3, 64)).astype(np.uint8)
    whole = [sum(int(v) << (bits * i) for i, v in enumerate(row)) for row in values]
    packed = np.stack([np.frombuffer(n.to_bytes(8 * bits, "little"), "<u4") for n in whole])
    np.testing.assert_array_equal(unpack(packed, bits), values)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("bits", "group_size"), list(itertools.product([2, 3, 4, 5, 6, 8], [32, 64, 128])))
def test_every_bit_is_mlx_s(bits: int, group_size: int, dtype: str) -> None:
    with mx.stream(mx.cpu):
        weight = mx.random.normal((2, 24, 256), key=mx.random.key(bits)) * 0.1  # as of experts, too
        parts = mx.quantize(weight.astype(getattr(mx, dtype)), group_size=group_size, bits=bits)
        expected = mx.dequantize(*parts, group_size=group_size, bits=bits).astype(mx.float32)
        packed, scales, biases = (np.array(x if x.dtype == mx.uint32 else x.astype(mx.float32)) for x in parts)
    ours = dequantize(packed, scales, biases, group_size=group_size, bits=bits, dtype=dtype)
    np.testing.assert_array_equal(ours.view(np.uint32), np.array(expected).view(np.uint32))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("plain") / "model", hidden_size=64, intermediate_size=128)


def quantised(plain: Path, folder: Path, **options: Any) -> Path:
    convert(str(plain), str(folder), quantize=True, q_group_size=32, **{"dtype": "bfloat16"} | options)
    return folder


@pytest.fixture(scope="module")
def four_bits(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """But for one layer of 8 bits, and one of none."""

    def predicate(path: str, module: Any) -> Any:
        if path.endswith("layers.1.mlp.up_proj"):
            return {"bits": 8, "group_size": 64, "mode": "affine"}
        return hasattr(module, "to_quantized") and not path.endswith("layers.0.mlp.gate_proj")

    folder = tmp_path_factory.mktemp("quantised") / "model"
    return quantised(plain, folder, q_bits=4, quant_predicate=predicate)


def engine(backend: str, folder: Path, **options: Any) -> Engine:
    from bnf_core import registry

    return registry.get(backend).load(folder, device="cpu", dtype="float32", **options)


def test_the_backends_agree_on_a_quantised_model(four_bits: Path, plain: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [Example(tuple(rng.integers(1, 300, 20)), tuple(rng.integers(1, 300, 30)), i % 2 == 0) for i in range(4)]
    batch = collate(rows, 4)
    models = [("torch", four_bits), ("mlx", four_bits), ("torch", plain)]
    torch, mlx, full = (engine(*model).reference_log_odds(batch) for model in models)
    top = np.abs(torch).max()
    assert np.abs(torch - mlx).max() < 5e-6 * top
    assert np.abs(torch - full).max() > 1e-2 * top  # 4 bits are not the whole weights


def test_the_weights_are_those_of_the_precision_asked_for(plain: Path, tmp_path: Path) -> None:
    """MLX casts the scales, and multiplies in what they are cast to."""
    import torch
    from mlx_lm.utils import dequantize_model

    from bnf_mlx.model import load_model as load_on_mlx

    folder = quantised(plain, tmp_path / "q", q_bits=8, dtype="float16")
    with mx.stream(mx.cpu):
        theirs = dequantize_model(load_on_mlx(folder, mx.Device(mx.cpu), mx.bfloat16))
    ours = load_model(folder, resolve_device("cpu"), resolve_dtype("bfloat16", torch.device("cpu")))
    weight, expected = (model.model.layers[0].self_attn.q_proj.weight for model in (ours, theirs))
    assert weight.dtype == torch.bfloat16
    np.testing.assert_array_equal(weight.float().numpy(), np.array(expected.astype(mx.float32)))


def test_the_whole_weights_are_trained_and_saved_plain(four_bits: Path, feedback: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = f"train --model {four_bits} --data {feedback} --output {run} --backend torch --device cpu"
    assert cli.run(f"{command} --fine-tune-type full --max-steps 1 --max-length 128".split()) == 0
    config = json.loads((run / "model" / "config.json").read_text())
    assert not config.keys() & {"quantization", "quantization_config"} and config["dtype"] == "float32"
    engine("torch", run / "model")
    engine("mlx", run / "model")


def changed(folder: Path, to: Path, **quantization: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config["quantization"] |= quantization
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_what_cannot_be_dequantised_is_refused(four_bits: Path, plain: Path, tmp_path: Path) -> None:
    def refusal(folder: Path, **options: Any) -> str:
        with pytest.raises(UserError) as raised:
            engine("torch", folder, **options)
        return str(raised.value)

    assert "mode mxfp4" in refusal(quantised(plain, tmp_path / "mxfp4", q_mode="mxfp4", q_bits=4))
    assert "says 7 bits" in refusal(changed(four_bits, tmp_path / "7", bits=7))
    assert "4 bits in groups of 64, as config.json says" in refusal(changed(four_bits, tmp_path / "64", group_size=64))
    of_one = {"model.layers.1.mlp.down_proj": {"mode": "nvfp4"}}
    assert "model.layers.1.mlp.down_proj is quantised in MLX's mode nvfp4" in refusal(
        changed(four_bits, tmp_path / "mixed", **of_one)
    )
    # The same product of both, and so no contradiction in the file itself: the shapes differ from the model's.
    assert "cannot load" in refusal(changed(four_bits, tmp_path / "product", bits=2, group_size=64))
