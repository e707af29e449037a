"""Completing prompts with a loaded model."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from bnf_core.config import Template
from bnf_core.data.messages import Text
from bnf_core.data.rendering import Chat
from bnf_core.data.tokenization import prompt_ids
from bnf_core.protocol import Engine


def complete(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    template: Template,
    max_tokens: int,
    stops: Sequence[int],
    batch_size: int = 16,
    chat: Chat | None = None,
) -> list[str]:
    """Greedy completions of many prompts, in their order."""
    ids = [prompt_ids(p, tokenizer, template, chat=chat) for p in prompts]
    return complete_ids(engine, tokenizer, ids, max_tokens, stops, batch_size)


def complete_ids(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    max_tokens: int,
    stops: Sequence[int],
    batch_size: int = 16,
) -> list[str]:
    """The same for prompts that are tokens already."""
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    for at in range(0, len(ids), batch_size):
        chosen = by_length[at : at + batch_size]
        for i, tokens in zip(chosen, engine.generate([ids[i] for i in chosen], max_tokens, stops), strict=True):
            texts[i] = str(tokenizer.decode(tokens))
    return texts
