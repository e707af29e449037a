"""Prompts without completions: what is to be completed, with all else that stands beside each."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnf_core.config import Where
from bnf_core.data.labels import look_up
from bnf_core.data.messages import RowError, Text, Tool, named, plain, template_kwargs_of, text_or_messages, tools_of
from bnf_core.data.sources import no_rows, read_rows
from bnf_core.errors import UserError


@dataclass(frozen=True)
class Prompt:
    text: Text
    row: dict[str, Any]  # the whole row, for whoever judges completions of it
    source: str  # file:line
    tools: list[Tool] | None = None
    template_kwargs: dict[str, Any] | None = None


def load_prompts(path: str | Where, split: str = "train", column: str = "prompt") -> list[Prompt]:
    """Each prompt once, in the order in which they are met.

    Args:
        path: a .txt file with a prompt a line, or any form that feedback comes in; the first of several rows of one
            prompt counts.
        split: train, valid or test.
        column: which holds the prompt, a name or a path of names with dots between them.
    Raises:
        UserError: nothing there, or a row without a prompt.
    """
    file = Path(path if isinstance(path, str) else path.path).expanduser()
    if file.suffix.lower() == ".txt":
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        rows: list[tuple[str, Any]] = [(f"{path}:{n}", {"prompt": t}) for n, t in enumerate(lines, 1) if t.strip()]
    else:
        rows = list(read_rows(path, split))
    prompts: dict[str, Prompt] = {}
    for source, row in rows:
        prompt = _parse(row, source, "prompt" if file.suffix.lower() == ".txt" else column)
        prompts.setdefault(json.dumps([prompt.text, prompt.tools, prompt.template_kwargs], sort_keys=True), prompt)
    if not prompts:
        raise no_rows(str(path), split)
    return list(prompts.values())


def _parse(row: Any, source: str, column: str) -> Prompt:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(source, "", f"found {named(row)}, expected an object", f"Give each prompt a row with {column}")
    row = {str(name): plain(value) for name, value in row.items()}
    if not (found := look_up(row, column)):
        remedy = "Add it, or name the one that holds prompts, as with --data.columns '{prompt: question}'"
        raise RowError(source, column, f"no such column: found {', '.join(row) or 'none'}", remedy)
    text = text_or_messages(found, column, source)
    tools, kwargs = tools_of(row.get("tools"), source), template_kwargs_of(row.get("chat_template_kwargs"), source)
    return Prompt(text, row, source, tools, kwargs)
