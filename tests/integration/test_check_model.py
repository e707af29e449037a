"""`bnf check-model` finds what is wrong: known mistakes are made in one backend, and it names module and cause."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import tiny
from conftest import slow

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

import bnf_mlx.inspection
import bnf_mlx.model
import bnf_torch.inspection
from bnf_align import cli
from bnf_align.commands.check_model import (
    INPUT,
    OUTPUT,
    Comparison,
    Result,
    compare,
    first_to_part,
    gradient_errors,
    relative_error,
    rows,
    shared_targets,
    verdict,
)
from bnf_core import registry
from bnf_core.errors import UserError
from bnf_core.models.model_config import full_config

GEMMA2 = {"head_dim": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0, "sliding_window": 64}


@pytest.fixture(autouse=True)
def no_preloading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")  # or MLX's commands would start this process anew


def model_of(folder: Path, family: str, settings: dict[str, Any]) -> Path:
    from test_families import make

    return make(folder, family, settings)


def checked(folder: Path) -> Result:
    return compare(folder, ["torch", "mlx"], rows(folder, None, Console()))


def told(result: Result) -> str:
    return "\n".join(verdict(result))


# What the command says


def test_agreement_is_exit_code_0_and_the_report_holds_every_module(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "check.json"
    assert cli.run(["check-model", str(tiny_model), "--report", str(report)]) == 0
    assert "torch and mlx agree on 70 tokens in rows of up to 64." in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert written["agree"] is True and written["divergence"] is None and written["notes"] == []
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {module.rpartition(".")[2] for module in written["gradients"]} == set(linear)
    assert len(written["gradients"]) == 2 * len(linear)
    errors = {c["quantity"]: c["error"] for c in written["comparisons"]}
    assert errors["log-odds, reference"] < 1e-6 and errors["BNF loss"] < 1e-5


def test_the_rope_trap_is_found_when_the_loader_does_not_see_to_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bnf_mlx.model, "full_config", lambda folder: json.loads((folder / "config.json").read_text()))
    report = tmp_path / "check.json"
    assert cli.run(["check-model", str(tiny_model), "--backends", "torch,mlx", "--report", str(report)]) == 1
    out = capsys.readouterr().out
    assert "The first to part is layers.0.self_attn, by" in out
    assert "Likely cause: RoPE base: the config says 500.0, and mlx computes as if it were 10000.0." in out
    written = json.loads(report.read_text())
    assert written["agree"] is False and written["divergence"]["where"] == "layers.0.self_attn"


@pytest.mark.parametrize("dtype", ["bfloat16", slow("float16")])
def test_where_every_operation_rounds_both_are_as_far_from_float32(
    tiny_model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = compare(tiny_model, ["torch", "mlx"], rows(tiny_model, None, Console()), dtype)
    print([f"{c.quantity} {c.error:.1e} of {c.allowed:.1e}" for c in result.comparisons])
    assert result.agree and all(c.error > 1e-4 for c in result.comparisons)
    assert f"in {dtype} neither is more than 2 times as far from float32 as the other." in told(result)

    monkeypatch.setattr(bnf_mlx.inspection, "token_log_odds", rounded_log_odds)
    result = compare(tiny_model, ["torch", "mlx"], rows(tiny_model, None, Console()), dtype)
    assert {c.quantity for c in result.comparisons if not c.agrees} >= {"log-odds, policy: mlx from float32"}
    assert "one is more than 2 times as far" in told(result)


def rounded_log_odds(logits: Any, targets: Any) -> Any:
    """A head that keeps four bits."""
    import mlx.core as mx

    from bnf_mlx.losses import token_log_odds

    step = mx.abs(mx.stop_gradient(logits)).max() / 16
    return token_log_odds(mx.round(logits / step) * step, targets)


def test_rows_of_feedback_are_compared(tiny_model: Path, feedback: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check-model", "--model", str(tiny_model), "--data", str(feedback)]) == 0
    out = capsys.readouterr().out
    assert "train: 12 rows" in out and "agree on" in out and "agree on 70 tokens" not in out


# Mistakes made in MLX: each is named


def changed(**changes: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: full_config(folder) | changes


@pytest.mark.parametrize(
    ("family", "settings", "mistake", "module", "cause"),
    [
        slow(
            "llama",
            {"rms_norm_eps": 1e-2},
            changed(rms_norm_eps=1e-6),
            "layers.0.input_layernorm",
            "norm epsilon: the config says 0.01, and mlx computes as if it were 1e-06",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
            changed(rope_scaling=None),
            "layers.0.self_attn",
            "RoPE scaling: the config says linear, and mlx computes as if it were default",
        ),
        (
            "olmo3",
            {"num_hidden_layers": 4, "sliding_window": 8},
            changed(sliding_window=1000),
            "layers.0.self_attn",
            "sliding window: the config says 8, and mlx computes as if it were none",
        ),
        slow(
            "gemma2",
            GEMMA2,
            changed(attn_logit_softcapping=1e9),
            "layers.0.self_attn",
            "attention soft-cap: the config says 3.0, and mlx computes as if it were none",
        ),
        slow(
            "gemma2",
            GEMMA2,
            changed(final_logit_softcapping=30.0),
            "the model's output",
            "logit soft-cap: the config says 5.0, and mlx computes as if it were 30.0",
        ),
        slow(
            "granite",
            {"logits_scaling": 2.0},
            changed(logits_scaling=1.0),
            "the model's output",
            "logit scale: the config says 2.0, and mlx computes as if it were 1.0",
        ),
        slow(
            "granite",
            {"embedding_multiplier": 3.0},
            changed(embedding_multiplier=1.0),
            "what goes into layers.0",
            "embedding scale: the config says 3.0, and mlx computes as if it were 1.0",
        ),
    ],
)
def test_a_config_read_wrongly_is_named(
    family: str,
    settings: dict[str, Any],
    mistake: Callable[[Path], dict[str, Any]],
    module: str,
    cause: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = model_of(tmp_path, family, settings)
    assert checked(folder).agree
    monkeypatch.setattr(bnf_mlx.model, "full_config", mistake)
    text = told(checked(folder))
    assert f"The first to part is {module}" in text
    assert cause in text


def test_a_tensor_that_differs_is_found_in_its_module(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = bnf_mlx.inspection.load_model

    def rounded(*args: Any) -> Any:
        model = load(*args)
        layer = model.layers[1].mlp.up_proj
        layer.weight = layer.weight.astype(bnf_mlx.inspection.mx.bfloat16).astype(bnf_mlx.inspection.mx.float32)
        return model

    monkeypatch.setattr(bnf_mlx.inspection, "load_model", rounded)
    text = told(checked(tiny_model))
    assert "The first to part is layers.1.mlp.up_proj" in text
    assert "its weights: dtype, quantisation" in text


def test_a_loss_with_the_right_value_and_the_wrong_gradient_is_found(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnf_mlx.inspection import bnf_token_loss, mx

    def half_the_gradient(odds: Any, entropy: Any, reference: Any) -> Any:
        loss = bnf_token_loss(odds, entropy, reference)
        return (loss + mx.stop_gradient(loss)) / 2

    monkeypatch.setattr(bnf_mlx.inspection, "bnf_token_loss", half_the_gradient)
    result = checked(tiny_model)
    assert [c.agrees for c in result.comparisons] == [True, True, True, False]
    assert result.divergence is None
    assert "no module parts" in told(result) and "Look at the gradients" in told(result)


def test_another_adapter_is_found_though_no_module_parts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = bnf_mlx.inspection.initial_lora_a
    monkeypatch.setattr(bnf_mlx.inspection, "initial_lora_a", lambda module, *rest: draw(module + "?", *rest))
    result = checked(tiny_model)
    assert [c.agrees for c in result.comparisons[:2]] == [True, False]
    assert result.divergence is None


# Finding the module


def traced(*modules: tuple[str, float, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two traces whose modules' inputs and outputs are so much apart."""
    ones = np.ones((2, 3), np.float32)
    return (
        {path: (ones, ones) for path, _, _ in modules},
        {path: (ones + given, ones + made) for path, given, made in modules},
    )


def test_the_first_module_that_parts_is_the_innermost_whose_input_agrees() -> None:
    attention = [("layers.0.attn.q_proj", 0, 0), ("layers.0.attn.o_proj", 0.01, 0.9), ("layers.0.attn", 0, 0.9)]
    a, b = traced(("embed", 0, 0), *attention, ("layers.0", 0, 0.1), ("lm_head", 0.1, 0.1))
    assert first_to_part(a, b) == ("layers.0.attn", OUTPUT)
    assert first_to_part(*traced(("layers.0.mlp.act", 0, 1e-6), ("layers.0", 0, 1e-6), ("", 0, 1e-6))) is None


def test_an_embedding_scaled_elsewhere_is_no_difference_unless_the_layers_see_it() -> None:
    agrees = [("embed", 0, 0.5), ("layers.0", 0, 0), ("norm", 0, 0), ("lm_head", 0, 0.2)]
    assert first_to_part(*traced(*agrees)) == ("lm_head", OUTPUT)
    differs = [("embed", 0, 0), ("layers.0", 0.5, 0.4), ("lm_head", 0.4, 0.4), ("", 0, 0.4)]
    assert first_to_part(*traced(*differs)) == ("layers.0", INPUT)


def test_a_residual_outside_every_module_is_the_layer_itself() -> None:
    assert first_to_part(*traced(("layers.0.mlp", 0, 0), ("layers.0", 0, 0.1))) == ("layers.0", OUTPUT)


def test_rounding_that_grows_through_layers_is_no_module_that_parts() -> None:
    grown = [(f"layers.{i}", 1e-6 * 3**i, 1e-6 * 3 ** (i + 1)) for i in range(6)]
    assert first_to_part(*traced(*grown)) is None


def test_values_that_are_not_finite_part() -> None:
    assert first_to_part(*traced(("layers.0.mlp", 0, np.nan), ("layers.0", 0, np.nan))) == ("layers.0.mlp", OUTPUT)
    error = relative_error(np.ones(2), np.array([1.0, np.nan]))
    assert not Comparison("log-odds", error, 1e-5).agrees and Comparison("log-odds", 1e-6, 1e-5).agrees


def test_the_gradients_of_a_and_b_both_count_and_rounding_of_small_ones_does_not() -> None:
    one, small = np.ones((2, 2)), np.full((2, 2), 1e-9)
    right = {"q.lora_a": one, "q.lora_b": one, "k.lora_a": one, "k.lora_b": one, "v.lora_a": small, "v.lora_b": small}
    wrong = right | {"q.lora_a": one * 1.5, "k.lora_b": one * 0.75, "v.lora_a": small * 2}
    errors = gradient_errors(right, wrong)
    assert errors == pytest.approx({"q": 0.5, "k": 0.25, "v": 1e-6})


def test_looking_leaves_the_model_as_it_was(tiny_model: Path) -> None:
    ids = np.arange(12, dtype=np.int32)[None]
    for inspect in (bnf_torch.inspection.TorchInspector, bnf_mlx.inspection.MLXInspector):
        looked_into = inspect(tiny_model)
        first = looked_into.trace(ids)
        assert list(first)[-1] == "" and first["layers.1.mlp"][1].shape == (1, 12, 32)
        assert all(
            np.array_equal(x, y)
            for p, pair in looked_into.trace(ids).items()
            for x, y in zip(first[p], pair, strict=True)
        )
        kinds = [type(module) for _, module in looked_into.model.named_modules()]
        untouched = [type(module) for _, module in inspect(tiny_model).model.named_modules()]
        assert kinds == untouched
        assert not any(getattr(module, "_forward_hooks", None) for _, module in looked_into.model.named_modules())


def test_adapters_go_on_what_both_have() -> None:
    both = {"layers.0.attn.q_proj", "layers.1.attn.q_proj"}
    assert shared_targets(both | {"lm_head"}, set(both)) == ["all-linear"]
    assert shared_targets(both | {"layers.0.gate"}, set(both)) == ["q_proj"]
    assert shared_targets(both | {"layers.0.gate"}, both | {"layers.1.gate"}) == ["q_proj"]
    assert shared_targets(both | {"projection"}, both | {"projection"}) == ["q_proj"]
    with pytest.raises(UserError, match="no linear layer of the same name"):
        shared_targets({"layers.0.a"}, {"layers.0.b"})


# What a user gets wrong


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.run(["check-model", *argv]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_bad_usage_and_bad_models_are_exit_code_2(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model)
    assert "unknown backend 'jax'" in refused(capsys, model, "--backends", "torch,jax")
    assert "two different ones" in refused(capsys, model, "--backends", "torch,torch")
    assert "two different ones" in refused(capsys, model, "--backends", "torch")
    assert "missing --model" in refused(capsys)
    assert "neither a folder here" in refused(capsys, str(tmp_path / "absent"))

    broken = tiny.make_model(tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "9 tensors are missing" in refused(capsys, str(broken))
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    assert "no_such_model" in refused(capsys, str(broken))

    monkeypatch.setattr(registry, "missing", lambda name: ["mlx"] if name == "mlx" else [])
    assert "backend 'mlx' is not installed" in refused(capsys, model)
