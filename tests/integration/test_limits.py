"""What lies beyond a model's vocabulary or its positions is refused, by one message, before anything is done;
generation is greedy whatever the checkpoint's own settings say; and only an adapter drops inputs."""

# ruff: noqa: E402  (imports follow the check that PyTorch is installed)

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from conftest import fast_on

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

from bnf_align import cli
from bnf_core import registry
from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.errors import UserError
from bnf_core.models.model_config import position_limit
from bnf_core.steps.batching import collate
from bnf_core.types import Example

POSITIONS = 48


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under the names that it was published with, which both libraries read, and with dropout, as published."""
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    tiny.make_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 304, "n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    published = {
        name.removeprefix("transformer."): w for name, w in model.state_dict().items() if name != "lm_head.weight"
    }
    model.save_pretrained(folder)
    from safetensors.torch import save_file

    save_file({name: w.contiguous() for name, w in published.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def rows(path: Path, words: list[int]) -> Path:
    lines = [{"prompt": "What?", "completion": " sorry" * n, "label": bool(i % 2)} for i, n in enumerate(words)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def said(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    capsys.readouterr()
    assert cli.run([str(word) for word in command]) == 2
    return " ".join(capsys.readouterr().err.split())


@fast_on("torch")
def test_a_row_beyond_the_positions_is_refused_before_the_first_step(
    gpt2: Path, backend_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The long row comes late. Rejects an error in the middle of the run, and MLX's reading of other memory."""
    data = rows(tmp_path / "rows.jsonl", [1, 2, 1, 2, 1, 60])
    command = ["train", "--model", gpt2, "--data", data, "--output", tmp_path / "run", "--backend", backend_name]
    command += ["--device", "cpu", "--dtype", "float32"]
    assert "a row has 184 tokens, and the model has 48 positions" in said(capsys, *command)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    evaluate = ["evaluate", "--model", gpt2, "--data", data, "--split", "train", "--backend", backend_name]
    assert "the model has 48 positions" in said(capsys, *evaluate, "--device", "cpu")
    assert cli.run([str(word) for word in [*command, "--max-length", 48, "--max-steps", 1]]) == 0


def test_data_check_names_it(gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows(tmp_path / "rows.jsonl", [1, 60, 2])
    assert cli.run(["data", "check", str(data), "--model", str(gpt2)]) == 2
    found = " ".join(capsys.readouterr().out.split())
    assert f"{data}:2: a row has 184 tokens, and the model has 48 positions" in found
    assert "1 of 3 rows are bad" in found
    assert cli.run(["data", "check", str(data), "--model", str(gpt2), "--max-length", "48"]) == 0


def test_padding_beyond_the_positions_does_no_harm(gpt2: Path) -> None:
    """Of a packed row, which may be longer than any sequence in it."""
    engine: Any = registry.get("torch").load(gpt2, device="cpu", dtype="float32")
    examples = [
        Example((5,), tuple(range(1, 41)), True),
        Example((5,), tuple(range(1, 41)), False),
        Example((5,), (6,), True),
    ]
    batch = collate(examples, 3, bins=[[0, 1], [2]])
    alone = collate(examples, 3)
    nothing = np.zeros(len(batch.targets), np.float32)
    packed, padded = (engine.evaluate(b, nothing).log_odds for b in (batch, alone))
    np.testing.assert_allclose(packed, padded, atol=1e-4)


def test_generation_keeps_to_them(gpt2: Path, backend_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine: Any = registry.get(backend_name).load(gpt2, device="cpu", dtype="float32")
    assert len(engine.generate([[5] * 40], 8, [])[0]) == 8
    with pytest.raises(UserError, match=r"9 tokens after a prompt of 40 do not fit into the 48 positions.*at most 8"):
        engine.generate([[5] * 4, [5] * 40], 9, [])
    with pytest.raises(UserError, match="token id 304, and the model knows ids below 304"):
        engine.generate([[5, 304]], 1, [])
    said(capsys, "generate", "--model", gpt2, "--prompt", "x" * 60, "--backend", backend_name, "--device", "cpu")


SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True}
FAMILIES: dict[str, tuple[dict[str, Any], int | None]] = {
    "bart": ({"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}, 16),
    "biogpt": ({}, 16),
    "codegen": ({"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 16}, 16),
    "gpt_neo": ({"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}, 16),
    "gptj": ({"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 16}, 16),
    "mpt": ({"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 16}, 16),
    "opt": ({"ffn_dim": 16, "word_embed_proj_dim": 16}, 16),
    "roberta": ({"pad_token_id": 1, "bos_token_id": 0}, 14),
    "llama": ({}, None),
    "gpt_neox": ({}, None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_how_many_positions_a_family_has(family: str) -> None:
    """By transformers itself: so many tokens are computed, and one more is not."""
    settings, limit = FAMILIES[family]
    known = CONFIG_MAPPING[family]().to_dict().keys() | CONFIG_MAPPING[family].attribute_map.keys()
    named = {k: v for k, v in SIZES.items() if k in known and not settings.keys() & {"n_embd", "d_model"}}
    basic = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    named |= {"max_position_embeddings": 16} if family == "bart" else {}
    config = CONFIG_MAPPING[family](**basic | named | settings)
    assert position_limit(config.to_dict()) == limit
    model = AutoModelForCausalLM.from_config(config).eval()
    model(torch.full((1, limit or 40), 3), use_cache=False)
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 3), use_cache=False)


def test_greedy_is_greedy_whatever_the_checkpoint_says(tiny_model: Path, backend_name: str, tmp_path: Path) -> None:
    """Rejects transformers' filling in of what is not asked for."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    prompts, texts = [[5, 6, 7, 8], [9, 10]], []
    settings = {
        "repetition_penalty": 1.8,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": list(range(150)),
        "min_length": 40,
    }
    for own in ({}, settings | {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 12}):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0} | own))
        engine: Any = registry.get(backend_name).load(folder, device="cpu", dtype="float32")
        texts.append(engine.generate(prompts, 24, [0]))
    assert texts[0] == texts[1]
    model, greedy = AutoModelForCausalLM.from_pretrained(folder), list(prompts[0])
    with torch.no_grad():
        for _ in range(24):
            greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
    expected = greedy[4:]
    assert texts[0][0] == (expected[: expected.index(0)] if 0 in expected else expected)


# Dropout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_models_own_dropout_is_off_while_it_is_trained(gpt2: Path, checkpointing: bool) -> None:
    """gpt2 drops a tenth in three places. At the first step p is r; and two passes are one. The adapter's own stays."""
    assert json.loads((gpt2 / "config.json").read_text())["attn_pdrop"] == 0.1
    batch = collate([Example((5, 6, 7), (8, 9, 10, 11), True), Example((5, 6), (12, 13), False)], 2)
    for dropout, kind in ((0.0, "lora"), (0.0, "full"), (0.5, "lora")):
        engine: Any = registry.get("torch").load(
            gpt2,
            device="cpu",
            dtype="float32",
            fine_tune_type=kind,
            lora=LoraConfig(rank=4, alpha=8, dropout=dropout),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant"),
            gradient_checkpointing=checkpointing,
        )
        reference = engine.reference_log_odds(batch)
        _, [scores], _ = engine.accumulate([(batch, reference)], None)
        np.testing.assert_array_equal(scores.log_odds, reference)
        engine.step([(batch, reference)], 1e-2, None)  # B is no longer zero
        now = engine.evaluate(batch, reference).log_odds
        _, [scores], _ = engine.accumulate([(batch, reference)], None)
        assert np.array_equal(scores.log_odds, now) == (dropout == 0)
        if checkpointing:
            assert any(m.training for m in engine.base.modules() if getattr(m, "gradient_checkpointing", False))


def test_dropout_of_an_mlx_model_is_off_as_well(tiny_model: Path) -> None:
    """No family of mlx-lm that is trained has any; one that had is to be no exception."""
    nn = pytest.importorskip("mlx.nn")
    engine: Any = registry.get("mlx").load(
        tiny_model,
        device="cpu",
        dtype="float32",
        fine_tune_type="lora",
        lora=LoraConfig(rank=4, alpha=8),
        optimizer=OptimizerConfig(),
    )
    engine.model.model.norm = nn.Sequential(engine.model.model.norm, nn.Dropout(0.5))
    batch = collate([Example((5, 6, 7), (8, 9, 10, 11), True), Example((5, 6), (12, 13), False)], 2)
    reference = engine.reference_log_odds(batch)
    _, scores, _ = engine.micro_step(batch, reference)
    np.testing.assert_allclose(scores.log_odds, reference, atol=1e-5)
