"""Goldens: what a release computes in a whole run, as files that later releases, machines and backends compare with.

Twenty optimizer steps of a LoRA adapter on a tiny llama whose weights and rows are drawn from the raw bits of PCG64:
the same bytes on every machine, without a tokenizer. A golden holds, for each backend, every step's loss and gradient
norm and the adapter's digest, norms and sums, in decimal and in hexadecimal, and what it was made with.

`python -m bnf_conformance.goldens` writes that of the present release. A file that was changed needs its line in
CHANGELOG.md.
"""

import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bnf_conformance.tolerances import Tolerances
from bnf_conformance.vectors import Draw
from bnf_core import registry
from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.errors import UserError
from bnf_core.protocol import Backend
from bnf_core.steps import loop, steps
from bnf_core.steps.batching import MicroBatching, Rows
from bnf_core.steps.metrics import Meter
from bnf_core.steps.reference import ReferenceCache
from bnf_core.steps.steps import Step
from bnf_core.storage.shards import WEIGHTS, Shard, under
from bnf_core.types import Array, Example, TokenScores

FORMAT = 1
FOLDER = Path(__file__).parent / "goldens"
BACKENDS = ("torch", "mlx")  # whose goldens a release has

# The run. Epsilon is 1e-2 because with the usual 1e-8 AdamW makes whole steps of round-off (docs/invariance.md); about
# half of the steps are clipped.
STEPS, ROWS, BATCH, MICRO_BATCH = 20, 24, 6, 3
VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 97, 32, 48, 2, 4, 2
LORA = LoraConfig(rank=2, alpha=4)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, epsilon=1e-2, max_grad_norm=1.4)
SEED = 0

# Of what a backend says of itself, what bits depend on.
VERSIONS = ("torch", "transformers", "peft", "cpu threads", "mlx", "mlx-lm")


@dataclass(frozen=True)
class Result:
    """What one backend made of the run."""

    made_with: Mapping[str, str]  # versions and CPU: where these are the same, the bits are
    loss: Sequence[float]  # of each step, float64
    grad_norm: Sequence[float]  # before clipping
    digest: str  # SHA-256 of the adapter's names and float32 bytes
    norms: Mapping[str, float]  # of each tensor of the adapter
    sums: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        steps = zip(self.loss, self.grad_norm, strict=True)
        return {
            "made_with": dict(self.made_with),
            "steps": [{**_number("loss", loss), **_number("grad_norm", norm)} for loss, norm in steps],
            "adapter": {
                "sha256": self.digest,
                "tensors": {
                    name: {**_number("norm", norm), **_number("sum", self.sums[name])}
                    for name, norm in self.norms.items()
                },
            },
        }

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Result":
        tensors = stored["adapter"]["tensors"]
        return cls(
            stored["made_with"],
            [_exact(step, "loss") for step in stored["steps"]],
            [_exact(step, "grad_norm") for step in stored["steps"]],
            stored["adapter"]["sha256"],
            {name: _exact(tensor, "norm") for name, tensor in tensors.items()},
            {name: _exact(tensor, "sum") for name, tensor in tensors.items()},
        )


@dataclass(frozen=True)
class Golden:
    """One release's file."""

    release: str
    date: str
    results: Mapping[str, Result]  # by backend


@dataclass(frozen=True)
class Comparison:
    """A run beside a golden's."""

    errors: Mapping[str, tuple[float, float]]  # quantity → largest relative error, allowed
    other: Mapping[str, tuple[str, str]]  # what the golden was made with, and what is here, where they differ
    same_bits: bool

    @property
    def ok(self) -> bool:
        """Within tolerances, and with the same versions on the same CPU the same bits."""
        near = all(error <= allowed for error, allowed in self.errors.values())  # which no NaN is
        return near and (self.same_bits or bool(self.other))


# The run ------------------------------------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    """config.json and model.safetensors of the tiny llama, in float32."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    grouped = HIDDEN * KV_HEADS // HEADS
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qo"}
        shapes |= {f"{layer}.self_attn.{x}_proj": (grouped, HIDDEN) for x in "kv"}
        shapes |= {f"{layer}.mlp.{x}_proj": (INNER, HIDDEN) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (HIDDEN, INNER)}
    weights = {f"{n}.weight": Draw(f"golden {n}").values(0.5, *shape, bits=24) for n, shape in shapes.items()}
    norms = ["model.norm"]
    norms += [f"model.layers.{i}.{x}_layernorm" for i in range(LAYERS) for x in ("input", "post_attention")]
    weights |= {f"{name}.weight": np.ones(HIDDEN, np.float32) for name in norms}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def rows() -> list[Example]:
    """Feedback as tokens: prompts of 3 to 9 tokens, two rows to a prompt, completions of 1 to 12."""
    draw = Draw("golden rows")
    examples: list[Example] = []
    for i in range(0, ROWS, 2):
        prompt = tuple(draw.below(VOCABULARY, 3 + int(draw.below(7, 1)[0])).tolist())
        for label in (True, False):
            completion = tuple(draw.below(VOCABULARY, 1 + int(draw.below(12, 1)[0])).tolist())
            examples.append(Example(prompt, completion, label, group=i, source=f"row {len(examples) + 1}"))
    return examples


def take(backend: Backend) -> Result:
    """Take the twenty steps, on the CPU in float32.

    Raises:
        UserError: the backend has losses alone.
    """
    losses: list[float] = []
    norms: list[float] = []

    def done(step: Step, scores: list[TokenScores], norm: float) -> None:
        meter = Meter()
        for (batch, reference), measured in zip(step.batches, scores, strict=True):
            meter.add(batch, measured, reference)
        losses.append(float(meter.result()["loss"] or 0.0))
        norms.append(norm)

    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name))
        engine = backend.load(
            Path(name),
            device="cpu",
            dtype="float32",
            fine_tune_type="lora",
            lora=LORA,
            optimizer=OPTIMIZER,
            seed=SEED,
        )
        taken = steps.steps(
            Rows(rows(), SEED),
            batch_size=BATCH,
            num_steps=STEPS,
            optimizer=OPTIMIZER,
            batching=MicroBatching(MICRO_BATCH),
            reference=ReferenceCache(engine.reference_log_odds),
            processes=engine.processes,
        )
        loop.train(engine, taken, done, OPTIMIZER.max_grad_norm)
        adapter = under(WEIGHTS, {n: value for n, value in engine.state().items() if not isinstance(value, Shard)})
    return Result(
        made_with(backend),
        losses,
        norms,
        _digest(adapter),
        {name: float(np.linalg.norm(adapter[name].astype(np.float64))) for name in sorted(adapter)},
        {name: float(adapter[name].sum(dtype=np.float64)) for name in sorted(adapter)},
    )


def made_with(backend: Backend) -> dict[str, str]:
    """What the bits of a run depend on beside our own code."""
    described = backend.describe()
    return {
        "numpy": np.__version__,
        **{name: described[name] for name in VERSIONS if name in described},
        "cpu": _cpu(),
        "preloaded": ", ".join(Path(name).name for name in os.environ.get("LD_PRELOAD", "").split(":") if name),
    }


@cache
def _cpu() -> str:
    """Its kind, by which libraries choose their kernels."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return f"{platform.machine()} {platform.processor()}".strip()
    found = {name.strip(): value.strip() for name, _, value in reversed(lines)}  # of the first one
    flags = [flag for flag in found.get("flags", "").split() if flag in ("avx2", "fma", "avx512f", "avx512_bf16")]
    named = [found[name] for name in ("model name", "cpu family", "model") if name in found]
    return " ".join([platform.machine(), *named, *flags])


def _digest(tensors: Mapping[str, Array]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        content = np.ascontiguousarray(tensors[name], "<f4").tobytes()
        whole.update(f"{name} {len(content)}\n".encode() + content)
    return whole.hexdigest()


# Comparing ----------------------------------------------------------------------------------------------------


def compare(golden: Golden, backend: Backend) -> Comparison:
    """Take the run and hold it beside what the golden has of this backend.

    Raises:
        UserError: the golden has nothing of this backend, or the backend trains nothing.
    """
    if backend.name not in golden.results:
        raise UserError(
            f"the golden of {golden.release} has no results of {backend.name!r}: it has "
            f"{', '.join(golden.results) or 'none at all'}"
        )
    return beside(golden.results[backend.name], take(backend))


def beside(expected: Result, got: Result) -> Comparison:
    """Errors are relative to the largest loss, the largest norm of a gradient, and each tensor's norm."""
    names = sorted(expected.made_with.keys() | got.made_with.keys())
    here = {name: (expected.made_with.get(name, "none"), got.made_with.get(name, "none")) for name in names}
    weights = np.inf
    if expected.norms.keys() == got.norms.keys():
        pairs = [(of[name], to[name], expected.norms[name]) for of, to in _weights(expected, got) for name in of]
        weights = max(abs(a - b) / scale for a, b, scale in pairs)
    found = {
        "loss": _worst(expected.loss, got.loss),
        "grad_norm": _worst(expected.grad_norm, got.grad_norm),
        "adapter": float(weights),
    }
    allowed = Tolerances()
    exact = [(r.loss, r.grad_norm, r.digest) for r in (expected, got)]
    return Comparison(
        {name: (error, allowed("golden", name, "float32")[0]) for name, error in found.items()},
        {name: pair for name, pair in here.items() if pair[0] != pair[1]},
        same_bits=exact[0] == exact[1],
    )


def _weights(a: Result, b: Result) -> tuple[tuple[Mapping[str, float], Mapping[str, float]], ...]:
    return (a.norms, b.norms), (a.sums, b.sums)


def _worst(expected: Sequence[float], got: Sequence[float]) -> float:
    if len(expected) != len(got):
        return float("inf")
    e = np.asarray(expected)
    return float(np.abs(np.asarray(got) - e).max() / np.abs(e).max())


# Files --------------------------------------------------------------------------------------------------------


def releases() -> list[str]:
    """Those that have goldens, the oldest first."""
    return sorted((path.stem for path in FOLDER.glob("*.json")), key=lambda name: [int(x) for x in name.split(".")])


def load(name: str) -> Golden:
    """That of a release, such as 0.1.0, or the one in a file.

    Raises:
        UserError: there is none, or it is not a golden that this version reads.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise UserError(f"golden {name!r}: expected a .json file, or a release of {', '.join(releases())}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, and this version of bnf-align reads {FORMAT}")
        results = {backend: Result.of(stored) for backend, stored in content["results"].items()}
        return Golden(content["release"], content["date"], results)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no golden: {type(error).__name__}: {error}") from error


def write(path: Path, results: Mapping[str, Result], made_on: str) -> None:
    content = {
        "name": "bnf-golden",
        "format": FORMAT,
        "release": version("bnf-align"),
        "date": made_on,
        "about": "Each number is given in decimal and, to the bit, as C's %a has it. docs/conformance.md says what the "
        "run is, and when bits are compared.",
        "results": {name: result.as_dict() for name, result in results.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _number(name: str, value: float) -> dict[str, object]:
    return {name: value, f"{name}_hex": value.hex()}


def _exact(stored: Mapping[str, Any], name: str) -> float:
    """
    Raises:
        ValueError: its two forms are two numbers.
    """
    value = float.fromhex(stored[f"{name}_hex"])
    if value != stored[name]:
        raise ValueError(f"{name} is {stored[name]} in decimal and {value} in hexadecimal")
    return value


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / f"{version('bnf-align')}.json"
    write(target, {name: take(registry.get(name)) for name in BACKENDS}, date.today().isoformat())
    print(f"{target}: sha256 {file_digest(target)}")
