"""Conversations as others write them, as messages with roles and contents."""

import json
import re
from collections.abc import Mapping
from typing import Any

from bnf_core.data.messages import Message, RowError, named

Row = Mapping[str, Any]

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


def user(text: Any, column: str, source: str) -> list[Message]:
    return [{"role": "user", "content": text_of(text, column, source)}]


def assistant(text: Any, column: str, source: str) -> list[Message]:
    return [{"role": "assistant", "content": text_of(text, column, source)}]


def text_of(value: Any, column: str, source: str) -> str:
    if not isinstance(value, str):
        raise RowError(source, column, f"is {named(value)}, expected text", "Mend it, or drop the row")
    return str(value)


def system_of(row: Row, source: str) -> list[Message]:
    text = row.get("system")
    return [{"role": "system", "content": text_of(text, "system", source)}] if text else []


def messages_of(value: Any, column: str, source: str) -> list[Message]:
    """Messages of ShareGPT: `from` and `value` for role and content; others as they are."""
    if not isinstance(value, list):
        raise RowError(
            source, column, f"is {named(value)}, expected a list of turns", 'Write [{"from": …, "value": …}]'
        )
    return [message_of(turn, f"{column}[{i}]", source) for i, turn in enumerate(value)]


def message_of(turn: Any, column: str, source: str) -> Message:
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


def answered(messages: list[Message], column: str, source: str) -> dict[str, Any]:
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


def transcript(text: str) -> list[Message]:
    _, *parts = SPEAKER.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def without(row: Row, *columns: str) -> dict[str, Any]:
    return {column: value for column, value in row.items() if column not in columns}
