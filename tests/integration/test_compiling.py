"""Compiled decoder layers compute what they compute as written, but for round-off."""

# ruff: noqa: E402  (imports follow the check that PyTorch is installed)

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from test_block_masks import FAMILIES, PACKED, SHARED, SIZES, assert_same, engine, rows, stepped
from torch._dynamo.utils import counters
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from bnf_align import cli
from bnf_core import registry
from bnf_core.config import DataConfig, HardwareConfig, OptimizerConfig, TrainConfig
from bnf_core.errors import UserError
from bnf_core.steps.batching import MicroBatching, micro_batches
from bnf_torch import compiling
from bnf_torch.engine import TorchEngine
from conftest import fast_of

PADDED = MicroBatching(2)
BATCHINGS = {"padded": PADDED, "packed": PACKED, "shared": SHARED}


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """No layer has been compiled before."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compiled code that is only traced and then runs as it is: an entry for each time that a part of it runs."""
    called: list[int] = []

    def traced(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            called.append(len(args))
            return graph.forward(*args)

        return run

    monkeypatch.setattr(compiling, "COMPILER", traced)
    return called


TRACED = [(name, again) for name in BATCHINGS for again in (False, True)]


@pytest.mark.parametrize(("batching", "again"), fast_of(TRACED, ("padded", False)))
def test_layers_are_traced_and_computed_again_where_they_are_to_be(
    calls: list[int], batching: str, again: bool
) -> None:
    """Rejects checkpointing that is compiled away, a layer that is passed by, and one that is traced anew for each new
    layout."""
    some, others = (micro_batches(part, BATCHINGS[batching]) for part in (rows()[:4], rows()[6:10]))
    expected = [stepped(engine("llama", gradient_checkpointing=again), parts) for parts in (some, others)]
    compiled = engine("llama", gradient_checkpointing=again, compile=True)
    assert calls == [1], "whether anything can be compiled is tried, and what a model's code does is found out without"
    calls.clear()
    assert_same(stepped(compiled, some), expected[0])
    traced = counters["stats"]["unique_graphs"]
    parts_of_a_layer = 1 if batching == "padded" else 2  # before attention and after it
    times = parts_of_a_layer * SIZES["num_hidden_layers"] * (2 if again else 1)
    assert len(calls) == len(some) * times
    assert_same(stepped(compiled, others), expected[1])
    assert len(calls) == (len(some) + len(others)) * times
    assert counters["stats"]["unique_graphs"] == traced


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_layers_as_written(family: str, batching: str, again: bool) -> None:
    """As compiled for users. Also without the adapter, and for scores alone."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    parts = micro_batches(rows(), BATCHINGS[batching])
    written = engine(family, gradient_checkpointing=again)
    compiled = engine(family, gradient_checkpointing=again, compile=True)
    for part in parts:
        scores = compiled.reference_log_odds(part), written.reference_log_odds(part)
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)
    assert_same(stepped(compiled, parts), stepped(written, parts))
    assert counters["stats"]["unique_graphs"] > 0


def test_where_nothing_can_be_compiled_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compiling, "COMPILER", missing)
    with pytest.raises(UserError, match=r"C\+\+ compiler.*leave hardware.compile out"):
        engine("llama", compile=True)
    monkeypatch.setattr(compiling, "GradientCheckpointingLayer", int)
    with pytest.raises(UserError, match="no layers of transformers' common kind"):
        engine("llama", compile=True)


def test_what_only_scores_is_not_compiled() -> None:
    model = engine("llama").base.requires_grad_(False)
    TorchEngine(model, OptimizerConfig(), compile=True)
    assert all("forward" not in vars(layer) for layer in model.modules() if isinstance(layer, LlamaDecoderLayer))


def test_it_is_a_setting_of_one_backend(tiny_model: Path, feedback: Path, tmp_path: Path) -> None:
    assert not HardwareConfig().compile
    with pytest.raises(ValueError, match=r"hardware.compile is True: expected false with deterministic"):
        TrainConfig("m", DataConfig("d"), deterministic=True, hardware=HardwareConfig(compile=True))
    if "mlx" in registry.names():
        words = ["train", "--backend", "mlx", "--model", str(tiny_model), "--data", str(feedback)]
        assert cli.run([*words, "--output", str(tmp_path / "run"), "--hardware.compile", "true"]) == 2
