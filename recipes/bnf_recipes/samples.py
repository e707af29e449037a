"""What the model says as it is trained: greedy completions of some held-out prompts, step by step.

In the run folder, `samples.jsonl` has a line for each completion: `step`, `prompt`, `completion`, and as `good` and
`bad` a completion from the held-out rows where there is one. All are text as the model sees it, special tokens
included. `samples.md` shows the same, a table for each prompt.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bnf_core.batching import Example
from bnf_core.errors import UserError
from bnf_core.files import replace_file
from bnf_core.protocol import Engine
from bnf_recipes.generate import complete_ids

Sample = dict[str, Any]


def write_samples(
    run_folder: Path | None,
    step: int,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    count: int,
    max_tokens: int,
    stops: Sequence[int],
) -> None:
    """Complete the first `count` different prompts and add what came out, in place of anything from this step on.

    Args:
        run_folder: an existing folder; None to complete and write nothing, in processes besides the first.
        step: optimizer steps done.
        engine: the model as it is now.
        tokenizer: of the model.
        examples: the held-out rows.
        count: how many prompts.
        max_tokens: of each completion.
        stops: token ids that end a completion.
    Raises:
        OSError: nothing can be written; the files are as they were.
        UserError: samples.jsonl has been changed, and holds something else.
    """
    prompts = list(dict.fromkeys(e.prompt_ids for e in examples))[:count]
    completions = complete_ids(engine, tokenizer, prompts, max_tokens, stops)
    if run_folder is None:
        return
    new: list[Sample] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        sample: Sample = {"step": step, "prompt": tokenizer.decode(list(prompt)), "completion": completion}
        for name, label in (("good", True), ("bad", False)):
            ids = next((e.completion_ids for e in examples if e.prompt_ids == prompt and e.label == label), None)
            if ids is not None:  # without the end of turn, which `generate` leaves out too
                sample[name] = tokenizer.decode(list(ids[:-1] if ids[-1] in stops else ids))
        new.append(sample)
    _write(run_folder, [s for s in _read(run_folder) if s["step"] < step] + new)


def cut_samples(run_folder: Path, start: int) -> None:
    """Take a run's samples back to where it goes on.

    Args:
        run_folder: an existing folder.
        start: steps done; samples of later steps go, and at 0 all that an earlier run left.
    Raises:
        OSError, UserError: as write_samples.
    """
    if start:
        if samples := _read(run_folder):
            _write(run_folder, [s for s in samples if s["step"] <= start])
    else:
        for name in ("samples.jsonl", "samples.md"):
            (run_folder / name).unlink(missing_ok=True)


def page(samples: Sequence[Sample]) -> str:
    """A table for each prompt, a row for each step, as Markdown in which the text looks as it is."""
    parts = ["# Samples\n"]
    for number, prompt in enumerate(dict.fromkeys(sample["prompt"] for sample in samples), 1):
        of_prompt = [sample for sample in samples if sample["prompt"] == prompt]
        rows = [(str(name), of_prompt[0][name]) for name in ("good", "bad") if name in of_prompt[0]]
        rows += [(f"step {sample['step']}", sample["completion"]) for sample in of_prompt]
        parts += [f"## Prompt {number}\n", f"| prompt | {_cell(prompt)} |", "|---|---|"]
        parts += [f"| {name} | {_cell(text)} |" for name, text in rows]
        parts.append("")
    return "\n".join(parts)


def _cell(text: str) -> str:
    """Text as one cell of a table, with the characters that Markdown would take for its own escaped."""
    lines = [re.sub(r"([\\`*_~$&!:<>|\[\]])", r"\\\1", line) for line in text.splitlines()]
    return "<br>".join(line.replace("  ", "&nbsp; ") for line in lines)


def _write(run_folder: Path, samples: Sequence[Sample]) -> None:
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    replace_file(run_folder / "samples.jsonl", "".join(lines))
    replace_file(run_folder / "samples.md", page(samples))


def _read(run_folder: Path) -> list[Sample]:
    path = run_folder / "samples.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        samples = [json.loads(line) for line in lines if line]
        return sorted(samples, key=lambda sample: int(sample["step"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the samples of a run ({error!r}). Move it away to go on") from error
