"""Rows that nobody would write, through real chat templates and in files of every kind: each is taken, or refused with
its place, and nothing else ever comes of it.

A mutation follows from its seed alone: `mutated(seed)` shows what a seed that is printed stands for.
"""

import json
import random
import traceback
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import chat_templates as chats
import tiny
from bnf_core.data.readers import number_rows
from bnf_core.data.rendering import Chat
from bnf_core.data.sources import load_feedback
from bnf_core.data.tokenization import tokenize
from bnf_core.errors import UserError

MANY, FEW = 10_000, 300

BASES: list[dict[str, Any]] = [
    {"prompt": "Two and two?", "completion": " Four.", "label": True},
    {"prompt": "Two and two?", "chosen": " Four.", "rejected": " Five."},
    {"chosen": "Two and two? Four.", "rejected": "Two and two? Five."},
    {"chosen": [*chats.QUESTION, chats.assistant("Yes.")], "rejected": [*chats.QUESTION, chats.assistant("No.")]},
    {"prompt": chats.QUESTION, "chosen": [chats.assistant("Yes.")], "rejected": [chats.assistant("No.")]},
    *({**chats.as_row(shape), "chat_template_kwargs": {"enable_thinking": True}} for shape in chats.SHAPES),
]
WORDS = ["", " ", "x", "user", "assistant", "system", "tool", "true", "[]", "{}", "[{", "é", "\u2028", "\ud800", "\x00"]
WORDS += ["<think>", "</think>", "<|im_end|>", "<eos>", "{{ 1 / 0 }}", "%", "a" * 3000, "\n" * 50, "1e999", "NaN"]
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2**63, 10**400, 0.5, 1e308, float("inf"), float("nan"), [], {}, [[]]]
VALUES += [[None], [{}], {"a": None}, {"role": "user"}, {"content": "x"}, [1, "x", None], {"": ""}, {"role": []}]
KEYS = [
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "label",
    "tools",
    "messages",
    "role",
    "content",
    "train",
    "weight",
]
KEYS += ["tool_calls", "function", "arguments", "name", "parameters", "properties", "type", "text", "thinking", "", "x"]
KEYS += [
    "reasoning_content",
    "chat_template_kwargs",
    "tokenize",
    "conversation",
    "add_generation_prompt",
    "tool_call_id",
]


def odd(draw: random.Random) -> Any:
    return deepcopy(draw.choice([*VALUES, *WORDS]))


def keys(value: Any) -> Iterable[Any]:
    return list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container within, with each of its keys."""
    for key in keys(value):
        yield value, key
        yield from places(value[key])


def mutated(seed: int) -> Any:
    """A row with one to four mutations."""
    draw = random.Random(seed)
    row = json.loads(json.dumps(draw.choice(BASES)))
    for _ in range(draw.choice([1, 1, 2, 3, 4])):
        found = list(places(row))
        if not found:
            return row
        holder, key = draw.choice(found)
        old = holder[key]
        match draw.randrange(9):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[draw.choice(KEYS)] = holder.pop(key)
            case 2 if isinstance(holder, dict):
                holder[draw.choice(KEYS)] = odd(draw)
            case 3 if isinstance(holder, list):
                holder.insert(draw.randrange(len(holder) + 1), draw.choice([deepcopy(old), odd(draw)]))
            case 4:
                holder[key] = [deepcopy(old) for _ in range(draw.choice([1, 1, 2]))]
            case 5:
                other, place = draw.choice(found)
                holder[key] = deepcopy(other[place]) if place in list(keys(other)) else old
            case 6 if isinstance(old, str):
                at = draw.randrange(len(old) + 1)
                holder[key] = old[:at] + draw.choice(WORDS) + old[at + draw.randrange(3) :]
            case 7:
                holder[key] = json.dumps(old)
            case _:
                holder[key] = odd(draw)
    return row if draw.random() > 0.02 else draw.choice([odd(draw), [row]])


@cache
def tokenizers() -> list[tuple[Any, Chat]]:
    """The tiny one, and real templates: with tools, with reasoning, strict about roles."""
    names = ["qwen3", "llama3", "deepseekr1", "gemma", "gptoss", "phi", "mistral"]
    files = [path for name in names for path in chats.template_files() if path.stem.startswith(name)][:8]
    templates = [tiny.TEMPLATE, *(path.read_text(encoding="utf-8") for path in files)]
    return [(chats.tokenizer_of(template), Chat(kwargs={"enable_thinking": False})) for template in templates]


def feedback(seed: int, folder: Path) -> None:
    """As a run takes it: read, checked, rendered, tokenised and cut."""
    tokenizer, chat = tokenizers()[seed % len(tokenizers())]
    template = ("auto", "auto", "chat")[seed % 3]
    rows = load_feedback([mutated(seed)]).rows
    tokenize(rows, tokenizer, template=template, chat=chat, max_length=512)


def written(seed: int, folder: Path) -> None:
    """The same in a file of one kind or another, in which some bytes are wrong."""
    draw = random.Random(-seed - 1)
    kind = draw.choice([".jsonl", ".json", ".csv"])
    rows = [draw.choice(BASES), mutated(seed)]
    if kind == ".csv":
        good = BASES[draw.randrange(2)]
        cells = ['"' + str(value).replace('"', '""') + '"' for value in good.values()]
        text = f"{','.join(good)}\n{','.join(cells)}\n"
    else:
        text = json.dumps(rows) if kind == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(draw.choice([0, 1, 1, 2, 5])):
        at = draw.randrange(len(content))
        match draw.randrange(3):
            case 0:
                content[at] = draw.randrange(256)
            case 1:
                del content[at : at + draw.randrange(9)]
            case _:
                content[at:at] = draw.choice(
                    [b'"', b"\n", b",", b"[", b"}", b"\xff", b"\x00", b"\\u12", b"\xef\xbb\xbf"]
                )
        if not content:
            return
    path = folder / f"f{kind}"
    path.write_bytes(content)
    load_feedback(str(path), skip_bad_rows=draw.random() < 0.5)


def outcomes(work: Callable[[int, Path], None], seeds: range, folder: Path) -> dict[str, int]:
    """How many are taken and refused.

    Raises:
        AssertionError: an error is of another kind, or names no place; with the seeds.
    """
    counts, faults = {"taken": 0, "refused": 0}, []
    for seed in seeds:
        try:
            work(seed, folder)
            counts["taken"] += 1
        except UserError as error:
            counts["refused"] += 1
            if not any(place in str(error) for place in ("list[train]:1", f"{folder}/f.", "list[train]: no")):
                faults.append(f"seed {seed}: names no place: {error}")
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            faults.append(f"seed {seed}: {type(error).__name__}: {error} at {Path(last.filename).name}:{last.lineno}")
    assert not faults, "\n".join([f"{len(faults)} of {len(seeds)}", *faults[:40]])
    return counts


@pytest.mark.parametrize("work", [feedback, written])
def test_mutated_rows_are_taken_or_refused(work: Callable[[int, Path], None], tmp_path: Path) -> None:
    counts = outcomes(work, range(FEW), tmp_path)
    assert min(counts.values()) > FEW // 20  # neither is all there is


@pytest.mark.slow
@pytest.mark.parametrize("work", [feedback, written])
def test_many_mutated_rows_are_taken_or_refused(
    work: Callable[[int, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = outcomes(work, range(MANY), tmp_path)
    with capsys.disabled():
        print(f"\n{work.__name__}: seeds 0 to {MANY - 1}: {counts}")


def test_a_seed_is_always_the_same_row() -> None:
    assert json.dumps(mutated(7)) == json.dumps(mutated(7)) != json.dumps(mutated(8))
    assert next(iter(number_rows([1], "list[train]"))).source == "list[train]:1"
