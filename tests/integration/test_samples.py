"""Samples: what is written of what the model says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnf_align.run.samples import Samples, page
from bnf_core import registry
from bnf_core.config import LoraConfig
from bnf_core.data.tokenization import load_tokenizer, stop_ids
from bnf_core.errors import UserError
from bnf_core.protocol import Engine
from bnf_core.sampling import Completion
from bnf_core.types import Example


class Parrot:
    """An engine that completes every prompt with its last tokens, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[int, ...]]] = []

    def sample(self, rows: list[Completion]) -> None:
        self.asked.append([row.prompt_ids for row in rows])
        for row in rows:
            for token in row.prompt_ids[-row.max_tokens :]:
                row.next(np.eye(304, dtype=np.float32)[token])


@pytest.fixture
def parrot() -> Any:
    return Parrot()


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture
def examples(tokenizer: Any) -> list[Example]:
    """Three prompts, the longest first; the second has no bad completion."""

    def row(prompt: str, completion: str, label: bool) -> Example:
        prompt_ids, completion_ids = (tuple(tokenizer(t)["input_ids"]) for t in (prompt, completion))
        return Example(prompt_ids, (*completion_ids, tokenizer.eos_token_id), label)

    return [
        row("What is 2 plus 2? ", "No idea.", False),
        row("What is 2 plus 2? ", "It is 4.", True),
        row("Paris", " is the capital", True),
        row("What is 2 plus 2? ", "It is 22.", False),
        row("0 1 2", " 3", True),
    ]


def make(folder: Path | None, examples: list[Example], tokenizer: Any, start: int = 0) -> Samples:
    return Samples(folder, examples, tokenizer, [tokenizer.eos_token_id], count=2, max_tokens=3, start=start)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_first_different_prompts_with_what_is_known_of_them(
    tmp_path: Path, examples: list[Example], tokenizer: Any, parrot: Any
) -> None:
    make(tmp_path, examples, tokenizer).write(5, parrot)
    assert [(s["step"], s["prompt"], s.get("chosen"), s.get("rejected")) for s in read(tmp_path)] == [
        (5, "What is 2 plus 2? ", "It is 4.", "No idea."),
        (5, "Paris", " is the capital", None),
    ]
    # Each prompt has its own completion, though the engine may be given them in another order.
    for sample in read(tmp_path):
        assert sample["completion"] and sample["prompt"].endswith(sample["completion"])


def test_samples_come_step_by_step_and_are_cut_where_a_run_goes_on(
    tmp_path: Path, examples: list[Example], tokenizer: Any, parrot: Any
) -> None:
    def steps() -> list[int]:
        return [s["step"] for s in read(tmp_path)]

    samples = make(tmp_path, examples, tokenizer)
    for step in (0, 5, 10):
        samples.write(step, parrot)
    assert steps() == [0, 0, 5, 5, 10, 10]
    samples = make(tmp_path, examples, tokenizer, start=5)
    assert steps() == [0, 0, 5, 5]
    assert "step 10" not in (tmp_path / "samples.md").read_text()
    for step in (5, 10):  # the step of the checkpoint comes once more
        samples.write(step, parrot)
    assert steps() == [0, 0, 5, 5, 10, 10]
    assert (tmp_path / "samples.md").read_text().count("step 10") == 2


def test_a_run_started_anew_has_no_samples_of_an_earlier_one(
    tmp_path: Path, examples: list[Example], tokenizer: Any, parrot: Any
) -> None:
    samples = make(tmp_path, examples, tokenizer)
    for step in (0, 5):
        samples.write(step, parrot)
    make(tmp_path, examples, tokenizer)
    assert read(tmp_path) == [] and "step" not in (tmp_path / "samples.md").read_text()


def test_processes_besides_the_first_complete_and_write_nothing(
    tmp_path: Path, examples: list[Example], tokenizer: Any, parrot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(None, examples, tokenizer, start=5).write(5, parrot)
    assert len(parrot.asked) == 1 and not list(tmp_path.iterdir())


def test_the_page_shows_text_as_it_is() -> None:
    prompt = "<|user|>a|b\n\n# no *heading* [x](y)"
    lines = page([{"step": 3, "prompt": prompt, "completion": "if x:\n    `y` <b> & ü", "rejected": "\\"}]).splitlines()
    assert lines[2:] == [
        "## Prompt 1",
        "",
        r"| prompt | \<\|user\|\>a\|b<br><br># no \*heading\* \[x\](y) |",
        "|---|---|",
        r"| rejected | \\ |",
        r"| step 3 | if x\:<br>&nbsp; &nbsp; \`y\` \<b\> \& ü |",
    ]


def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path, examples: list[Example], tokenizer: Any) -> None:
    for content in ('{"step": 1}\n{"st', '{"prompt": "a"}\n', "[1]\n"):
        (tmp_path / "samples.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"samples\.jsonl: not the samples of a run"):
            make(tmp_path, examples, tokenizer, start=5)
        assert (tmp_path / "samples.jsonl").read_text() == content


def test_a_backend_completes_the_prompts(
    backend_name: str, tiny_model: Path, tmp_path: Path, examples: list[Example], tokenizer: Any
) -> None:
    engine: Engine = registry.get(backend_name).load(tiny_model, device="cpu", lora=LoraConfig(rank=2))
    stops = stop_ids(tokenizer, tiny_model)
    Samples(tmp_path, examples, tokenizer, stops, count=3, max_tokens=4, start=0).write(0, engine)
    found = read(tmp_path)
    assert [s["prompt"] for s in found] == ["What is 2 plus 2? ", "Paris", "0 1 2"]
    for sample, prompt in zip(found, (examples[0], examples[2], examples[4]), strict=True):
        (alone,) = engine.generate([prompt.prompt_ids], 4, stops)
        assert sample["completion"] == tokenizer.decode(alone)
