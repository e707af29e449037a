"""Heads that do more than multiply go through the fused loss as well: a soft cap, a scale, a bias."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from bnf_core import registry
from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.objectives import parse
from bnf_core.steps.batching import collate
from bnf_core.types import Array, Batch, Example
from conftest import fast_on

VOCABULARY = 12_000
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# What each does to its logits: (scale, soft cap), and whether there is a bias.
HEADS: dict[str, tuple[dict[str, Any], tuple[float, float | None], bool]] = {
    "gemma2": ({"head_dim": 4, "final_logit_softcapping": 7.0}, (1.0, 7.0), False),
    "cohere": ({"logit_scale": 0.3}, (0.3, None), False),
    "granite": ({"logits_scaling": 3.0}, (1 / 3, None), False),
    "phi": ({"tie_word_embeddings": False}, (1.0, None), True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    found = {}
    for family, (settings, _, bias) in HEADS.items():
        folder = found[family] = tmp_path_factory.mktemp(family)
        tiny.make_tokenizer(folder)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(SIZES | settings)))
        if bias:
            model.lm_head.bias.data.normal_()
        model.save_pretrained(folder)
    return found


def rows(count: int = 4, tokens: int = 40) -> Batch:
    rng = np.random.default_rng(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(1, VOCABULARY, count))

    examples = [Example(ids(3), ids(tokens), i % 2 == 0, pair=1 + i // 2, group=i // 2) for i in range(count)]
    return collate(examples, len(examples))


def engine(backend: str, folder: Path, objective: str) -> Any:
    return registry.get(backend).load(
        folder,
        device="cpu",
        dtype="float32",
        fine_tune_type="lora",
        lora=LoraConfig(rank=2),
        optimizer=OptimizerConfig(epsilon=1e3),  # a step along the gradient
        objective=parse(objective),
    )


def trained(engine: Any, batch: Batch, reference: Array) -> dict[str, Array]:
    """What one step makes of the weights."""
    before = {name: np.array(x) for name, x in engine.state().items() if name.startswith("weights/")}
    engine.step([(batch, reference)], 1e3, None)
    return {name: np.array(engine.state()[name]) - x for name, x in before.items()}


# Each head, each objective with two of them; all of them among the slow.
PAIRED = [(family, ("bnf", "dpo(beta=1)")[i % 2]) for i, family in enumerate(HEADS)]
OTHERS = [
    pytest.param(family, objective, marks=pytest.mark.slow)
    for family in HEADS
    for objective in ("bnf", "dpo(beta=1)")
    if (family, objective) not in PAIRED
]


@fast_on("mlx")
@pytest.mark.parametrize(("family", "objective"), PAIRED + OTHERS)
def test_the_fused_head_computes_what_the_models_own_logits_give(
    folders: dict[str, Path], backend_name: str, family: str, objective: str
) -> None:
    batch = rows()
    fused, dense = (engine(backend_name, folders[family], objective) for _ in range(2))
    assert fused.scored.head == pytest.approx(HEADS[family][1])
    dense.scored.head = None
    reference = fused.reference_log_odds(batch)
    np.testing.assert_allclose(reference, dense.reference_log_odds(batch), rtol=1e-5, atol=2e-5)
    reference = reference + np.float32(0.25)  # or DPO's pair would be symmetrical
    got, expected = trained(fused, batch, reference), trained(dense, batch, reference)
    largest = max(np.abs(x).max() for x in expected.values())
    assert largest > 0
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, atol=1e-4 * largest, err_msg=name)


@fast_on("torch")
@pytest.mark.parametrize(("family", "objective"), PAIRED + OTHERS)
def test_no_array_has_all_tokens_and_the_whole_vocabulary(
    folders: dict[str, Path], backend_name: str, family: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = rows(8, 60)  # of which a chunk, and ten arrays of its size, are a part
    logits = 4 * len(batch.targets) * VOCABULARY  # bytes
    monkeypatch.setattr(f"bnf_{backend_name}.linear.CHUNK_BYTES", 2**18)
    found = engine(backend_name, folders[family], objective)
    reference = found.reference_log_odds(batch)
    for head in (found.scored.head, None):  # the model's own logits show that they would be seen
        found.scored.head = head
        with watched(backend_name) as largest:
            found.evaluate(batch, reference)
            found.step([(batch, reference)], 1e-3, None)
        assert (largest() >= logits) == (head is None)


@contextmanager
def watched(backend: str) -> Iterator[Any]:
    """Bytes: of the largest tensor that an operator gives, or on MLX of all that is allocated beyond what was."""
    if backend == "mlx":
        import mlx.core as mx

        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        yield lambda: mx.get_peak_memory() - before
        return
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    seen = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            seen[0] = max([seen[0], *(x.nbytes for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
            return result

    with Watch():
        yield lambda: seen[0]
