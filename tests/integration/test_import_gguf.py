"""Import of GGUF files, on a tiny llama model written here."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bnf_align import cli
from bnf_align.commands import import_gguf as module
from bnf_align.commands.import_gguf import RECORD, find_gguf, import_gguf
from bnf_align.run import gguf_check
from bnf_align.run.gguf_header import read_gguf_header
from bnf_core.errors import UserError
from bnf_core.models.model_folder import resolve_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
HIDDEN, INNER, LAYERS, HEADS, CONTEXT, THETA = 64, 96, 2, 2, 128, 54321.0
UNQUANTISED = ("norm", "token_embd")


def tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĊĊ", "ĠĠ"]


def write_gguf(path: Path, seed: int = 0, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A llama model with a Q8_0 body; returns its dequantised tensors."""
    rng = np.random.Generator(np.random.PCG64(seed))
    vocabulary = tokens()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(THETA)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 3] + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd.weight": (len(vocabulary), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{x}.weight": (HIDDEN, HIDDEN) for x in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{x}.weight": (INNER, HIDDEN) for x in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (HIDDEN, INNER)}
        shapes |= {f"blk.{i}.{x}_norm.weight": (HIDDEN,) for x in ("attn", "ffn")}
    written = {}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        if any(word in name for word in UNQUANTISED):
            writer.add_tensor(name, values)
            written[name] = values
        else:
            blocks = gguf.quantize(values, kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
            written[name] = gguf.dequantize(blocks, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """(the GGUF file, the folder made from it, its tensors)"""
    root = tmp_path_factory.mktemp("gguf")
    tensors = write_gguf(root / "tiny.gguf")
    return root / "tiny.gguf", import_gguf(str(root / "tiny.gguf"), root / "made" / "model"), tensors


def refused(source: Path | str, output: Path, force: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        import_gguf(str(source), output, force=force)
    return str(caught.value)


def test_weights_are_the_dequantised_ones_exactly(imported: tuple[Path, Path, dict[str, np.ndarray]]) -> None:
    from safetensors.numpy import load_file

    _, folder, tensors = imported
    made = load_file(folder / "model.safetensors")
    assert all(weight.dtype == np.float32 for weight in made.values())
    for ours, theirs in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.1.self_attn.v_proj": "blk.1.attn_v",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
    }.items():
        np.testing.assert_array_equal(made[f"{ours}.weight"], tensors[f"{theirs}.weight"])
    # GGUF interleaves the two halves of each head's rows that rotary embeddings turn together.
    halves = tensors["blk.1.attn_q.weight"].reshape(HEADS, HIDDEN // HEADS // 2, 2, HIDDEN).swapaxes(1, 2)
    np.testing.assert_array_equal(made["model.layers.1.self_attn.q_proj.weight"], halves.reshape(HIDDEN, HIDDEN))


def test_the_folder_is_a_checkpoint_that_loads(imported: tuple[Path, Path, dict[str, np.ndarray]]) -> None:
    from transformers import AutoModelForCausalLM

    _, folder, _ = imported
    assert resolve_model(str(folder)) == folder
    assert "quantization_config" not in (folder / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")
    assert model.config.rope_parameters["rope_theta"] == THETA
    assert model.generation_config.eos_token_id == 2


def test_works_with_a_transformers_that_has_no_gguf_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.GgufConfig", None, raising=False)
    write_gguf(tmp_path / "tiny.gguf")
    folder = import_gguf(str(tmp_path / "tiny.gguf"), tmp_path / "model")
    assert "quantization_config" not in (folder / "config.json").read_text()


def test_tokenizer_keeps_template_turn_end_and_splitting(imported: tuple[Path, Path, dict[str, np.ndarray]]) -> None:
    from transformers import AutoTokenizer

    _, folder, _ = imported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.model_max_length == CONTEXT
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.tokenize("a  1<|im_end|>") == ["a", "ĠĠ", "1", "<|im_end|>"]


def test_an_import_that_is_there_is_kept(
    imported: tuple[Path, Path, dict[str, np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, folder, _ = imported
    monkeypatch.setattr(module, "_convert", lambda *_: pytest.fail("converted again"))
    assert import_gguf(str(source), folder) == folder
    assert "already holds tiny.gguf" in capsys.readouterr().out


def fake_convert(source: Path, output: Path, say: Callable[[str], None]) -> str:
    (output / "config.json").write_text(json.dumps({"source": source.name}))
    return "converted"


def test_another_file_needs_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_convert", fake_convert)
    one, two, output = tmp_path / "one.gguf", tmp_path / "two.gguf", tmp_path / "model"
    one.write_bytes(b"GGUF one")
    two.write_bytes(b"GGUF two")
    import_gguf(str(one), output)
    assert "holds one.gguf, not this two.gguf" in refused(two, output)
    assert json.loads((output / "config.json").read_text()) == {"source": "one.gguf"}
    import_gguf(str(two), output, force=True)
    assert json.loads((output / "config.json").read_text()) == {"source": "two.gguf"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one.gguf", "two.gguf"]


@pytest.mark.parametrize("force", [False, True])
def test_never_replaces_what_it_did_not_make(tmp_path: Path, force: bool) -> None:
    source, output = tmp_path / "one.gguf", tmp_path / "thesis"
    source.write_bytes(b"GGUF")
    output.mkdir()
    (output / "chapter1.txt").write_text("precious")
    assert "no earlier import" in refused(source, output, force)
    assert (output / "chapter1.txt").read_text() == "precious"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_import_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(source: Path, output: Path, say: Callable[[str], None]) -> str:
        fake_convert(source, output, say)
        raise error

    source, output = tmp_path / "one.gguf", tmp_path / "model"
    source.write_bytes(b"GGUF")
    monkeypatch.setattr(module, "_convert", interrupted)
    with pytest.raises(error):
        import_gguf(str(source), output)
    assert [path.name for path in tmp_path.iterdir()] == ["one.gguf"]


def test_refuses_what_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"\x93NUMPY")
    assert "not a GGUF file: it begins with" in refused(tmp_path / "model.gguf", tmp_path / "out")
    assert "is a folder" in refused(tmp_path, tmp_path / "out")
    assert "no installed package" in refused(tmp_path / "missing.gguf", tmp_path / "out")
    assert "no installed package" in refused("no-such-package-here", tmp_path / "out")
    assert "found none" in refused("numpy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_a_cut_file_and_an_unknown_architecture(tmp_path: Path) -> None:
    cut, unknown = tmp_path / "cut.gguf", tmp_path / "unknown.gguf"
    write_gguf(cut)
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-1])
    said = f"it has {len(whole) - 1:,} bytes, and its tensors end at {len(whole):,}"
    assert f"cut.gguf is cut short: {said}" in refused(cut, tmp_path / "out")
    for length in (100, 2000, 6):  # within the metadata, the vocabulary, and the first number
        cut.write_bytes(whole[:length])
        assert f"({length:,} bytes) is cut short or damaged" in refused(cut, tmp_path / "out")
    cut.write_bytes(whole[:4] + b"\x07" + whole[5:])
    assert "is a GGUF of version 7: expected version 2 or 3" in refused(cut, tmp_path / "out")
    write_gguf(unknown, architecture="abacus")
    said = refused(unknown, tmp_path / "out")
    assert "transformers cannot read this GGUF, whose architecture is abacus" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf", "unknown.gguf"]


def test_a_tensor_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    with pytest.raises(UserError, match="is of ggml's type 8, which the package gguf does not know"):
        read_gguf_header(path, {0: (1, 4)})


def test_the_header_says_what_the_package_gguf_says(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    header, reader = module._header(path), gguf.GGUFReader(path)
    last = reader.tensors[-1]
    assert header.size == last.data_offset + last.n_bytes == path.stat().st_size
    assert header.types == Counter(int(tensor.tensor_type) for tensor in reader.tensors)
    for name, value in header.metadata.items():
        field = reader.get_field(name)
        expected = field.contents()
        assert value == (len(expected) if isinstance(expected, list) else expected), name
    assert header.architecture == "llama" and header.metadata["tokenizer.ggml.tokens"] == len(tokens())


# What is said of it


def test_the_file_that_is_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "tiny.gguf"
    write_gguf(source)
    assert cli.run(["import-gguf", "--source", str(source), "--output", str(tmp_path / "model")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    size = source.stat().st_size
    assert f"reading {source} ({size:,} bytes): without a name, architecture llama, tensors 14 Q8_0, 6 F32" in said
    if find_spec("llama_cpp") is None:
        assert "not compared with llama.cpp: llama-cpp-python is not installed" in said


class Words:
    """A tokenizer of one token a word."""

    bos_token_id = 0
    ids = (5, 6, 7, 8, 9)

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(self.ids[: len(text.split())]))

    def decode(self, ids: list[int]) -> str:
        return "".join(f" w{i}" for i in ids)


@pytest.mark.parametrize(
    ("tokens", "said", "line"),
    [
        ([5, 6, 7, 8, 9], list(range(20, 40)), "llama.cpp says the same: The capital of France is w20 w21"),
        ([5, 6, 7, 8, 9], [20, 21, 22, *[1] * 20], "says the same for 3 of 16 tokens: The capital of France is"),
        ([5, 6, 7, 8], [], "llama.cpp has other tokens for 'The capital of France is': [5, 6, 7, 8], the tokenizer"),
    ],
)
def test_what_llama_cpp_says_stands_beside_it(
    monkeypatch: pytest.MonkeyPatch, tokens: list[int], said: list[int], line: str
) -> None:
    class Llama:
        def __init__(self, model_path: str, n_ctx: int, verbose: bool):
            assert model_path == "some.gguf"

        def tokenize(self, text: bytes, add_bos: bool) -> list[int]:
            assert not add_bos
            return tokens

        def generate(self, ids: list[int], temp: float) -> Iterator[int]:
            assert ids == tokens and temp == 0
            yield from said

    fake: Any = ModuleType("llama_cpp")
    fake.Llama, fake.__spec__ = Llama, ModuleSpec("llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    words: Any = Words()
    assert line in gguf_check.beside_llama_cpp(Path("some.gguf"), words, lambda ids, n: list(range(20, 20 + n)))


def test_names_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    message = refused(tmp_path / "one.gguf", tmp_path / "out")
    assert "needs torch, gguf" in message and "pip install" in message


def test_finds_the_file_inside_a_package_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_toy"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "toy.gguf").write_bytes(b"GGUF")
    info = tmp_path / "llm_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-toy\nVersion: 1.0\n")
    (info / "RECORD").write_text("llm_toy/__init__.py,,\nllm_toy/toy.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_gguf("llm-toy") == package / "toy.gguf"


def test_the_record_names_the_source(imported: tuple[Path, Path, dict[str, np.ndarray]]) -> None:
    _, folder, _ = imported
    record = json.loads((folder / RECORD).read_text())
    assert record["source"] == "tiny.gguf" and record["dtype"] == "float32" and len(record["sha256"]) == 64
