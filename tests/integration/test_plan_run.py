"""Planning: the formulae of memory against measured runs, and what is made of them."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import forked
import tiny
from benchmarks import interleaved
from benchmarks.growth import random_row
from benchmarks.step import OURS, benchmark, peak_memory
from bnf_align.commands import plan as plan_run
from bnf_align.commands.train import train
from bnf_align.run import auto_batch
from bnf_align.run.feedback import TrainingData, load_split
from bnf_core.config import DataConfig, FineTuneType, HardwareConfig, LoraConfig, TrainConfig
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import UserError
from bnf_core.models.architecture import HYBRIDS, Architecture, Grid, Memory, Training, UnknownLayers, memory
from bnf_core.models.layers import Layers, kinds_of
from bnf_core.steps.batching import MicroBatching, Rows, collate
from bnf_core.types import Example
from conftest import fast_on, slow
from invariance import write_turns

VOCAB = 4000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for a step to take more than the libraries do, small enough for a second."""
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "vocab_size": VOCAB,
        "initializer_range": 0.02,
        "max_position_embeddings": 1024,
    }
    return tiny.make_model(tmp_path_factory.mktemp("planned") / "model", **sizes)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With a shared expert and without."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 1024}
    families = {
        "mixtral": {"intermediate_size": 384, "num_local_experts": 8},
        "qwen2_moe": {"moe_intermediate_size": 192, "shared_expert_intermediate_size": 384, "num_experts": 8},
        "qwen3_moe": {"moe_intermediate_size": 192, "num_experts": 8, "num_experts_per_tok": 4, "head_dim": 64},
    }
    folder = tmp_path_factory.mktemp("mixtures")
    for family, own in families.items():
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes | own))
        model.save_pretrained(folder / family)
        assert Architecture.of(folder / family).parameters == pytest.approx(model.num_parameters(), rel=0.002)
    return {family: folder / family for family in families}


SIZES: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "max_position_embeddings": 1024}
SIZES |= {"vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
MAMBA, FULL, CONV = "linear_attention", "full_attention", "conv"
SSD: dict[str, Any] = {"mamba_d_head": 64, "mamba_d_state": 32, "mamba_n_groups": 1}
DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,  # the last has attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
HYBRID_SIZES: dict[str, dict[str, Any]] = {
    "falcon_h1": SSD | {"num_hidden_layers": 4, "mamba_d_ssm": 256, "mamba_n_heads": 4},
    "granitemoehybrid": SSD
    | {"num_hidden_layers": 5, "layer_types": [MAMBA, MAMBA, FULL, MAMBA, FULL], "mamba_n_heads": 8}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128, "shared_intermediate_size": 512},
    "lfm2": {"num_hidden_layers": 6, "layer_types": [CONV, CONV, FULL, CONV, FULL, CONV], "intermediate_size": 1024}
    | {"block_multiple_of": 8},
    "lfm2_moe": EXPERTS
    | {"num_hidden_layers": 5, "layer_types": [CONV, CONV, FULL, CONV, FULL], "num_dense_layers": 1},
    "mamba2": {"num_hidden_layers": 3, "num_heads": 8, "head_dim": 64, "state_size": 32, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 32, "num_hidden_layers": 6}
    | {"moe_intermediate_size": 128, "moe_shared_expert_intermediate_size": 256},
    "qwen3_5_text": DELTA,
    "qwen3_next": EXPERTS | DELTA | {"shared_expert_intermediate_size": 256},
}


def make_hybrid(folder: Path, family: str, **sizes: Any) -> Path:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = CONFIG_MAPPING[family]
    given = SIZES | HYBRID_SIZES[family] | sizes
    config = kind(**{kind.attribute_map.get(name, name): deepcopy(value) for name, value in given.items()})
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of a family."""
    return cache(lambda family: make_hybrid(tmp_path_factory.mktemp("hybrids") / family, family))


def settings(model: Path, backend: str, dtype: Any, **overrides: Any) -> TrainConfig:
    hardware = HardwareConfig(backend=backend, device="cpu", dtype=dtype)
    return TrainConfig(str(model), DataConfig(""), hardware=hardware, batch_size=16, micro_batch_size=16, **overrides)


def held_in_memory(rows: list[Example]) -> TrainingData:
    return TrainingData(Rows(rows, 0), rows, "", {})


@pytest.fixture(scope="module")
def runtime() -> Iterator[Callable[[str], float]]:
    """Bytes of a process like the one that is measured, by its backend. Both are forked: what they share counts as
    theirs."""
    with pytest.MonkeyPatch.context() as patch:
        forked.context()
        patch.setattr(interleaved, "START_METHOD", "forkserver")
        yield cache(lambda backend: interleaved.apart(backend, _runtime, backend))


def _runtime(backend: str) -> float:
    return benchmark(HardwareConfig(backend, "cpu", "float32")).runtime_memory()


@pytest.mark.parametrize(
    ("kind", "dtype", "dropout", "completions", "checkpointing"),
    [
        pytest.param("lora", "float32", 0.0, 1, False, marks=pytest.mark.slow),
        pytest.param("lora", "float32", 0.0, 4, False, marks=pytest.mark.slow),
        pytest.param("lora", "float32", 0.0, 1, True, marks=pytest.mark.slow),
        pytest.param("lora", "bfloat16", 0.0, 1, False, marks=pytest.mark.slow),
        pytest.param("dora", "float32", 0.1, 1, False, marks=pytest.mark.slow),
        pytest.param("full", "float32", 0.0, 1, False, marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_is_that_of_a_run(
    model: Path,
    runtime: Callable[[str], float],
    backend_name: str,
    kind: FineTuneType,
    dtype: str,
    dropout: float,
    completions: int,
    checkpointing: bool,
) -> None:
    require_predicted(
        model, runtime, backend_name, kind, dtype, dropout=dropout, completions=completions, checkpointing=checkpointing
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "dtype", "checkpointing"),
    [
        ("mixtral", "lora", "float32", False),
        ("qwen2_moe", "lora", "float32", False),
        ("qwen3_moe", "lora", "float32", False),
        ("mixtral", "lora", "bfloat16", False),
        ("mixtral", "lora", "float32", True),
        ("mixtral", "full", "float32", False),
    ],
)
def test_so_it_is_of_mixtures_of_experts(
    mixtures: dict[str, Path],
    runtime: Callable[[str], float],
    backend_name: str,
    family: str,
    kind: FineTuneType,
    dtype: str,
    checkpointing: bool,
) -> None:
    """Rejects experts that are counted once, whatever number is chosen, and adapters on them."""
    if backend_name == "mlx" and (dtype != "float32" or kind == "full"):
        pytest.skip("MLX trains adapters of mixtures alone, and on a CPU multiplies experts in float32")
    require_predicted(mixtures[family], runtime, backend_name, kind, dtype, checkpointing=checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "dtype", "checkpointing"),
    [
        *((family, "lora", "float32", False) for family in HYBRIDS),
        ("lfm2", "lora", "bfloat16", False),
        ("lfm2", "dora", "float32", False),
        ("lfm2", "full", "float32", False),
        ("falcon_h1", "full", "float32", False),
        ("falcon_h1", "lora", "float32", True),
        ("granitemoehybrid", "lora", "float32", True),
        ("qwen3_next", "lora", "float32", True),
    ],
)
def test_so_it_is_of_hybrids(
    hybrid: Callable[[str], Path],
    runtime: Callable[[str], float],
    backend_name: str,
    family: str,
    kind: FineTuneType,
    dtype: str,
    checkpointing: bool,
) -> None:
    """Rejects a kind of layer that is counted as another, and layers of a kind that are counted once."""
    if backend_name == "mlx" and (dtype != "float32" or kind == "full"):
        pytest.skip("MLX trains adapters of hybrids alone, and on a CPU multiplies in float32")
    if backend_name == "mlx" and family in ("nemotron_h", "qwen3_5_text"):
        with pytest.raises(UserError, match=f"what {family.removesuffix('_text')} keeps in memory is not known on mlx"):
            benchmark(HardwareConfig("mlx", "cpu")).layers(hybrid(family), Training(dtype, kind, LoraConfig()))
        return
    if backend_name == "mlx" and checkpointing and family == "qwen3_next":
        pytest.skip("its layers cannot be replaced on MLX, and checkpointing is refused")
    require_predicted(hybrid(family), runtime, backend_name, kind, dtype, checkpointing=checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_so_it_is_of_a_long_row(runtime: Callable[[str], float], checkpointing: bool, tmp_path: Path) -> None:
    """Of 6,000 tokens on PyTorch. Rejects attention that keeps a number for every two tokens, 144 MiB a head."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6}
    model = tiny.make_model(tmp_path / "long", **sizes, vocab_size=VOCAB, max_position_embeddings=8192)
    rows = [random_row(0, 5500, 500, VOCAB)]
    require_predicted(model, runtime, "torch", "lora", "float32", checkpointing=checkpointing, rows=rows)


def require_predicted(
    model: Path,
    runtime: Callable[[str], float],
    backend_name: str,
    kind: FineTuneType,
    dtype: str,
    *,
    dropout: float = 0.0,
    completions: int = 1,
    checkpointing: bool = False,
    rows: list[Example] | None = None,
) -> None:
    count = 16 if backend_name == "torch" else completions  # MLX counts what it allocates, without the libraries
    rows = rows or [random_row(i // completions, 110, 40, VOCAB, i % completions) for i in range(count)]
    lora = LoraConfig(dropout=dropout)
    config = settings(model, backend_name, dtype, fine_tune_type=kind, lora=lora, gradient_checkpointing=checkpointing)
    predicted = auto_batch.peak(
        auto_batch.Planned.of(config, model),
        held_in_memory(rows),
        len(rows),
        MicroBatching(len(rows), share_prompts=True),
        runtime(backend_name),
    )
    # What glibc leaves lying about differs from run to run, and only ever adds.
    measured = min(peak_memory(config, rows, OURS) for _ in range(3 if backend_name == "torch" else 1))
    assert predicted.total == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32)])
def test_a_quantised_checkpoint_takes_what_its_arrays_do(tmp_path: Path, bits: int, group_size: int) -> None:
    """And the head is widened beside them. Rejects weights counted in bfloat16, which are twice to four times that."""
    convert = pytest.importorskip("mlx_lm").convert
    from mlx.utils import tree_flatten

    from bnf_mlx.backend import MLXBackend

    model = tiny.make_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    convert(str(model), str(tmp_path / "q"), quantize=True, q_bits=bits, q_group_size=group_size, dtype="bfloat16")
    engine: Any = MLXBackend().load(tmp_path / "q", device="cpu", dtype="bfloat16")
    held = sum(x.nbytes for _, x in tree_flatten(engine.model.parameters())) + engine.scored.dequantised.nbytes
    training = Training("bfloat16", "lora", LoraConfig())
    kept = benchmark(HardwareConfig("mlx", "cpu")).kept(Architecture.of(tmp_path / "q"), training, Grid(1, 1, 1))
    assert kept.weights == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 7, "group_size": 64}])
def test_a_quantisation_that_mlx_does_not_have_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected 2, 3, 4"):
        Architecture.from_config(LLAMA | {"quantization": settings})


def test_bitsandbytes_narrows_the_linear_layers_alone() -> None:
    model = Architecture.from_config(LLAMA)
    training, torch = Training("bfloat16", "lora", LoraConfig()), benchmark(HardwareConfig("torch", "cpu"))
    whole, narrow = (
        torch.kept(model, replace(training, load_in_4bit=four), Grid(1, 1, 1)).weights for four in (False, True)
    )
    assert whole - narrow == pytest.approx(model.linear_parameters * (2 - 4.127 / 8), rel=1e-4)


def test_mlx_on_a_gpu_is_planned_in_the_precision_of_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    from bnf_mlx import memory as mlx_memory

    monkeypatch.setattr(mlx_memory, "resolve_device", lambda device: mx.Device(getattr(mx, device)))
    found = [
        mlx_memory.MLXMeasures(on, dtype, own_dtype="bfloat16").dtype
        for on in ("gpu", "cpu")
        for dtype in ("auto", "float16")
    ]
    assert found == [mx.bfloat16, mx.float16, mx.float32, mx.float16]


def test_a_plan_counts_rows_tokens_and_steps(tiny_model: Path, feedback: Path, backend_name: str) -> None:
    hardware = HardwareConfig(backend=backend_name, device="cpu", dtype="float32")
    config = TrainConfig(str(tiny_model), DataConfig(str(feedback)), hardware=hardware, batch_size=5, epochs=2)
    console = Console(record=True, width=120)
    plan = plan_run.plan(config, console)
    rows = load_split(config.data, "train", load_tokenizer(tiny_model), Console(quiet=True))
    assert plan.steps == 6  # 12 rows, twice: the last batch of an epoch is short
    assert plan.tokens == sum(map(len, rows))
    assert plan.completion_tokens == sum(len(row.completion_ids) for row in rows)
    assert plan.largest == 5 and plan.seconds > 0
    for word in ("peak", "micro_batch_size 5 fits", "6  of 5 rows"):
        assert word in console.export_text(clear=False)


def test_a_plan_counts_trained_tokens_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Rejects turns of tools, and those that are switched off, counted as trained."""
    data = write_turns(tmp_path / "turns.jsonl")
    hardware = HardwareConfig(backend="torch", device="cpu", dtype="float32")
    config = TrainConfig(str(tiny_model), DataConfig(str(data)), hardware=hardware)
    plan = plan_run.plan(config, Console(quiet=True))
    rows = load_split(config.data, "train", load_tokenizer(tiny_model), Console(quiet=True))
    completions = sum(len(row.completion_ids) for row in rows)
    assert plan.completion_tokens == sum(sum(row.trained or (1,) * len(row.completion_ids)) for row in rows)
    assert 0 < plan.completion_tokens < completions < plan.tokens


def test_a_plan_needs_no_weights(tiny_model: Path, feedback: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    hardware = HardwareConfig(backend="torch", device="cpu")
    plan_run.plan(TrainConfig(str(folder), DataConfig(str(feedback)), hardware=hardware), Console(quiet=True))


@pytest.mark.parametrize("free", [0.0, 99.0, 100.0, 250.0, 1e9, math.nan])
def test_the_largest_micro_batch_is_the_last_that_fits(free: float) -> None:
    """Needs 90 bytes a row, and a tenth of the memory is left alone."""
    expected = 16 if math.isnan(free) else min(16, int(0.9 * free / 90))
    assert auto_batch.largest(lambda size: 90.0 * size, 16, free) == expected


def test_auto_batch_takes_what_fits(
    tiny_model: Path,
    feedback: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bnf_torch.memory import TorchMeasures

    config = TrainConfig(
        str(tiny_model),
        DataConfig(str(feedback)),
        hardware=HardwareConfig("torch", "cpu", "float32"),
        output=str(tmp_path / "run"),
        max_steps=1,
        auto_batch=True,
        batch_size=12,
        share_prompts=False,
    )
    rows = load_split(config.data, "train", load_tokenizer(tiny_model), Console(quiet=True))
    planned = auto_batch.Planned.of(config, tiny_model)

    def needs(size: int) -> float:
        found = auto_batch.peak(planned, held_in_memory(rows), 12, MicroBatching(size))
        return found.total - found.weights

    monkeypatch.setattr(TorchMeasures, "free_memory", lambda self: needs(3) / 0.9 + 1)
    train(config, Console())
    assert "3 rows at a time" in capsys.readouterr().out
    monkeypatch.setattr(TorchMeasures, "free_memory", lambda self: needs(1) / 2)
    with pytest.raises(UserError, match="not even one row fits"):
        train(replace(config, overwrite=True), Console(quiet=True))


LLAMA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 304,
    "tie_word_embeddings": True,
}


def test_parameters_are_those_of_the_model(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert Architecture.of(tiny_model).parameters == sum(p.numel() for p in model.parameters())


def test_adapter_parameters_follow_rank_and_targets() -> None:
    model = Architecture.from_config(LLAMA)
    assert model.adapter_parameters(LoraConfig(rank=4, targets=["q_proj"])) == 2 * 4 * (32 + 32)
    assert model.adapter_parameters(LoraConfig(rank=4, targets=["k_proj", "down_proj"])) == 2 * 4 * (32 + 16 + 64 + 32)
    assert model.adapter_parameters(LoraConfig(rank=4, targets=["all-linear"])) == 2 * 4 * (
        64 + 48 + 48 + 64 + 96 + 96 + 96
    )


def test_masks_are_planned_as_they_are_made() -> None:
    """On a CPU the mask that transformers makes; none where each row holds one sequence."""
    import torch
    from transformers.masking_utils import create_causal_mask
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    from bnf_torch.attention import LAYOUT, attending

    model, measures = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval(), benchmark(HardwareConfig("torch", "cpu"))
    planned, training = Architecture.from_config(LLAMA), Training("float32", "lora", LoraConfig())
    rows = [random_row(i, 20, 10, 300, i) for i in range(4)]
    packed = collate(rows, 4, bins=[[0, 1], [2, 3]])
    layout = {name: torch.from_numpy(getattr(packed, name)).long() for name in LAYOUT}
    with attending(model, **layout) as options:
        made = create_causal_mask(
            config=model.config, inputs_embeds=torch.zeros(*packed.input_ids.shape, 32), past_key_values=None, **options
        )
    grid = measures.grid(packed)
    assert memory(planned, training, measures.kept(planned, training, grid)).masks == made.nbytes
    alone = measures.grid(collate(rows, 4))
    assert measures.kept(planned, training, alone).masks == 0
    long = Grid(1, 32768, 100, masked=True)
    assert measures.kept(planned, training, long).masks == 2**30
    measures.cuda = True
    assert measures.kept(planned, training, long).masks == 2 * 4 * 256**2


@pytest.mark.parametrize("change", [{"num_experts": 8}, {"intermediate_size": None}, {"mamba_d_state": 16}])
def test_a_model_that_the_formulae_do_not_know_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="dense transformers"):
        Architecture.from_config(LLAMA | change)


def test_memory_grows_with_what_it_depends_on() -> None:
    model, measures = Architecture.from_config(LLAMA), benchmark(HardwareConfig("torch", "cpu"))

    def needs(training: Training, rows: int = 2, completion_tokens: int = 64) -> Memory:
        grid = Grid(rows, 64, completion_tokens)
        return memory(model, training, measures.kept(model, training, grid))

    training = Training("float32", "lora", LoraConfig())
    few, many = needs(training), needs(training, 4, 128)
    assert many.activations == 2 * few.activations and many.weights == few.weights
    assert needs(replace(training, kind="full")).trained == 12 * model.parameters
    half = needs(replace(training, dtype="bfloat16"))
    assert half.weights == few.weights / 2 and half.activations < few.activations
    dora, few_targets = replace(training, kind="dora"), LoraConfig(targets=["q_proj", "v_proj"])
    assert needs(dora).activations > 1.5 * few.activations
    fewer, none = (needs(replace(dora, lora=lora)) for lora in (few_targets, LoraConfig(targets=["x"])))
    assert none.activations < fewer.activations < few.activations
    assert needs(replace(training, gradient_checkpointing=True)).activations < few.activations / 4


def test_holes_are_those_of_glibc_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, measures = Architecture.from_config(LLAMA), benchmark(HardwareConfig("torch", "cpu"))

    def fragments(kind: FineTuneType = "lora") -> float:
        return measures.kept(model, Training("float32", kind, LoraConfig()), Grid(2, 64, 64)).fragments

    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    assert fragments() == fragments("dora") > 0, "DoRA adds few to LoRA's"
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    assert fragments() == 0
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert fragments() == 0


# Layers that the formulae do not know


def layers_of(kept: Mapping[int, float], beside: Mapping[int, float], kinds: tuple[int, ...]) -> Layers:
    """A decoder whose layers of a kind keep so many bytes of a row for each token, one for every two tokens, and 5 of
    any number of rows; and take so many beside that while they are trained."""

    def peak(places: Mapping[int, int], rows: int, width: int) -> float:
        order = [kinds[places[i]] for i in sorted(places)]
        each = [5 + rows * (kept[kind] * width + width**2) for kind in order]
        return max(sum(each[: i + 1]) + rows * width * beside[kind] for i, kind in enumerate(order))

    return Layers(kinds, 32, 304, 1000, 900, 100, peak, widest=64, how="told")


@pytest.mark.parametrize("kinds", [(0, 1, 0, 0, 1), (0, 0, 0, 0), (0, 1, 1, 1), (0, 1)])
@pytest.mark.parametrize("width", [48, 64, 640])
def test_layers_are_counted_each_by_its_kind(kinds: tuple[int, ...], width: int) -> None:
    """Rejects one kind counted as the other, one layer of each kind, a second of a lone kind that is the other, rows
    longer than those measured that grow with their length alone, and the sum at the last layer where an earlier one
    takes more."""
    kept, beside = {0: 100.0, 1: 7.0}, {0: 1000.0, 1: 3.0}
    found = layers_of(kept, beside, kinds).step(Grid(4, width, 1))
    each = [5 + 4 * (kept[kind] * width + width**2) for kind in kinds]
    most = max(sum(each[: i + 1]) + 4 * width * beside[kind] for i, kind in enumerate(kinds))
    assert found == pytest.approx((sum(each), most - sum(each)))


def test_the_only_layer_is_all_there_is() -> None:
    assert sum(layers_of({0: 100.0}, {0: 10.0}, (0,)).step(Grid(4, 8, 1))) == pytest.approx(5 + 4 * 8 * 118)


def test_grids_that_fit_into_others_are_not_measured() -> None:
    few, wide, many = Grid(4, 100, 50), Grid(4, 200, 50), Grid(4, 150, 60)
    assert auto_batch.largest_of({few, wide, many}) == {wide, many}


def test_layers_that_are_alike_are_of_one_kind() -> None:
    assert kinds_of(["a", "b", "a", "b", "c"]) == (0, 1, 0, 1, 4)


@pytest.mark.parametrize(
    ("kind", "dtype", "checkpointing"),
    [
        ("lora", "float32", False),
        *map(slow, ("lora", "lora", "full"), ("bfloat16", "float32", "bfloat16"), (False, True, False)),
    ],
)
def test_a_trace_says_what_the_formulae_do(model: Path, kind: FineTuneType, dtype: str, checkpointing: bool) -> None:
    """Of a model that both know. Rejects weights that are counted with what layers keep, and tensors counted twice."""
    measures, grid = benchmark(HardwareConfig("torch", "cpu", dtype)), Grid(8, 128, 64)
    training = Training(dtype, kind, LoraConfig(), gradient_checkpointing=checkpointing)
    known, traced = Architecture.of(model), measures.layers(model, training)
    assert len(set(traced.kinds)) == 1
    assert (traced.parameters, traced.trained) == (known.parameters, known.trained_parameters(training))
    expected, found = (measures.kept(m, training, grid) for m in (known, traced))
    assert found.activations + found.weights == pytest.approx(expected.activations + expected.weights, rel=0.01)
    assert found.backward == pytest.approx(expected.backward, abs=0.05 * expected.activations + 4 * 2**20)
    assert found.loss == expected.loss


SMALL: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "vocab_size": 304}


@fast_on("mlx")
@pytest.mark.parametrize(("family", "kinds"), [("granitemoehybrid", (0, 0, 2, 0, 2)), slow("falcon_h1", (0, 0, 0, 0))])
def test_what_layers_keep_adds_up_to_the_model(
    tmp_path: Path, backend_name: str, family: str, kinds: tuple[int, ...]
) -> None:
    """On either backend, and where layers give tuples. Rejects one kind counted as the other, of which one keeps five
    times as much."""
    sizes = SMALL | {"mamba_n_heads": 4, "mamba_d_head": 32}
    if family == "granitemoehybrid":
        sizes |= {"shared_intermediate_size": 128, "intermediate_size": 32}
    else:
        sizes |= {"mamba_d_ssm": 128}
    folder = make_hybrid(tmp_path, family, **sizes)
    layers = benchmark(HardwareConfig(backend_name, "cpu")).layers(folder, Training("float32", "lora", LoraConfig()))
    assert layers.kinds == kinds
    whole = layers.peak({i: i for i in range(len(kinds))}, 3, 64)
    assert sum(layers.step(Grid(3, 64, 1))) == pytest.approx(whole, rel=0.03 if backend_name == "torch" else 0.15)


@pytest.fixture
def planned_hybrid(tiny_model: Path, tmp_path: Path) -> Path:
    """A tokenizer and the configuration of a model, without its weights."""
    made = make_hybrid(tmp_path / "made", "lfm2", **SMALL)
    folder = shutil.copytree(tiny_model, tmp_path / "lfm2", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(made / "config.json", folder)
    return folder


@fast_on("mlx")
def test_a_hybrid_is_planned_without_weights(planned_hybrid: Path, feedback: Path, backend_name: str) -> None:
    hardware = HardwareConfig(backend=backend_name, device="cpu", dtype="float32")
    config = TrainConfig(str(planned_hybrid), DataConfig(str(feedback)), hardware=hardware, batch_size=2)
    console = Console(record=True, width=160)
    plan = plan_run.plan(config, console)
    said = console.export_text()
    assert plan.largest == 2 and plan.memory.activations > 0 and math.isnan(plan.seconds)
    assert "of 2 kinds, traced on cpu" in said or "of 2 kinds, measured on cpu" in said
    assert not [line for line in said.splitlines() if line.startswith("time")]


@pytest.mark.slow
def test_auto_batch_of_a_hybrid_does_not_share_prompts(
    planned_hybrid: Path, feedback: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejects grids in which states go from one completion into the next."""
    from bnf_torch.memory import TorchMeasures

    grids: list[Any] = []
    grid_of = TorchMeasures.grid
    monkeypatch.setattr(TorchMeasures, "grid", lambda self, batch: grids.append(batch) or grid_of(self, batch))
    hardware = HardwareConfig("torch", "cpu", "float32")
    config = TrainConfig(str(planned_hybrid), DataConfig(str(feedback)), hardware=hardware, batch_size=4)
    plan_run.plan(config, Console(quiet=True))
    assert grids and not any(batch.shared for batch in grids)


def test_hybrids_are_not_taken_for_transformers() -> None:
    for family in HYBRIDS:
        for config in (LLAMA | {"model_type": family}, {"text_config": LLAMA | {"model_type": family}}):
            with pytest.raises(UnknownLayers, match=f"is of {family}"):
                Architecture.from_config(config)


@pytest.mark.parametrize("family", ["jamba", "falcon_mamba", "recurrent_gemma"])
def test_a_family_that_nobody_measured_is_refused(
    family: str, planned_hybrid: Path, feedback: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bnf_align import cli

    config = json.loads((planned_hybrid / "config.json").read_text()) | {"model_type": family}
    (planned_hybrid / "config.json").write_text(json.dumps(config))
    assert cli.run(["plan", "--model", str(planned_hybrid), "--data", str(feedback), "--backend", "torch"]) == 2
    assert "Measured are falcon_h1, granitemoehybrid, lfm2" in " ".join(capsys.readouterr().err.split())


def test_a_quantised_hybrid_is_refused_on_mlx(planned_hybrid: Path) -> None:
    pytest.importorskip("mlx_lm")
    config = json.loads((planned_hybrid / "config.json").read_text()) | {"quantization": {"bits": 4, "group_size": 64}}
    (planned_hybrid / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantised: what its layers keep is not measured"):
        benchmark(HardwareConfig("mlx", "cpu")).layers(planned_hybrid, Training("float32", "lora", LoraConfig()))


def test_layers_that_cannot_be_traced_are_refused(planned_hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as of kernels that want data."""
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    monkeypatch.setattr(Lfm2ShortConv, "forward", lambda self, x, *_, **__: x * float(x.sum()))
    layers = benchmark(HardwareConfig("torch", "cpu")).layers(planned_hybrid, Training("float32", "lora", LoraConfig()))
    with pytest.raises(UserError, match="layers of Lfm2ForCausalLM keep cannot be traced without data"):
        layers.step(Grid(1, 16, 1))
