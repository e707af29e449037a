"""One row of feedback as people keep it, checked, and turned into labelled completions.

The column sets are TRL's: unpaired (prompt, completion, label), paired (prompt, chosen, rejected) and implicit
prompt (chosen, rejected); and a prompt with several completions. Each is plain text or chat messages.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bnf_core.data.labels import Labels, Value
from bnf_core.data.messages import (
    Cell,
    RowError,
    Text,
    Tool,
    for_template,
    named,
    plain,
    template_kwargs_of,
    text_or_messages,
    tools_of,
)

UNPAIRED = ("prompt", "completion", "label")
PAIRED = ("prompt", "chosen", "rejected")
IMPLICIT = ("chosen", "rejected")
SEVERAL = ("prompt", "completions")
COLUMN_SETS = (UNPAIRED, PAIRED, IMPLICIT, SEVERAL)
TOKENS = ("prompt_ids", "completion_ids")  # of a completion that a model drew, beside its text
BESIDE = {*TOKENS, "weight", "tools", "chat_template_kwargs"}  # what any of them may have as well
USED = {*BESIDE, *(column for columns in COLUMN_SETS for column in columns)}
TEXTS = ("completion", "response", "text", "answer", "output", "content")  # the names of what an object in a list says


class TokenIds(NamedTuple):
    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class Feedback:
    """One completion of one prompt, and whether it is wanted. Prompt and completion are of the same kind."""

    prompt: Text
    completion: Text  # messages begin and end with the assistant's
    label: bool  # True: chosen, False: rejected
    source: str  # file:line, such as feedback.jsonl:17
    paired: bool = False  # whether the same row gives its partner
    tools: list[Tool] | None = None  # what the chat template is given besides the messages
    template_kwargs: dict[str, Any] | None = None  # the same, over those of the run
    weight: float = 1.0  # how much it counts: the size of a graded label times the row's weight
    score: Value | None = None  # to be compared with those of the prompt's other rows, which then gives its label
    ids: TokenIds | None = None  # the tokens that a model drew, of which the texts are what they say

    def labelled(self, label: float) -> "Feedback":
        """With a label from −1 to 1, in what is its own weight so far."""
        return replace(self, label=label > 0, weight=abs(label) * self.weight, score=None)


class _Shared(NamedTuple):
    """What all completions of a row have alike."""

    prompt: Text
    source: str
    tools: list[Tool] | None
    template_kwargs: dict[str, Any] | None
    weight: float

    def feedback(self, completion: Text, label: float, score: Value | None = None, *, paired: bool = False) -> Feedback:
        strength, kwargs = abs(label) * self.weight, self.template_kwargs
        return Feedback(self.prompt, completion, label > 0, self.source, paired, self.tools, kwargs, strength, score)


def parse_row(row: Any, source: str, labels: Labels | None = None, *, is_plain: bool = False) -> list[Feedback]:
    """Check one row and turn it into labelled completions: one, two of a pair, or several. Other columns are ignored.

    Those whose label or weight is 0 have the weight 0.

    Args:
        row: a mapping from column to value, as read from JSON.
        source: file:line, for messages.
        labels: how labels are read; default: from the column `label`.
        is_plain: whether the row is as `messages.plain` gives it.
    Raises:
        RowError: the row is not what any of the column sets asks for.
    """
    labels = labels or Labels()
    if not isinstance(row, Mapping):
        raise RowError(
            source, "", f"found {named(row)}, expected an object with columns", f"The columns are {_column_sets()}"
        )
    if not is_plain:
        row = {column: plain(value) for column, value in row.items()}
    columns = _column_set(row, source, labels)
    beside = (
        tools_of(row.get("tools"), source),
        template_kwargs_of(row.get("chat_template_kwargs"), source),
        _weight(row.get("weight"), source),
    )
    if columns in (UNPAIRED, SEVERAL):
        prompt = text_or_messages(row["prompt"], "prompt", source)
        _check_prompt(prompt, source)
        shared = _Shared(for_template(prompt), source, *beside)
        if columns == SEVERAL:
            return _several(row, shared, labels)
        completion = text_or_messages(row["completion"], "completion", source)
        ids = _token_ids(row, source)
        if ids is None:  # what a model said may be anything
            _check_completion(completion, "completion", prompt, source)
        value = labels.read(row, source)
        label = 1.0 if labels.compares else labels.of([value])[0]
        return [replace(shared.feedback(completion, label, value if labels.compares else None), ids=ids)]
    if labels.rule is not None:
        raise RowError(
            source,
            "",
            f"is a pair, whose completions are chosen and rejected, and data.label is {labels.rule}: expected no rule",
            "Leave out data.label for pairs",
        )
    chosen, rejected = (text_or_messages(row[column], column, source) for column in IMPLICIT)
    if type(chosen) is not type(rejected):
        raise RowError(
            source,
            "rejected",
            f"is {named(rejected)} where chosen is {named(chosen)}, expected the same kind",
            "Write both as plain text or both as messages",
        )
    if chosen == rejected:
        raise RowError(source, "rejected", "is the same as chosen: there is nothing to prefer", "Drop this row")
    if columns == PAIRED:
        prompt = text_or_messages(row["prompt"], "prompt", source)
        if _is_repeated(prompt, chosen, rejected):
            prompt, chosen, rejected = _without_prompt(prompt, chosen, rejected)
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
    shared = _Shared(for_template(prompt), source, *beside)
    return [shared.feedback(chosen, 1.0, paired=True), shared.feedback(rejected, -1.0, paired=True)]


def _several(row: Mapping[str, Any], shared: _Shared, labels: Labels) -> list[Feedback]:
    """The completions of a list, each judged by what it says of itself, or by lists beside it."""
    source, items = shared.source, row["completions"]
    if not isinstance(items, list) or not items:
        raise RowError(source, "completions", f"is {named(items)}, expected a list of completions", "Mend or drop it")
    beside = {
        name: value
        for column, value in row.items()
        if column != "completions" and isinstance(value, list) and len(value) == len(items)
        for name in (column, column.removesuffix("s"))
    }
    completions, values, weights = [], [], []
    for i, item in enumerate(items):
        name = f"completions[{i}]"
        fields = {column: value[i] for column, value in beside.items() if column != "weight"}
        text = item
        if isinstance(item, Mapping) and "role" in item:
            text = [item]
        elif isinstance(item, Mapping):
            fields |= item
            column = next((c for c in TEXTS if item.get(c) is not None), None)
            if column is None:
                found = f"found {', '.join(map(str, item)) or 'none'}, expected one of {', '.join(TEXTS)}"
                raise RowError(source, name, f"has no text: {found}", "Rename it")
            text = item[column]
        completion = text_or_messages(text, name, source)
        _check_completion(completion, name, shared.prompt, source)
        completions.append(completion)
        values.append(labels.read(fields, source, name))
        weights.append(_weight(fields.get("weight"), source, f"{name}.weight"))
    of_each = zip(completions, labels.of(values), weights, strict=True)
    return [shared.feedback(completion, label * weight) for completion, label, weight in of_each]


def _column_set(row: Mapping[str, Any], source: str, labels: Labels) -> tuple[str, ...]:
    # Tables fill the columns that a row lacks with nulls, so nulls are passed over first; a row that has a
    # column set only with its nulls is told about the null.
    for names in ({k for k, v in row.items() if v is not None}, set(row)):
        needed = UNPAIRED if labels.rule is None else UNPAIRED[:2]
        fitting = [columns for columns in (needed, IMPLICIT, SEVERAL) if names.issuperset(columns)]
        if len(fitting) > 1:
            both = ", and ".join(" and ".join(columns[-2:] if columns == UNPAIRED else columns) for columns in fitting)
            raise RowError(
                source,
                "",
                f"has both {both}, expected one or the other",
                "Drop the columns that are not meant for training, or name those that are with data.columns",
            )
        if fitting:
            of = {needed: UNPAIRED, SEVERAL: SEVERAL, IMPLICIT: PAIRED if "prompt" in names else IMPLICIT}
            return of[fitting[0]]

    raise _unknown_columns(row, source)


def _unknown_columns(row: Mapping[str, Any], source: str) -> RowError:
    """Name the column that was probably meant, judged by the set that most columns are of, or nearly."""

    def nearest(columns: tuple[str, ...]) -> dict[str, str | None]:
        others = [str(k) for k in row if k not in columns]
        return {c: c if c in row else next(iter(difflib.get_close_matches(c, others, 1)), None) for c in columns}

    expected = max(
        (UNPAIRED, PAIRED, SEVERAL), key=lambda columns: sum(v is not None for v in nearest(columns).values())
    )
    meant = nearest(expected)
    found = f"found {', '.join(map(str, row)) or 'none'}"
    if not any(meant.values()):
        return RowError(source, "", f"unknown columns: {found}", f"Rename them; expected {_column_sets()}")
    # A misspelt column first; a pair does without a prompt.
    absent = min((c for c in expected if c not in row), key=lambda c: (meant[c] is None, c == "prompt"))
    remedy = f"Rename {meant[absent]!r} to {absent!r}" if meant[absent] else "Add it"
    scores = [column for column, value in row.items() if _is_score(value)]
    if absent == "label" and not meant[absent] and scores:
        remedy = f'Add it, or have it made of a score, as with --data.label "{scores[0]} >= 4"'
    return RowError(source, absent, f"no such column: {found}, expected {', '.join(expected)}", remedy)


def _column_sets() -> str:
    return "; or ".join(", ".join(columns) for columns in COLUMN_SETS)


def _is_score(value: Any) -> bool:
    value = value.meant() if isinstance(value, Cell) else value
    return isinstance(value, int | float) and not isinstance(value, bool)


def _weight(value: Any, source: str, field: str = "weight") -> float:
    value = value.meant() if isinstance(value, Cell) else value
    if value is None:
        return 1.0
    if not _is_score(value) or not 0 <= value <= 1e6:
        problem = f"is {named(value)}, expected a number from 0 to a million"
        raise RowError(source, field, problem, "A row of the weight 2 counts as two do; drop the column for 1")
    return float(value)


def _token_ids(row: Mapping[str, Any], source: str) -> TokenIds | None:
    """Of a row that was sampled; None: it was not."""
    found = {name: row.get(name) for name in TOKENS}
    if any(value is None for value in found.values()):
        return None
    for name, value in found.items():
        if not isinstance(value, list) or not value or not all(type(i) is int and i >= 0 for i in value):
            raise RowError(source, name, f"is {named(value)}, expected a list of token ids", "Mend it or drop it")
    return TokenIds(*(tuple(row[name]) for name in TOKENS))


def _check_prompt(prompt: Text, source: str, problem: str = "") -> None:
    if prompt == []:
        problem = problem or "is an empty list"
        raise RowError(source, "prompt", f"{problem}, expected at least one message", "Add the user's message")


def _check_completion(completion: Text, field: str, prompt: Text, source: str) -> None:
    if type(completion) is not type(prompt):
        raise RowError(
            source,
            field,
            f"is {named(completion)} where the prompt is {named(prompt)}, expected the same kind",
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
    for at, place in ((0, "begins"), (-1, "ends")):
        if (role := completion[at]["role"]) != "assistant":
            raise RowError(
                source,
                field,
                f"{place} with a message of the role {role!r}, expected the assistant's",
                "Only the assistant's messages are trained: move what comes before the first into the prompt, and drop "
                "what comes after the last",
            )
    for i, message in enumerate(completion):
        if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
            raise RowError(
                source, f"{field}[{i}].content", "is empty, expected a completion", "Fill it in or drop the row"
            )
    if not any(message["role"] == "assistant" and message.get("train", True) for message in completion):
        raise RowError(
            source,
            field,
            "none of its turns is to be trained, expected at least one",
            "Set train or weight of a turn, or drop the row",
        )


def _is_repeated(prompt: Text, chosen: Text, rejected: Text) -> bool:
    """Whether a plain-text prompt is there once more, as what both completions begin with or as a message of theirs.

    Many published pairs are kept so: `prompt` is the question, `chosen` and `rejected` are whole conversations.
    """
    if not isinstance(prompt, str):
        return False
    question = prompt.strip()
    if isinstance(chosen, str) and isinstance(rejected, str):
        # As whole words: "1" is no prompt of "12" and "13".
        again = re.compile(rf"\s*{re.escape(question)}(?=\s)" if question else "(?!)")
        return all(again.match(completion) for completion in (chosen, rejected))
    if isinstance(chosen, str) or isinstance(rejected, str):
        return False
    shared = chosen[: common_length(chosen, rejected)]
    return any(message["content"].strip() == question for message in shared)


def _split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The longest common beginning as the prompt, and what is left of each."""
    size = common_length(chosen, rejected)
    # A space before the first difference belongs to the completion, as in " Paris": most tokenizers glue it there.
    if isinstance(chosen, str) and chosen[:size].endswith(" "):
        size -= 1
    return chosen[:size], chosen[size:], rejected[size:]


def _without_prompt(prompt: Text, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The prompt, and both completions without it."""
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        size = len(prompt.strip())
        return prompt.rstrip(), chosen.lstrip()[size:], rejected.lstrip()[size:]
    return _split_prompt(chosen, rejected)


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items (characters, messages, token ids) two sequences share."""
    if a == b[: len(a)]:  # the usual case, and quick
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
