"""`bnf data convert`: what it writes reads as what it read, and it writes all or nothing."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bnf_align import cli
from bnf_align.commands.data_convert import as_rows
from bnf_core.data.labels import LabelRule
from bnf_core.data.reading import Reading, RowReader
from bnf_core.data.records import Feedback
from bnf_core.data.sources import load_feedback

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = [
    {"prompt": "Name a fruit.", "response": "A pear.", "helpfulness": 4, "coherence": 4},
    {"prompt": "Name a fruit.", "response": "Iron.", "helpfulness": 0, "coherence": 3},
]


def test_what_is_written_reads_as_what_was_read() -> None:
    calls = [{"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"at": None}}], "train": False}]
    whole = [*calls, {"role": "tool", "content": "21"}, {"role": "assistant", "content": "Warm."}]
    question = [{"role": "user", "content": "Warm?"}]
    tools = [{"name": "look", "parameters": {}}]
    rows = [
        {"prompt": "q", "completion": "a", "label": 0.6, "weight": 0.5},
        {"prompt": "q", "completion": "b", "label": False, "weight": 3},
        {"prompt": question, "completion": whole, "label": True, "tools": tools, "chat_template_kwargs": {"x": 1}},
        {"prompt": "q", "chosen": "a", "rejected": "b", "weight": 2},
        {"prompt": "q", "completions": ["a", "b"], "labels": [True, -0.5]},
    ]
    read = [feedback for row in rows for feedback in RowReader()(row, "")]
    again = [feedback for row in as_rows(read) for feedback in RowReader()(json.loads(json.dumps(row)), "")]
    assert again == read and len(read) == 7


def test_every_shape_of_the_docs_survives() -> None:
    for text in re.findall(r"^### (.*?)(?=^##)", DOCS, re.S | re.M):
        rules = re.findall(r'--data\.label "([^"]+)"', text)
        for block in re.findall(r"```jsonl\n(.*?)```", text, re.S):
            read = RowReader(Reading(label=LabelRule.parse(rules[0]) if rules else None))
            found: list[Feedback] = [f for line in block.splitlines() for f in read(json.loads(line), "a:1")]
            again = [f for row in as_rows(found) for f in RowReader()(row, "a:1")]
            assert found and again == [replace(row, source="a:1") for row in found]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("answers.json").write_text(json.dumps(ROWS))
    arguments = ["data", "convert", "answers.json", "feedback.jsonl", "--data.label", "helpfulness >= 3"]
    assert cli.run(arguments) == 0
    shown = capsys.readouterr().out
    (docs,) = re.findall(r"^\$ bnf data convert.*?\n(.*?)```", DOCS, re.S | re.M)
    assert shown == docs.replace("coherence, complexity, correctness, verbosity", "coherence")
    assert [row.label for row in load_feedback("feedback.jsonl").rows] == [True, False]
    before = Path("feedback.jsonl").read_text()
    assert cli.run(arguments) == 2 and "is there already" in capsys.readouterr().err
    Path("answers.json").write_text(json.dumps([ROWS[0], ROWS[1] | {"helpfulness": "good"}]))
    assert cli.run([*arguments, "--overwrite"]) == 2
    assert "answers.json:1: helpfulness: is the text" in capsys.readouterr().err
    assert Path("feedback.jsonl").read_text() == before and {p.name for p in tmp_path.iterdir()} == {
        "answers.json",
        "feedback.jsonl",
    }
    assert cli.run([*arguments, "--overwrite", "--skip-bad-rows"]) == 0
    assert len(Path("feedback.jsonl").read_text().splitlines()) == 1
    assert cli.run(["data", "convert", "feedback.jsonl", "feedback.jsonl", "--overwrite"]) == 2  # onto itself
    assert "is there already" in capsys.readouterr().err
    for output, why in (("feedback.txt", "expected the name of a .jsonl file"), ("nowhere.jsonl", "no such file")):
        data = "answers.json" if output.endswith("txt") else "absent.json"
        assert cli.run(["data", "convert", data, output]) == 2 and why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label", "helpfulness => 3"], "data.label is 'helpfulness => 3': it cannot be read. Expected a rule"),
        (["--label", "stars >= 3"], "answers.json:1: stars: no such column"),
        ([], "answers.json:1: HelpSteer's ratings have scores and no labels"),
        (["--data.columns", "{prompt: query}"], "answers.json:1: query: no such column"),
        (["--data.columns", "{promt: prompt}"], "did you mean prompt?"),
        (["--label", "helpfulness > mean", "--data.columns", "{completion: response, weight: coherence}"], ""),
    ],
)
def test_bad_settings(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "answers.json"
    data.write_text(json.dumps([row | {"helpfulness": i} for i, row in enumerate(ROWS)]))
    code = cli.run(["data", "convert", str(data), str(tmp_path / "out.jsonl"), *flags])
    assert code == (2 if message else 0)
    assert message in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").exists() == (not message)
