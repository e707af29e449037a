"""One row of feedback as people keep it, checked, and turned into labelled completions.

The column sets are TRL's: unpaired (prompt, completion, label), paired (prompt, chosen, rejected) and implicit
prompt (chosen, rejected); each column plain text or chat messages.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnf_core.errors import UserError

Message = dict[str, Any]  # {"role", "content"}, both text; other keys go to the chat template as they are
Text = str | list[Message]

UNPAIRED = ("prompt", "completion", "label")
PAIRED = ("prompt", "chosen", "rejected")
IMPLICIT = ("chosen", "rejected")


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
        super().__init__(f"{source}: {field + ': ' if field else ''}{problem}. {remedy}.")


@dataclass(frozen=True)
class Feedback:
    """One completion of one prompt, and whether it is wanted. Prompt and completion are of the same kind."""

    prompt: Text
    completion: Text  # messages are all the assistant's
    label: bool  # True: chosen, False: rejected
    source: str  # file:line, such as feedback.jsonl:17
    paired: bool = False  # whether the same row gives its partner


def parse_row(row: Any, source: str) -> list[Feedback]:
    """Check one row and turn it into one labelled completion, or two for a pair. Other columns are ignored.

    Args:
        row: a mapping from column to value, as read from JSON.
        source: file:line, for messages.
    Raises:
        RowError: the row is not what any of the three column sets asks for.
    """
    if not isinstance(row, Mapping):
        raise RowError(
            source, "", f"found {_name(row)}, expected an object with columns", f"The columns are {_column_sets()}"
        )
    columns = _column_set(row, source)
    if columns == UNPAIRED:
        prompt = _text(row["prompt"], "prompt", source)
        completion = _text(row["completion"], "completion", source)
        _check_prompt(prompt, source)
        _check_completion(completion, "completion", prompt, source)
        return [Feedback(prompt, completion, _label(row["label"], source), source)]

    chosen, rejected = _text(row["chosen"], "chosen", source), _text(row["rejected"], "rejected", source)
    if type(chosen) is not type(rejected):
        raise RowError(
            source,
            "rejected",
            f"is {_name(rejected)} where chosen is {_name(chosen)}, expected the same kind",
            "Write both as plain text or both as messages",
        )
    if chosen == rejected:
        raise RowError(source, "rejected", "is the same as chosen: there is nothing to prefer", "Drop this row")
    if columns == PAIRED:
        prompt = _text(row["prompt"], "prompt", source)
        if _is_repeated(prompt, chosen, rejected):
            prompt, chosen, rejected = _split_prompt(chosen, rejected)
    else:
        prompt, chosen, rejected = _split_prompt(chosen, rejected)
        for field, rest in (("chosen", chosen), ("rejected", rejected)):
            if not rest or (isinstance(rest, str) and not rest.strip()):
                raise RowError(
                    source,
                    field,
                    "ends where chosen and rejected begin to differ, expected a completion after the shared prompt",
                    "Add it, or give the prompt in a column of its own",
                )
    _check_prompt(prompt, source, "chosen and rejected share no leading message" if columns == IMPLICIT else "")
    _check_completion(chosen, "chosen", prompt, source)
    _check_completion(rejected, "rejected", prompt, source)
    return [Feedback(prompt, chosen, True, source, True), Feedback(prompt, rejected, False, source, True)]


def _column_set(row: Mapping[str, Any], source: str) -> tuple[str, ...]:
    # Tables fill the columns that a row lacks with nulls, so nulls are passed over first; a row that has a
    # column set only with its nulls is told about the null.
    for names in ({k for k, v in row.items() if v is not None}, set(row)):
        unpaired, paired = names.issuperset(UNPAIRED), names.issuperset(IMPLICIT)
        if unpaired and paired:
            raise RowError(
                source,
                "",
                "has both completion and label, and chosen and rejected, expected one or the other",
                "Drop the columns that are not meant for training",
            )
        if unpaired:
            return UNPAIRED
        if paired:
            return PAIRED if "prompt" in names else IMPLICIT

    raise _unknown_columns(row, source)


def _unknown_columns(row: Mapping[str, Any], source: str) -> RowError:
    """Name the column that was probably meant, judged by the set that most columns are of, or nearly."""

    def nearest(columns: tuple[str, ...]) -> dict[str, str | None]:
        others = [str(k) for k in row if k not in columns]
        return {c: c if c in row else next(iter(difflib.get_close_matches(c, others, 1)), None) for c in columns}

    expected = max((UNPAIRED, PAIRED), key=lambda columns: sum(v is not None for v in nearest(columns).values()))
    meant = nearest(expected)
    found = f"found {', '.join(map(str, row)) or 'none'}"
    if not any(meant.values()):
        return RowError(source, "", f"unknown columns: {found}", f"Rename them; expected {_column_sets()}")
    # A misspelt column first; a pair does without a prompt.
    absent = min((c for c in expected if c not in row), key=lambda c: (meant[c] is None, c == "prompt"))
    remedy = f"Rename {meant[absent]!r} to {absent!r}" if meant[absent] else "Add it"
    return RowError(source, absent, f"no such column: {found}, expected {', '.join(expected)}", remedy)


def _column_sets() -> str:
    return "; or ".join(", ".join(columns) for columns in (UNPAIRED, PAIRED, IMPLICIT))


def _label(value: Any, source: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        remedy = "Write true (preferred) or false (dispreferred) without quotes"
    else:
        remedy = "Write true for a preferred completion and false for a dispreferred one, as in 1 -> true, 0 -> false"
    raise RowError(source, "label", f"is {_name(value)}, expected true or false", remedy)


def _text(value: Any, field: str, source: str) -> Text:
    """Plain text or messages, whichever it is, checked."""
    if isinstance(value, str):
        _check_unicode(value, field, source)
        return value
    if not isinstance(value, list):
        raise RowError(
            source,
            field,
            f"is {_name(value)}, expected text or a list of messages",
            'Write plain text, or [{"role": "user", "content": "..."}]',
        )
    return [_message(m, f"{field}[{i}]", source) for i, m in enumerate(value)]


def _message(message: Any, field: str, source: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(
            source, field, f"is {_name(message)}, expected a message", 'Write {"role": "user", "content": "..."}'
        )
    message = {k: v for k, v in message.items() if v is not None}  # tables fill absent keys with nulls
    for key in ("role", "content"):
        if key not in message:
            raise RowError(
                source,
                field,
                f'the message has no "{key}": found {", ".join(map(str, message)) or "none"}',
                'Every message needs "role" and "content"',
            )
        if not isinstance(message[key], str):
            raise RowError(
                source, f"{field}.{key}", f"is {_name(message[key])}, expected text", "Only text can be trained on"
            )
        _check_unicode(message[key], f"{field}.{key}", source)
    return message


def _check_unicode(text: str, field: str, source: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            source,
            field,
            f"character {error.start + 1} is half of a surrogate pair, expected valid Unicode",
            "An emoji was probably cut in two when the data was made: repair the text or drop the row",
        ) from error


def _check_prompt(prompt: Text, source: str, problem: str = "") -> None:
    if prompt == []:
        problem = problem or "is an empty list"
        raise RowError(source, "prompt", f"{problem}, expected at least one message", "Add the user's message")


def _check_completion(completion: Text, field: str, prompt: Text, source: str) -> None:
    if type(completion) is not type(prompt):
        raise RowError(
            source,
            field,
            f"is {_name(completion)} where the prompt is {_name(prompt)}, expected the same kind",
            "Write both as plain text or both as messages",
        )
    if isinstance(completion, str):
        if not completion.strip():
            raise RowError(source, field, "is empty, expected a completion", "Fill it in or drop the row")
        return
    if not completion:
        raise RowError(
            source, field, "has no message after the prompt, expected the assistant's", "Fill it in or drop the row"
        )
    for i, message in enumerate(completion):
        if message["role"] != "assistant":
            raise RowError(
                source,
                field,
                f"holds a message of the role {message['role']!r}, expected only the assistant's",
                "Everything in a completion is trained on: move what comes before the last answer into the prompt",
            )
        if not message["content"].strip():
            raise RowError(
                source, f"{field}[{i}].content", "is empty, expected a completion", "Fill it in or drop the row"
            )


def _is_repeated(prompt: Text, chosen: Text, rejected: Text) -> bool:
    """Whether a plain-text prompt is there once more as a message that both completions begin with.

    Many published pairs are kept so: `prompt` is the question, `chosen` and `rejected` are whole conversations.
    """
    if not isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
        return False
    shared = chosen[: common_length(chosen, rejected)]
    return any(message["content"].strip() == prompt.strip() for message in shared)


def _split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The longest common beginning as the prompt, and what is left of each."""
    size = common_length(chosen, rejected)
    # A space before the first difference belongs to the completion, as in " Paris": most tokenizers glue it there.
    if isinstance(chosen, str) and chosen[:size].endswith(" "):
        size -= 1
    return chosen[:size], chosen[size:], rejected[size:]


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items (characters, messages, token ids) two sequences share."""
    if a == b[: len(a)]:  # the usual case, and quick
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _name(value: Any) -> str:
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
