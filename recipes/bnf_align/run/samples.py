"""What the model says as it is trained: completions of some held-out prompts, step by step.

In the run folder, `samples.jsonl` has a line for each completion: `step`, `prompt`, `completion`, and as `chosen`
and `rejected` a completion from the held-out rows where there is one. All are text as the model sees it, special tokens
included, but for the end of a completion. `samples.md` shows the same, a table for each prompt.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bnf_align.run.completions import complete_ids
from bnf_core.config import SamplingConfig
from bnf_core.errors import UserError
from bnf_core.protocol import Engine
from bnf_core.sampling import GREEDY
from bnf_core.storage.files import replace_file
from bnf_core.types import Example

Sample = dict[str, Any]


class Samples:
    """The samples of one run.

    Args:
        run_folder: an existing folder; None to complete and write nothing, in processes besides the first.
        examples: the held-out rows; the first `count` different prompts are completed.
        tokenizer: of the model.
        stops: token ids that end a completion.
        count: how many prompts.
        max_tokens: of each completion.
        sampling, seed: how its tokens are chosen.
        start: steps done. Samples of later steps go, and at 0 all that an earlier run left.
    Raises:
        OSError: nothing can be written, here and in `write`; the files are as they were.
        UserError: samples.jsonl holds something else.
    """

    def __init__(
        self,
        run_folder: Path | None,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int],
        *,
        count: int,
        max_tokens: int,
        start: int,
        sampling: SamplingConfig = GREEDY,
        seed: int = 0,
    ):
        self._sampling, self._seed = sampling, seed
        self._folder, self._tokenizer, self._stops, self._max_tokens = run_folder, tokenizer, stops, max_tokens
        self._prompts = _different((e.prompt_ids for e in examples), count)
        self._known = [self._describe(prompt, examples) for prompt in self._prompts]
        self._samples: list[Sample] = []
        if run_folder is not None:
            self._samples = [s for s in _read(run_folder) if s["step"] <= start] if start else []
            _write(run_folder, self._samples)

    def write(self, step: int, engine: Engine) -> None:
        """Complete the prompts after `step` optimizer steps, and add what came out."""
        completions = complete_ids(
            engine,
            self._tokenizer,
            self._prompts,
            self._max_tokens,
            self._stops,
            sampling=self._sampling,
            seed=self._seed,
        )
        if self._folder is None:
            return
        new = [{"step": step, **known, "completion": c} for c, known in zip(completions, self._known, strict=True)]
        self._samples = [s for s in self._samples if s["step"] != step] + new  # a resumed run may do a step again
        _write(self._folder, self._samples)

    def _describe(self, prompt: tuple[int, ...], examples: Sequence[Example]) -> Sample:
        known: Sample = {"prompt": self._tokenizer.decode(list(prompt))}
        for name, label in (("chosen", True), ("rejected", False)):
            ids = next((e.completion_ids for e in examples if e.prompt_ids == prompt and e.label == label), None)
            if ids is not None:  # without the end of turn, which `generate` leaves out too
                known[name] = self._tokenizer.decode(list(ids[:-1] if ids[-1] in self._stops else ids))
        return known


def _different(prompts: Iterable[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """The first so many, each once."""
    found: dict[tuple[int, ...], None] = {}
    for prompt in prompts:
        found[prompt] = None
        if len(found) == count:
            break
    return list(found)


def page(samples: Sequence[Sample]) -> str:
    """A table for each prompt, a row for each step, as Markdown in which the text looks as it is."""
    parts = ["# Samples\n"]
    for number, prompt in enumerate(dict.fromkeys(sample["prompt"] for sample in samples), 1):
        of_prompt = [sample for sample in samples if sample["prompt"] == prompt]
        rows = [(str(name), of_prompt[0][name]) for name in ("chosen", "rejected") if name in of_prompt[0]]
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
        samples = [_with_present_names(dict(json.loads(line))) for line in lines if line]
        return sorted(samples, key=lambda sample: int(sample["step"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the samples of a run ({error!r}). Move it away to continue") from error


def _with_present_names(sample: Sample) -> Sample:
    """A sample of a run before 0.2, which called the two completions good and bad."""
    return {{"good": "chosen", "bad": "rejected"}.get(name, name): value for name, value in sample.items()}
