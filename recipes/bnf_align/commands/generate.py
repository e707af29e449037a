"""`bnf generate`: what a model says, to one prompt or to many."""

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from bnf_align.run.completions import completions, draw
from bnf_align.run.progress import bar
from bnf_core import registry
from bnf_core.config import GenerateConfig
from bnf_core.data.prompts import Prompt, load_prompts
from bnf_core.data.rendering import Chat
from bnf_core.data.tokenization import load_tokenizer, prompt_ids, stop_ids
from bnf_core.errors import UserError
from bnf_core.models.model_folder import resolve_model
from bnf_core.sampling import Completion
from bnf_core.storage.files import replace_file


def generate(config: GenerateConfig, console: Console) -> Iterator[tuple[Prompt, Completion]]:
    """The completions of all prompts, prompt by prompt; a single one is written to the terminal as it comes.

    Raises:
        UserError: a missing model, adapter or file, or no chat template where one is wanted.
    """
    prompts = _prompts(config)
    folder = resolve_model(config.model)
    tokenizer = load_tokenizer(folder)
    chat = Chat.of(config.chat_template, config.template_kwargs)
    ids = [prompt_ids(p.text, tokenizer, config.template, p.source, chat, p.tools, p.template_kwargs) for p in prompts]
    engine = registry.get(config.hardware.backend).load(
        folder,
        device=config.hardware.device,
        dtype=config.hardware.dtype,
        adapter=Path(config.adapter) if config.adapter else None,
    )
    stops = stop_ids(tokenizer, *([folder, Path(config.adapter)] if config.adapter else [folder]), chat=chat)
    alone = config.prompt is not None and config.samples == 1 and config.output is None
    rows = completions(
        tokenizer,
        ids,
        config.samples,
        config.sample,
        max_tokens=config.max_tokens,
        stops=stops,
        seed=config.seed,
        on_token=_Typist() if alone else None,
    )
    if alone:  # without a bar, which would hold back half a line
        draw(engine, rows, 1)
        yield prompts[0], rows[0]
        return
    size = max(config.batch_size // config.samples, 1)  # prompts at a time
    with bar("generate", -(-len(prompts) // size), console) as progress:
        for at in range(0, len(prompts), size):
            part = rows[at * config.samples : (at + size) * config.samples]
            draw(engine, part, config.batch_size)
            progress.advance()
            yield from ((prompts[at + i // config.samples], row) for i, row in enumerate(part))


def _prompts(config: GenerateConfig) -> list[Prompt]:
    if config.prompts is not None:
        return load_prompts(config.prompts, config.split)
    assert config.prompt is not None
    return [Prompt(config.prompt, {"prompt": config.prompt}, "prompt")]


class _Typist:
    """Writes a completion to the terminal as it grows."""

    def __init__(self) -> None:
        self._written = 0

    def __call__(self, row: Completion) -> None:
        text = row.settled
        print(text[self._written :], end="", flush=True)
        self._written = max(len(text), self._written)
        if row.done:
            print()


Config = GenerateConfig
POSITIONAL = ("--prompt",)


def run(config: GenerateConfig, console: Console) -> int:
    lines = []
    for prompt, row in generate(config, console):
        line = json.dumps({"prompt": prompt.text, "completion": row.text, "cut": row.cut}, ensure_ascii=False) + "\n"
        if config.output is not None:
            lines.append(line)
        elif config.prompts is not None or config.samples > 1:
            print(line, end="")
    if config.output is not None:
        try:
            replace_file(Path(config.output), "".join(lines))
        except OSError as error:
            raise UserError(f"output {config.output}: {error.strerror}") from error
    return 0
