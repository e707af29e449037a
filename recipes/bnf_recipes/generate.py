"""`bnf generate`: greedy completions, to look at what a model says."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bnf_core import registry
from bnf_core.config import GenerateConfig, Template
from bnf_core.model_folder import resolve_model
from bnf_core.protocol import Engine
from bnf_core.records import Text
from bnf_core.tokenization import load_tokenizer, prompt_ids, stop_ids


def generate(config: GenerateConfig) -> str:
    """The completion of one prompt.

    Raises:
        UserError: a missing model or adapter, or no chat template where one is wanted.
    """
    folder = resolve_model(config.model)
    tokenizer = load_tokenizer(folder)
    engine = registry.get(config.hardware.backend).load(
        folder,
        device=config.hardware.device,
        dtype=config.hardware.dtype,
        adapter=Path(config.adapter) if config.adapter else None,
    )
    stops = stop_ids(tokenizer, folder)
    return complete(engine, tokenizer, [config.prompt], config.template, config.max_tokens, stops)[0]


def complete(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    template: Template,
    max_tokens: int,
    stops: Sequence[int],
    batch_size: int = 16,
) -> list[str]:
    """Greedy completions of many prompts, in their order."""
    ids = [prompt_ids(p, tokenizer, template) for p in prompts]
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
