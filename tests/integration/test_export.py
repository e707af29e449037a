"""`bnf export`: each target opened again by others' code, and what is not known refused by name."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chat_templates
import tiny
from bnf_align import cli
from bnf_align.commands.import_gguf import import_gguf
from bnf_align.run import gguf_writer, ollama
from bnf_align.run.gguf_header import read_gguf_header
from bnf_align.run.gguf_writer import write_gguf
from bnf_core.data.rendering import Chat
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import UserError

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("mlx_lm")

SAME = "32 of 32 tokens the same"


def trained(folder: Path, model: Path, feedback: Path, backend: str, *more: object) -> Path:
    words: list[object] = ["train", "--model", model, "--data", feedback, "--output", folder, "--backend", backend]
    words += ["--device", "cpu", "--dtype", "float32", "--max-steps", 2, "--lr", 0.01, "--warmup-steps", 0, *more]
    assert cli.run([str(word) for word in words]) == 0
    return folder


@pytest.fixture(scope="module")
def run_of_torch(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, feedback: Path) -> Path:
    return trained(tmp_path_factory.mktemp("export") / "mine", tiny_model, feedback, "torch")


def exported(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    found = cli.run(["export", *map(str, words)])
    said = capsys.readouterr()
    assert found == code, said.out + said.err
    return " ".join((said.err if code else said.out).split())


def greedy(model: Any, ids: list[int], count: int = 16) -> list[int]:
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return model.generate(torch.tensor([ids]), **settings)[0].tolist()[len(ids) :]


# Of a run


def test_a_run_of_torch_in_every_form(run_of_torch: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    said = exported(capsys, run_of_torch, "--to", "merged,peft,mlx,gguf,ollama", "--gguf-type", "f32")
    assert said.count(SAME) == 5
    out, ids = run_of_torch / "export", [1, 40, 41, 42]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = greedy(base, ids)
    adapted = greedy(PeftModel.from_pretrained(base, run_of_torch / "adapter"), ids)
    assert adapted != before
    assert greedy(AutoModelForCausalLM.from_pretrained(out / "merged"), ids) == adapted
    again = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert greedy(PeftModel.from_pretrained(again, out / "peft"), ids) == adapted
    assert {path.name for path in (out / "ollama").iterdir()} == {"Modelfile", "mine-f32.gguf", "bnf_export.json"}
    written = (out / "ollama" / "Modelfile").read_text()
    assert written.startswith('FROM ./mine-f32.gguf\nTEMPLATE """') and 'PARAMETER stop "<|end|>"' in written
    assert (out / "ollama" / "mine-f32.gguf").samefile(out / "gguf" / "mine-f32.gguf")  # once on the disk
    record = json.loads((out / "gguf" / "bnf_export.json").read_text())
    assert record["run"] == "mine" and record["check"].startswith(SAME)
    assert "exists: choose another --output, or --force" in exported(capsys, run_of_torch, "--to", "peft", code=2)
    assert SAME in exported(capsys, run_of_torch, "--to", "peft", "--force")


def test_a_run_of_mlx_goes_to_the_other_side(
    tmp_path: Path, tiny_model: Path, feedback: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "mine", tiny_model, feedback, "mlx")
    words = ["--to", "peft,mlx,gguf", "--gguf-type", "q8_0", "--publisher", "me", "--output", tmp_path / "models"]
    said = exported(capsys, run, *words)
    assert said.count("of 32 tokens the same") == 3
    assert (tmp_path / "models" / "me" / "mine-gguf" / "mine-q8_0.gguf").is_file()
    assert (tmp_path / "models" / "me" / "mine-mlx" / "model.safetensors").is_file()
    assert (tmp_path / "models" / "peft" / "adapter_model.safetensors").is_file()


def test_all_weights_have_no_adapter(
    tmp_path: Path, tiny_model: Path, feedback: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run", tiny_model, feedback, "torch", "--fine-tune-type", "full")
    assert "there is no adapter for peft" in exported(capsys, run, "--to", "merged,peft", code=2)
    assert not (run / "export").exists()
    assert SAME in exported(capsys, run, "--to", "merged")
    weights = "model.safetensors"
    assert (run / "export" / "merged" / weights).read_bytes() == (run / "model" / weights).read_bytes()


def test_what_says_otherwise_is_not_kept(
    run_of_torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of the query and key projections in transformers' order."""
    monkeypatch.setitem(gguf_writer.FAMILIES, "llama", gguf_writer.Family("llama", "silu"))
    words = ["--to", "gguf", "--output", tmp_path / "out", "--gguf-type", "f32"]
    assert "says otherwise than the run, and is removed again" in exported(capsys, run_of_torch, *words, code=1)
    assert list((tmp_path / "out").iterdir()) == []
    said = exported(capsys, run_of_torch, "--to", "gguf", "--output", tmp_path / "unseen", "--check", "false")
    assert "not opened again" in said


@pytest.mark.slow
def test_llama_cpps_own_converter_is_taken_where_it_is(
    run_of_torch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import sys, pathlib\n"
        "from bnf_align.run.gguf_writer import write_gguf\n"
        "model, _, output, _, kind = sys.argv[1:]\n"
        "write_gguf(pathlib.Path(model), pathlib.Path(output), kind, name='of llama.cpp')\n"
    )
    words = ["--to", "gguf", "--output", tmp_path / "out", "--llama-cpp", tmp_path, "--gguf-type", "f32"]
    assert SAME in exported(capsys, run_of_torch, *words)
    assert header(tmp_path / "out" / "gguf" / "mine-f32.gguf")["general.name"] == "of llama.cpp"
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such family')")
    said = exported(capsys, run_of_torch, *words, "--force", code=1)
    assert "convert_hf_to_gguf.py failed: no such family" in said
    missing = exported(capsys, run_of_torch, "--to", "gguf", "--llama-cpp", tmp_path / "out", code=2)
    assert "expected a folder of llama.cpp with convert_hf_to_gguf.py in it" in missing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "onnx"], "to is ['onnx']: expected some of merged, peft, mlx, gguf, ollama"),
        (["--to", "gguf", "--gguf-type", "q4_k_m"], "gguf_type"),
        ([], "missing --to"),
    ],
)
def test_bad_usage_is_said(
    run_of_torch: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in exported(capsys, run_of_torch, *words, code=2)


def test_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run, it has no config.yaml" in exported(capsys, tmp_path, "--to", "gguf", code=2)


# The GGUF writer, family by family


def header(path: Path) -> dict[str, Any]:
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    return read_gguf_header(path, sizes).metadata


def checkpoint(folder: Path, family: str, **overrides: Any) -> Path:
    """A tiny model of a family, with a tokenizer that is smaller than its embedding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny.make_tokenizer(folder)
    if family.startswith("qwen"):  # whose tokenizer transformers knows by the family
        split = {"type": "Split", "pattern": {"Regex": SPLIT_OF["qwen2"]}, "behavior": "Isolated", "invert": False}
        words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        tokenizer_json(folder, lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, words]}))
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": family == "gemma3_text",
        "initializer_range": 0.2,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    # Heads as of the published models: transformers reads no others from a GGUF.
    if family == "qwen3":
        settings |= {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    if family == "gemma3_text":
        settings |= {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 6}
        settings |= {"query_pre_attn_scalar": 256, "sliding_window": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(settings | overrides)))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # which begin at 0 or 1, and would hide what is done to them
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path, ids: list[int]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0].numpy()


SPLIT_OF = {name: steps[0] for steps, name in gguf_writer.SPLITS.items()}
IDS = [1, 40, 41, 42, 100, 7, 7, 250, 33, 60, 61, 2]


@pytest.mark.parametrize("family", list(gguf_writer.FAMILIES))
def test_transformers_reads_the_same_model_of_each_family(family: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", family)
    write_gguf(model, tmp_path / "f32.gguf", "f32", name="tiny")
    read = import_gguf(str(tmp_path / "f32.gguf"), tmp_path / "read")
    expected = logits(model, IDS)
    np.testing.assert_allclose(logits(read, IDS), expected, atol=2e-5 * np.abs(expected).max())
    ours, theirs = load_tokenizer(model), load_tokenizer(read)
    assert theirs.chat_template == tiny.TEMPLATE and theirs.eos_token == ours.eos_token == "<|end|>"
    if family == "gemma3_text":  # as which transformers takes Gemma's tokenizer, whatever the file holds
        return
    text = "<|user|>What is 2 plus 2?\n\n It's 4.<|end|>"
    assert theirs(text).input_ids == ours(text).input_ids


@pytest.mark.parametrize(("kind", "bound"), [("f16", 2.0**-11), ("bf16", 2.0**-8), ("q8_0", 1 / 127)])
def test_matrices_are_rounded_as_their_type_is_and_the_rest_is_not(kind: Any, bound: float, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "qwen2")
    for name in ("f32", kind):
        write_gguf(model, tmp_path / f"{name}.gguf", name, name="tiny")
    exact, stored = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("f32", kind))
    assert [a.name for a in exact] == [b.name for b in stored]
    for a, b in zip(exact, stored, strict=True):
        x, y = (gguf.dequantize(t.data, t.tensor_type).astype(np.float64) for t in (a, b))
        rounds = x.ndim == 2
        assert (b.tensor_type.name == kind.upper()) is rounds, a.name
        assert np.abs(x - y).max() <= (bound * np.abs(x).max() if rounds else 0), a.name
        assert not rounds or (x != y).any()


def test_llama_3s_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = checkpoint(tmp_path / "model", "llama", rope_parameters=rope, head_dim=32)
    write_gguf(model, tmp_path / "f32.gguf", "f32", name="tiny")
    (factors,) = (t.data for t in gguf.GGUFReader(tmp_path / "f32.gguf").tensors if t.name == "rope_freqs.weight")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(model), torch.device("cpu"))
    plain = 5e5 ** (-np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-5)
    assert {1.0, 8.0} < set(factors.tolist())  # all three ranges


def test_a_sentencepiece_like_tokenizer_is_scored_by_its_merges(tmp_path: Path) -> None:
    """llama.cpp merges what has the highest score, and transformers builds merges of the scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "a", "b", "c", "▁a", "bc", "▁abc", "ab", "▁b"]
    merges = [("b", "c"), ("▁", "a"), ("▁a", "bc"), ("a", "b"), ("▁", "b")]
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{i:02X}>" for i in range(256)), *words]
    core = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    model = checkpoint(tmp_path / "model", "llama", vocab_size=len(pieces))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    fast.save_pretrained(model)
    write_gguf(model, tmp_path / "f32.gguf", "f32", name="tiny")
    read = gguf.GGUFReader(tmp_path / "f32.gguf")
    scores = dict(zip(pieces, read.get_field("tokenizer.ggml.scores").contents(), strict=True))
    assert scores["bc"] > scores["▁a"] > scores["▁abc"] > scores["ab"] > scores["▁b"] > scores["a"]
    kinds = dict(zip(pieces, read.get_field("tokenizer.ggml.token_type").contents(), strict=True))
    assert [kinds[p] for p in ("<unk>", "<s>", "<0x41>", "a")] == [2, 3, 6, 1]
    assert read.get_field("tokenizer.ggml.add_space_prefix").contents() is True
    theirs = load_tokenizer(import_gguf(str(tmp_path / "f32.gguf"), tmp_path / "read"))
    for text in ("abc abc", "ab é bc", "b"):
        assert theirs(text, add_special_tokens=False).input_ids == fast(text).input_ids


def tokenizer_json(model: Path, change: Any) -> None:
    path = model / "tokenizer.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("gpt_neox", {}, "the family gpt_neox is none that is written as GGUF here (llama, mistral, qwen2, qwen3, gem"),
        ("llama", {"hidden_act": "relu"}, "llama with hidden_act relu, where a GGUF means silu"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "qwen2 with rope_type yarn, where a GGUF means default",
        ),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
        ("gemma3_text", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16.0, where a GGUF means 256.0"),
        ("llama", {"vocab_size": 290}, "the tokenizer has tokens up to"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = checkpoint(tmp_path / "model", family, **overrides)
    with pytest.raises(UserError) as caught:
        write_gguf(model, tmp_path / "x.gguf", "f32", name="tiny")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "splits text in a way that has no name here"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "has no name here (Lowercase, bytes by words)"),
        (lambda t: t["model"].update(ignore_merges=True), "splits text as gpt-2, with ignore_merges True"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "llama")
    tokenizer_json(model, change)
    with pytest.raises(UserError) as caught:
        write_gguf(model, tmp_path / "x.gguf", "f32", name="tiny")
    assert message in str(caught.value)


# Ollama's templates


def sayable() -> dict[str, ollama.Turns]:
    found = {}
    for path in chat_templates.template_files():
        try:
            found[path.stem] = ollama.turns(chat_templates.tokenizer_of(path.read_text()), Chat())
        except UserError as error:
            assert "cannot be said in Ollama's language" in str(error), path.name
    return found


@pytest.mark.slow
def test_most_templates_of_real_models_can_be_said_in_go(tmp_path: Path) -> None:
    """Each is held against Jinja as it is made; here by Go itself, where it is installed."""
    if not chat_templates.template_files():
        pytest.skip("trl is not installed")
    found = sayable()
    assert {"llama3", "qwen2_5", "qwen3", "gemma", "gemma3", "phi3", "deepseekv3"} <= found.keys()
    assert not {"llama3_2", "gptoss"} & found.keys()  # the date; another end of the last turn
    assert len(found) >= 35
    assert found["gemma"].system is None and found["gemma3"].folded
    cases = [
        {"template": turns.template(), "messages": messages, "expected": turns.text(messages)}
        for turns in found.values()
        for messages in ollama._conversations(turns.system is not None)
    ]
    go = shutil.which("go")
    if go is None:
        return
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "main.go").write_text(GO)
    subprocess.run([go, "run", "main.go", "cases.json"], cwd=tmp_path, check=True)


GO = """package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	text, _ := os.ReadFile(os.Args[1])
	var cases []struct {
		Template, Expected string
		Messages           []message
	}
	if err := json.Unmarshal(text, &cases); err != nil {
		panic(err)
	}
	for _, c := range cases {
		system := ""
		if c.Messages[0].Role == "system" {
			system = c.Messages[0].Content
		}
		var out bytes.Buffer
		values := map[string]any{"System": system, "Messages": c.Messages}
		if err := template.Must(template.New("").Parse(c.Template)).Execute(&out, values); err != nil {
			panic(err)
		}
		if out.String() != c.Expected {
			panic(out.String() + " and not " + c.Expected)
		}
	}
}
"""


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content }}{{ loop.length }}{% endfor %}", "ends otherwise once others follow"),
        ("{{ messages[-1].content }}", "it does not write each user's message once"),
        ("{{ strftime_now('%d %b %Y') }}" + tiny.TEMPLATE, "it writes the date"),
        ('"""' + tiny.TEMPLATE, "characters that a Modelfile has a use for"),
        ("{% if messages|length > 3 %}!{% endif %}" + tiny.TEMPLATE, "depends on more than the roles"),
    ],
)
def test_a_template_that_go_cannot_say_is_refused_with_the_reason(template: str, why: str) -> None:
    with pytest.raises(UserError, match="cannot be said in Ollama's language") as caught:
        ollama.turns(chat_templates.tokenizer_of(template), Chat())
    assert why in str(caught.value) and "write the Modelfile's TEMPLATE yourself" in str(caught.value)


def test_a_bos_that_ollama_puts_itself_is_not_in_the_template(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_templates.tokenizer_of("{{ bos_token }}" + tiny.TEMPLATE)
    assert ollama.turns(tokenizer, Chat()).default == "<bos>"
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    assert ollama.turns(tokenizer, Chat()).default == ""
    tokenizer.chat_template = tiny.TEMPLATE
    with pytest.raises(UserError, match="does not begin with <bos>, which Ollama would write all the same"):
        ollama.turns(tokenizer, Chat())
