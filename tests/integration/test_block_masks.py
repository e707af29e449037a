"""Masks in blocks, for FlexAttention: they hide what dense ones hide, and no (T, T) mask is made."""

# ruff: noqa: E402  (imports follow the check that PyTorch is installed)

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from torch.nn.attention.flex_attention import BlockMask
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations import flex_attention as transformers_flex
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.errors import UserError
from bnf_core.steps.batching import MicroBatching, micro_batches
from bnf_core.types import Array, Batch, Example
from bnf_torch import attention
from bnf_torch.adapter import add_lora
from bnf_torch.engine import TorchEngine

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
WINDOWS: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
FAMILIES = {"llama": SIZES, "gemma3_text": SIZES | WINDOWS}
SHARED = MicroBatching(2, pack_to=300, share_prompts=True)  # of three blocks, the last one short
PACKED = MicroBatching(2, pack_to=300)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """FlexAttention as a GPU's kernel has it, which PyTorch does not differentiate on a CPU: what is in no block is not
    seen, whatever the mask says. The masks that it is given."""
    given: list[BlockMask] = []

    def stand_in(
        module: Any, query: Any, key: Any, value: Any, mask: BlockMask, scaling: float | None = None
    ) -> tuple[Any, None]:
        given.append(mask)
        seen = dense(mask) & listed(mask)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", stand_in)
    return given


def dense(mask: BlockMask) -> Any:
    """(B, 1, T, T) by the function that the kernel asks within a block."""
    b, q, kv = torch.meshgrid(*map(torch.arange, (mask.shape[0], *mask.seq_lengths)), indexing="ij")
    return mask.mask_mod(b, torch.zeros_like(b), q, kv).unsqueeze(1)


def listed(mask: BlockMask) -> Any:
    """(B, 1, T, T): whether two tokens are in a block that the kernel computes."""
    q, kv = mask.seq_lengths
    block = attention.BLOCK
    return mask.to_dense().bool().repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :q, :kv]


def rows() -> list[Example]:
    draw = np.random.default_rng(3)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.integers(1, 64, draw.integers(most // 2, most)).tolist())

    prompts = [ids(60) for _ in range(5)]
    return [Example(prompts[i // 3], ids(90), i % 2 == 0, i // 3) for i in range(15)]


def engine(family: str, **options: Any) -> TorchEngine:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family]), attn_implementation="sdpa")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    policy = add_lora(model.requires_grad_(False).eval(), LoraConfig(rank=4), 0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.add_(torch.randn_like(p) * 0.1)
    return TorchEngine(policy, OptimizerConfig(), **options)


def stepped(engine: TorchEngine, parts: list[Batch]) -> tuple[float, dict[str, Array]]:
    assert engine.optimizer is not None
    loss, _, _ = engine.accumulate([(part, np.sin(part.targets).astype(np.float32) - 3) for part in parts], None)
    found = {name: p.grad.numpy().copy() for name, p in engine.trainable.items() if p.grad is not None}
    engine.optimizer.torch.zero_grad()
    return loss, found


def assert_same(found: tuple[float, dict[str, Array]], expected: tuple[float, dict[str, Array]]) -> None:
    scale = max(np.abs(value).max() for value in expected[1].values())
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert np.abs(found[1][name] - value).max() < 1e-5 * scale, name


@pytest.mark.parametrize(
    ("batching", "family"),
    [
        pytest.param(SHARED, "gemma3_text", id="shared"),
        pytest.param(PACKED, "gemma3_text", id="packed"),
        pytest.param(SHARED, "llama", id="shared, one window", marks=pytest.mark.slow),
        pytest.param(PACKED, "llama", id="packed, one window", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_dense_masks(
    blocks: list[BlockMask], family: str, batching: MicroBatching
) -> None:
    """Also where layers are computed again for their gradient. Rejects a table of blocks that lacks one."""
    parts = micro_batches(rows(), batching)
    assert any(part.shared for part in parts) == batching.share_prompts
    expected = stepped(engine(family, attention_masks="dense"), parts)
    assert not blocks
    for again in (False, True):
        assert_same(stepped(engine(family, attention_masks="blocks", gradient_checkpointing=again), parts), expected)
    assert blocks


def test_a_block_that_is_left_out_is_noticed(blocks: list[BlockMask], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are in other blocks than some of their completions: a table by a token's own segment alone is wrong."""
    parts, right = micro_batches(rows(), SHARED), attention._blocks
    expected = stepped(engine("llama", attention_masks="dense"), parts)
    wrong = engine("llama", attention_masks="blocks")
    monkeypatch.setattr(attention, "_blocks", lambda own, prefix: right(own, own))
    with pytest.raises(AssertionError):
        assert_same(stepped(wrong, parts), expected)


def test_no_mask_is_as_large_as_the_row_is_long(blocks: list[BlockMask]) -> None:
    """Of 300 tokens, nine pairs of blocks, of which those are listed that hold something to be seen."""
    (part,) = micro_batches(rows()[:6], MicroBatching(1, pack_to=600, share_prompts=True))
    stepped(engine("llama", attention_masks="blocks"), [part])
    count = -(-part.input_ids.shape[1] // attention.BLOCK)
    mask = blocks[-1]
    assert count > 2 and mask.kv_indices.shape == (1, 1, count, count)
    assert max(tensor.numel() for tensor in mask.as_tuple() if isinstance(tensor, torch.Tensor)) == count**2
    seen = (dense(mask) & ~listed(mask)).sum()
    assert seen == 0 and int(mask.kv_num_blocks.sum()) <= count * (count + 1) // 2


def test_packed_rows_skip_blocks_of_other_sequences() -> None:
    """Three sequences of two blocks each: of 21 causal pairs of blocks nine are computed."""
    ids = torch.arange(3).repeat_interleave(2 * attention.BLOCK).unsqueeze(0)
    counts, indices = attention._blocks(ids, ids)
    assert counts.tolist() == [[[1, 2, 1, 2, 1, 2]]]
    assert indices[0, 0, 3, :2].tolist() == [2, 3] and indices[0, 0, 4, :1].tolist() == [4]


@torch.no_grad()
def test_flex_attention_itself_takes_these_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own, uncompiled and without gradients, which is all that a CPU has of it."""
    flex = transformers_flex.flex_attention
    monkeypatch.setattr(
        transformers_flex, "compile_friendly_flex_attention", lambda *args, training, **options: flex(*args, **options)
    )
    found = {}
    (part,) = micro_batches(rows()[:6], MicroBatching(1, pack_to=600, share_prompts=True))
    for masks in ("dense", "blocks"):
        made = engine("llama", attention_masks="dense")
        attention.use_masks(made.base, masks)
        found[masks] = made.evaluate(part, np.zeros(len(part.targets), np.float32)).log_odds
    np.testing.assert_allclose(found["blocks"], found["dense"], rtol=1e-4, atol=1e-4)


def test_what_takes_no_blocks_goes_on_with_dense_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or says so, where blocks were asked for by name."""

    def cannot(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel for this head dimension")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", cannot)
    with pytest.raises(UserError, match="LlamaForCausalLM does not take"):
        engine("llama", attention_masks="blocks")
    made = engine("llama", attention_masks="dense")
    made.scored.probe("blocks")
    assert made.shares_prompts and attention.masks_of(made.base) == "segments"
