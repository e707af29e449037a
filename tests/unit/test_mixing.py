"""Several sources in one epoch: how many rows of each, which, and in what order."""

from collections import Counter
from itertools import islice, pairwise

import pytest

from bnf_core.config import DataConfig, SourceConfig, TrainConfig, Where
from bnf_core.errors import UserError
from bnf_core.steps.batching import Rows
from bnf_core.steps.mixing import Mixture
from bnf_core.types import Example, Position, Unit

NAMES = ["few", "many"]


def source(name: str, rows: int, unit: Unit = "row", start: int = 0) -> list[Example]:
    """Rows of prompts of their own; of pairs two each."""
    if unit == "row":
        return [Example((start + i,), (1,), i % 2 == 0, group=start + i, source=f"{name}:{i}") for i in range(rows)]
    return [
        Example((start + i,), (1,), label, group=start + i, pair=start + i + 1, source=f"{name}:{i}")
        for i in range(rows // 2)
        for label in (True, False)
    ]


def mixed(sizes: tuple[int, int], unit: Unit = "row", **how: object) -> Rows:
    few, many = source("few", sizes[0], unit), source("many", sizes[1], unit, 1000)
    given = {"weights": [None, None], "rows": [None, None]} | how
    return Rows(few + many, 3, unit, Mixture.of(NAMES, sizes, unit=unit, **given))


def epoch_of(rows: Rows, number: int, batch_size: int = 4) -> list[Example]:
    order, _ = rows.epoch(number, batch_size)
    return [rows.examples[i] for i in order.tolist()]


def of(name: str, rows: list[Example]) -> Counter[str]:
    return Counter(row.source for row in rows if row.source.startswith(name))


def test_weights_are_shares_of_an_epoch_as_long_as_the_data() -> None:
    """Of many, no row comes twice before all have come; of few, each comes as often as any other, or once more."""
    rows = mixed((5, 35), weights=[3, 1])
    assert rows.mixture is not None and list(rows.mixture.takes) == [30, 10] and rows.epoch_rows == 40
    epochs = [epoch_of(rows, number) for number in range(7)]
    for number, epoch in enumerate(epochs):
        assert len(epoch) == 40
        assert set(of("few", epoch).values()) == {6}
        assert len(of("many", epoch)) == 10 or number in (3, 6)  # where one pass ends and the next begins
    met = [row.source for epoch in epochs for row in epoch if row.source.startswith("many")]
    assert sorted(Counter(met).values()) == [2] * 35
    assert len(set(met[:30])) == 30
    assert epochs[0] != epochs[1] and epoch_of(rows, 2) == epochs[2]


def test_without_weights_every_row_comes_once_or_as_many_as_asked_for() -> None:
    rows = mixed((5, 35))
    assert all(sorted(r.source for r in epoch_of(rows, n)) == sorted(r.source for r in rows.examples) for n in range(3))
    some = mixed((5, 35), rows=[None, 7])
    epochs = [epoch_of(some, number) for number in range(5)]
    assert [(of("few", epoch).total(), of("many", epoch).total()) for epoch in epochs] == [(5, 7)] * 5
    assert len({row.source for epoch in epochs for row in epoch}) == 40


def test_sources_are_shuffled_together() -> None:
    """Rejects one source after the other."""
    order = [row.source[:3] for row in epoch_of(mixed((50, 50), weights=[1, 1]), 0)]
    changes = sum(a != b for a, b in pairwise(order))
    assert 35 < changes < 65


@pytest.mark.parametrize("unit", ["row", "pair"])
def test_batches_resume_anywhere_in_the_same_order(unit: Unit) -> None:
    rows = mixed((6, 34), unit, weights=[0.7, 0.3])
    whole = list(islice(rows.batches(4), 40))
    for at in (0, 3, 9, 10, 25):
        again = mixed((6, 34), unit, weights=[0.7, 0.3])
        assert list(islice(again.batches(4, whole[at][1]), 39 - at)) == whole[at + 1 :]
    assert [position["rows"] for _, position in whole[:10]] == list(range(4, 41, 4))


def test_what_was_drawn_follows_from_the_position() -> None:
    rows, seen = mixed((6, 34), weights=[2, 1]), Counter[str]()
    for batch, position in islice(rows.batches(7), 20):
        seen.update(row.source.partition(":")[0] for row in batch)
        assert rows.drawn(7, position) == {name: seen[name] for name in NAMES}
    assert Rows(source("few", 3), 0).drawn(2, Position(epoch=0, rows=2)) == {}


def test_pairs_are_never_parted_nor_repeated_within_a_unit() -> None:
    rows = mixed((6, 34), "pair", weights=[5, 1])
    assert rows.mixture is not None and all(take % 2 == 0 for take in rows.mixture.takes)
    for batch, _ in islice(rows.batches(4), 40):
        counts = Counter((row.pair, row.label) for row in batch)
        assert all(counts[pair, True] == counts[pair, False] for pair, _ in counts)


def test_a_loss_that_compares_a_prompt_takes_whole_sources_only() -> None:
    sizes = (6, 34)
    assert Mixture.of(NAMES, sizes, [None, None], [None, None], "prompt").takes == [6, 34]
    with pytest.raises(UserError, match="compares all rows of a prompt, which the weight or rows of a source would"):
        Mixture.of(NAMES, sizes, [1, 1], [None, None], "prompt")


# Settings

TWO = [{"path": "a.jsonl", "weight": 2}, {"path": "owner/name", "subset": "math", "weight": 1}]


def test_a_source_says_what_it_does_otherwise() -> None:
    first = {"path": "x/a.jsonl", "template": "plain", "name": "mine", "split": "train_prefs"}
    data = DataConfig([first, "owner/name.v2"], template="chat", max_length=7, subset="math")
    each = data.each()
    assert list(each) == ["mine", "name.v2"]
    assert (each["mine"].template, each["mine"].max_length, each["mine"].called("train")) == ("plain", 7, "train_prefs")
    assert each["mine"].called("valid") == "valid"
    assert each["name.v2"].where == Where("owner/name.v2", "math") and each["name.v2"].template == "chat"
    assert DataConfig("f.jsonl").each() == {"": DataConfig("f.jsonl")}
    with pytest.raises(UserError, match="data is a list of 2 sources: expected one"):
        _ = data.where
    assert str(Where("owner/name", "math", "main")) == "owner/name/math@main"


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], r"data is \[\]: expected at least one source"),
        ([3], r"data\[0\] is 3: expected a path, or settings by name"),
        ([{"weight": 1}], r"data\[0\]\.path is None: expected a file"),
        ([{"path": ""}], r"data\[0\]\.path is '': expected a file"),
        ([{"path": 3}], r"data\[0\]\.path is 3: expected text"),
        ([*TWO[:1], {"path": "b", "wieght": 1}], r"unknown setting data\[1\]\.wieght: did you mean weight\?"),
        ([{"path": "a", "zzz": 1}], r"unknown setting data\[0\]\.zzz: expected one of path, name, weight"),
        ([{"path": "a", "weight": "x"}], r"data\[0\]\.weight is 'x': expected a number or null"),
        ([{"path": "a", "weight": True}], r"data\[0\]\.weight is True: expected a number or null"),
        ([{"path": "a", "weight": -1}], r"data\[0\]\.weight is -1: expected a number of at least 0"),
        ([{"path": "a", "weight": float("nan")}], r"data\[0\]\.weight is nan: expected a number of at least 0"),
        ([{"path": "a", "weight": 0}, {"path": "b", "weight": 0}], r"expected a number above 0 of one source at least"),
        ([{"path": "a", "weight": 1}, "b"], r"data\[1\]\.weight is None: expected a number: give all sources weights"),
        ([{"path": "a", "weight": 1, "rows": 2}], r"data\[0\]\.rows is 2: expected either rows or a weight"),
        ([{"path": "a", "rows": 0}], r"data\[0\]\.rows is 0: expected an integer of at least 1"),
        ([{"path": "a", "template": "chut"}], r"data\[0\]\.template is 'chut': expected auto, chat, plain or null"),
        ([{"path": "a", "template_kwargs": []}], r"data\[0\]\.template_kwargs is \[\]: expected names with values"),
        (
            [{"path": "a", "columns": {"prompt": 3}}],
            r"data\[0\]\.columns is \{'prompt': 3\}: expected names with values",
        ),
        (["x/a.jsonl", "y/a.json"], r"data\[1\]\.name is 'a': expected another name: two sources are called so"),
        ([{"path": "a", "name": "a/b"}], r"data\[0\]\.name is 'a/b': expected letters, digits"),
    ],
)
def test_bad_sources_are_named(sources: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(sources)


def test_streams_of_several_sources_need_weights() -> None:
    assert len(DataConfig(TWO, streaming=True).each()) == 2
    with pytest.raises(ValueError, match=r"data\[0\]\.weight is None: expected a number: nobody knows how many rows"):
        DataConfig(["a", "b"], streaming=True)
    with pytest.raises(ValueError, match=r"valid\[0\]\.weight is 2"):
        TrainConfig("m", DataConfig("a"), valid=TWO)
    assert TrainConfig("m", DataConfig("a"), valid=["b"]).valid == [SourceConfig("b")]
