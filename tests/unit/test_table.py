"""Rows as columns: the same examples come out, from memory, from files, and of any choice of rows."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from bnf_core.data.table import About, Columns, ExampleTable, column, part_of
from bnf_core.data.token_cache import FORMAT, Making, TokenCache
from bnf_core.data.tokenization import Fate, Tokenized
from bnf_core.errors import UserError
from bnf_core.storage.digests import rows_digest
from bnf_core.types import Example


def examples(count: int, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(200_000) for _ in range(draw.randint(1, most)))

    made = []
    for i in range(count):
        completion = ids(4)
        mask = tuple(draw.random() < 0.5 for _ in completion)
        made.append(
            Example(
                ids(6),
                completion,
                draw.random() < 0.5,
                group=draw.choice([0, 2**63 - 1, i]),
                pair=draw.choice([0, 2**63 - 1]),
                source=draw.choice([f"a.jsonl:{i + 1}", f"b:1[data]:{i}", "no number", "zero:007", ""]),
                trained=mask if any(mask) and not all(mask) else None,
                weight=draw.choice([1.0, 0.6, 1e-300]),
            )
        )
    return made


def tokenized(rows: list[Example]) -> Tokenized:
    return Tokenized(rows, [Fate(i % 16) for i, _ in enumerate(rows)], [])


def making(*parts: list[Example], skipped: list[str] | None = None) -> Making:
    groups = [e.group for part in parts for e in part]
    return Making(groups, (part_of(tokenized(part)) for part in parts), About(skipped=skipped or [], unused=["remark"]))


def no_rows() -> Making:
    raise AssertionError("the data are read")


def test_examples_come_out_of_columns_as_they_went_in() -> None:
    """Token ids at the ends of their range, masks, and sources that are no file:line included."""
    rows = [*examples(40), Example((0, 2**31 - 1), (0, 2**31 - 1), True, trained=(False, True))]
    table = ExampleTable([making(rows[:7], [], rows[7:]).columns()])
    assert list(table) == rows and [table[i] for i in range(-41, 41)] == rows * 2
    assert table[3:9:2] == rows[3:9:2]
    assert table.digest == rows_digest(rows)
    assert [e.trained for e in rows].count(None) < 40
    with pytest.raises(IndexError):
        table[41]
    for name in ("group", "pair", "label", "weight", "key", "length"):
        assert column(table, name).tolist() == column(rows, name).tolist()
    assert table.column("highest").tolist() == [max(e.prompt_ids + e.completion_ids) for e in rows]


def test_a_choice_of_rows_and_several_tables_in_one() -> None:
    a, b = examples(9, 1), examples(5, 2)
    first, second = (ExampleTable([making(rows).columns()]) for rows in (a, b))
    whole = ExampleTable.joined([first, second])
    assert list(whole) == a + b and whole.digest == rows_digest(a + b)
    some = whole.take(np.array([12, 3, 3, 8]))
    assert list(some) == [b[3], a[3], a[3], a[8]] and some.digest == rows_digest(some)
    assert list(some.take(np.array([True, False, False, True]))) == [b[3], a[8]]
    assert list(ExampleTable.joined([some, first.take(np.array([0])), second])) == [b[3], a[3], a[3], a[8], a[0], *b]
    assert column(some, "key").tolist() == [e.key for e in some]


def test_tokens_are_made_once_and_then_mapped(tmp_path: Path) -> None:
    rows, said = examples(30), list[str]()
    cache = TokenCache(tmp_path / "tokens")
    made = cache.table({"data": "f"}, lambda: making(rows[:20], rows[20:], skipped=["f:3: bad"]), said.append)
    again = cache.table({"data": "f"}, no_rows, said.append)
    for columns in (made, again):
        assert list(ExampleTable([columns])) == rows
        assert (columns.digest, columns.about.skipped, columns.about.unused) == (
            rows_digest(rows),
            ["f:3: bad"],
            ["remark"],
        )
        assert columns.prompts.tolist() == list(dict.fromkeys(e.group for e in rows))
        assert isinstance(columns.arrays["tokens"].base, np.memmap)
    assert said == []
    assert list(ExampleTable([cache.table({"data": "g"}, lambda: making(rows[:1]), said.append)])) == rows[:1]
    entries = {entry.data: entry for entry in cache.entries()}
    assert entries.keys() == {"f", "g"} and (entries["f"].rows, entries["g"].rows) == (30, 1)
    assert entries["f"].tokens == sum(map(len, rows))
    assert cache.remove(entries["f"])
    assert [entry.data for entry in cache.entries()] == ["g"]
    assert list(ExampleTable([again])) == rows  # what is mapped stays


def test_the_digest_of_some_rows_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, some = examples(30), np.array([3, 5, 7])
    cache = TokenCache(tmp_path)
    digest = rows_digest([rows[i] for i in some])
    for _ in range(2):
        assert ExampleTable([cache.table({}, lambda: making(rows), print)]).take(some).digest == digest
        monkeypatch.setattr("bnf_core.data.table.rows_digest", no_rows)
    monkeypatch.undo()
    other = ExampleTable([cache.table({}, no_rows, print)]).take(some[::-1])
    assert other.digest == rows_digest([rows[i] for i in some[::-1]]) != digest


def place(cache: TokenCache) -> Path:
    (entry,) = cache.entries()
    return entry.folder


def cut_short(path: Path) -> None:
    file = path / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-4])


def of_another_format(path: Path) -> None:
    file = path / "index.json"
    file.write_text(file.read_text().replace(f'"format": {FORMAT}', '"format": 0'))


def of_another_version(path: Path) -> None:
    file = path / "index.json"
    file.write_text(file.read_text().replace('"tokenizers": "', '"tokenizers": "9'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"tokens has [\d,]+ bytes, expected"),
        (of_another_format, r"another version wrote them \(format 0\)"),
        (of_another_version, r"another version wrote them \(tokenizers 9\S+, now"),
        (lambda path: (path / "keys.bin").unlink(), r"keys\.bin"),
        (lambda path: (path / "index.json").write_text("{"), r"Expecting"),
        (lambda path: (path / "index.json").write_text("{}"), r"made_by"),
    ],
)
def test_what_is_not_as_it_was_written_is_made_again_and_said(tmp_path: Path, damage: object, message: str) -> None:
    rows, said = examples(10), list[str]()
    cache = TokenCache(tmp_path)
    cache.table({"data": "f"}, lambda: making(rows), said.append)
    damage(place(cache))
    assert list(ExampleTable([cache.table({"data": "f"}, lambda: making(rows), said.append)])) == rows
    assert len(said) == 1
    assert re.search(rf"the tokens in .* are made again: .*{message}", said[0])
    assert list(ExampleTable([cache.table({"data": "f"}, no_rows, said.append)])) == rows


def test_an_error_in_the_data_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Making:
        def parts() -> object:
            yield part_of(tokenized(examples(5)))
            raise UserError("f:6: bad")

        return Making([1], parts(), About())

    cache = TokenCache(tmp_path)
    with pytest.raises(UserError, match="f:6: bad"):
        cache.table({}, broken, print)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    rows = examples(3)
    assert list(ExampleTable([cache.table({}, lambda: making(rows), print)])) == rows


def test_a_table_without_a_lock_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnf_core.data.token_cache.lock", lambda path, wait: type("Free", (), {"is_locked": False}))
    with pytest.raises(OSError, match="has no locks"):
        TokenCache(tmp_path).table({}, no_rows, print)


def test_columns_are_small() -> None:
    """4 bytes a token; rejects Python's integers, and a column of words."""
    columns: Columns = making(examples(50)).columns()
    tokens = columns.arrays["tokens"]
    others = sum(array.nbytes for name, array in columns.arrays.items() if name != "tokens")
    assert tokens.itemsize == 4 and others <= 64 * 50
