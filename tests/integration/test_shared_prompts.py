"""Shared prompts: a prompt computed once for all its completions gives the losses and gradients that it gives each time
anew, with fewer tokens."""

import importlib
import itertools
from dataclasses import replace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest

from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.errors import UserError
from bnf_core.steps.batching import MicroBatching, Rows, collate, micro_batches
from bnf_core.types import Batch, Example
from bnf_mlx.pages import pages
from conftest import fast_of, slow

PAD = 99


def feedback(shape: list[tuple[int, list[int]]], vocabulary: int = 64, seed: int = 0) -> list[Example]:
    """Rows of prompts, each with its length and those of its completions."""
    draw = np.random.default_rng(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.integers(1, vocabulary, length).tolist())

    rows = []
    for group, (prompt, completions) in enumerate(shape):
        prompt_ids = ids(prompt)
        rows += [Example(prompt_ids, ids(n), (i + group) % 2 == 0, group) for i, n in enumerate(completions)]
    return rows


PAIRS = feedback([(7, [5, 2]), (3, [1, 6]), (12, [4, 9])])
GROUP = feedback([(9, [3, 11, 1, 8, 2, 5, 7, 4])])
MIXED = feedback([(7, [5, 2, 9]), (3, [6]), (15, [4, 1]), (1, [3, 3, 12]), (5, [8])])
# Turns of others in the midst of every second completion that has room for them, and one at the beginning.
TURNS = [
    replace(e, trained=tuple(i % 3 != row % 2 for i in range(len(e.completion_ids))))
    if len(e.completion_ids) > 2
    else e
    for row, e in enumerate(MIXED)
]
ROWS = {"pairs": PAIRS, "eight": GROUP, "mixed": MIXED, "turns": TURNS}
APART = MicroBatching(1, group_by_length=False)
# Unpacked, in parts that split groups, packed, and packed so tightly that groups are split.
CUTS = [
    MicroBatching(8),
    MicroBatching(3),
    MicroBatching(3, group_by_length=False),
    MicroBatching(2, pack_to=64),
    MicroBatching(2, pack_to=30),
]
CUTS = [MicroBatching(c.micro_batch_size, c.pack_to, c.group_by_length, share_prompts=True) for c in CUTS]


# Batches


def test_a_shared_grid_by_hand() -> None:
    prompt = (1, 2, 3)
    rows = [Example(prompt, (4, 5), True), Example(prompt, (6,), False), Example((7,), (8, 9), True)]
    batch = collate(rows, 4, PAD, bins=[[0, 1], [2]], share_prompts=True)
    assert batch.shared and not batch.packed
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, PAD, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 0, 1, 2]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1]]
    assert batch.prefix_ids.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1]]
    assert batch.positions.tolist() == [2, 3, 2, 6, 7]  # the end of the prompt predicts two tokens
    assert batch.targets.tolist() == [4, 5, 6, 8, 9]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 2, 2]
    assert batch.lengths.tolist() == [5, 4, 3]
    np.testing.assert_array_equal(batch.coefficients, np.array([1 / 8, 1 / 8, -1 / 4, 1 / 8, 1 / 8], np.float32))


def test_pages_by_hand() -> None:
    prompt = (1, 2, 3, 4, 5)
    rows = [Example(prompt, (6, 7, 8), True), Example(prompt, (9,), False), Example((7,), (8, 9), True)]
    batch = collate(rows, 4, PAD, bins=[[0, 1], [2]], share_prompts=True)
    batching = pages(batch, 4)
    assert batching.input_ids.tolist() == [[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 0, 0], [7, 8, 0, 0]]
    assert batching.offsets.tolist() == [0, 4, 5, 0] and batching.lengths.tolist() == [4, 1, 2, 2]
    assert batching.table.tolist() == [[-1, -1, 0], [-1, 0, 1], [0, 1, 2], [-1, -1, 3]]
    assert batching.positions.tolist() == [4, 8, 9, 4, 12, 13]


def sequences(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """What each scored position sees and predicts, and its coefficient, from the rule of attention alone."""
    found: list[tuple[tuple[int, ...], tuple[int, ...], float]] = []
    for position, target, coefficient in zip(batch.positions, batch.targets, batch.coefficients, strict=True):
        row, at = divmod(int(position), batch.input_ids.shape[1])
        segments = batch.segment_ids[row, : at + 1]
        seen = (segments == segments[-1]) | (segments == batch.prefix_ids[row, at])
        assert batch.position_ids[row, : at + 1][seen].tolist() == list(range(seen.sum()))
        found.append((tuple(batch.input_ids[row, : at + 1][seen].tolist()), (int(target),), float(coefficient)))
    return found


@pytest.mark.parametrize("batching", [*CUTS, MicroBatching(2, 40, multiple_of=3, share_prompts=True)])
@pytest.mark.parametrize("name", ROWS)
def test_what_is_scored_is_the_same(name: str, batching: MicroBatching) -> None:
    """Rejects completions that see each other, positions from zero, and lost coefficients."""
    shared = micro_batches(ROWS[name], batching)
    assert any(batch.shared for batch in shared) and len(shared) % batching.multiple_of == 0
    apart = itertools.chain(*map(sequences, micro_batches(ROWS[name], APART)))
    assert sorted(itertools.chain(*map(sequences, shared))) == sorted(apart)
    if batching.pack_to:
        assert all(batch.input_ids.shape[1] <= batching.pack_to for batch in shared)
    else:
        assert all(len(batch.labels) <= batching.micro_batch_size for batch in shared)


def test_the_grid_is_never_larger_than_without_sharing() -> None:
    """One prompt with many completions among prompts with one each would make all rows as long."""
    draw = np.random.default_rng(0)
    for seed in range(50):
        shape = [(int(draw.integers(1, 9)), draw.integers(1, 9, draw.integers(1, 6)).tolist()) for _ in range(5)]
        rows = feedback(shape, seed=seed)
        shared = micro_batches(rows, MicroBatching(len(rows), share_prompts=True))[0]
        assert shared.input_ids.size <= micro_batches(rows, MicroBatching(len(rows)))[0].input_ids.size


def test_rows_of_one_group_share_only_where_their_prompts_are_the_same() -> None:
    rows = [Example((1, 2), (3,), True, 5), Example((1, 4), (3,), False, 5)]
    (batch,) = micro_batches(rows, MicroBatching(2, share_prompts=True))
    assert not batch.shared and batch.input_ids.tolist() == [[1, 2, 3], [1, 4, 3]]


def test_without_common_prompts_nothing_changes() -> None:
    rows = feedback([(n, [n % 3 + 1]) for n in (4, 2, 9, 5, 1, 7)])
    for batching in CUTS:
        plain = MicroBatching(batching.micro_batch_size, batching.pack_to, batching.group_by_length)
        for one, other in zip(micro_batches(rows, batching), micro_batches(rows, plain), strict=True):
            assert not one.shared
            for field in vars(one):
                np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


# Engines


class Torch:
    """The PyTorch engine, and what the tests ask of it."""

    families: ClassVar[dict[str, dict[str, Any]]] = {
        "llama": {},
        "mistral": {"sliding_window": 4},
        "gemma3_text": {"sliding_window": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
    }
    unable = ("mamba", "bloom", "gpt_neo")

    def __init__(self, family: str, kind: str = "full", attention: str | None = None, **options: Any):
        torch = pytest.importorskip("torch")
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        from bnf_torch.adapter import add_lora
        from bnf_torch.engine import TorchEngine

        settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
        settings |= {"state_size": 8, "max_position_embeddings": 256}
        if family == "gpt_neo":
            settings |= {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family](**settings | self.families.get(family, {}))
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        trained: Any = model.requires_grad_(kind == "full").eval()
        if kind != "full":
            trained = add_lora(model, LoraConfig(rank=4, alpha=8), 0, dora=kind == "dora")
            with torch.no_grad():
                for name, p in trained.named_parameters():
                    if "lora_B" in name:
                        p.add_(torch.randn_like(p) * 0.1)
        self.engine = TorchEngine(trained, OptimizerConfig(), **options)

    def tokens(self, batches: list[Batch]) -> int:
        """That the model computes for a step."""
        counts: list[int] = []
        embedding = self.engine.base.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
        self.gradients(batches)
        handle.remove()
        return sum(counts)

    def gradients(self, batches: list[Batch]) -> dict[str, Any]:
        self.engine.scored.train()  # or nothing is checkpointed
        for batch in batches:
            loss, _ = self.engine.scored(**self.engine._inputs(batch, reference_of(batch)))
            loss.backward()
        grads = {name: p.grad.numpy().copy() for name, p in self.engine.trainable.items() if p.grad is not None}
        for p in self.engine.trainable.values():
            p.grad = None
        return grads


class MLX:
    """The MLX engine, and what the tests ask of it."""

    families: ClassVar[dict[str, dict[str, Any]]] = {
        "llama": {"tie_word_embeddings": False},
        "llama-sliding": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
        "qwen3": {"rope_theta": 1e4, "tie_word_embeddings": True},
        "gemma2": {"query_pre_attn_scalar": 8.0},
        "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2},
        "gpt2": {},
    }
    unable = ("mamba",)

    def __init__(self, family: str, kind: str = "full", **options: Any):
        mx = pytest.importorskip("mlx.core")
        pytest.importorskip("mlx_lm")
        from mlx.utils import tree_flatten

        from bnf_mlx.adapter import add_adapter
        from bnf_mlx.engine import MLXEngine

        settings: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 64}
        settings |= {"head_dim": 8, "max_position_embeddings": 256, "state_size": 8, "conv_kernel": 4}
        settings |= {"use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
        settings |= {"n_ctx": 128, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}
        settings |= {"layer_norm_epsilon": 1e-5} | self.families.get(family, {})
        name = family.partition("-")[0]
        module = importlib.import_module(f"mlx_lm.models.{name}")
        mx.random.seed(1)
        model = module.Model(module.ModelArgs.from_dict({"model_type": name} | settings))
        grown = [(path, p + 0.3 * mx.random.normal(p.shape)) for path, p in tree_flatten(model.parameters())]
        model.load_weights(grown)
        model.freeze()
        if kind == "full":
            model.unfreeze()
        else:
            add_adapter(model, LoraConfig(rank=4), 0, kind)
            for path, part in model.named_modules():
                if "lora_b" in part:
                    part.lora_b = mx.random.normal(part.lora_b.shape, key=mx.random.key(len(path))) * 0.1
        model.eval()
        self.engine = MLXEngine(model, mx.Device(mx.cpu), OptimizerConfig(), **options)

    def tokens(self, batches: list[Batch]) -> int:
        """That the model computes for a step."""
        import mlx.nn as nn

        counts: list[int] = []
        right = nn.Embedding.__call__

        def counting(embedding: Any, ids: Any) -> Any:
            counts.append(ids.size)
            return right(embedding, ids)

        with mock.patch.object(nn.Embedding, "__call__", counting):
            self.gradients(batches)
        return sum(counts)

    def gradients(self, batches: list[Batch]) -> dict[str, Any]:
        from bnf_mlx.scored import MicroStep

        parts = [MicroStep(self.engine.scored)(batch, reference_of(batch))[2] for batch in batches]
        return {name: np.sum([np.array(part[name]) for part in parts], axis=0) for name in parts[0]}


ENGINES: Any = {"torch": Torch, "mlx": MLX}
FAMILIES = [(name, family) for name, engine in ENGINES.items() for family in engine.families]
UNABLE = [(name, family) for name, engine in ENGINES.items() for family in engine.unable]


def reference_of(batch: Batch) -> np.ndarray:
    """Some log-odds of each token, whatever the batch it is in."""
    return -3.0 + np.sin(batch.targets).astype(np.float32)


def assert_close(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    assert got.keys() == want.keys()
    top = max(np.abs(g).max() for g in want.values())
    assert top > 0
    for name in want:
        assert np.abs(got[name] - want[name]).max() < tolerance * top, name


@pytest.mark.parametrize(
    ("backend", "family"),
    fast_of(FAMILIES, ("torch", "gemma3_text"), ("mlx", "llama-sliding")),
)
def test_gradients_are_those_of_prompts_computed_each_time(backend: str, family: str) -> None:
    """Rejects completions that see each other or padding, positions that begin anew or go on from one completion to the
    next, windows in the grid, and a prompt whose gradient is counted for one completion only."""
    model = ENGINES[backend](family)
    for rows in ROWS.values():
        apart = model.gradients(micro_batches(rows, APART))
        for batching in CUTS:
            assert_close(model.gradients(micro_batches(rows, batching)), apart, 1e-5)


@pytest.mark.parametrize("kind", ["lora", slow("dora"), slow("full")])
@pytest.mark.parametrize("backend", ENGINES)
def test_gradient_checkpointing_goes_with_shared_prompts(backend: str, kind: str) -> None:
    family = "llama"
    apart = ENGINES[backend](family, kind).gradients(micro_batches(MIXED, APART))
    model = ENGINES[backend](family, kind, gradient_checkpointing=True)
    assert_close(model.gradients(micro_batches(MIXED, CUTS[0])), apart, 1e-5)


def test_either_attention_of_torch_takes_shared_prompts() -> None:
    eager, sdpa = (Torch("llama", attention=kind) for kind in ("eager", "sdpa"))
    assert eager.engine.shares_prompts and sdpa.engine.shares_prompts
    batches = micro_batches(MIXED, CUTS[0])
    assert_close(eager.gradients(batches), sdpa.gradients(micro_batches(MIXED, APART)), 1e-5)


@pytest.mark.usefixtures("compiled_or_not")
def test_a_compiled_step_of_mlx_takes_shared_prompts() -> None:
    """Whose grids are padded, so that there are few shapes."""
    apart = MLX("llama").gradients(micro_batches(MIXED, APART))
    model, batches = MLX("llama", compiled=True), micro_batches(MIXED, CUTS[1])
    inputs = [model.engine.scored.inputs(batch, reference_of(batch), pad=True) for batch in batches]
    assert any(i.pages is not None for i in inputs) and all(i.ids.shape[1] % 32 == 0 for i in inputs)
    assert_close(model.gradients(batches), apart, 1e-5)


@pytest.mark.parametrize("backend", ENGINES)
def test_scores_are_those_of_prompts_computed_each_time(backend: str) -> None:
    engine = ENGINES[backend]("llama").engine

    def scores(batching: MicroBatching) -> dict[int, np.ndarray]:
        found = {}
        for batch in micro_batches(MIXED, batching):
            stats = engine.evaluate(batch, reference_of(batch))
            found |= {int(k): np.stack(stats)[:, batch.sequence_ids == i] for i, k in enumerate(batch.keys)}
        return found

    apart = scores(APART)
    for batching in CUTS:
        together = scores(batching)
        for key, values in apart.items():
            np.testing.assert_allclose(together[key], values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ENGINES)
def test_the_model_computes_fewer_tokens(backend: str) -> None:
    """Eight completions as long as their prompt: 16 parts become 9, and in pairs 4 become 3."""
    model = ENGINES[backend]("llama")
    assert model.engine.shares_prompts  # found out before tokens are counted
    for completions, fewer in ((8, 1.6), (2, 1.3)):
        rows, _ = next(Rows(feedback([(16, [16] * completions)] * (16 // completions)), 0).batches(16))
        apart, shared = (
            model.tokens(micro_batches(rows, MicroBatching(8, share_prompts=share))) for share in (False, True)
        )
        assert apart == 16 * 32 and apart >= fewer * shared


@pytest.mark.parametrize("kind", ["full", "checkpointing"])
def test_on_a_cpu_torch_computes_no_attention_that_a_mask_would_hide(kind: str) -> None:
    """Also where packed sequences have no prompt in common, and where a layer is computed again for its gradient."""
    model = Torch("llama", "lora", gradient_checkpointing=kind == "checkpointing")
    import torch

    right, seen = torch.nn.functional.scaled_dot_product_attention, []

    def counting(query: Any, key: Any, *args: Any, **options: Any) -> Any:
        seen.append(query.shape[:3].numel() * key.shape[2])
        return right(query, key, *args, **options)

    for share in (True, False):
        (batch,) = micro_batches(MIXED, MicroBatching(1, pack_to=200, share_prompts=share))
        with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", counting):
            model.gradients([batch])
        rows = zip(batch.segment_ids, batch.prefix_ids, strict=True)
        visible = sum(int(((a[:, None] == a) | (b[:, None] == a)).sum()) for a, b in rows)
        assert sum(seen) == 2 * 4 * visible * (2 if kind == "checkpointing" else 1)  # of two layers, four heads
        seen.clear()


@pytest.mark.parametrize(("backend", "family"), UNABLE)
def test_a_model_that_cannot_share_says_so(backend: str, family: str) -> None:
    """Recurrent layers, and positions that a model takes from the grid."""
    engine = ENGINES[backend](family).engine
    assert not engine.shares_prompts
    (batch,) = micro_batches(GROUP, MicroBatching(8, share_prompts=True))
    with pytest.raises(UserError, match="Set share_prompts to false"):
        engine.evaluate(batch, reference_of(batch))
    plain = collate(GROUP, 8)
    engine.evaluate(plain, reference_of(plain))
