"""Adapters between PEFT and mlx-lm: the same logits on the other side, and a reason where that cannot be."""

# ruff: noqa: E402  (imports follow the checks that both frameworks are installed)

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import convert
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from bnf_align import cli
from bnf_core.errors import UserError
from bnf_core.models.adapters import matrix_shapes, mlx_keys, read_adapter
from bnf_mlx import adapter as mlx_adapter
from bnf_mlx import model as mlx_model
from bnf_torch import adapter as torch_adapter
from bnf_torch import model as torch_model

CPU = torch.device("cpu")
IDS = np.random.default_rng(0).integers(1, 300, (2, 24))
SCALE = 3.0


@pytest.fixture(autouse=True)
def no_preloading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")  # or MLX's commands would start this process anew


def torch_base(folder: Path) -> Any:
    return torch_model.load_model(folder, CPU, torch.float32)


def mlx_base(folder: Path) -> nn.Module:
    return mlx_model.load_model(folder, mx.Device(mx.cpu), mx.float32)


def torch_logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    model = torch_base(folder)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def mlx_logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    model = mlx_base(folder)
    if adapter is not None:
        model = load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mx.array(IDS)))


def assert_same(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> None:
    assert np.abs(a - b).max() <= tolerance * np.abs(a).max()


def drawn(shape: Any, name: str) -> np.ndarray:
    return (0.1 * np.random.default_rng(len(name)).standard_normal(shape)).astype(np.float32)


def peft_adapter(base: Path, folder: Path, **options: Any) -> Path:
    settings = {"r": 4, "lora_alpha": 4 * SCALE, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(torch_base(base), peft.LoraConfig(**(settings | options)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.from_numpy(drawn(p.shape, name)))
            elif "magnitude" in name:
                p.mul_(torch.from_numpy(1 + drawn(p.shape, name)))
    model.save_pretrained(str(folder))
    return folder


def mlx_lm_adapter(base: Path, folder: Path, *, dora: bool = False, num_layers: int = 2, **options: Any) -> Path:
    """As mlx-lm's own trainer leaves one."""
    model = mlx_base(base)
    model.freeze()
    settings = {"rank": 4, "scale": SCALE, "dropout": 0.0} | options
    linear_to_lora_layers(model, num_layers, settings, use_dora=dora)
    weights = {}
    for name, value in tree_flatten(model.trainable_parameters()):
        change = mx.array(drawn(value.shape, name))
        weights[name] = change if name.endswith("lora_b") else value * (1 + change) if name.endswith(".m") else value
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def converted(base: Path, adapter: Path, output: Path, *more: str) -> Path:
    command = ["convert-adapter", "--adapter", str(adapter), "--model", str(base), "--output", str(output), *more]
    assert cli.run(command) == 0
    return output


def refusal(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    capsys.readouterr()
    assert cli.run([str(word) for word in command]) == 2
    return " ".join(capsys.readouterr().err.split())


PEFT_KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 2 * SCALE},
    "one layer": {"layers_to_transform": [0], "target_modules": ["q_proj", "down_proj"]},
    "paths": {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"]},
}


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_from_peft_and_back(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    before = peft_adapter(tiny_model, tmp_path / "peft", **PEFT_KINDS[kind])
    logits = torch_logits(tiny_model, before)
    assert np.abs(logits - torch_logits(tiny_model)).max() > 1e-2 * np.abs(logits).max()  # it does something
    there = converted(tiny_model, before, tmp_path / "mlx")
    assert_same(mlx_logits(tiny_model, there), logits)
    back = converted(tiny_model, there, tmp_path / "back")
    assert_same(torch_logits(tiny_model, back), logits, 1e-6)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (before, back))
    assert old.keys() == new.keys()
    for name, value in old.items():
        np.testing.assert_array_equal(new[name], value, err_msg=name)


MLX_KINDS: dict[str, dict[str, Any]] = {
    "lora": {"keys": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]},
    "dora": {"keys": ["self_attn.q_proj", "mlp.down_proj"], "dora": True},
    "last layer": {"num_layers": 1, "keys": ["mlp.gate_proj"]},
    "all that there are": {"num_layers": 1},
    "whole paths": {"keys": ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]},
}


@pytest.mark.parametrize("kind", MLX_KINDS)
def test_from_mlx_lm_and_back(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    before = mlx_lm_adapter(tiny_model, tmp_path / "mlx", **MLX_KINDS[kind])
    logits = mlx_logits(tiny_model, before)
    assert np.abs(logits - mlx_logits(tiny_model)).max() > 1e-2 * np.abs(logits).max()
    there = converted(tiny_model, before, tmp_path / "peft")
    assert_same(torch_logits(tiny_model, there), logits)
    back = converted(tiny_model, there, tmp_path / "back")
    assert_same(mlx_logits(tiny_model, back), logits, 1e-6)
    old, new = (load_file(folder / "adapters.safetensors") for folder in (before, back))
    assert old.keys() == new.keys()
    for name, value in old.items():
        np.testing.assert_array_equal(new[name], value, err_msg=name)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_converted_adapter_goes_through_the_backends(tiny_model: Path, tmp_path: Path, layer: int) -> None:
    """Loaded and saved by each backend, it stays what it was: also where only the first layer has one, or the last."""
    options = PEFT_KINDS["one layer"] | {"layers_to_transform": [layer]}
    before = peft_adapter(tiny_model, tmp_path / "peft", **options)
    there = converted(tiny_model, before, tmp_path / "mlx")
    model = mlx_base(tiny_model)
    mlx_adapter.save_adapter(mlx_adapter.load_adapter(model, there), tmp_path / "saved")
    mlx_adapter.load_adapter(mlx_base(tiny_model), tmp_path / "saved")
    back = converted(tiny_model, tmp_path / "saved", tmp_path / "back")
    torch_adapter.load_adapter(torch_base(tiny_model), back)
    old, new = (read_adapter(folder).modules for folder in (before, back))
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[path].b, new[path].b) for path in old)


def test_the_shortest_keys_that_say_it() -> None:
    every = [f"model.layers.{i}.{name}" for i in range(3) for name in ("q", "mlp.up")] + ["model.embed", "lm_head"]
    assert mlx_keys([p for p in every if p.endswith(".q")], every) == (["q"], 3)
    assert mlx_keys(["model.layers.2.q", "model.layers.1.q"], every) == (["q"], 2)
    assert mlx_keys(["model.layers.2.mlp.up", "lm_head"], every) == (["lm_head", "mlp.up"], 1)
    uneven = ["model.layers.0.q", "model.layers.2.mlp.up"]
    assert mlx_keys(uneven, every) == (uneven, 3)


def test_half_precision_is_widened(tiny_model: Path, tmp_path: Path) -> None:
    folder = mlx_lm_adapter(tiny_model, tmp_path / "mlx", keys=["mlp.up_proj"])
    weights = {name: w.astype(mx.bfloat16) for name, w in mx.load(str(folder / "adapters.safetensors")).items()}
    mx.eval(weights)  # read before the file is written over
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    read = read_adapter(folder).modules["model.layers.1.mlp.up_proj"].a
    expected = weights["model.layers.1.mlp.up_proj.lora_a"].astype(mx.float32)
    np.testing.assert_array_equal(read, np.array(expected).T)


UNHELD: list[tuple[dict[str, Any], str]] = [
    ({"modules_to_save": ["lm_head"]}, "whole modules beside the low-rank matrices (modules_to_save)"),
    ({"rank_pattern": {"q_proj": 2}}, "ranks that differ between modules (rank_pattern)"),
    ({"alpha_pattern": {"q_proj": 2}}, "scales that differ between modules (alpha_pattern)"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "is an adapter of an embedding"),
]


@pytest.mark.parametrize(("options", "reason"), UNHELD)
def test_what_mlx_lm_cannot_hold_is_refused(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = peft_adapter(tiny_model, tmp_path / "peft", **options)
    said = refusal(capsys, "convert-adapter", "--adapter", adapter, "--model", tiny_model, "--output", tmp_path / "mlx")
    assert reason in said
    assert not (tmp_path / "mlx").exists()


def edited(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))


def without(folder: Path, name: str) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    kept = {key: value for key, value in tensors.items() if name not in key}
    assert len(kept) < len(tensors)
    save_file(kept, path)


BREAK: list[tuple[Callable[[Path], None], str]] = [
    (lambda f: without(f, "layers.0.mlp.up_proj.lora_B"), "lora_b of model.layers.0.mlp.up_proj is missing"),
    (lambda f: without(f, "layers.0.mlp.up_proj"), "1 of 14 modules that adapter_config.json names have no tensors"),
    (lambda f: edited(f, bias="all"), "trained biases"),
    (lambda f: edited(f, r=8), "says rank 8, and the matrices have rank 4"),
    (lambda f: edited(f, peft_type="LOHA"), "PEFT's kind LOHA"),
    (lambda f: edited(f, init_lora_weights="pissa"), "changing the model's own weights"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    (lambda f: (f / "adapter_config.json").write_text("{}"), "neither PEFT's (peft_type) nor mlx-lm's"),
    (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 40), "is not a whole safetensors file"),
    (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickled weights are not loaded"),
]


@pytest.mark.parametrize(("harm", "reason"), BREAK)
def test_a_broken_adapter_is_refused(
    tiny_model: Path,
    tmp_path: Path,
    harm: Callable[[Path], None],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = peft_adapter(tiny_model, tmp_path / "peft")
    harm(adapter)
    assert reason in refusal(
        capsys, "convert-adapter", "--adapter", adapter, "--model", tiny_model, "--output", tmp_path / "mlx"
    )


def test_an_adapter_of_mlx_lm_that_peft_cannot_hold(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reason(folder: Path) -> str:
        return refusal(
            capsys, "convert-adapter", "--adapter", folder, "--model", tiny_model, "--output", tmp_path / "x"
        )

    embedding = mlx_lm_adapter(tiny_model, tmp_path / "embedding", keys=["model.embed_tokens"])
    assert "adapter of an embedding" in reason(embedding)
    full = mlx_lm_adapter(tiny_model, tmp_path / "full", keys=["mlp.up_proj"])
    edited(full, fine_tune_type="full")
    assert "fine_tune_type full" in reason(full)
    short = mlx_lm_adapter(tiny_model, tmp_path / "short", keys=["mlp.up_proj"], num_layers=1)
    edited(short, num_layers=2)
    assert "1 of 2 modules that adapter_config.json names have no tensors" in reason(short)


def test_an_adapter_of_another_model_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wider = tiny.make_model(tmp_path / "wider", intermediate_size=96)
    shallow = tiny.make_model(tmp_path / "shallow", num_hidden_layers=1)
    adapter = peft_adapter(tiny_model, tmp_path / "peft")
    there = converted(tiny_model, adapter, tmp_path / "mlx")
    for folder in (adapter, there):
        said = refusal(capsys, "convert-adapter", "--adapter", folder, "--model", wider, "--output", tmp_path / "x")
        assert "is not for this model: model.layers.0.mlp.down_proj is (32, 96) there" in said
        said = refusal(capsys, "convert-adapter", "--adapter", folder, "--model", shallow, "--output", tmp_path / "x")
        assert "has no matrix model.layers.1." in said
        for model in (wider, shallow):
            said = refusal(capsys, "fuse", "--adapter", folder, "--model", model, "--output", tmp_path / "x")
            assert "does not fit the model" in said
    assert not (tmp_path / "x").exists()


def test_an_incomplete_adapter_is_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    """PEFT itself goes on with a warning."""
    from bnf_core.errors import UserError

    adapter = peft_adapter(tiny_model, tmp_path / "peft")
    without(adapter, "layers.0.mlp.up_proj")
    with pytest.raises(UserError, match="2 tensors do not match"):
        torch_adapter.load_adapter(torch_base(tiny_model), adapter)


def test_nothing_is_overwritten_without_force(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = peft_adapter(tiny_model, tmp_path / "peft")
    there = converted(tiny_model, adapter, tmp_path / "mlx")
    command = ["convert-adapter", "--adapter", adapter, "--model", tiny_model, "--output"]
    assert "--force" in refusal(capsys, *command, there)
    converted(tiny_model, adapter, there, "--force")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("the only copy")
    assert "holds something else" in refusal(capsys, *command, other, "--force")
    assert "is what is read" in refusal(capsys, *command, adapter, "--force")
    assert (other / "thesis.txt").exists() and read_adapter(adapter).layout == "peft"
    assert "is what is read" in refusal(
        capsys, "fuse", "--adapter", adapter, "--model", tiny_model, "--output", tiny_model, "--force"
    )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("layout", ["peft", "mlx"])
def test_a_fused_model_is_the_model_with_its_adapter(tiny_model: Path, tmp_path: Path, layout: str, dora: bool) -> None:
    adapter = peft_adapter(tiny_model, tmp_path / "peft", use_dora=dora)
    logits = torch_logits(tiny_model, adapter)
    if layout == "mlx":
        adapter = converted(tiny_model, adapter, tmp_path / "mlx")
    fused = tmp_path / "fused"
    assert cli.run(["fuse", "--model", str(tiny_model), "--adapter", str(adapter), "--output", str(fused)]) == 0
    assert_same(torch_logits(fused), logits)
    assert_same(mlx_logits(fused), logits)
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (fused / name).read_bytes() == (tiny_model / name).read_bytes()
    assert {tensor.dtype for tensor in load_file(fused / "model.safetensors").values()} == {np.dtype("float32")}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    plain = tiny.make_model(folder / "plain", hidden_size=64, intermediate_size=128)
    convert(str(plain), str(folder / "q"), quantize=True, q_group_size=32, q_bits=4, dtype="bfloat16")
    return folder / "q"


def test_a_quantised_model_is_fused(quantised: Path, tmp_path: Path) -> None:
    adapter = mlx_lm_adapter(quantised, tmp_path / "mlx", keys=["self_attn.q_proj", "mlp.down_proj"])
    logits = mlx_logits(quantised, adapter)
    command = ["fuse", "--model", str(quantised), "--adapter", str(adapter), "--output"]
    assert cli.run([*command, str(tmp_path / "plain"), "--dequantize", "--dtype", "float32"]) == 0
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not config.keys() & {"quantization", "quantization_config"}
    assert_same(mlx_logits(tmp_path / "plain"), logits)
    assert_same(torch_logits(tmp_path / "plain"), logits)

    assert cli.run([*command, str(tmp_path / "packed")]) == 0
    before, after, whole = (
        mx.load(str(folder / "model.safetensors")) for folder in (quantised, tmp_path / "packed", tmp_path / "plain")
    )
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype, name
        same = bool(mx.array_equal(before[name], after[name]))
        assert same != ("q_proj" in name or "down_proj" in name), name
    layer = "model.layers.1.mlp.down_proj"
    expected = mx.quantize(whole[f"{layer}.weight"].astype(mx.bfloat16), group_size=32, bits=4)
    for part, value in zip(("weight", "scales", "biases"), expected, strict=True):
        assert mx.array_equal(after[f"{layer}.{part}"], value)

    peft_folder = converted(quantised, adapter, tmp_path / "peft")
    command[command.index(str(adapter))] = str(peft_folder)
    assert cli.run([*command, str(tmp_path / "of torch"), "--dtype", "float32"]) == 0
    assert_same(torch_logits(tmp_path / "of torch"), logits)
    assert cli.run([*command, str(tmp_path / "half")]) == 0
    saved = load_torch_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_an_adapter_of_a_quantised_model_is_evaluated_on_both_sides(
    quantised: Path, feedback: Path, tmp_path: Path
) -> None:
    adapter = mlx_lm_adapter(quantised, tmp_path / "mlx", keys=["self_attn.q_proj", "mlp.down_proj"])
    assert matrix_shapes(quantised)["model.layers.0.mlp.down_proj"] == (64, 128)
    peft_folder = converted(quantised, adapter, tmp_path / "peft")
    metrics = []
    for backend, folder in (("mlx", adapter), ("torch", peft_folder)):
        report = tmp_path / f"{backend}.json"
        command = f"evaluate --backend {backend} --model {quantised} --adapter {folder} --data {feedback}"
        assert cli.run(f"{command} --device cpu --dtype float32 --report {report}".split()) == 0
        metrics.append(json.loads(report.read_text()))
    assert abs(metrics[0]["log_odds_shift/chosen"]) > 0.1
    sums = max(abs(metrics[0][f"logps/{kind}"]) for kind in ("chosen", "rejected"))
    for name, value in metrics[0].items():
        # A reward is the difference of two sums of float32, each known to a millionth of its size.
        error = 1e-6 * sums if name.startswith("rewards/") else 2e-5
        assert metrics[1][name] == pytest.approx(value, rel=2e-5, abs=error), name


def test_training_goes_on_on_the_other_side(
    quantised: Path, feedback: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun with MLX on a quantised model, then continued by MLX, and by PyTorch: the same steps, the same adapter."""

    def train(backend: str, name: str, *more: object) -> Path:
        command = f"train --model {quantised} --data {feedback} --output {tmp_path / name} --backend {backend}"
        settings = "--device cpu --dtype float32 --rank 4 --alpha 12 --batch-size 4 --max-steps 3 --lr 1e-2"
        assert cli.run([*command.split(), *settings.split(), *map(str, more)]) == 0
        return tmp_path / name

    begun = train("mlx", "begun") / "adapter"
    there = converted(quantised, begun, tmp_path / "there")
    on_mlx = train("mlx", "on-mlx", "--seed", 1, "--adapter", begun)
    on_torch = train("torch", "on-torch", "--seed", 1, "--adapter", there)
    assert cli.run(["check-run", str(on_mlx), str(on_torch), "--picture", str(tmp_path / "x.png")]) == 0
    fresh = train("torch", "fresh", "--seed", 1)
    assert cli.run(["check-run", str(on_mlx), str(fresh), "--picture", str(tmp_path / "x.png")]) == 1
    back = converted(quantised, on_torch / "adapter", tmp_path / "back")
    mlx_adapter.load_adapter(mlx_base(quantised), back)

    for backend, folder in (("mlx", begun), ("torch", there)):
        command = f"train --model {quantised} --data {feedback} --output {tmp_path / 'x'} --backend {backend}"
        command += f" --device cpu --adapter {folder}"
        assert "has rank 4 and alpha 12, and this run has lora.rank 8" in refusal(
            capsys, *command.split(), "--rank", 8, "--alpha", 12
        )
        said = refusal(capsys, *command.split(), "--rank", 4, "--alpha", 12, "--fine-tune-type", "dora")
        assert "was made with fine_tune_type lora, and this run has dora" in said


# Folders of older versions of mlx-lm

OLD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what is put in the place of num_layers, of lora_parameters
    "0.14": ({"lora_layers": 2}, {"rank": 4, "dropout": 0.0, "scale": SCALE}),
    "0.9": ({"lora_layers": 2}, {"rank": 4, "alpha": 4, "dropout": 0.0, "scale": SCALE}),
    "0.18, DoRA": ({"lora_layers": 2, "use_dora": True}, {"rank": 4, "dropout": 0.0, "scale": SCALE}),
    "without the number": ({}, {"rank": 4, "scale": SCALE}),
}


@pytest.mark.parametrize("version", OLD)
def test_a_folder_of_an_older_mlx_lm_is_read(tiny_model: Path, tmp_path: Path, version: str) -> None:
    """Without `keys` it means the modules of its time, which the tensors name: here two of seven."""
    top, parameters = OLD[version]
    dora = "use_dora" in top
    folder = mlx_lm_adapter(tiny_model, tmp_path / "old", dora=dora, keys=["self_attn.q_proj", "self_attn.v_proj"])
    expected = mlx_logits(tiny_model, folder)
    (folder / "adapter_config.json").write_text(json.dumps(top | {"lora_parameters": parameters}))
    model = mlx_adapter.load_adapter(mlx_base(tiny_model), folder)
    assert_same(np.array(model(mx.array(IDS))), expected)
    assert_same(torch_logits(tiny_model, converted(tiny_model, folder, tmp_path / "peft")), expected)
    fuse = ["fuse", "--model", str(tiny_model), "--adapter", str(folder), "--output", str(tmp_path / "fused")]
    assert cli.run(fuse) == 0
    assert_same(mlx_logits(tmp_path / "fused"), expected)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rank": 4, "alpha": 16.0}, "lora_parameters has no scale. It has alpha"),
        ({"alpha": 16.0}, "lora_parameters has no rank and no scale"),
        ({"rank": 4, "alpha": 16.0, "scale": 10.0}, "has scale 10.0 and alpha 16.0"),
        (None, "has no lora_parameters"),
    ],
)
def test_what_an_old_folder_does_not_say_is_asked_for(
    tiny_model: Path, tmp_path: Path, parameters: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mlx_lm_adapter(tiny_model, tmp_path / "old", keys=["self_attn.q_proj"])
    config = {"lora_layers": 2, "fine_tune_type": "lora"} | (
        {} if parameters is None else {"lora_parameters": parameters}
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = ["--model", tiny_model, "--adapter", folder]
    assert message in refusal(capsys, "generate", *model, "--prompt", "x", "--backend", "mlx")
    assert message in refusal(capsys, "convert-adapter", *model, "--output", tmp_path / "peft")
    assert message in refusal(capsys, "fuse", *model, "--output", tmp_path / "fused")


def test_an_mlx_adapter_that_brings_weights_of_the_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """They would stay when it is switched off."""
    folder = mlx_lm_adapter(tiny_model, tmp_path / "mlx", keys=["self_attn.q_proj"])
    file = folder / "adapters.safetensors"
    whole = mx.zeros((304, 32))
    weights = dict(mx.load(str(file))) | {"model.embed_tokens.weight": whole}
    mx.eval(weights)  # read before the file is written over
    mx.save_safetensors(str(file), weights)
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is not of an adapter"):
        mlx_adapter.load_adapter(mlx_base(tiny_model), folder)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
@pytest.mark.parametrize("tied", [True, False])
def test_a_fused_model_with_an_adapted_head_or_embedding(tmp_path: Path, tied: bool, targets: list[str]) -> None:
    """Adding what is for the one to both, as tied weights would have it, is another model."""
    base = tiny.make_model(tmp_path / "model", tie_word_embeddings=tied)
    both = {"peft": peft_adapter(base, tmp_path / "peft", target_modules=targets)}
    if not (tied and "lm_head" in targets):  # which mlx-lm does not have
        keys = ["self_attn.q_proj", "lm_head" if "lm_head" in targets else "model.embed_tokens"]
        both["mlx"] = mlx_lm_adapter(base, tmp_path / "mlx", keys=keys)
    for layout, adapter in both.items():
        expected = torch_logits(base, adapter) if layout == "peft" else mlx_logits(base, adapter)
        output = tmp_path / f"fused-{layout}"
        assert cli.run(["fuse", "--model", str(base), "--adapter", str(adapter), "--output", str(output)]) == 0
        assert_same(torch_logits(output), expected)
        assert_same(mlx_logits(output), expected)
