"""Streaming: the order and its resumption, bad rows and broken sources, memory."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import forked
import tiny
from bnf_core.data.messages import RowError
from bnf_core.data.records import Feedback
from bnf_core.data.sources import load_feedback
from bnf_core.data.streaming import FeedbackStream, shuffle
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import UserError
from bnf_core.types import Example, Position
from conftest import fast_of

Batches = Iterator[tuple[list[Example], Position]]


def tokenize_rows(rows: list[Feedback]) -> list[Example]:
    """A token a character, which loses nothing; completions with a ? are refused."""
    for row in rows:
        if "?" in row.completion:
            raise RowError(row.source, "completion", "has a question mark", "Drop it")
    return [
        Example(tuple(map(ord, row.prompt)), tuple(map(ord, row.completion)), row.label, source=row.source)
        for row in rows
    ]


def stream(source: Any, shuffle_buffer: int = 4, seed: int = 0, **options: Any) -> FeedbackStream:
    return FeedbackStream(source, "train", tokenize_rows, shuffle_buffer=shuffle_buffer, seed=seed, **options)


def good(name: object) -> dict[str, Any]:
    return {"prompt": "q", "completion": str(name), "label": True}


def pair(name: object) -> dict[str, Any]:
    return {"prompt": "q", "chosen": f"{name}+", "rejected": f"{name}-"}


def bad(name: object) -> dict[str, Any]:
    return {"prompt": "q", "completion": str(name), "label": "no"}


ROWS = [good(0), pair(1), good(2), bad(3), pair(4), pair("5?"), good("6?"), pair(7), good(8), bad(9)]


def completions(batch: list[Example]) -> list[str]:
    return ["".join(map(chr, example.completion_ids)) for example in batch]


def epochs(stream: FeedbackStream, count: int, batch_size: int = 3) -> list[list[list[str]]]:
    """The batches of each epoch."""
    found: list[list[list[str]]] = []
    for batch, position in stream.batches(batch_size):
        while len(found) <= position["epoch"]:
            found.append([])
        if len(found) > count:
            return found[:count]
        found[-1].append(completions(batch))
    raise AssertionError("batches are endless")


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# The order


def test_the_order_of_an_epoch_is_fixed_for_all_time() -> None:
    """A run of today goes on with the NumPy of next year."""
    assert list(shuffle(range(12), 4, seed=7, epoch=0)) == [3, 1, 2, 5, 4, 0, 8, 7, 6, 10, 9, 11]
    assert list(shuffle(range(12), 4, seed=7, epoch=1)) == [1, 0, 2, 6, 4, 5, 9, 7, 3, 10, 11, 8]
    assert list(shuffle(range(12), 4, seed=8, epoch=0)) == [0, 1, 4, 2, 5, 6, 8, 7, 11, 10, 3, 9]


def test_rows_wait_in_a_buffer_and_no_longer_matter_behind_it() -> None:
    for epoch in range(50):
        order = list(shuffle(range(40), 8, seed=1, epoch=epoch))
        assert sorted(order) == list(range(40))
        assert all(row < at + 8 for at, row in enumerate(order))  # read no further ahead than the buffer is long
        longer = list(shuffle(range(60), 8, seed=1, epoch=epoch))
        assert longer[:33] == order[:33]


@pytest.mark.parametrize("size", [3, 5, 100])
def test_every_row_can_come_at_every_place_that_it_may(size: int) -> None:
    """Rejects draws that leave a place out, or that favour one."""
    orders = [list(shuffle(range(5), size, seed=3, epoch=epoch)) for epoch in range(4000)]
    first = Counter(order[0] for order in orders)
    last = Counter(order[-1] for order in orders)
    share = 4000 / min(size, 5)
    assert set(first) == set(range(min(size, 5))) and set(last) == set(range(5))
    assert all(abs(n - share) < 0.15 * share for n in first.values())
    if size >= 5:
        assert all(abs(n - share) < 0.15 * share for n in last.values())


def test_a_buffer_of_one_keeps_the_order_and_a_buffer_larger_than_the_data_is_no_matter() -> None:
    rows = [good(i) for i in range(7)]
    assert epochs(stream(rows, shuffle_buffer=1), 2) == [[["0", "1", "2"], ["3", "4", "5"], ["6"]]] * 2
    whole = epochs(stream(rows, shuffle_buffer=7), 1)
    assert whole == epochs(stream(rows, shuffle_buffer=10**9), 1)
    assert [c for batch in whole[0] for c in batch] != list("0123456")


def test_each_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    found = epochs(stream([good(i) if i % 2 else pair(i) for i in range(20)]), 3, batch_size=8)
    everything = sorted([str(i) for i in range(1, 20, 2)] + [f"{i}{sign}" for i in range(0, 20, 2) for sign in "+-"])
    for batches in found:
        assert [len(batch) for batch in batches] == [8, 8, 8, 6]
        assert sorted(c for batch in batches for c in batch) == everything
    assert found[0] != found[1] != found[2] != found[0]
    again = stream([good(i) if i % 2 else pair(i) for i in range(20)], seed=1)
    assert epochs(again, 1, batch_size=8)[0] != found[0]


# Going on


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("shuffle_buffer", [1, 3, 100])
def test_a_stream_goes_on_from_every_batch(batch_size: int, shuffle_buffer: int) -> None:
    """Within pairs, behind bad rows, at and after the short last batch of an epoch; and on from there."""

    def fresh() -> FeedbackStream:
        return stream(ROWS, shuffle_buffer, skip_bad_rows=True)

    through = list(islice(fresh().batches(batch_size), 3 * 10))
    for at in range(len(through) // 2):
        position = json.loads(json.dumps(through[at][1]))
        assert list(islice(fresh().batches(batch_size, position), 12)) == through[at + 1 : at + 13]


def test_positions_count_rows_and_the_completions_of_a_pair() -> None:
    batches = stream([pair(0), good(1), pair(2)], shuffle_buffer=1).batches(2)
    assert [(completions(batch), tuple(at.values())) for batch, at in islice(batches, 4)] == [
        (["0+", "0-"], (0, 1, 0)),
        (["1", "2+"], (0, 2, 1)),
        (["2-"], (0, 3, 0)),
        (["0+", "0-"], (1, 1, 0)),
    ]


def test_going_on_decodes_none_of_the_rows_that_were_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [good(i) for i in range(100)])
    position = list(islice(stream(path, shuffle_buffer=10).batches(4), 20))[-1][1]
    decoded: list[Any] = []

    def counted(text: str) -> Any:
        decoded.append(text)
        return json.JSONDecoder().decode(text)

    monkeypatch.setattr("bnf_core.data.readers.json.loads", counted)
    next(stream(path, shuffle_buffer=10).batches(4, position))
    assert len(decoded) == 1 + 4  # the file's first line tells what kind it is


def test_a_position_in_other_data_is_refused() -> None:
    later = {"epoch": 2, "rows": 3, "examples": 0}
    with pytest.raises(UserError, match=r"list\[train\]: not the data .* 3 rows of epoch 2 were used, .* only 2 now"):
        next(stream([good(0), good(1)]).batches(1, later))
    for rows in ([good(0)], [pair(0), good(1)]):
        with pytest.raises(UserError, match="not the data that the run began with: 1 completions of a row were used"):
            next(stream(rows, 1).batches(1, {"epoch": 0, "rows": 1, "examples": 1}))
    with pytest.raises(UserError, match=r"\{'epoch': 0, 'rows': 3\} is no position in streamed data"):
        next(stream(ROWS).batches(1, {"epoch": 0, "rows": 3}))


# Sources


def test_all_forms_of_the_same_data_stream_alike(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from bnf_core.data import readers

    rows = [good(i) for i in range(3 * readers.PARQUET_ROWS // 2)]
    half = len(rows) // 2
    forms: list[Any] = [rows, write_jsonl(tmp_path / "one.jsonl", rows)]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    (tmp_path / "one.csv").write_text("prompt,completion,label\n" + "".join(f"q,{i},true\n" for i in range(len(rows))))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "one.parquet")
    for at, part in enumerate((rows[:half], rows[half:])):
        write_jsonl(tmp_path / "jsonl" / f"train-{at}.jsonl", part)
        (tmp_path / "parquet").mkdir(exist_ok=True)
        name = f"parquet/train-{at:05}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / name)
    forms += [str(tmp_path / name) for name in ("one.json", "one.csv", "one.parquet", "jsonl", "parquet")]
    found = [[completions(batch) for batch, _ in islice(stream(form, 50).batches(64), 30)] for form in forms]
    assert all(batches == found[0] for batches in found)


def test_a_stream_has_the_rows_that_a_list_has(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [row for row in ROWS if "?" not in str(row)])
    loaded = tokenize_rows(load_feedback(path, skip_bad_rows=True).rows)
    streamed = stream(path, 1, skip_bad_rows=True).batches(len(loaded))
    assert next(streamed)[0] == loaded


def test_an_iterable_data_set_of_python(tmp_path: Path) -> None:
    import datasets

    rows = [pair(i) for i in range(5)]
    data_set = datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert epochs(stream(data_set), 2) == epochs(stream(rows), 2)


def test_hub_data_sets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Rows:
        def __iter__(self) -> Iterator[Any]:
            yield from (good(i) for i in range(6))
            if len(asked) > 1:
                raise ConnectionError("the line is\ncut")

    def load_dataset(name: str, **options: Any) -> Rows:
        asked.append((name, options))
        return Rows()

    fake = SimpleNamespace(get_dataset_split_names=lambda name: ["train"], load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    batches = stream("owner/rows", 1).batches(4)
    assert [completions(batch) for batch, _ in islice(batches, 3)] == [["0", "1", "2", "3"], ["4", "5"], list("0123")]
    assert asked == [("owner/rows", {"split": "train", "streaming": True})]
    batches = stream("owner/rows", 1).batches(4)
    assert next(batches)[0][0].source == "owner/rows[train]:1"
    with pytest.raises(UserError, match=r"owner/rows: .* the line is cut"):
        next(batches)


def test_the_code_of_the_docs_runs(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", docs, re.S) if "FeedbackStream" in block]
    assert "...  #" in code
    tiny.make_tokenizer(tmp_path)
    found: list[Any] = []
    names = {"rows": [pair(i) for i in range(20)], "tokenizer": load_tokenizer(tmp_path), "found": found}
    exec(code.replace("...  #", "found.append((examples, position))\n    if len(found) == 3: break  #"), names)
    assert [len(examples) for examples, _ in found] == [16, 16, 8]
    assert len({example.group for examples, _ in found for example in examples}) == 1


# Bad rows


def test_a_bad_row_stops_with_its_place(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train" / "a.jsonl", [good(0)])
    write_jsonl(tmp_path / "train" / "b.jsonl", [good(1), bad(2)])
    batches = stream(str(tmp_path), 1).batches(2)
    assert next(batches)[0][0].source == f"{path}:1"
    with pytest.raises(RowError, match=r"train/b\.jsonl:2: label: is the text \"no\""):
        next(batches)
    for rows, at in ((ROWS, 4), ([good(0), 3], 2), ([good("?")], 1)):
        with pytest.raises(RowError, match=rf"^list\[train\]:{at}: "):
            epochs(stream(rows, 1), 1)


def test_bad_rows_are_skipped_and_listed_but_not_without_end(tmp_path: Path) -> None:
    """Also those that only tokenisation finds bad: of a pair, then, the other half stays, as in a list."""
    rows = [*ROWS, {"prompt": "q", "chosen": "10+", "rejected": "10?"}]
    skipping = stream(rows, 1, skip_bad_rows=True)
    assert epochs(skipping, 1) == [[["0", "1+", "1-"], ["2", "4+", "4-"], ["7+", "7-", "8"], ["10+"]]]
    assert {message.split(":")[1] for message in skipping.skipped} == {"4", "6", "7", "10", "11"}
    many = stream([good(0), *(bad(i) for i in range(100))], 1, skip_bad_rows=True)
    epochs(many, 2, batch_size=200)
    assert [m.split(":")[1] for m in many.skipped] == [str(i) for i in range(2, 22)]
    assert many.skipped_count >= 200


def test_an_epoch_without_rows_is_an_error_rather_than_a_wait(tmp_path: Path) -> None:
    for empty in ([], write_jsonl(tmp_path / "f.jsonl", [])):
        with pytest.raises(UserError, match="no rows in the train split"):
            next(stream(empty).batches(2))
    with pytest.raises(UserError, match=r"none of its 3 rows is usable; the first: list\[train\]:.: "):
        next(stream([bad(0), good("?"), bad(1)], skip_bad_rows=True).batches(2))
    with pytest.raises(UserError, match=r"generator\[train\]: no rows left in epoch 1. .* a generator cannot"):
        epochs(stream(good(i) for i in range(3)), 2)


def test_mistakes_of_the_caller() -> None:
    with pytest.raises(UserError, match="the shuffle buffer is 0 rows: expected at least 1"):
        stream(ROWS, 0)
    with pytest.raises(UserError, match="no such file or folder"):
        stream("nowhere")
    few = FeedbackStream([good(0)], "train", lambda rows: [], shuffle_buffer=1, seed=0)
    with pytest.raises(ValueError, match="0 examples for 1 rows"):
        next(few.batches(1))


# Broken sources


def test_a_file_that_changes_or_vanishes_stops_the_run(tmp_path: Path) -> None:
    first = Path(write_jsonl(tmp_path / "train-0.jsonl", [good(i) for i in range(4)]))
    second = Path(write_jsonl(tmp_path / "train-1.jsonl", [good(i) for i in range(4, 8)]))
    batches = stream(str(tmp_path), 1).batches(4)
    next(batches)
    with second.open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"train-1\.jsonl: has changed since it was first read"):
        next(batches)

    batches = stream(str(tmp_path), 1).batches(8)
    next(batches)
    first.unlink()
    with pytest.raises(UserError, match=r"train-0\.jsonl: cannot be read: No such file"):
        next(batches)


def test_a_file_that_is_written_to_while_it_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [good("x" * 1000) for i in range(1000)])
    batches = stream(path, 1).batches(4)
    next(batches)
    with open(path, "a") as file:
        file.write(json.dumps(good("late")) + "\n")
    with pytest.raises(UserError, match=r"f\.jsonl: has changed"):
        for _ in range(250):  # up to the last row, no further
            next(batches)


@pytest.mark.parametrize("content", [b"no parquet", b"PAR1" + bytes(40) + b"PAR1", b""])
def test_a_broken_shard_is_named(tmp_path: Path, content: bytes) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([good(0)] * 4), tmp_path / "train-0.parquet")
    (tmp_path / "train-1.parquet").write_bytes(content)
    batches = stream(str(tmp_path), 1).batches(4)
    next(batches)
    with pytest.raises(UserError, match=r"train-1\.parquet: "):
        next(batches)


# Memory


def growth(few: Path, many: Path, report: Path) -> None:
    """Rows of both files, and by how much MB the process grows with the second."""

    def peak() -> float:  # of this process alone: getrusage starts with what the parent had
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

    def pass_over(path: Path) -> int:
        def tokenize_rows(rows: Any) -> list[Example]:
            return [Example((1,), (2,), row.label) for row in rows]

        rows = 0
        for batch, position in FeedbackStream(str(path), "train", tokenize_rows, shuffle_buffer=100, seed=0).batches(8):
            if position["epoch"] == 1:
                break
            rows += len(batch)
        return rows

    counted, before = pass_over(few), peak()
    report.write_text(json.dumps([counted, pass_over(many), peak() - before]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ending", fast_of(("jsonl", "csv", "parquet"), "jsonl"))
def test_memory_does_not_grow_with_the_data(tmp_path: Path, ending: str) -> None:
    """80 MB of rows within 24 MiB more than 1.6 MB take; rejects whole files, and pyarrow's whole row groups."""
    text = "x" * 4000
    for name, count in (("few", 400), ("many", 20_000)):
        path = tmp_path / f"{name}.{ending}"
        if ending == "parquet":
            import pyarrow
            import pyarrow.parquet

            columns = {"prompt": ["q"] * count, "completion": [text] * count, "label": [True] * count}
            table = pyarrow.table(columns)
            pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
            assert pyarrow.parquet.read_metadata(path).num_row_groups == 1
        else:
            head, line = {"jsonl": ("", json.dumps(good(text))), "csv": ("prompt,completion,label", f"q,{text},true")}[
                ending
            ]
            with path.open("w") as file:
                file.write(head + "\n")
                file.writelines(line + "\n" for _ in range(count))
    few, many, report = tmp_path / f"few.{ending}", tmp_path / f"many.{ending}", tmp_path / "report"
    assert forked.ended(forked.start(growth, few, many, report)) == 0
    many.unlink()
    *counts, grown = json.loads(report.read_text())
    assert counts == [400, 20_000]
    assert grown < 24
