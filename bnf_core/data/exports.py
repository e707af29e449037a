"""What tools in which people rate answers export, as rows of ours: Open WebUI, Langfuse and Argilla."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bnf_core.data.conversations import Row, assistant, user, without
from bnf_core.data.messages import Cell, Message, RowError, named
from bnf_core.data.records import TEXTS


def open_webui(row: Row, source: str) -> dict[str, Any]:
    """The rated message with those that lead to it, and thumbs up or down as its label."""
    chat = _inner(row, ("snapshot", "chat", "chat"), source)
    messages = _inner(chat, ("history", "messages"), source, "snapshot.chat.chat.")
    at = _inner(row, ("meta",), source).get("message_id")
    path: list[Message] = []
    while at is not None:
        message = messages.get(at) if isinstance(at, str) else None
        if not isinstance(message, Mapping) or len(path) > len(messages):
            raise RowError(
                source,
                "snapshot.chat.chat.history.messages",
                f"has no message that is called {named(at)}, expected the rated one and those that lead to it",
                "Export the feedback again, or drop the row",
            )
        path.insert(0, _open_webui_message(message, rated=not path))
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


REASONING_BLOCK = re.compile(
    r'<details type="reasoning"[^>]*>\s*(?:<summary>[^<]*</summary>)?\s*(.*?)\s*</details>\s*', re.DOTALL
)


def _open_webui_message(message: Mapping[str, Any], *, rated: bool) -> Message:
    """Reasoning stands in the text of a message, quoted and escaped for display. That of earlier messages is left out,
    as it was when the model answered."""
    role, content = message.get("role"), message.get("content")
    if role != "assistant" or not isinstance(content, str):
        return {"role": role, "content": content}
    quoted = "\n".join(REASONING_BLOCK.findall(content))
    thoughts = html.unescape(re.sub(r"^(?:&gt;|>) ?", "", quoted, flags=re.MULTILINE))
    found: Message = {"role": role, "content": REASONING_BLOCK.sub("", content)}
    return found | {"reasoning_content": thoughts} if thoughts and rated else found


def _inner(row: Mapping[str, Any], path: Sequence[str], source: str, within: str = "") -> Mapping[str, Any]:
    for i, name in enumerate(path):
        found = row.get(name)
        if not isinstance(found, Mapping):
            where = within + ".".join(path[: i + 1])
            raise RowError(source, where, f"is {named(found)}, expected an object", "Export it again, or drop the row")
        row = found
    return row


def langfuse(row: Row, source: str) -> dict[str, Any]:
    """A trace or an observation: its scores are columns, each a list."""
    tools = None
    given = _perhaps_json(row["input"])
    if isinstance(given, Mapping) and "messages" in given:
        given, tools = given["messages"], given.get("tools")
    prompt = given if isinstance(given, list) else user(given, "input", source)
    output = _perhaps_json(row["output"])
    if isinstance(output, Mapping) and isinstance(output.get("choices"), list) and output["choices"]:
        output = output["choices"][0]
    if isinstance(output, Mapping) and isinstance(output.get("message"), Mapping):
        output = output["message"]
    if isinstance(output, Mapping):
        output = [{"role": "assistant", **output}]
    completion = output if isinstance(output, list) else assistant(output, "output", source)
    rest = {column: _single(value) for column, value in without(row, "input", "output").items()}
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
    if all(isinstance(item, int | float) and not isinstance(item, bool) and abs(item) < 1e300 for item in value):
        return sum(value) / len(value)
    return value[0] if all(item == value[0] for item in value) else value


NUMBERED = re.compile(r"(response|completion|answer|generation|reply)[-_ ]?(\d+)")


def argilla(row: Row, source: str) -> dict[str, Any]:
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
    messages = given if isinstance(given, list) else user(given, prompt, source)
    if answer is not None and not numbered:
        value = flat[answer]
        completion = value if isinstance(value, list) else assistant(value, answer, source)
        return without(flat, prompt, answer) | {"prompt": messages, "completion": completion}
    completions: list[dict[str, Any]] = []
    for name, text in numbered.items():
        ranks = {question: rank for question, value in flat.items() if (rank := _rank(value, name)) is not None}
        said = text if isinstance(text, list) else assistant(text, name, source)
        completions.append({"completion": said, **ranks})
    return without(flat, prompt, *numbered) | {"prompt": messages, "completions": completions}


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
            status = row.get(f"{column}.status")
            status = status if isinstance(status, list) else ["submitted"] * len(value)
            said = [v for v, s in zip(value, status, strict=False) if s == "submitted"]
            flat |= {match[1]: _single(said)} if said else {}
    return flat
