"""Chat messages and tools as people keep them, checked and brought into one form."""

import json
import re
from collections.abc import Mapping
from typing import Any

from bnf_core.errors import UserError

# {"role", "content"}, both text; an assistant's may have "tool_calls", each {"type": "function", "function": {"name",
# "arguments"}} with an object of arguments, and "train": False. Other keys go to the chat template as they are.
Message = dict[str, Any]
Text = str | list[Message]
Tool = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")  # the names under which an assistant's thoughts are kept


class RowError(UserError):
    """A row that cannot be used. The message says where it is, what was found and expected, and what to do.

    Args:
        source: file:line.
        field: the column, or "" when the row as a whole is meant.
        problem: what was found and what was expected.
        remedy: what to do.
    """

    def __init__(self, source: str, field: str, problem: str, remedy: str) -> None:
        self.source = source
        self.field = field
        self.problem = problem
        self.remedy = remedy
        message = f"{source}: {field + ': ' if field else ''}{problem}. {remedy}."
        super().__init__(message.encode(errors="backslashreplace").decode())  # what is wrong may be half a surrogate

    def __reduce__(self) -> tuple[Any, ...]:  # from one process to another
        return type(self), (self.source, self.field, self.problem, self.remedy)


class Cell(str):
    """Text of a table that has nothing else, such as CSV: it may be meant as a number or a truth value."""

    def meant(self) -> bool | int | float | str | None:
        """What JSON would say of it; nothing is null."""
        text = self.strip()
        if not text:
            return None
        if text.casefold() in ("true", "false"):
            return text.casefold() == "true"
        if re.fullmatch(r"[-+]?\d{1,18}", text):
            return int(text)
        return float(text) if re.fullmatch(NUMBER, text) else str(self)


NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,2})?"


def plain(value: Any) -> Any:
    """What JSON would hold, of rows from tables and from Python: arrays and tuples are lists, NumPy's scalars numbers
    and truth values, NaN and pandas' NA null.

    Keys of an object without a value are absent, at every depth: a table gives all structs of a column the same keys,
    and fills those that a row lacks with nulls.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if value != value else float(value)
    if isinstance(value, Mapping):
        return {key: item for key, v in value.items() if (item := plain(v)) is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def text_or_messages(value: Any, field: str, source: str) -> Text:
    """Plain text or messages, whichever it is, checked.

    Raises:
        RowError: it is neither, or a message is not what it should be.
    """
    if isinstance(value, str):
        check_unicode(value, field, source)
        return str(value)
    if not isinstance(value, list):
        raise RowError(
            source,
            field,
            f"is {named(value)}, expected text or a list of messages",
            'Write plain text, or [{"role": "user", "content": "..."}]',
        )
    return [_message(m, f"{field}[{i}]", source) for i, m in enumerate(value)]


def for_template(text: Text) -> Text:
    """Without what is not meant for the chat template: which turns are to be trained."""
    return text if isinstance(text, str) else [{k: v for k, v in m.items() if k != "train"} for m in text]


def _message(given: Any, field: str, source: str) -> Message:
    if not isinstance(given, Mapping):
        raise RowError(
            source, field, f"is {named(given)}, expected a message", 'Write {"role": "user", "content": "..."}'
        )
    message: Message = dict(given)
    calls = _tool_calls(message.pop("tool_calls", None), f"{field}.tool_calls", source)
    trained = _trained(message, field, source)
    for key in ("role", "content"):
        if key == "content" and calls and key not in message:
            message[key] = ""
        if key not in message:
            raise RowError(
                source,
                field,
                f'the message has no "{key}": found {", ".join(map(str, message)) or "none"}',
                'Every message needs "role" and "content"',
            )
        if key == "content" and isinstance(message[key], list):
            message[key] = "".join(_part(p, f"{field}.content[{i}]", source) for i, p in enumerate(message[key]))
    for key in ("role", "content", *REASONING):
        if key not in message:
            continue
        if not isinstance(message[key], str):
            raise RowError(
                source, f"{field}.{key}", f"is {named(message[key])}, expected text", "Only text can be trained on"
            )
        check_unicode(message[key], f"{field}.{key}", source)
    for key in message.keys() - {"role", "content", *REASONING}:  # a template may write it
        check_unicode(json.dumps({key: message[key]}, ensure_ascii=False, default=str), f"{field}.{key}", source)
    if calls:
        message["tool_calls"] = calls
    if not trained:
        message["train"] = False
    return message


def _part(part: Any, field: str, source: str) -> str:
    """The text of one part of a content that is a list."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise RowError(
        source,
        field,
        f"is {f'a part of the type {kind!r}' if kind else named(part)}, expected text",
        'Only text can be trained on: write {"type": "text", "text": "..."}, or drop the row',
    )


def _trained(message: Message, field: str, source: str) -> bool:
    """Whether a turn is to be trained, by the keys `train` and `weight`, which are taken out of the message."""
    trained, weight = message.pop("train", True), message.pop("weight", 1)
    if not isinstance(trained, bool):
        raise RowError(source, f"{field}.train", f"is {named(trained)}, expected true or false", "Mend or drop it")
    if weight not in (0, 1):
        raise RowError(
            source, f"{field}.weight", f"is {named(weight)}, expected 0 or 1", "A turn is trained or it is not"
        )
    return trained and bool(weight)


def _tool_calls(calls: Any, field: str, source: str) -> list[dict[str, Any]]:
    calls = _json(calls, field, source)
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise RowError(source, field, f"is {named(calls)}, expected a list of calls", f"Write [{CALL}]")
    return [_tool_call(call, f"{field}[{i}]", source) for i, call in enumerate(calls)]


CALL = '{"type": "function", "function": {"name": "...", "arguments": {...}}}'


def _tool_call(call: Any, field: str, source: str) -> dict[str, Any]:
    """With its arguments as an object, however they were kept: most templates write them as JSON."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(source, field, f"is {named(call)}, expected a call with the name of a function", f"Write {CALL}")
    arguments = function.get("arguments", {})
    arguments = {} if arguments == "" else _json(arguments, f"{field}.function.arguments", source)
    if not isinstance(arguments, Mapping):
        raise RowError(
            source,
            f"{field}.function.arguments",
            f"is {named(arguments)}, expected an object",
            "Write the arguments by their names",
        )
    check_unicode(json.dumps([function["name"], arguments], ensure_ascii=False, default=str), field, source)
    around = {key: value for key, value in call.items() if key != "function"} if "function" in call else {}
    return {"type": "function"} | around | {"function": {**function, "arguments": dict(arguments)}}


def tools_of(value: Any, source: str) -> list[Tool] | None:
    """The column `tools`: a list of JSON Schemas of functions, or the same as JSON text; None: there are none.

    Raises:
        RowError: it is something else.
    """
    tools = _json(value, "tools", source)
    if not tools and not isinstance(tools, Mapping):
        return None
    if not isinstance(tools, list):
        raise RowError(source, "tools", f"is {named(tools)}, expected a list of functions", f"Write [{SCHEMA}]")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(
                source, f"tools[{i}]", f"is {named(tool)}, expected a function with a name", f"Write {SCHEMA}"
            )
        parameters = function.get("parameters", {})
        if not isinstance(parameters, Mapping) or not isinstance(parameters.get("properties", {}), Mapping):
            raise RowError(
                source,
                f"tools[{i}].parameters",
                f"is {named(parameters)}, expected a JSON Schema, an object with properties",
                f"Write {SCHEMA}",
            )
        check_unicode(json.dumps(tool, ensure_ascii=False, default=str), f"tools[{i}]", source)
    return tools


SCHEMA = '{"type": "function", "function": {"name": "...", "parameters": {"type": "object", "properties": {...}}}}'


def template_kwargs_of(value: Any, source: str) -> dict[str, Any] | None:
    """The column `chat_template_kwargs`: an object, or the same as JSON text; None: there are none.

    Raises:
        RowError: it is something else.
    """
    kwargs = _json(value, "chat_template_kwargs", source)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise RowError(
            source,
            "chat_template_kwargs",
            f"is {named(kwargs)}, expected an object",
            'Write what the template takes by name, such as {"enable_thinking": false}',
        )
    check_unicode(json.dumps(kwargs, ensure_ascii=False, default=str), "chat_template_kwargs", source)
    return dict(kwargs) if kwargs else None


def _json(value: Any, field: str, source: str) -> Any:
    """What JSON text says, and an empty cell of a table; anything else as it is."""
    if isinstance(value, Cell) and value.meant() is None:
        return None
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(source, field, f"is {named(value)}, which is not JSON: {error}", "Write it as JSON") from error


def check_unicode(text: str, field: str, source: str) -> None:
    """Raises RowError where text cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            source,
            field,
            f"character {error.start + 1} is half of a surrogate pair, expected valid Unicode",
            "An emoji was probably cut in two when the data was made: repair the text or drop the row",
        ) from error


def named(value: Any) -> str:
    """A value as it stands in the file, short enough for a message."""
    if isinstance(value, str):
        return f"the text {json.dumps(value if len(value) <= 40 else value[:40] + '…', ensure_ascii=False)}"
    if isinstance(value, list):
        return "a list of messages" if value and all(isinstance(v, Mapping) for v in value) else "a list"
    if isinstance(value, Mapping):
        return "an object"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return f"a {type(value).__name__}"
