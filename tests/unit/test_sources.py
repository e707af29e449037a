"""Reading feedback from files, folders and the Hub, with true line numbers; grouping and splitting by prompt."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bnf_core.data.labels import LabelRule
from bnf_core.data.messages import RowError
from bnf_core.data.reading import Reading
from bnf_core.data.records import Feedback
from bnf_core.data.sources import digest, has_split, held_out_prompts, load_feedback, prompt_group
from bnf_core.errors import UserError

ROW = '{"prompt": "q", "completion": "a", "label": true}'
CHAT = [{"role": "user", "content": "q"}]
ANSWER = [{"role": "assistant", "content": "a"}]


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def lines(path: str) -> list[str]:
    return [row.source.removeprefix(path) for row in load_feedback(path).rows]


def test_importing_the_data_modules_loads_no_framework_and_no_reader() -> None:
    code = (
        "import sys, bnf_core.data.records, bnf_core.data.sources, bnf_core.data.tokenization\n"
        "import bnf_core.steps.batching\n"
        "heavy = ('torch', 'mlx', 'transformers', 'datasets', 'pyarrow', 'pandas', 'jinja2')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# JSON lines


def test_jsonl_counts_blank_lines_and_allows_bom_crlf_and_separators_within_text(tmp_path: Path) -> None:
    inner = json.dumps({"prompt": "a\u2028b\x85c", "completion": "d", "label": False}, ensure_ascii=False)
    path = write(tmp_path / "f.jsonl", "\ufeff" + "\r\n".join([ROW, "", inner, "  ", ROW]))
    loaded = load_feedback(path)
    assert lines(path) == [":1", ":3", ":5"]
    assert loaded.rows[1] == Feedback("a\u2028b\x85c", "d", False, f"{path}:3")
    assert loaded.skipped == []


def test_jsonl_malformed_json_is_named_by_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", f'{ROW}\n\n  {{"prompt": "q" "completion": "a"}}\n')
    with pytest.raises(RowError, match=r"f\.jsonl:3: column 18: not JSON: .*delimiter.* one JSON object on each line"):
        load_feedback(path)


def test_jsonl_not_utf8_is_named_by_line_and_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", ROW.encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(RowError, match=r"f\.jsonl:2: byte 16 of the line is not UTF-8"):
        load_feedback(path)


def test_bad_rows_can_be_skipped_but_not_all_of_them(tmp_path: Path) -> None:
    bad = '{"prompt": "q", "completion": "a", "label": "yes"}'
    path = write(tmp_path / "f.jsonl", f'{ROW}\n{bad}\n{{"prompt"\n\xe9\n'.encode("latin-1") + ROW.encode())
    with pytest.raises(RowError, match=r"f\.jsonl:2: label"):
        load_feedback(path)
    loaded = load_feedback(path, skip_bad_rows=True)
    assert [row.source for row in loaded.rows] == [f"{path}:1", f"{path}:5"]
    assert [message.removeprefix(path)[:2] for message in loaded.skipped] == [":2", ":3", ":4"]
    only_bad = write(tmp_path / "bad.jsonl", f"{bad}\n{bad}\n")
    with pytest.raises(UserError, match=r"none of its 2 rows is usable; the first: .*bad\.jsonl:1: label"):
        load_feedback(only_bad, skip_bad_rows=True)


@pytest.mark.parametrize(("name", "text"), [("f.jsonl", ""), ("f.jsonl", "\n\n"), ("f.json", ""), ("f.json", "[]")])
def test_a_file_without_rows_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match="no rows"):
        load_feedback(write(tmp_path / name, text))


# JSON


def test_json_names_the_line_where_each_element_begins(tmp_path: Path) -> None:
    pretty = json.dumps([json.loads(ROW)] * 3, indent=1)  # five lines an element
    path = write(tmp_path / "f.json", "\ufeff" + pretty)
    assert lines(path) == [":2", ":7", ":12"]
    assert lines(write(tmp_path / "g.json", f"\n[{ROW}, {ROW}\n,\n\n{ROW}]")) == [":2", ":2", ":5"]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("text", "places"),
    [
        (f"{ROW}\n\n{ROW}\n", [":1", ":3"]),
        (ROW, [":1"]),
        (f"[{ROW},\n{ROW}]", [":1", ":2"]),
        (f"[\n{ROW}\n,{ROW}]", [":2", ":3"]),
        (f'{{"data": [{ROW}, {ROW}]}}', ["[data]:1", "[data]:2"]),
        (json.dumps({"rows": [json.loads(ROW)]}, indent=1), ["[rows]:1"]),
    ],
)
def test_kinds_of_json_are_told_apart_by_what_is_there(
    ending: str, text: str, places: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / f"f.{ending}", "\ufeff" + text)
    assert [row.source.removeprefix(path) for row in load_feedback(path).rows] == places


def test_a_csv_field_may_be_a_long_document(tmp_path: Path) -> None:
    """Rejects Python's own limit of 131,072 characters."""
    long = "word " * 30_000
    path = write(tmp_path / "f.csv", f'prompt,completion,label\nq,a,true\n"{long}",b,false\nr,c,true\n')
    assert [row.prompt for row in load_feedback(path).rows] == ["q", long, "r"]


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    more = [{"id": 1, "tools": None, "score": None}, {"id": 2, "tools": [], "chat_template_kwargs": {}}]
    path = write(tmp_path / "f.jsonl", "\n".join(json.dumps(json.loads(ROW) | columns) for columns in more))
    assert load_feedback(path).unused == {"id"}


def test_rows_from_python_may_hold_what_tables_do() -> None:
    """NumPy's scalars and arrays, tuples, and NaN for what is absent."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"town": "Ulm", "a": None, "n": np.int64(2)}}}
    rows = [
        {"prompt": "q", "completion": "a", "label": np.bool_(False), "tools": float("nan")},
        {
            "prompt": np.array([{"role": "user", "content": "q"}], object),
            "completion": ({"role": "assistant", "content": None, "tool_calls": np.array([call], object)},),
            "label": np.bool_(True),
        },
    ]
    text, messages = load_feedback(rows).rows
    assert (text.label, text.tools, messages.label) == (False, None, True)
    assert messages.prompt == [{"role": "user", "content": "q"}]
    (answer,) = messages.completion
    assert answer["tool_calls"][0]["function"]["arguments"] == {"town": "Ulm", "n": 2}


def test_parquet_rows_are_those_of_json_lines(tmp_path: Path) -> None:
    """Rejects the nulls that a table gives to keys which other rows have."""
    import pyarrow
    import pyarrow.parquet

    rows = []
    for arguments in ({"town": "Ulm"}, {"a": 1, "b": {"c": 2}}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        prompt = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        answer = [{"role": "assistant", "content": "a"}]
        rows.append({"prompt": prompt, "completion": answer, "label": True})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    lines = write(tmp_path / "f.jsonl", "\n".join(map(json.dumps, rows)))
    kept = [[(row.prompt, row.completion) for row in load_feedback(p).rows] for p in (lines, f"{tmp_path}/f.parquet")]
    assert kept[0] == kept[1]


def test_json_must_be_a_sound_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"f\.json: expected a list of objects, found one dict"):
        load_feedback(write(tmp_path / "f.json", json.dumps(json.loads(ROW), indent=1)))
    with pytest.raises(RowError, match=r"g\.json:2: column 1: not JSON"):
        load_feedback(write(tmp_path / "g.json", f"[{ROW},\nx]"))
    with pytest.raises(RowError, match=r"h\.json:2: byte 3 of the line is not UTF-8"):
        load_feedback(write(tmp_path / "h.json", b'[\n "\xff"]'))
    with pytest.raises(RowError, match=r"i\.json:1: found 3, expected an object"):
        load_feedback(write(tmp_path / "i.json", "[3]"))


# CSV


def test_csv_labels_messages_and_line_numbers(tmp_path: Path) -> None:
    chat, answer = (json.dumps(m).replace('"', '""') for m in (CHAT, ANSWER))
    text = (
        f'prompt,completion,label,id\r\nq,a,TRUE,1\r\n"two\r\nlines",a,false,2\r\n\r\n"{chat}","{answer}", False ,3\r\n'
    )
    path = write(tmp_path / "f.csv", "\ufeff" + text)
    loaded = load_feedback(path)
    assert [row.label for row in loaded.rows] == [True, False, False]
    assert loaded.rows[1].prompt == "two\r\nlines"
    assert (loaded.rows[2].prompt, loaded.rows[2].completion) == (CHAT, ANSWER)
    assert lines(path) == [":2", ":3", ":6"]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("q,a,1", r"f\.csv:3: label: is the text \"1\", expected true or false"),
        ("q,a,yes", r"f\.csv:3: label: is the text \"yes\""),
        ("q,a", r"f\.csv:3: found 2 fields, expected 3 \(prompt, completion, label\)"),
        ("q,a,b,true", r"f\.csv:3: found 4 fields, expected 3 .*Put fields that hold commas"),
        ('"q" x,a,true', r"f\.csv:3: not CSV"),
        ('"q,a,true', r"f\.csv:3: not CSV: unexpected end"),
        ("\"[{'role': 'user', 'content': 'q'}]\",a,true", r"f\.csv:3: prompt: is a list in Python's notation"),
    ],
)
def test_csv_bad_rows(tmp_path: Path, record: str, says: str) -> None:
    with pytest.raises(RowError, match=says):
        load_feedback(write(tmp_path / "f.csv", f"prompt,completion,label\nq,a,true\n{record}\n"))


def test_csv_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    text = b"prompt,completion,label\n" + b"q,a,true\n" * 10_000 + b"q,caf\xe9,true\n"
    with pytest.raises(RowError, match=r"f\.csv:10002: byte 6 of the line is not UTF-8"):
        load_feedback(write(tmp_path / "f.csv", text), skip_bad_rows=True)


def test_csv_text_that_only_looks_like_json_stays_text(tmp_path: Path) -> None:
    path = write(tmp_path / "f.csv", 'prompt,completion,label\n"[1, 2]",[{x}],true\n')
    assert load_feedback(path).rows[0].prompt == "[1, 2]"
    assert load_feedback(path).rows[0].completion == "[{x}]"


# Parquet


def test_parquet_text_and_messages(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "f.parquet"
    rows = [{"prompt": CHAT, "completion": ANSWER, "label": label} for label in (True, False)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert load_feedback(str(path)).rows == [
        Feedback(CHAT, ANSWER, True, f"{path}:1"),
        Feedback(CHAT, ANSWER, False, f"{path}:2"),
    ]
    with pytest.raises(UserError, match=r"g\.parquet: not a parquet file"):
        load_feedback(write(tmp_path / "g.parquet", ROW))


# Folders


def test_a_folder_holds_splits_in_any_format(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROW)
    write(tmp_path / "validation.csv", "prompt,completion,label\nheld,out,true\n")
    folder = str(tmp_path)
    assert load_feedback(folder).rows[0].source == f"{tmp_path}/train.jsonl:1"
    assert load_feedback(folder, "valid").rows[0].prompt == "held"
    assert (has_split(folder, "train"), has_split(folder, "valid"), has_split(folder, "test")) == (True, True, False)
    with pytest.raises(UserError, match=r"no test file in this folder, which holds train.jsonl, validation.csv"):
        load_feedback(folder, "test")


def test_the_valid_split_may_be_called_validation_or_test_but_valid_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROW)
    assert not has_split(str(tmp_path), "valid")
    for name in ("test", "validation", "valid"):
        write(tmp_path / f"{name}.jsonl", ROW.replace('"q"', f'"{name}"'))
        assert has_split(str(tmp_path), "valid")
        assert load_feedback(str(tmp_path), "valid").rows[0].prompt == name


def test_a_split_held_twice_is_ambiguous(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROW)
    write(tmp_path / "train.json", f"[{ROW}]")
    with pytest.raises(UserError, match=r"train\.json and train\.jsonl are both the train split"):
        load_feedback(str(tmp_path))


def row_of(prompt: str) -> str:
    return ROW.replace('"q"', json.dumps(prompt)) + "\n"


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00003.jsonl", "train-00001-of-00003.jsonl", "train-00002-of-00003.jsonl"),
        ("train-00000-of-00003-b42a775f407cee4f.jsonl", "train-00001-of-00003.jsonl", "train-00002-of-00003.jsonl"),
        ("train-0.jsonl", "train-1.jsonl", "train-2.jsonl"),
        ("train.01.jsonl", "train_02.JSONL", "train_03.json"),
        ("train/0000.jsonl", "train/0001.jsonl", "train/more.jsonl"),
    ],
)
def test_a_split_may_be_several_files_read_in_the_order_of_their_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "train").mkdir()
    for at in (2, 0, 1):
        text = row_of(f"{at}a") + row_of(f"{at}b") if not names[at].endswith(".json") else f"[{row_of('2a')}]"
        write(tmp_path / names[at], text)
    for other in ("train-old.jsonl", "training.jsonl", "train-0.txt", "valid-0.jsonl", "train/.hidden.jsonl"):
        write(tmp_path / other, row_of("other"))
    rows = load_feedback(str(tmp_path)).rows
    assert [row.prompt for row in rows] == ["0a", "0b", "1a", "1b", "2a", "2b"][: len(rows)]
    assert len(rows) >= 5
    assert rows[3].source == f"{tmp_path}/{names[1]}:2"
    assert has_split(str(tmp_path), "train") and has_split(str(tmp_path), "valid")


@pytest.mark.parametrize(
    "names",
    [
        ("train-0.csv", "train-0.jsonl"),
        ("train-0.jsonl", "train.jsonl"),
        ("train/0.jsonl", "train.jsonl"),
        ("train/0.jsonl", "train-1.jsonl"),
        ("train/0.csv", "train/0.jsonl"),
    ],
)
def test_shards_beside_another_copy_are_ambiguous(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / "train").mkdir()
    for name in names:
        write(tmp_path / name, ROW)
    with pytest.raises(UserError, match=f"{re.escape(' and '.join(names))} are both the train split"):
        load_feedback(str(tmp_path))


def test_missing_shards_are_noticed(tmp_path: Path) -> None:
    for at in (0, 2):
        write(tmp_path / f"train-{at:05}-of-00003.jsonl", ROW)
    with pytest.raises(UserError, match=r"the train split is 3 files by their names, found 2: train-00000-of-00003"):
        load_feedback(str(tmp_path))
    for at in (0, 1):
        write(tmp_path / f"train-{at:05}-of-00002.jsonl", ROW)
    with pytest.raises(UserError, match="the train split is 2 or 3 files by their names, found 4"):
        load_feedback(str(tmp_path))


def test_a_digest_tells_data_apart_but_not_where_they_are(tmp_path: Path) -> None:
    found = []
    for folder, rows in (("a", 5000), ("b", 5000), ("c", 4999)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train-0.jsonl", row_of("x") * rows)
        write(tmp_path / folder / "train-1.jsonl", row_of("y"))
        found.append(digest(str(tmp_path / folder), "train"))
    assert found[0] == found[1] != found[2]
    assert found[0].startswith(f"2 files of {len(row_of('x')) * 5001:,} bytes, SHA-256 ")
    for name, text in (("train-0.jsonl", row_of("z") * 5000), ("train-1.jsonl", row_of("z"))):
        write(tmp_path / "b" / name, text)  # as long as before
        found.append(digest(str(tmp_path / "b"), "train"))
    (tmp_path / "b" / "train-1.jsonl").rename(tmp_path / "b" / "train-2.jsonl")
    found.append(digest(str(tmp_path / "b"), "train"))
    assert len(set(found)) == 5


def test_a_single_file_is_all_train(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", ROW)
    assert (has_split(path, "train"), has_split(path, "valid")) == (True, False)
    assert len(load_feedback(path, "valid").rows) == 1  # held-out data given as a file of its own
    assert not has_split(path, "dev")
    with pytest.raises(UserError, match="unknown split 'dev': expected train, valid, test; a file has no others"):
        load_feedback(path, "dev")


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "data/train.jsonl", "a/b/c", "/no/such", "~/none"])
def test_what_is_neither_a_path_nor_a_hub_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for ask in (load_feedback, lambda n: has_split(n, "valid")):
        with pytest.raises(UserError, match=r"no such file or folder. Expected a .jsonl, .json, .csv, .parquet file"):
            ask(name)


def test_an_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"f\.txt: unknown kind of file. Expected one of the endings .jsonl"):
        load_feedback(write(tmp_path / "f.txt", ROW))


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the Hub that holds owner/pairs; what load_dataset was asked for."""
    asked: list[Any] = []

    def get_dataset_split_names(name: str) -> list[str]:
        if name != "owner/pairs":
            raise ConnectionError("could not\nreach it")
        return ["train", "validation"]

    def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, Any]]:
        asked.append((name, split, streaming))
        return [{"prompt": "q", "chosen": split, "rejected": "b"}]

    fake = SimpleNamespace(get_dataset_split_names=get_dataset_split_names, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return asked


def test_hub_data_set(hub: list[Any]) -> None:
    loaded = load_feedback("owner/pairs", "valid")
    assert [(r.completion, r.label, r.source) for r in loaded.rows] == [
        ("validation", True, "owner/pairs[validation]:1"),
        ("b", False, "owner/pairs[validation]:1"),
    ]
    assert hub == [("owner/pairs", "validation", False)]
    assert digest("owner/pairs", "valid") == "owner/pairs[validation]"
    assert (has_split("owner/pairs", "valid"), has_split("owner/pairs", "test")) == (True, False)
    with pytest.raises(UserError, match="has no test split, only train, validation"):
        load_feedback("owner/pairs", "test")


def test_hub_failures_are_told_as_errors_for_people(hub: list[Any]) -> None:
    for ask in (load_feedback, lambda n: has_split(n, "valid")):
        with pytest.raises(UserError, match=r"owner/none: there is no such .* could not reach it. Check the spelling"):
            ask("owner/none")


# Groups and splits


def rows_of(*prompts: Any) -> list[Feedback]:
    return [Feedback(p, "a" if isinstance(p, str) else ANSWER, True, f"f:{i}") for i, p in enumerate(prompts)]


def test_equal_prompts_share_a_group() -> None:
    swapped = [{"content": "q", "role": "user"}]  # the same message, its keys in another order
    rows = rows_of("q", "r", CHAT, "q", swapped, json.dumps(CHAT, sort_keys=True), [*CHAT, *ANSWER], "q ")
    groups = [prompt_group(row.prompt) for row in rows]
    assert [groups.index(group) for group in groups] == [0, 1, 2, 0, 2, 5, 6, 7]


def test_the_group_of_a_prompt_is_always_the_same_number() -> None:
    """What is read in another order, by another process or on another day still belongs together."""
    assert (prompt_group("q"), prompt_group(CHAT)) == (7955565855182224833, 6181226078149104760)
    assert all(0 <= prompt_group(str(i)) < 2**63 for i in range(1000))
    assert any(prompt_group(str(i)) >= 2**62 for i in range(100))


def test_a_share_of_the_prompts_is_held_out() -> None:
    prompts = range(100, 120)
    held = held_out_prompts(prompts, 0.25, seed=1)
    assert len(held) == 5 and held < set(prompts)
    assert held_out_prompts(np.asarray(prompts), 0.25, seed=1) == held
    assert held_out_prompts(prompts, 0.25, seed=2) != held


@pytest.mark.parametrize(("fraction", "held"), [(0.01, 1), (0.5, 2), (0.99, 2)])
def test_at_least_one_prompt_goes_to_either_side(fraction: float, held: int) -> None:
    assert len(held_out_prompts([1, 2, 3], fraction, seed=0)) == held


def test_a_split_that_cannot_be_made() -> None:
    with pytest.raises(UserError, match="has 1 different prompt, expected at least 2"):
        held_out_prompts([1], 0.5, seed=0)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="expected a number above 0 and below 1"):
            held_out_prompts([1, 2], fraction, seed=0)


# The documentation


def test_the_gsm8k_script_of_the_docs_makes_a_loadable_folder_split_by_question(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (script,) = re.findall(r'```python title="gsm8k.py"\n(.*?)```', docs, re.S)
    solved = {"is_correct": True, "solution": "1 + 1 = <<1+1=2>>2\nA: 2"}
    broken = {"is_correct": False, "solution": "1 + 1 = <<1/3=0.333"}
    with open(tmp_path / "solutions.jsonl", "w") as file:
        for i in range(20):
            problem = {"question": f"Question {i}?", "ground_truth": "A: 2", "small": broken, "large": solved}
            file.write(json.dumps(problem) + "\n")
    subprocess.run([sys.executable, "-c", script, "solutions.jsonl"], cwd=tmp_path, check=True)
    folder = str(tmp_path / "gsm8k")
    train, valid = load_feedback(folder, "train").rows, load_feedback(folder, "valid").rows
    assert (len(train), len(valid)) == (36, 4)
    assert not {str(r.prompt) for r in train} & {str(r.prompt) for r in valid}
    assert {(r.completion[0]["content"], r.label) for r in train} == {
        ("1 + 1 = 2\nA: 2", True),
        ("1 + 1 = ", False),
    }


def test_the_rows_and_messages_of_the_docs_are_real(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"```json\n(.*?)```", docs, re.S))
    assert len(load_feedback(write(tmp_path / "docs.jsonl", rows)).rows) == 7
    lists = re.findall(r"```jsonl\n(.*?)```", docs, re.S)[0]
    assert [row.weight for row in load_feedback(write(tmp_path / "lists.jsonl", lists)).rows] == [1, 0.5, 2, 2]
    bad = [
        '{"prompt": "2 + 2 =", "completion": " 4", "label": true}',
        '{"prompt": "2 + 2 =", "completion": " 5", "label": "no"}',
        '{"prompt": "2 + 3 =", "completion": " 5", "lable": true}',
        '{"prompt": "2 + 3 =", "completion": " 6" "label": false}',
        '{"prompt": "2 + 4 =", "completion": "", "label": false}',
        '{"chosen": [{"role": "user", "content": "2 + 5?"}, {"role": "assistant", "content": "7"}], '
        '"rejected": [{"role": "user", "content": "2 + 5?"}]}',
    ]
    path = write(tmp_path / "feedback.jsonl", "\n".join(bad))
    skipped = load_feedback(path, skip_bad_rows=True).skipped
    (shown,) = re.findall(r"```text\n(feedback\.jsonl:2.*?)```", docs, re.S)
    assert "\n".join(skipped).replace(path, "feedback.jsonl") + "\n" == shown


def test_what_datasets_saved_to_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "q", "completion": text, "label": text == "a"} for text in "abc"]
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    both = datasets.DatasetDict({"train": one, "validation": one.select([2])})
    both.save_to_disk(tmp_path / "both")
    loaded = load_feedback(str(tmp_path / "one"))
    assert [(row.completion, row.label) for row in loaded.rows] == [("a", True), ("b", False), ("c", False)]
    assert loaded.rows[1].source == f"{tmp_path / 'one'}:2"
    assert len(load_feedback(str(tmp_path / "both")).rows) == 3
    assert [row.completion for row in load_feedback(str(tmp_path / "both"), "valid").rows] == ["c"]
    assert [has_split(str(tmp_path / "both"), split) for split in ("train", "valid", "test")] == [True, True, False]
    assert [has_split(str(tmp_path / "one"), split) for split in ("train", "valid")] == [True, False]
    assert digest(str(tmp_path / "one"), "train") != digest(str(tmp_path / "both"), "valid")
    with pytest.raises(UserError, match=r"no test split in this saved data set, only train, validation"):
        load_feedback(str(tmp_path / "both"), "test")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="the saved data set cannot be read"):
        load_feedback(str(tmp_path / "one"))


def test_a_table_of_text_has_labels_weights_and_scores(tmp_path: Path) -> None:
    text = "question,answer,correct,weight,stars,tools\nq,a,TRUE,2,5,\nq,b,false,,1,\n"
    path = write(tmp_path / "f.csv", text)
    columns = {"prompt": "question", "completion": "answer"}
    loaded = load_feedback(path, reading=Reading({**columns, "label": "correct"}))
    assert [(row.label, row.weight) for row in loaded.rows] == [(True, 2), (False, 1)]
    for rule in ("stars >= 4", "correct == true", "stars > mean", "correct"):
        found = load_feedback(path, reading=Reading(columns, LabelRule.parse(rule))).rows
        assert [(row.prompt, row.label) for row in found] == [("q", True), ("q", False)]
    graded = write(tmp_path / "g.csv", "prompt,completion,label\nq,a,0.6\nq,b,-0.25\nq,c,1\n")
    assert [row.weight for row in load_feedback(graded, skip_bad_rows=True).rows] == [0.6, 0.25]  # 1 may mean anything
    whole = load_feedback(
        write(tmp_path / "h.csv", "prompt,completion,label\nq,a,1\nq,b,0\n"), reading=reading("label")
    )
    assert [row.label for row in whole.rows] == [True, False]


def reading(rule: str) -> Reading:
    return Reading(label=LabelRule.parse(rule))
