"""A checkpoint folder as a GGUF file, by the writers and tables of names of the package gguf.

Of the families whose computation and names llama.cpp has under a fixed rule, and of tokenizers that it splits text for:
what is not known here by its name is refused, for a file that opens and computes something else is worse than none.

Rows of llama's query and key projections are interleaved, as llama.cpp turns neighbours by rotary embeddings and
transformers the two halves of a head; Gemma's norms are stored with the 1 that it adds to them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bnf_core.data.rendering import Chat
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import UserError
from bnf_core.models.model_config import Config, full_config
from bnf_core.storage.tensors import StoredTensor, model_tensors
from bnf_core.types import Array

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedTokenizerBase

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
ELSEWHERE = (
    "install llama.cpp, whose convert_hf_to_gguf.py knows more (on PATH, or --llama-cpp FOLDER), or export merged and "
    "convert that"
)


@dataclass(frozen=True)
class Family:
    architecture: str  # as gguf calls it
    activation: str
    interleaved: bool = False  # rows of the query and key projections
    norm_offset: float = 0.0


FAMILIES = {
    "llama": Family("llama", "silu", interleaved=True),
    "mistral": Family("llama", "silu", interleaved=True),
    "qwen2": Family("qwen2", "silu"),
    "qwen3": Family("qwen3", "silu"),
    "gemma3_text": Family("gemma3", "gelu_pytorch_tanh", norm_offset=1.0),
}

# How text is split before the byte-pair merges, by llama.cpp's name for it (`tokenizer.ggml.pre`).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    ("bytes by words",): "gpt-2",
    ("digits", "bytes by words"): "smollm",
    (_WORDS + r"|\p{N}" + _REST, "bytes"): "qwen2",
    (_WORDS + r"|\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
    (_TEKKEN, "bytes"): "tekken",
}
WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")  # a word that is a token is one, whatever the merges say
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf's kinds of tokens


def require_gguf_writer() -> None:
    """
    Raises:
        UserError: the package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise UserError("writing a GGUF needs gguf: pip install 'bnf-align[gguf]'")


def write_gguf(model: Path, output: Path, kind: GGUFType, *, name: str, chat: Chat | None = None) -> None:
    """Write a checkpoint folder as one GGUF file. Matrices are stored in `kind`, all else in float32.

    Args:
        model: safetensors, config and tokenizer.
        output: the file.
        name: what the model is called in it.
        chat: the chat template that goes with it; default: the tokenizer's.
    Raises:
        UserError: a family, a setting of it or a tokenizer that is not known here.
        OSError: the file cannot be written.
    """
    require_gguf_writer()
    from gguf import GGUFWriter

    config = full_config(model)
    family = _family(config)
    writer = GGUFWriter(output, family.architecture)
    writer.add_name(name)
    _write_settings(writer, config, family)
    tensors = _named(model, config, family)
    _write_vocabulary(writer, model, config, chat or Chat())
    try:
        _write_tensors(writer, tensors, config, family, kind)
    finally:
        writer.close()


# Settings


def _family(config: Config) -> Family:
    """
    Raises:
        UserError: a family that is not in the table, or a setting that llama.cpp does not compute.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"the family {kind} is none that is written as GGUF here ({', '.join(FAMILIES)}): {ELSEWHERE}")
    family = FAMILIES[kind]
    rope = _rope(config)
    head_dim = _head_dim(config)
    gemma = kind == "gemma3_text"
    expected: dict[str, tuple[Any, Any]] = {
        "hidden_act": (config.get("hidden_activation", config.get("hidden_act")), family.activation),
        "rope_type": (rope.get("rope_type", "default"), ("default", "llama3") if family.interleaved else "default"),
        "partial_rotary_factor": (float(rope.get("partial_rotary_factor") or 1.0), 1.0),
        "use_sliding_window": (bool(config.get("use_sliding_window")), False),
    }
    if gemma:
        layers = config["num_hidden_layers"]
        pattern = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
        expected |= {
            "layer_types": (config.get("layer_types") or pattern, pattern),
            "rope_local_base_freq": (float(config.get("rope_local_base_freq") or 1e4), 1e4),
            "query_pre_attn_scalar": (float(config.get("query_pre_attn_scalar", head_dim)), float(head_dim)),
            "attn_logit_softcapping": (config.get("attn_logit_softcapping"), None),
            "use_bidirectional_attention": (bool(config.get("use_bidirectional_attention")), False),
        }
    for setting, (found, wanted) in expected.items():
        if found not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            raise UserError(f"{kind} with {setting} {found}, where a GGUF means {wanted}: {ELSEWHERE}")
    return family


def _rope(config: Config) -> dict[str, Any]:
    """Of all layers, or of those that see everything."""
    rope = config.get("rope_parameters") or {}
    found = rope.get("full_attention", rope)
    return found if isinstance(found, dict) else {}


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _write_settings(writer: "GGUFWriter", config: Config, family: Family) -> None:
    longest = int(config["max_position_embeddings"])
    if family.architecture == "llama" and config.get("sliding_window"):
        longest = min(longest, int(config["sliding_window"]))  # llama.cpp's llama sees all that is before a token
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(longest)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config.get("rope_theta") or _rope(config)["rope_theta"]))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_vocab_size(config["vocab_size"])
    if family.architecture == "llama":
        writer.add_rope_dimension_count(_head_dim(config))
    if family.architecture == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        if cap := config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(cap)


# Weights


def _named(model: Path, config: Config, family: Family) -> dict[str, tuple[str, StoredTensor]]:
    """The checkpoint's tensors, by the names that GGUF has for them, each with its own name.

    Raises:
        UserError: one that the family has no name for.
    """
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[family.architecture], config["num_hidden_layers"])
    found: dict[str, tuple[str, StoredTensor]] = {}
    for name, tensor in model_tensors(model).items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise UserError(f"{model}: GGUF's {family.architecture} has no place for {name}: {ELSEWHERE}")
        found[theirs] = name, tensor
    if found["token_embd.weight"][1].shape[0] != config["vocab_size"]:
        rows = found["token_embd.weight"][1].shape[0]
        raise UserError(
            f"{model}: the embedding has {rows} rows, and config.json says vocab_size {config['vocab_size']}"
        )
    return found


def _write_tensors(
    writer: "GGUFWriter", tensors: dict[str, tuple[str, StoredTensor]], config: Config, family: Family, kind: GGUFType
) -> None:
    """One at a time."""
    import gguf

    kinds = {name: _stored_as(name, tensor.shape, kind) for name, (_, tensor) in tensors.items()}
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, (_, tensor) in tensors.items():
        stored = kinds[name]
        block, size = gguf.GGML_QUANT_SIZES[stored]
        writer.add_tensor_info(
            name, tensor.shape, np.dtype(np.float32), int(np.prod(tensor.shape)) // block * size, raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, (own, tensor) in tensors.items():
        writer.write_tensor_data(gguf.quantize(_values(own, tensor, config, family), kinds[name]))


def _stored_as(name: str, shape: tuple[int, ...], kind: GGUFType) -> "GGMLQuantizationType":
    from gguf import GGMLQuantizationType

    if len(shape) < 2 or "norm" in name:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32:  # no whole number of blocks
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[kind.upper()]


def _values(name: str, tensor: StoredTensor, config: Config, family: Family) -> Array:
    """float32, as llama.cpp computes with them."""
    values = tensor.float32()
    if name.endswith("norm.weight"):
        return values + np.float32(family.norm_offset) if family.norm_offset else values
    if family.interleaved and (".q_proj." in name or ".k_proj." in name):
        heads = config["num_attention_heads"] if ".q_proj." in name else config.get("num_key_value_heads")
        heads = heads or config["num_attention_heads"]
        halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return values


def _rope_factors(config: Config) -> Array | None:
    """(head_dim / 2,) float32: what each of llama 3's frequencies is divided by (rope_type llama3); None: nothing."""
    rope = _rope(config)
    if rope.get("rope_type", "default") != "llama3":
        return None
    theta = float(config.get("rope_theta") or rope["rope_theta"])
    dim, factor = _head_dim(config), float(rope["factor"])
    low, high, original = (
        float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    turns = original * theta ** (-np.arange(0, dim, 2) / dim) / (2 * np.pi)  # within the original length
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


# The tokenizer


def _write_vocabulary(writer: "GGUFWriter", model: Path, config: Config, chat: Chat) -> None:
    """
    Raises:
        UserError: a tokenizer that llama.cpp has no name for, or one with more tokens than the model.
    """
    tokenizer = load_tokenizer(model)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{model}: the tokenizer is none of the library tokenizers: {ELSEWHERE}")
    settings = json.loads(backend.to_str())
    byte_level, pre = _splitting(settings)
    tokens, kinds = _tokens(tokenizer, config["vocab_size"], byte_level)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in settings["model"]["merges"]]
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if byte_level:
        writer.add_token_merges(merges)
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_begins_with_space(settings))
    for special in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{special}_token_id")
        if number is not None:
            getattr(writer, f"add_{special}_token_id")(number)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    template = _template(tokenizer, chat)
    if template is not None:
        writer.add_chat_template(template)


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether plain text begins with BOS."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _template(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> str | None:
    if tokenizer.chat_template is None and chat.template is None:
        return None
    return str(tokenizer.get_chat_template(chat.template))


def _splitting(settings: dict[str, Any]) -> tuple[bool, str]:
    """Whether tokens are spelled in bytes, as GPT-2's, and llama.cpp's name for how text is split.

    Raises:
        UserError: it has none.
    """
    merging = settings["model"]
    if merging["type"] != "BPE":
        raise UserError(f"a tokenizer of the kind {merging['type']} is not written as GGUF here: {ELSEWHERE}")
    if merging.get("byte_fallback"):
        return False, "default"
    steps = _flat(settings["pre_tokenizer"], "pretokenizers")
    pre = SPLITS.get(tuple(map(_step, steps)))
    normalisers = [step["type"] for step in _flat(settings["normalizer"], "normalizers")]
    if pre is None or normalisers not in ([], ["NFC"]):  # llama.cpp leaves NFC to whoever writes the text
        shown = ", ".join([*normalisers, *map(_step, steps)])
        raise UserError(f"the tokenizer splits text in a way that has no name here ({shown}): {ELSEWHERE}")
    if bool(merging.get("ignore_merges")) != (pre in WHOLE_WORDS_FIRST):
        raise UserError(
            f"the tokenizer splits text as {pre}, with ignore_merges {bool(merging.get('ignore_merges'))}, which "
            f"llama.cpp does not: {ELSEWHERE}"
        )
    return True, pre


def _flat(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [inner for one in step[parts] for inner in _flat(one, parts)] if step["type"] == "Sequence" else [step]


def _step(step: dict[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": by_words}:
            return "bytes by words" if by_words else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern
    return str(step["type"])


def _tokens(tokenizer: "PreTrainedTokenizerBase", count: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """Each row of the embedding's token, and its kind."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    if by_id and max(by_id) >= count:
        raise UserError(
            f"the tokenizer has tokens up to {max(by_id)}, and the model {count} rows for them: {ELSEWHERE}"
        )
    tokens, kinds = [], []
    for number in range(count):
        token = by_id.get(number)
        if token is None:
            token, kind = f"[PAD{number}]", UNUSED
        elif number in added:
            token, kind = added[number].content, CONTROL if added[number].special else USER_DEFINED
            if number == tokenizer.unk_token_id and not byte_level:
                kind = UNKNOWN
            elif kind == USER_DEFINED and not byte_level:
                token = token.replace("▁", " ")
        elif not byte_level and len(token) == 6 and token.startswith("<0x"):
            kind = BYTE
        else:
            kind = NORMAL
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """What llama.cpp merges first has the highest score: the earlier of two merges. Tokens that no merge makes are the
    last."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", "", 1) if merge.count(" ") == 1 else merge, rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _begins_with_space(settings: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    for step in _flat(settings["normalizer"], "normalizers"):
        if step["type"] == "Prepend":
            return True
    for step in _flat(settings["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            return str(step.get("prepend_scheme", "always")) != "never"
    return False
