"""`bnf generate`: greedy completions, to look at what a model says."""

from pathlib import Path

from rich.console import Console

from bnf_align.run.completions import complete
from bnf_core import registry
from bnf_core.config import GenerateConfig
from bnf_core.data.rendering import Chat
from bnf_core.data.tokenization import load_tokenizer, stop_ids
from bnf_core.models.model_folder import resolve_model


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
    chat = Chat.of(config.chat_template, config.template_kwargs)
    folders = [folder, Path(config.adapter)] if config.adapter else [folder]
    stops = stop_ids(tokenizer, *folders, chat=chat)
    return complete(engine, tokenizer, [config.prompt], config.template, config.max_tokens, stops, chat=chat)[0]


Config = GenerateConfig
POSITIONAL = ("--prompt",)


def run(config: GenerateConfig, console: Console) -> int:
    print(generate(config))
    return 0
