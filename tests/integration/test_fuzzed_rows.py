"""Ten thousand rows with something wrong in them: each is read, or refused with an error for people."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import tiny
from bnf_core.data.labels import LabelRule
from bnf_core.data.reading import Reading, RowReader
from bnf_core.data.tokenization import tokenize
from bnf_core.errors import UserError

ROWS = 10_000
DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
RULES = (
    "score >= 4",
    "rank <= 1",
    "overall_score > mean",
    "rating in top 1",
    "label",
    "verdict == good",
    "helpfulness > 2",
)
COLUMNS = ({"prompt": "question"}, {"completion": "answer.text", "label": "correct"}, {"weight": "score"})


def good_rows() -> list[tuple[dict[str, Any], str | None]]:
    """The rows of the docs, each with the rule that its section has for it."""
    found = []
    for section in re.split(r"^###? ", DOCS, flags=re.M):
        rules = re.findall(r'--data\.label "([^"]+)"', section) or [None]
        for block in re.findall(r"```jsonl?\n(.*?)```", section, re.S):
            found += [(json.loads(line), rules[0]) for line in block.splitlines()]
    return found


def deep(depth: int = 300) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


ODD: tuple[Callable[[], Any], ...] = (
    *(
        lambda value=value: value
        for value in (None, True, False, 0, -1, 7, 10**400, 0.5, -0.0, 1e308, "", " ", "\x00", "5")
    ),
    *(
        lambda value=value: value
        for value in (float("nan"), float("inf"), "\ud83d", "🍐", "<|end|>", "{}", "[1, 2]", "null")
    ),
    *(lambda value=value: value for value in (np.bool_(True), np.float32(0.5), np.array(["a"]), b"bytes", ("a", "b"))),
    dict,
    list,
    lambda: [None],
    lambda: {"role": "assistant", "content": "a"},
    lambda: {"from": "gpt", "value": "a"},
    lambda: {"": {"": 1}},
    lambda: {"\ud83d": 1},
    deep,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def mutated(row: dict[str, Any], draw: random.Random) -> Any:
    """A copy in which one to three places hold something else, are gone, twice there, or of another name."""
    row = json.loads(json.dumps(row))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        path = draw.choice(places(row))
        if not path:
            if draw.random() < 0.02:
                return draw.choice(ODD)()
            continue
        inner: Any = row
        for key in path[:-1]:
            inner = inner[key]
        what = draw.random()
        if what < 0.7:
            inner[path[-1]] = draw.choice(ODD)()
        elif what < 0.85:
            del inner[path[-1]]
        elif isinstance(inner, dict):
            inner[draw.choice(("prompt", "completion", "label", "chosen", "messages", "score", "\ud83d", "weight"))] = (
                inner[path[-1]]
            )
        else:
            inner.append(inner[path[-1]])
    return row


@pytest.mark.slow
def test_a_mutated_row_is_read_or_refused(tmp_path: Path) -> None:
    tiny.make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    good = good_rows()
    counts = {"read": 0, "refused": 0}
    for seed in range(ROWS):
        draw = random.Random(seed)
        row, own = draw.choice(good)
        row, rule = mutated(row, draw), draw.choice(RULES) if draw.random() < 0.1 else own
        columns = draw.choice(COLUMNS) if draw.random() < 0.05 else {}
        try:
            reader = RowReader(Reading(columns, LabelRule.parse(rule) if rule else None))
            found = reader(row, f"rows.jsonl:{seed}")
            found = reader.finish(found, range(len(found)))
            if found:
                tokenize(found, tokenizer, max_length=64, skip_bad_rows=False)
            ", ".join([*reader.unused, reader.described()]).encode()
            counts["read"] += 1
        except UserError as error:
            str(error).encode()
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error} of {row!r}") from error
    print(counts)
    assert min(counts.values()) > ROWS / 10, "both kinds are met"
