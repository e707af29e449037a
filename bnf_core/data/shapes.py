"""The shapes of rows that other trainers, data sets and tools write, recognised by their columns and brought into ours.

A shape gives a row of ours, a mapping with the columns that `records.parse_row` checks. Columns that it has no use for
stay beside them, where a label rule finds them.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bnf_core.data.messages import Cell, Message, RowError, named
from bnf_core.data.records import BESIDE, IMPLICIT, PAIRED, SEVERAL, TEXTS, UNPAIRED

Row = Mapping[str, Any]


def _as_it_is(row: Row, source: str) -> dict[str, Any]:
    return dict(row)


def _always(row: Row) -> bool:
    return True


@dataclass(frozen=True)
class Shape:
    """What rows of one kind have in common."""

    name: str  # for people
    columns: tuple[str, ...]  # all of which must hold something
    convert: Callable[[Row, str], dict[str, Any]] = _as_it_is  # from a row and its file:line; raises RowError
    fits: Callable[[Row], bool] = _always  # what the row must be besides
    labels: tuple[
        str, ...
    ] = ()  # columns one of which must be there, unless a rule makes the labels; empty: none needed
    uses: tuple[str, ...] = ()  # other columns that it reads
    called: Mapping[str, str] = field(default_factory=dict)  # our columns by their names there, for messages
    scored: bool = False  # whether it has scores alone, which need a rule
    own: bool = False  # whether it is ours already


def shapes_of(row: Row, ruled: bool) -> list[Shape]:
    """The shapes that a row may be of: more than one where neither has all columns of the other.

    Args:
        ruled: whether a rule makes the labels.
    """
    names = {column for column, value in row.items() if value is not None}
    found = [
        shape
        for shape in SHAPES
        if names.issuperset(shape.columns)
        and (not shape.labels or ruled or not names.isdisjoint(shape.labels))
        and shape.fits(row)
    ]
    return [a for a in found if not any(set(a.columns) < set(b.columns) for b in found)]


# Messages of other kinds

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}


def _user(text: Any, column: str, source: str) -> list[Message]:
    return [{"role": "user", "content": _text(text, column, source)}]


def _assistant(text: Any, column: str, source: str) -> list[Message]:
    return [{"role": "assistant", "content": _text(text, column, source)}]


def _text(value: Any, column: str, source: str) -> str:
    if not isinstance(value, str):
        raise RowError(source, column, f"is {named(value)}, expected text", "Mend it, or drop the row")
    return str(value)


def _system(row: Row, source: str) -> list[Message]:
    text = row.get("system")
    return [{"role": "system", "content": _text(text, "system", source)}] if text else []


def _turns(value: Any, column: str, source: str) -> list[Message]:
    """Messages of ShareGPT: `from` and `value` for role and content; others as they are."""
    if not isinstance(value, list):
        raise RowError(
            source, column, f"is {named(value)}, expected a list of turns", 'Write [{"from": …, "value": …}]'
        )
    return [_turn(turn, f"{column}[{i}]", source) for i, turn in enumerate(value)]


def _turn(turn: Any, column: str, source: str) -> Message:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return dict(turn) if isinstance(turn, Mapping) else turn  # checked with all messages
    role = ROLES.get(str(turn["from"]))
    if role is None:
        raise RowError(
            source, f"{column}.from", f"is {named(turn['from'])}, expected {', '.join(ROLES)}", "Rename the role"
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if turn["from"] == "function_call":
        calls = _decoded(turn.get("value"), f"{column}.value", source)
        return {"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}
    return {"role": role, "content": turn.get("value"), **rest}


def _decoded(value: Any, column: str, source: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(source, column, f"is {named(value)}, which is not JSON: {error}", "Write it as JSON") from error


def _answered(messages: list[Message], column: str, source: str) -> dict[str, Any]:
    """A conversation as prompt and completion, which is all that follows the last user's message."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    at = next((i + 1 for i in reversed(range(len(roles))) if roles[i] not in ("assistant", "tool")), 0)
    if at == len(messages):
        raise RowError(
            source, column, f"ends with the role {roles[-1] if roles else None!r}, expected an answer", "Drop the row"
        )
    return {"prompt": messages[:at], "completion": messages[at:]}


SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \t]*")


def is_transcript(text: Any) -> bool:
    """Whether text is a conversation as hh-rlhf writes it."""
    return isinstance(text, str) and (first := SPEAKER.match(text)) is not None and first[1] == "Human"


def _transcript(text: str) -> list[Message]:
    _, *parts = SPEAKER.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _without(row: Row, *columns: str) -> dict[str, Any]:
    return {column: value for column, value in row.items() if column not in columns}


# What each shape becomes


def _hh_rlhf(row: Row, source: str) -> dict[str, Any]:
    return _without(row, *IMPLICIT) | {column: _transcript(row[column]) for column in IMPLICIT}


HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(Assistant|User)\n")


def _helpsteer(row: Row, source: str) -> dict[str, Any]:
    """Earlier turns are in the prompt, each after a line that says whose it is."""
    first, *parts = HELPSTEER_TURN.split(_text(row["prompt"], "prompt", source))
    prompt = [{"role": "user", "content": first}]
    prompt += [{"role": who.lower(), "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return _without(row, "response") | {"prompt": prompt, "completion": _assistant(row["response"], "response", source)}


def _ultrafeedback(row: Row, source: str) -> dict[str, Any]:
    items = row["completions"]
    completions = [_answer_of(item, f"completions[{i}]", source) for i, item in enumerate(items)]
    return _without(row, "instruction") | {
        "prompt": _user(row["instruction"], "instruction", source),
        "completions": completions,
    }


def _answer_of(item: Any, column: str, source: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise RowError(source, column, f"is {named(item)}, expected an object with response and scores", "Drop the row")
    return {**item, "completion": _assistant(item.get("response"), f"{column}.response", source)}


def _alpaca(row: Row, source: str) -> list[Message]:
    """The prompt of `instruction`, `input`, `system` and `history`."""
    history = row.get("history") or []
    turns: list[Message] = []
    for i, turn in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError(
                source, f"history[{i}]", f"is {named(turn)}, expected a pair of question and answer", "Mend it"
            )
        turns += _user(turn[0], f"history[{i}][0]", source) + _assistant(turn[1], f"history[{i}][1]", source)
    query = _text(row["instruction"], "instruction", source)
    more = row.get("input")
    if more:
        query += "\n" + _text(more, "input", source)
    return [*_system(row, source), *turns, {"role": "user", "content": query}]


ALPACA = ("instruction", "input", "system", "history")


def _llama_factory(row: Row, source: str) -> dict[str, Any]:
    ours = {"prompt": _alpaca(row, source), "completion": _assistant(row["output"], "output", source)}
    return _tagged(_without(row, *ALPACA, "output")) | ours


def _llama_factory_pair(row: Row, source: str) -> dict[str, Any]:
    answers = {column: _assistant(row[column], column, source) for column in IMPLICIT}
    return _without(row, *ALPACA) | {"prompt": _alpaca(row, source)} | answers


def _tagged(row: dict[str, Any]) -> dict[str, Any]:
    """With LLaMA-Factory's name of the label as ours."""
    return row if row.get("kto_tag") is None else {"label": row["kto_tag"]} | _without(row, "kto_tag")


def _sharegpt(row: Row, source: str) -> dict[str, Any]:
    messages = _system(row, source) + _turns(row["conversations"], "conversations", source)
    return _tagged(_without(row, "conversations", "system")) | _answered(messages, "conversations", source)


def _sharegpt_pair(row: Row, source: str) -> dict[str, Any]:
    prompt = _system(row, source) + _turns(row["conversations"], "conversations", source)
    answers = {
        column: _turns(value if isinstance(value, list) else [value], column, source)
        if not isinstance(value := row[column], str)
        else _assistant(value, column, source)
        for column in IMPLICIT
    }
    return _without(row, "conversations", "system") | {"prompt": prompt} | answers


def _ms_swift(row: Row, source: str) -> dict[str, Any]:
    return _without(row, "messages") | _answered(_turns(row["messages"], "messages", source), "messages", source)


def _ms_swift_pair(row: Row, source: str) -> dict[str, Any]:
    """The rejected answer stands in place of the last message."""
    messages, other = _turns(row["messages"], "messages", source), row["rejected_response"]
    rejected = [_turn(other, "rejected_response", source)] if isinstance(other, Mapping) else other
    if not isinstance(rejected, list):
        rejected = _assistant(rejected, "rejected_response", source)
    ours = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected}
    return _without(row, "messages", "rejected_response") | ours


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
    return _without(row, "input", "preferred_output", "non_preferred_output") | ours


def _open_webui(row: Row, source: str) -> dict[str, Any]:
    """The rated message with those that lead to it, and thumbs up or down as its label."""
    chat = _inner(row, ("snapshot", "chat", "chat"), source)
    messages, at = _inner(chat, ("history", "messages"), source, "snapshot.chat.chat."), None
    rated = _inner(row, ("meta",), source).get("message_id")
    path: list[Message] = []
    at = rated
    while at is not None:
        message = messages.get(at)
        if not isinstance(message, Mapping) or len(path) > len(messages):
            raise RowError(
                source,
                "snapshot.chat.chat.history.messages",
                f"has no message {at!r}, expected the rated one and those that lead to it",
                "Export the feedback again, or drop the row",
            )
        path.insert(0, {"role": message.get("role"), "content": message.get("content")})
        at = message.get("parentId")
    if not path:
        raise RowError(source, "meta.message_id", "names no message, expected the rated one", "Drop the row")
    params = chat.get("params")
    system = chat.get("system") or (params.get("system") if isinstance(params, Mapping) else None)
    if system:
        path.insert(0, {"role": "system", "content": system})
    rating = _inner(row, ("data",), source).get("rating")
    label = {"1": True, "-1": False}.get(str(rating).removesuffix(".0"), rating)
    return dict(row) | {"prompt": path[:-1], "completion": path[-1:], "label": label}


def _inner(row: Any, path: Sequence[str], source: str, within: str = "") -> Mapping[str, Any]:
    for i, name in enumerate(path):
        row = row.get(name)
        if not isinstance(row, Mapping):
            where = within + ".".join(path[: i + 1])
            raise RowError(source, where, f"is {named(row)}, expected an object", "Export it again, or drop the row")
    return row


def _langfuse(row: Row, source: str) -> dict[str, Any]:
    """A trace or an observation: its scores are columns, each a list."""
    tools = None
    given = _perhaps_json(row["input"])
    if isinstance(given, Mapping) and "messages" in given:
        given, tools = given["messages"], given.get("tools")
    prompt = given if isinstance(given, list) else _user(given, "input", source)
    output = _perhaps_json(row["output"])
    if isinstance(output, Mapping) and isinstance(output.get("choices"), list) and output["choices"]:
        output = output["choices"][0]
    if isinstance(output, Mapping) and isinstance(output.get("message"), Mapping):
        output = output["message"]
    if isinstance(output, Mapping):
        output = [{"role": "assistant", **output}]
    completion = output if isinstance(output, list) else _assistant(output, "output", source)
    rest = {column: _single(value) for column, value in _without(row, "input", "output").items()}
    return rest | {"prompt": prompt, "completion": completion, "tools": tools}


def _perhaps_json(value: Any) -> Any:
    """JSON text of a list or an object, or of text in a table, as what it says."""
    if not isinstance(value, str) or not value.lstrip().startswith(
        ("{", "[", '"') if isinstance(value, Cell) else ("{", "[")
    ):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _single(value: Any) -> Any:
    """One answer of several people's: the mean of numbers, or what all of them say; otherwise all."""
    value = _perhaps_json(value)
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(item, int | float) and not isinstance(item, bool) for item in value):
        return sum(value) / len(value)
    return value[0] if all(item == value[0] for item in value) else value


NUMBERED = re.compile(r"(response|completion|answer|generation|reply)[-_ ]?(\d+)")


def _argilla(row: Row, source: str) -> dict[str, Any]:
    """A record, nested as its JSON is or flat as its table: fields, and one answer to each question."""
    flat = _argilla_fields(row)
    prompt = next((name for name in ("prompt", "instruction", "question", "input") if flat.get(name)), None)
    answer = next((name for name in TEXTS if flat.get(name)), None)
    numbered = {name: value for name, value in flat.items() if NUMBERED.fullmatch(name) and value}
    if prompt is None or (answer is None and not numbered):
        raise RowError(
            source,
            "fields",
            f"found {', '.join(flat) or 'none'}, expected a prompt (or instruction, question, input) and a response "
            "(or completion, text, answer, output; or response-1, response-2 and so on)",
            "Name them with data.columns",
        )
    given = flat[prompt]
    messages = given if isinstance(given, list) else _user(given, prompt, source)
    if answer is not None and not numbered:
        value = flat[answer]
        completion = value if isinstance(value, list) else _assistant(value, answer, source)
        return _without(flat, prompt, answer) | {"prompt": messages, "completion": completion}
    completions: list[dict[str, Any]] = []
    for name, text in numbered.items():
        ranks = {question: rank for question, value in flat.items() if (rank := _rank(value, name)) is not None}
        said = text if isinstance(text, list) else _assistant(text, name, source)
        completions.append({"completion": said, **ranks})
    return _without(flat, prompt, *numbered) | {"prompt": messages, "completions": completions}


def _rank(value: Any, name: str) -> int | None:
    """Of a field in the answer to a ranking question, or to one that asks which is best."""
    if isinstance(value, list) and name in value:
        return value.index(name) + 1
    if isinstance(value, list):
        of = [item.get("rank") for item in value if isinstance(item, Mapping) and item.get("value") == name]
        return of[0] if of and isinstance(of[0], int) else None
    if isinstance(value, str) and NUMBERED.fullmatch(value):
        return 1 if value == name else 2
    return None


def _argilla_fields(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    answers, suggested = row.get("responses"), row.get("suggestions")
    if isinstance(row.get("fields"), Mapping):
        flat |= row["fields"]
        flat |= row["metadata"] if isinstance(row.get("metadata"), Mapping) else {}
        for question, given in suggested.items() if isinstance(suggested, Mapping) else ():
            flat[question] = given.get("value") if isinstance(given, Mapping) else given
        for question, given in answers.items() if isinstance(answers, Mapping) else ():
            by = [g for g in given if isinstance(g, Mapping)] if isinstance(given, list) else []
            said = [g.get("value") for g in by if g.get("status", "submitted") == "submitted"]
            flat |= {question: _single(said)} if said else {}
        return flat
    endings = re.compile(r"(.+)\.(responses|suggestion)(\.\w+)?")
    for column, value in row.items():
        match = endings.fullmatch(column)
        if match is None:
            flat.setdefault(column, value)
        elif match[2] == "suggestion" and match[3] is None and value is not None:
            flat.setdefault(match[1], value)
        elif match[2] == "responses" and match[3] is None and isinstance(value, list):
            status = row.get(f"{column}.status") or ["submitted"] * len(value)
            said = [v for v, s in zip(value, status, strict=False) if s == "submitted"]
            flat |= {match[1]: _single(said)} if said else {}
    return flat


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


def _scores(items: Any) -> Iterator[Mapping[str, Any]]:
    return (item for item in items if isinstance(item, Mapping)) if isinstance(items, list) else iter(())


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
        lambda row: any(True for _ in _scores(row["completions"])),
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
        _open_webui,
        called={"prompt": "snapshot", "completion": "snapshot", "label": "data.rating"},
    ),
    Shape(
        "Langfuse's traces",
        ("input", "output"),
        _langfuse,
        lambda row: not {"timestamp", "startTime", "traceId"}.isdisjoint(row) and row.get("instruction") is None,
        called={"prompt": "input", "completion": "output"},
        scored=True,
    ),
    Shape("Argilla's records", ("fields",), _argilla, _lacks("prompt"), uses=("responses", "suggestions"), scored=True),
    Shape("Argilla's records", (), _argilla, _is_flat_argilla, scored=True),
)


def used_columns(shape: Shape) -> set[str]:
    """Those that `convert` or `records.parse_row` reads."""
    return {*shape.columns, *shape.uses, *BESIDE}
