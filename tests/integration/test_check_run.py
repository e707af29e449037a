"""Twenty steps on either backend take the same road; `bnf check-run` says so, and notices whatever is not the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from bnf_align import cli
from bnf_align.commands.check_run import compare, read_run, update_error
from bnf_core import registry
from bnf_core.models.adapters import LowRank
from bnf_core.types import Array
from conftest import slow

STEPS = 20


@pytest.fixture(autouse=True)
def no_preloading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")  # or MLX's commands would start this process anew


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 2 * STEPS)


def train(model: Path, rows: Path, run: Path, backend: str, *more: str) -> Path:
    command = f"train --model {model} --data {rows} --output {run} --backend {backend} --device cpu --dtype float32"
    settings = "--batch-size 8 --epochs 4 --rank 4 --alpha 8 --lr 2e-3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", "")
        assert cli.run([*command.split(), *settings.split(), *more]) == 0
    return run


@pytest.fixture(scope="module")
def torch_run(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if registry.missing("torch"):
        pytest.skip("torch is not installed")
    return train(tiny_model, rows, tmp_path_factory.mktemp("runs") / "torch", "torch")


@pytest.fixture(scope="module")
def mlx_run(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if registry.missing("mlx"):
        pytest.skip("mlx is not installed")
    return train(tiny_model, rows, tmp_path_factory.mktemp("runs") / "mlx", "mlx")


def check(capsys: pytest.CaptureFixture[str], a: Path, b: Path) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.run(["check-run", str(a), str(b), "--picture", str(b.parent / "check-run.png")])
    output = capsys.readouterr()
    return code, " ".join((output.out + output.err).split())


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("lora", "bnf"),
        slow("dora", "bnf"),
        slow("full", "bnf"),
        *(slow("lora", name) for name in ("kto", "nll", "bco", "apo_zero_unpaired", "bnf + 0.2*npo")),
    ],
)
def test_both_backends_take_the_same_road(
    tiny_model: Path,
    rows: Path,
    torch_run: Path,
    mlx_run: Path,
    tmp_path: Path,
    kind: str,
    objective: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = torch_run, mlx_run
    if (kind, objective) != ("lora", "bnf"):
        other = "--fine-tune-type", kind, "--objective", objective
        a, b = (train(tiny_model, rows, tmp_path / name, name, *other) for name in ("torch", "mlx"))
    code, text = check(capsys, a, b)
    assert code == 0, text
    assert "the runs agree" in text and "settings that differ" not in text
    assert (b.parent / "check-run.png").stat().st_size > 10_000
    result = compare(read_run(a), read_run(b))
    assert [step for step, *_ in result.losses] == list(range(1, STEPS + 1))
    assert all(abs(x - y) <= 1e-4 * max(abs(x), abs(y)) + 1e-6 for _, x, y, _ in result.losses)
    losses = [x for _, x, _, _ in result.losses]
    assert np.ptp(losses) > 0.1  # it went somewhere


@pytest.mark.parametrize(
    ("change", "setting", "first"),
    [
        (("--lr", "2.02e-3"), "optimizer.learning_rate: 0.002 | 0.00202", "first in: learning rate (from step 1)"),
        slow(("--seed", "1"), "seed: 0 | 1", "first in: tokens (from step 1)"),
    ],
)
def test_other_settings_are_named_and_noticed(
    tiny_model: Path,
    rows: Path,
    torch_run: Path,
    tmp_path: Path,
    change: tuple[str, str],
    setting: str,
    first: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = train(tiny_model, rows, tmp_path / "other", "torch", *change)
    code, text = check(capsys, torch_run, other)
    assert code == 1
    assert setting in text and first in text
    assert text.index("settings that differ") < text.index("quantity")


def metrics(run: Path, change: Callable[[list[str]], list[str]]) -> None:
    path = run / "metrics.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def weights(run: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    """Changes A and B of a square layer."""
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    names = [f"base_model.model.model.layers.1.self_attn.q_proj.{part}.weight" for part in ("lora_A", "lora_B")]
    changed = change(*(tensors[name] for name in names))
    tensors |= {name: np.ascontiguousarray(value) for name, value in zip(names, changed, strict=True)}
    save_file(tensors, path)


def scaled(run: Path) -> None:
    path = run / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 1.001 * config["lora_alpha"]}))


DIFFERENT: list[tuple[Callable[[Path], None], str]] = [
    (lambda run: metrics(run, lambda lines: lines[:6] + lines[7:]), "first in: steps (step 7 is in one run only)"),
    (lambda run: metrics(run, lambda lines: lines[:-1]), "first in: steps (step 20 is in one run only)"),
    (lambda run: weights(run, lambda a, b: (b.T, a.T)), "first in: adapter (model.layers.1.self_attn.q_proj)"),
    (lambda run: weights(run, lambda a, b: (a, -b)), "first in: adapter (model.layers.1.self_attn.q_proj)"),
    (lambda run: weights(run, lambda a, b: (a, b * np.float32("nan"))), "first in: adapter (model.layers.1"),
    (scaled, "first in: adapter"),
]


@pytest.mark.parametrize(("change", "first"), DIFFERENT)
def test_a_difference_is_noticed(
    torch_run: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    first: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = shutil.copytree(torch_run, tmp_path / "other")
    assert check(capsys, torch_run, other)[0] == 0
    change(other)
    code, text = check(capsys, torch_run, other)
    assert code == 1 and first in text, text


def test_a_loss_that_differs_is_found_at_its_step(
    torch_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(torch_run, tmp_path / "other")

    def change(lines: list[str]) -> list[str]:
        line = json.loads(lines[11])
        return [*lines[:11], json.dumps(line | {"loss": line["loss"] + 1e-4}) + "\n", *lines[12:]]

    metrics(other, change)
    code, text = check(capsys, torch_run, other)
    assert code == 1 and "first in: loss (step 12)" in text


def test_whole_models_are_compared_tensor_by_tensor(
    tiny_model: Path, torch_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [shutil.copytree(torch_run, tmp_path / name) for name in "ab"]
    for run in runs:
        shutil.rmtree(run / "adapter")
        shutil.copytree(tiny_model, run / "model")
    assert check(capsys, *runs)[0] == 0
    path = runs[1] / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.0001
    save_file(tensors, path)
    code, text = check(capsys, *runs)
    assert code == 1 and "first in: weights (model.layers.0.mlp.up_proj.weight)" in text
    assert "an adapter in one run, all weights in the other" in check(capsys, torch_run, runs[0])[1]


BAD: list[tuple[Callable[[Path], object], str]] = [
    (lambda run: (run / "config.yaml").unlink(), "is not a run: it has no config.yaml"),
    (lambda run: (run / "metrics.jsonl").unlink(), "is not a run: it has no metrics.jsonl"),
    (lambda run: (run / "metrics.jsonl").write_text(""), "has taken no steps"),
    (lambda run: (run / "metrics.jsonl").write_text('{"kind": "train", "step'), "is not a finished run"),
    (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "is not a finished run"),
    (lambda run: (run / "config.yaml").write_text("a: [b"), "is not a finished run"),
    (lambda run: (run / "config.yaml").write_text("42"), "is not a finished run"),
    (lambda run: shutil.rmtree(run / "adapter"), "has neither an adapter nor a model"),
    (lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\x08"), "not a whole safetensors file"),
]


@pytest.mark.parametrize(("harm", "reason"), BAD)
def test_bad_input_is_explained(
    torch_run: Path, tmp_path: Path, harm: Callable[[Path], object], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(torch_run, tmp_path / "other")
    harm(other)
    code, text = check(capsys, torch_run, other)
    assert code == 2 and reason in text, text


@pytest.mark.usefixtures("drawn")
def test_usage_is_explained(torch_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check-run", str(torch_run)]) == 2
    assert "picture" in check(capsys, torch_run, torch_run)[1]
    (tmp_path / "file").touch()
    code = cli.run(["check-run", str(torch_run), str(torch_run), "--picture", str(tmp_path / "file" / "x.png")])
    assert code == 2 and "its folder cannot be made" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("size", [1e-7, 1.0])
def test_the_error_of_an_update_is_that_of_the_whole_matrices(size: float) -> None:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Array:
        return np.asarray(rng.standard_normal(shape), np.float32)

    a = LowRank(draw(3, 20), draw(11, 3))
    b = LowRank(a.a + np.float32(size) * draw(3, 20), a.b + np.float32(size) * draw(11, 3))
    wide = [(scale * x.b.astype(np.float64)) @ x.a.astype(np.float64) for scale, x in ((2.0, a), (2.0 + size, b))]
    expected = np.linalg.norm(wide[0] - wide[1]) / np.linalg.norm(wide[0])
    assert update_error(a, 2.0, b, 2.0 + size) == pytest.approx(expected, rel=1e-6)


def test_the_error_of_a_dora_update_sees_the_magnitudes() -> None:
    a = LowRank(np.ones((2, 4), np.float32), np.ones((3, 2), np.float32), np.float32([1, 2, 2]))
    b = LowRank(a.a, a.b, np.float32([1, 2, 2.3]))
    assert update_error(a, 1.0, b, 1.0) == pytest.approx(0.1, rel=1e-6)
    assert update_error(a, 1.0, LowRank(a.a, a.b), 1.0) == np.inf
