"""`bnf generate`: one prompt or many, greedily or not."""

import json
from pathlib import Path
from typing import Any

import pytest

from bnf_align import cli

PROMPTS = ["What is 2?", "Paris", "No idea, sorry.", "Paris"]


@pytest.fixture
def said(tiny_model: Path, backend_name: str, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: object, code: int = 0) -> str:
        hardware = ["--backend", backend_name, "--device", "cpu", "--dtype", "float32", "--max-tokens", "8"]
        found = cli.run([str(word) for word in ["generate", "--model", tiny_model, *hardware, *words]])
        captured = capsys.readouterr()
        assert found == code, captured.err
        return captured.err if code else captured.out

    return run


def test_many_prompts_from_a_file(said: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS))
    sampled = ["--prompts", tmp_path / "prompts.txt", "--samples", 2, "--temperature", 1, "--top-k", 40]
    lines = [json.loads(line) for line in said(*sampled).splitlines() if line.startswith("{")]
    assert [line["prompt"] for line in lines] == [p for p in PROMPTS[:3] for _ in range(2)]
    assert len({line["completion"] for line in lines}) > 3
    rows = "".join(json.dumps({"prompt": p, "answer": 1}) + "\n" for p in PROMPTS[1::-1])
    (tmp_path / "rows.jsonl").write_text(rows)
    said(*sampled[2:], "--prompts", tmp_path / "rows.jsonl", "--batch-size", 1, "--output", tmp_path / "out.jsonl")
    again = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert again == lines[2:4] + lines[:2]  # whatever the order and the batch
    other = [json.loads(line) for line in said(*sampled, "--seed", 1).splitlines() if line.startswith("{")]
    assert other != lines


def test_one_prompt_is_streamed(said: Any, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    (line,) = [x for x in said("--prompts", tmp_path / "one.txt", "--samples", 1).splitlines() if x.startswith("{")]
    text = json.loads(line)["completion"]
    assert said("--prompt", PROMPTS[0]) == text + "\n"
    assert len(text) > 2
    stop = text[len(text) // 2]
    assert said("--prompt", PROMPTS[0], "--stop", json.dumps([stop])) == text[: text.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either prompt or prompts"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--prompts", "rows.jsonl"], "rows.jsonl:2: prompt: no such column: found question. Add it, or name"),
    ],
)
def test_what_cannot_be_done_is_said(
    said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    monkeypatch.chdir(tmp_path)
    assert message in " ".join(said(*words, code=2).split())
