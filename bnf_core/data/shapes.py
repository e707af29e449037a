"""The shapes of rows that other trainers, data sets and tools write, recognised by their columns and brought into ours.

A shape gives a row of ours, a mapping with the columns that `records.parse_row` checks. Columns that it has no use for
stay beside them, where a label rule finds them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from bnf_core.data.conversations import (
    Row,
    answered,
    assistant,
    is_transcript,
    message_of,
    messages_of,
    system_of,
    text_of,
    transcript,
    user,
    without,
)
from bnf_core.data.exports import argilla, langfuse, open_webui
from bnf_core.data.messages import Message, RowError, named
from bnf_core.data.records import BESIDE, IMPLICIT, PAIRED, SEVERAL, UNPAIRED


def _as_it_is(row: Row, source: str) -> dict[str, Any]:
    return dict(row)


def _always(row: Row) -> bool:
    return True


@dataclass(frozen=True, eq=False)
class Shape:
    """What rows of one kind have in common."""

    name: str  # for people
    columns: tuple[str, ...]  # all of which must hold something
    convert: Callable[[Row, str], dict[str, Any]] = _as_it_is  # from a row and its file:line; raises RowError
    fits: Callable[[Row], bool] = _always  # what the row must be besides
    labels: tuple[str, ...] = ()  # columns of which one must be there, unless a rule makes the labels
    uses: tuple[str, ...] = ()  # other columns that it reads
    called: Mapping[str, str] = field(default_factory=dict)  # our columns by their names there, for messages
    scored: bool = False  # whether it has scores alone, which need a rule
    own: bool = False  # whether it is ours already


def shapes_of(row: Row, ruled: bool) -> list[Shape]:
    """The shapes that a row may be of: more than one where neither has all columns of the other.

    Args:
        ruled: whether a rule makes the labels.
    """
    names = frozenset(column for column, value in row.items() if value is not None)
    found = [shape for shape in _with_columns(names, ruled) if shape.fits(row)]
    return [a for a in found if not any(set(a.columns) < set(b.columns) for b in found)] if len(found) > 1 else found


@lru_cache(1000)
def _with_columns(names: frozenset[str], ruled: bool) -> tuple[Shape, ...]:
    """The shapes whose columns are all there, which is much the same in all rows of a file."""
    return tuple(
        shape
        for shape in SHAPES
        if names.issuperset(shape.columns) and (not shape.labels or ruled or not names.isdisjoint(shape.labels))
    )


# What each shape becomes


def _hh_rlhf(row: Row, source: str) -> dict[str, Any]:
    return without(row, *IMPLICIT) | {column: transcript(row[column]) for column in IMPLICIT}


HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(Assistant|User)\n")


def _helpsteer(row: Row, source: str) -> dict[str, Any]:
    """Earlier turns are in the prompt, each after a line that says whose it is."""
    first, *parts = HELPSTEER_TURN.split(text_of(row["prompt"], "prompt", source))
    prompt = [{"role": "user", "content": first}]
    prompt += [{"role": who.lower(), "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return without(row, "response") | {"prompt": prompt, "completion": assistant(row["response"], "response", source)}


def _ultrafeedback(row: Row, source: str) -> dict[str, Any]:
    items = row["completions"]
    completions = [_answer_of(item, f"completions[{i}]", source) for i, item in enumerate(items)]
    return without(row, "instruction") | {
        "prompt": user(row["instruction"], "instruction", source),
        "completions": completions,
    }


def _answer_of(item: Any, column: str, source: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise RowError(source, column, f"is {named(item)}, expected an object with response and scores", "Drop the row")
    return {**item, "completion": assistant(item.get("response"), f"{column}.response", source)}


def _alpaca(row: Row, source: str) -> list[Message]:
    """The prompt of `instruction`, `input`, `system` and `history`."""
    history = row.get("history") or []
    turns: list[Message] = []
    for i, turn in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError(
                source, f"history[{i}]", f"is {named(turn)}, expected a pair of question and answer", "Mend it"
            )
        turns += user(turn[0], f"history[{i}][0]", source) + assistant(turn[1], f"history[{i}][1]", source)
    query = text_of(row["instruction"], "instruction", source)
    more = row.get("input")
    if more:
        query += "\n" + text_of(more, "input", source)
    return [*system_of(row, source), *turns, {"role": "user", "content": query}]


ALPACA = ("instruction", "input", "system", "history")


def _llama_factory(row: Row, source: str) -> dict[str, Any]:
    ours = {"prompt": _alpaca(row, source), "completion": assistant(row["output"], "output", source)}
    return _tagged(without(row, *ALPACA, "output")) | ours


def _llama_factory_pair(row: Row, source: str) -> dict[str, Any]:
    answers = {column: assistant(row[column], column, source) for column in IMPLICIT}
    return without(row, *ALPACA) | {"prompt": _alpaca(row, source)} | answers


def _tagged(row: dict[str, Any]) -> dict[str, Any]:
    """With LLaMA-Factory's name of the label as ours."""
    return row if row.get("kto_tag") is None else {"label": row["kto_tag"]} | without(row, "kto_tag")


def _sharegpt(row: Row, source: str) -> dict[str, Any]:
    messages = system_of(row, source) + messages_of(row["conversations"], "conversations", source)
    return _tagged(without(row, "conversations", "system")) | answered(messages, "conversations", source)


def _sharegpt_pair(row: Row, source: str) -> dict[str, Any]:
    prompt = system_of(row, source) + messages_of(row["conversations"], "conversations", source)
    answers = {
        column: messages_of(value if isinstance(value, list) else [value], column, source)
        if not isinstance(value := row[column], str)
        else assistant(value, column, source)
        for column in IMPLICIT
    }
    return without(row, "conversations", "system") | {"prompt": prompt} | answers


def _ms_swift(row: Row, source: str) -> dict[str, Any]:
    return without(row, "messages") | answered(messages_of(row["messages"], "messages", source), "messages", source)


def _ms_swift_pair(row: Row, source: str) -> dict[str, Any]:
    """The rejected answer stands in place of the last message."""
    messages, other = messages_of(row["messages"], "messages", source), row["rejected_response"]
    rejected = [message_of(other, "rejected_response", source)] if isinstance(other, Mapping) else other
    if not isinstance(rejected, list):
        rejected = assistant(rejected, "rejected_response", source)
    ours = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected}
    return without(row, "messages", "rejected_response") | ours


def _openai(row: Row, source: str) -> dict[str, Any]:
    given = row["input"]
    if not isinstance(given, Mapping) or "messages" not in given:
        raise RowError(source, "input", f"is {named(given)}, expected an object with messages", "Drop the row")
    ours = {
        "prompt": given["messages"],
        "chosen": row["preferred_output"],
        "rejected": row["non_preferred_output"],
        "tools": given.get("tools"),
    }
    return without(row, "input", "preferred_output", "non_preferred_output") | ours


# The table


def _lacks(*columns: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(column) is None for column in columns)


def _is_sharegpt(row: Row) -> bool:
    turns = row["conversations"]
    return isinstance(turns, list) and any(isinstance(turn, Mapping) for turn in turns) and row.get("prompt") is None


def _is_flat_argilla(row: Row) -> bool:
    return any(re.fullmatch(r".+\.(responses|suggestion)", column) for column in row) and "fields" not in row


def _is_no_argilla(row: Row) -> bool:
    return not _is_flat_argilla(row)


def _is_transcripts(row: Row) -> bool:
    return all(is_transcript(row[column]) for column in IMPLICIT)


def _is_no_transcript(row: Row) -> bool:
    return not _is_transcripts(row)


def _has_objects(row: Row) -> bool:
    items = row["completions"]
    return isinstance(items, list) and any(isinstance(item, Mapping) for item in items)


SHAPES = (
    Shape("unpaired rows", UNPAIRED[:2], fits=_is_no_argilla, labels=("label",), uses=("label",), own=True),
    Shape("pairs", PAIRED, own=True),
    Shape("pairs with an implicit prompt", IMPLICIT, fits=_is_no_transcript, own=True),
    Shape("prompts with several completions", SEVERAL, own=True),
    Shape("hh-rlhf's conversations", IMPLICIT, _hh_rlhf, _is_transcripts),
    Shape(
        "HelpSteer's ratings",
        ("prompt", "response", "helpfulness"),
        _helpsteer,
        called={"completion": "response"},
        scored=True,
    ),
    Shape(
        "UltraFeedback's completions",
        ("instruction", "completions"),
        _ultrafeedback,
        _has_objects,
        called={"prompt": "instruction"},
        scored=True,
    ),
    Shape(
        "LLaMA-Factory's KTO rows",
        ("instruction", "output"),
        _llama_factory,
        labels=("kto_tag", "label"),
        uses=(*ALPACA, "kto_tag", "label"),
        called={"prompt": "instruction", "completion": "output", "label": "kto_tag"},
    ),
    Shape(
        "LLaMA-Factory's ranking pairs",
        ("instruction", *IMPLICIT),
        _llama_factory_pair,
        uses=ALPACA,
        called={"prompt": "instruction"},
    ),
    Shape(
        "ShareGPT's conversations",
        ("conversations",),
        _sharegpt,
        _is_sharegpt,
        labels=("kto_tag", "label"),
        uses=("system", "kto_tag", "label"),
        called={"prompt": "conversations", "completion": "conversations", "label": "kto_tag"},
    ),
    Shape(
        "ShareGPT's ranking pairs",
        ("conversations", *IMPLICIT),
        _sharegpt_pair,
        _is_sharegpt,
        uses=("system",),
        called={"prompt": "conversations"},
    ),
    Shape(
        "ms-swift's KTO rows",
        ("messages",),
        _ms_swift,
        _lacks("prompt", "rejected_response", "completion", "chosen"),
        labels=("label",),
        uses=("label",),
        called={"prompt": "messages", "completion": "messages"},
    ),
    Shape(
        "ms-swift's pairs",
        ("messages", "rejected_response"),
        _ms_swift_pair,
        called={"prompt": "messages", "chosen": "messages", "rejected": "rejected_response"},
    ),
    Shape(
        "OpenAI's preference pairs",
        ("input", "preferred_output", "non_preferred_output"),
        _openai,
        called={"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"},
    ),
    Shape(
        "Open WebUI's feedback",
        ("data", "meta", "snapshot"),
        open_webui,
        called={"prompt": "snapshot", "completion": "snapshot", "label": "data.rating"},
    ),
    Shape(
        "Langfuse's traces",
        ("input", "output"),
        langfuse,
        lambda row: not {"timestamp", "startTime", "traceId"}.isdisjoint(row) and row.get("instruction") is None,
        called={"prompt": "input", "completion": "output"},
        scored=True,
    ),
    Shape("Argilla's records", ("fields",), argilla, _lacks("prompt"), uses=("responses", "suggestions"), scored=True),
    Shape("Argilla's records", (), argilla, _is_flat_argilla, scored=True),
)


def used_columns(shape: Shape) -> set[str]:
    """Those that `convert` or `records.parse_row` reads."""
    return {*shape.columns, *shape.uses, *BESIDE}
