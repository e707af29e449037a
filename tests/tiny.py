"""A tiny random model with its tokenizer, built locally in a second: what tests train instead of a real one."""

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = ["What is 2 plus 2? It is 4.", "No idea, sorry.", "Paris is the capital of France.", "0 1 2 3 4 5 6 7 8 9"]


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def make_model(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A two-layer llama with a RoPE base of its own, saved by transformers in float32."""
    import torch
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder)
    settings: dict[str, Any] = {
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(settings | overrides))).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 12) -> Path:
    """Unpaired feedback of different lengths; every prompt has a good and a bad completion."""
    rows = []
    for i in range(count):
        prompt = f"What is {i // 2} plus 2?"
        good = i % 2 == 0
        completion = f"It is {i // 2 + 2}." if good else "No idea, sorry." * (1 + i % 3)
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
                "label": good,
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
