"""What a GGUF's own reader, llama.cpp, says beside what was read from it: the same tokens, greedily the same text."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedTokenizerBase

PROMPT, TOKENS = "The capital of France is", 16
ABSENT = "not compared with llama.cpp: llama-cpp-python is not installed (pip install llama-cpp-python)"


def beside_llama_cpp(
    gguf: Path, tokenizer: PreTrainedTokenizerBase, greedy: Callable[[Sequence[int], int], list[int]]
) -> str:
    """One line for people.

    Args:
        greedy: the most likely continuation of a prompt's tokens, so many tokens long, by the model that was read.
    """
    if find_spec("llama_cpp") is None:
        return ABSENT
    from llama_cpp import Llama

    reader = Llama(model_path=str(gguf), n_ctx=64, verbose=False)
    ids = [int(i) for i in tokenizer(PROMPT).input_ids]
    theirs = reader.tokenize(PROMPT.encode(), add_bos=ids[0] == tokenizer.bos_token_id)
    if list(theirs) != ids:
        return f"llama.cpp has other tokens for {PROMPT!r}: {list(theirs)}, the tokenizer that was written {ids}"
    expected = [int(token) for token, _ in zip(reader.generate(ids, temp=0.0), range(TOKENS), strict=False)]
    written = greedy(ids, TOKENS)
    same = next((i for i, (a, b) in enumerate(zip(expected, written, strict=False)) if a != b), TOKENS)
    if same == TOKENS:
        return f"llama.cpp says the same: {PROMPT}{tokenizer.decode(written)}"
    return (
        f"llama.cpp, which rounds activations to 8 bits, says the same for {same} of {TOKENS} tokens: "
        f"{PROMPT}{tokenizer.decode(expected)!r}, and what was written {PROMPT}{tokenizer.decode(written)!r}"
    )
