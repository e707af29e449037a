"""Checking feedback: everything wrong is listed with its place, lengths and cuts are those of training, and the work
grows with the rows, not with their square."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bnf_align import cli
from bnf_align.commands import data_check
from bnf_core.config import DataCheckConfig, DataConfig
from bnf_core.data import reading
from bnf_core.data.records import Feedback
from bnf_core.data.sources import load_feedback
from bnf_core.data.tokenization import Tokenized, load_tokenizer, tokenize
from bnf_core.errors import UserError


def write(path: Path, rows: Sequence[Any]) -> Path:
    """Rows as JSON; what is text already stands as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(prompt: str = "2 + 2 =", completion: str = " 4", label: Any = True) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def chat(*roles: str, completion: str = "4", label: bool = True) -> dict[str, Any]:
    messages = [{"role": role, "content": "2 + 2?"} for role in roles]
    return {"prompt": messages, "completion": [{"role": "assistant", "content": completion}], "label": label}


def check(path: Path, model: Path | None = None, **data: Any) -> data_check.DataReport:
    config = DataCheckConfig(DataConfig(str(path), **data), model=None if model is None else str(model))
    return data_check.data_check(config, cli.console)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.run(["data-check", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def tokenizer_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its weights: a check needs none."""
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_every_bad_row_is_listed_with_line_and_field(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [
        row(),
        row(label="no"),
        '{"prompt" 1}',
        {"prompt": "a", "completion": "b", "lable": True},
        row(completion=""),
    ]
    path = write(tmp_path / "f.jsonl", rows)
    code, out, _ = run(capsys, "--data", path)
    assert code == 2
    shape, *lines = out.splitlines()
    assert shape == f"{path}: unpaired rows (prompt, completion, label)"
    assert [line.partition(" ")[0] for line in lines[:4]] == [f"{path}:{n}:" for n in (2, 3, 4, 5)]
    for line, field in zip(lines, ("label:", "column 11:", "label:", "completion:"), strict=False):
        assert line.split(": ", 1)[1].startswith(field)
    assert lines[-1] == "4 of 5 rows are bad: see above"


def test_good_rows_are_exit_code_0(capsys: pytest.CaptureFixture[str], feedback: Path) -> None:
    code, out, err = run(capsys, "--data", feedback)
    assert (code, err) == (0, "") and "all 12 rows are good" in out


@pytest.mark.parametrize("use_model", [False, True])
def test_also_when_no_row_is_good(
    use_model: bool, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "f.jsonl", [row(label=1)] * 3)
    words = ["--model", tokenizer_folder] if use_model else []
    code, out, _ = run(capsys, "--data", path, "--picture", tmp_path / "p.png", *words)
    assert code == 2 and "3 of 3 rows are bad" in out and out.count("expected true or false") == 3


def test_a_broken_file_keeps_what_was_found_before(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text('prompt,completion,label\na,b,true\na,b,maybe\na,"b"c,true\n')
    report = check(path)
    assert [message.partition(": ")[0] for message in report.bad_rows] == [f"{path}:3", f"{path}:4"]
    assert len(report.sizes) == 1


def test_labels_prompts_and_pairs_are_counted(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    report = check(write(tmp_path / "f.jsonl", [pair, row(), row("x", "y", False), row("x", "z", False), row(label=0)]))
    (counts,) = report.as_dict()["files"].values()
    assert counts == {
        "rows": 5,
        "bad_rows": 1,
        "labelled_chosen": 2,
        "labelled_rejected": 3,
        "prompts": 3,
        "prompts_with_both": 1,
        "reopened": 0,
        "neither": 0,
    }


def test_duplicates_and_contradictions_name_both_places(tmp_path: Path) -> None:
    messages = chat("user")
    rows = [
        row(),
        row(completion=" 5", label=False),
        row(),  # again, as the first
        row(label=False),  # contradicts the first
        row(prompt="2 + 2", completion="= 4"),  # the same text, cut elsewhere: another row
        messages,
        {"extra": 1, "prompt": [{"content": "2 + 2?", "role": "user"}], "completion": messages["completion"]}
        | {"label": True},
        row(label=False),  # again, as the fourth; the contradiction is known
        row(prompt=json.dumps(messages["prompt"]), completion=json.dumps(messages["completion"])),  # text, not messages
    ]
    path = write(tmp_path / "f.jsonl", rows)
    repeats = check(path).repeats

    def places(*pairs: tuple[int, int]) -> list[tuple[str, str]]:
        return [(f"{path}:{a}", f"{path}:{b}") for a, b in pairs]

    assert repeats.duplicates == places((1, 3), (6, 7), (4, 8))
    assert repeats.contradictions == places((1, 4))


def test_repeats_are_found_across_the_files_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [row()])
    write(tmp_path / "test.jsonl", [row(), row(label=False)])
    report = check(tmp_path)
    assert [Path(name).name for name in report.files] == ["train.jsonl", "test.jsonl"]  # test, as valid too, once
    assert report.repeats.duplicates == [(f"{tmp_path}/train.jsonl:1", f"{tmp_path}/test.jsonl:1")]
    assert report.repeats.contradictions == [(f"{tmp_path}/train.jsonl:1", f"{tmp_path}/test.jsonl:2")]


def test_a_split_can_be_checked_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [row()])
    write(tmp_path / "valid.jsonl", [row(label=None)])
    assert run(capsys, "--data", tmp_path, "--split", "train")[0] == 0
    assert run(capsys, "--data", tmp_path, "--split", "valid")[0] == 2
    assert run(capsys, "--data", tmp_path)[0] == 2


@pytest.mark.parametrize("max_length", [2, 3, 8, 12, 13, 14, 25, 200])
def test_what_is_cut_is_what_training_cuts(max_length: int, tokenizer_folder: Path, tmp_path: Path) -> None:
    rows = [row("x" * p, "y" * c, c % 2 == 0) for p in range(1, 16) for c in range(1, 16)]
    path = write(tmp_path / "f.jsonl", rows)
    report = check(path, tokenizer_folder, max_length=max_length)
    trained = tokenize(load_feedback(str(path)).rows, load_tokenizer(tokenizer_folder), max_length=max_length)
    assert (len(report.prompts_cut), len(report.completions_cut)) == (trained.prompts_cut, trained.completions_cut)
    kept = [min(size.whole, max_length) for size in report.sizes]
    assert kept == [len(example) for example in trained.examples]
    assert [size.source for size in report.sizes] == [example.source for example in trained.examples]


def test_lengths_are_tokens_with_a_model_and_characters_without(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [row("é" * 3, "é" * 5), chat("user", completion="abc")])
    plain = check(path)
    assert plain.unit == "characters" and [(s.prompt, s.completion) for s in plain.sizes] == [(3, 5), (6, 3)]
    assert plain.prompts_cut == plain.completions_cut == [] and plain.as_dict()["max_length"] is None
    tokens = check(path, tokenizer_folder)
    assert tokens.unit == "tokens"
    assert (tokens.sizes[0].prompt, tokens.sizes[0].completion) == (6, 11)  # two bytes each, and the end


def test_rows_that_the_tokenizer_refuses_are_bad_rows(
    tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(
        tmp_path / "f.jsonl", [row(), row(prompt=""), row("b"), {"prompt": "", "chosen": "a", "rejected": "b"}]
    )
    assert check(path).bad_rows == []  # whether a prompt may be empty depends on the tokenizer
    report = check(path, tokenizer_folder)
    assert [message.split(": ")[:2] for message in report.bad_rows] == [
        [f"{path}:2", "prompt"],
        [f"{path}:4", "prompt"],
    ]
    assert len(report.sizes) == 2
    everything = check(write(path, [chat("user"), chat("user")]), tokenizer_folder, template="plain")
    assert [message.partition(": ")[0] for message in everything.bad_rows] == [f"{path}:1", f"{path}:2"]


def test_a_tokenizer_that_will_not_do_is_an_error(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder, folder, ignore=shutil.ignore_patterns("*.jinja"))
    with pytest.raises(UserError, match="no chat template"):
        check(write(tmp_path / "f.jsonl", [chat("user")]), folder)


def test_the_histogram_counts_every_row_once(tmp_path: Path) -> None:
    lengths = [1, 2, 3, 4, 5, 8, 9, 16, 17, 1024, 1025]
    lines = check(write(tmp_path / "f.jsonl", [row("x" * (n - 1), "y") for n in lengths])).histogram()
    assert {line["completion"] for line in lines if line["from"] == 1} == {len(lengths)}
    for part, values in (("prompt", [n - 1 for n in lengths]), ("whole", lengths)):
        for line in lines:
            assert line[part] == sum(line["from"] <= n <= line["to"] for n in values), line
        assert sum(line[part] for line in lines) == len(lengths)
    assert [line["to"] for line in lines] == [0, *(2**k for k in range(12))]


def test_the_report_and_the_picture_are_written(
    tokenizer_folder: Path, feedback: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report, picture = tmp_path / "new" / "r.json", tmp_path / "new" / "p.png"
    words = ["--model", tokenizer_folder, "--max-length", "24", "--report", report, "--picture", picture]
    code, out, _ = run(capsys, "--data", feedback, *words)
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(report.read_text())
    assert content["prompts_cut"] and f"{content['prompts_cut'][0]['source']} prompt" in out
    assert content["lengths"]["whole"]["longest"] == max(s["prompt"] + s["completion"] for s in content["prompts_cut"])
    assert content["bad_rows"] == content["duplicates"] == content["contradictions"] == []


def test_the_picture_holds_every_row_on_its_side(tokenizer_folder: Path, feedback: Path) -> None:
    report = check(feedback, tokenizer_folder, max_length=24)
    prompts, completions, whole = data_check.figure(report).axes
    bars: list[Any] = [[*axes.patches] for axes in (prompts, whole)]
    assert [sum(bar.get_height() for bar in one) for one in bars] == [12, 12]
    assert [text.get_text() for text in completions.get_legend().get_texts()] == ["chosen: 6", "rejected: 6"]
    assert list(whole.lines[0].get_xdata()) == [24, 24]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "vaild"], "split is 'vaild': expected train, valid, test or all"),
        (["--picture", "p.pdf"], "expected a name that ends in .png or .svg"),
        (["--report", "."], "is a folder: expected the name of a file"),
        (["--model", "./nowhere"], "no such folder"),
        (["--model", "owner/nowhere"], "its tokenizer cannot be fetched"),
        (["--data", "missing.jsonl"], "no such file or folder"),
    ],
)
def test_bad_usage_is_exit_code_2(
    words: list[str], message: str, feedback: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, "--data", feedback, *words)
    assert code == 2 and message in error and "Traceback" not in error


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows in the train split"):
        check(write(tmp_path / "f.jsonl", []))


def test_the_work_grows_with_the_rows(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 rows, some of them bad and a tenth of them repeated: every row is parsed and tokenised once, and keys
    are compared only where they are equal, never each with all before it."""
    rows = [row(f"{i % 3600} + 1 =", f" {i % 3600 + 1}", label=i % 200 != 7 or "no") for i in range(4000)]
    path = write(tmp_path / "f.jsonl", rows)
    work = {"parsed": 0, "tokenised": 0, "compared": 0}
    parse_row, digest = reading.parse_row, data_check._digest

    def counting_parse(*args: Any, **settings: Any) -> list[Feedback]:
        work["parsed"] += 1
        return parse_row(*args, **settings)

    def counting_tokenize(part: Sequence[Feedback], *args: Any, **settings: Any) -> Tokenized:
        work["tokenised"] += len(part)
        return tokenize(part, *args, **settings)

    class Key:
        def __init__(self, item: Feedback) -> None:
            self.digest = digest(item)

        def __hash__(self) -> int:
            return hash(self.digest)

        def __eq__(self, other: object) -> bool:
            work["compared"] += 1
            return isinstance(other, Key) and self.digest == other.digest

    monkeypatch.setattr(reading, "parse_row", counting_parse)
    monkeypatch.setattr(data_check, "tokenize", counting_tokenize)
    monkeypatch.setattr(data_check, "_digest", Key)
    report = check(path, tokenizer_folder)
    assert len(report.bad_rows) == 20 and len(report.sizes) == 3980
    assert len(report.repeats.duplicates) == 398
    assert work["parsed"] == 4000 and work["tokenised"] == 3980
    assert work["compared"] <= 4000
