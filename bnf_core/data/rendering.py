"""From a row of feedback to text: messages through the chat template, and all that the row says found again in what it
wrote.

The text of a prompt is what generation starts from, with the assistant's turn opened, and the completion follows it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from bnf_core.config import DataConfig, Template
from bnf_core.data.messages import REASONING, Message, RowError, Text, Tool
from bnf_core.data.records import Feedback, common_length
from bnf_core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

R = TypeVar("R")

READ = {"role", "content", "tool_calls", "train", *REASONING, "id", "tool_call_id"}  # or nothing that is said
THINKING = re.compile(r"</?think(?:ing)?>")
REMEDY = (
    "Set data.template_kwargs (such as enable_thinking: true) or data.chat_template so that it is written, take it out "
    "of the row, or give the row as plain text"
)


@dataclass(frozen=True)
class Chat:
    """How messages become text, besides what the tokenizer brings."""

    template: str | None = None  # Jinja, or the name of one of the model's templates; None: the model's own
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # what the template is given; a row's own come over them
    day: date | None = None  # what a template that asks for the date is told; None: today

    @classmethod
    def of(cls, template: str | None, kwargs: Mapping[str, Any], day: str | None = None) -> "Chat":
        """As the settings say.

        Args:
            template: a template's file, its text or a name.
            day: as 2025-12-31.
        Raises:
            UserError: the file cannot be read.
        """
        if template is not None and "{" not in template:
            path = Path(template).expanduser()
            if path.suffix or path.is_file():
                try:
                    template = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError) as error:
                    raise UserError(f"chat_template is {path}: the file cannot be read: {error}") from error
        return cls(template, kwargs, None if day is None else date.fromisoformat(day))


def chat_of(data: DataConfig) -> Chat:
    """`Chat.of` these settings."""
    return Chat.of(data.chat_template, data.template_kwargs, data.date)


class Turn(NamedTuple):
    """One assistant's turn that is trained, by its characters."""

    start: int
    end: int


class Rendered(NamedTuple):
    """A row as text, before tokenisation."""

    prompt: str  # what generation starts from
    whole: str  # prompt and completion, up to and with its end of turn
    templated: bool = False
    ended: bool = False  # whether the end of turn is there
    reopened: bool = False  # whether the template writes the finished turn's beginning otherwise than the opened one's
    turns: tuple[Turn, ...] = ()  # what is trained of the completion; empty: all of it


class Renderer:
    """The text of rows under one tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer.
        template: when to use the chat template, as `tokenization.tokenize` says.
        chat: which, and with what.
    """

    def __init__(self, tokenizer: "Tokenizer", template: Template = "auto", chat: Chat | None = None):
        self._tokenizer, self._template, self._chat = tokenizer, template, chat or Chat()
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.all_special_tokens) - {tokenizer.unk_token}
        special |= {tokenizer.eos_token} if tokenizer.eos_token else set()  # some use one token as EOS and unknown
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) or "(?!)")
        self._sources: dict[bool, str] = {}  # the template's text, by whether there are tools
        self.unused: set[str] = set()  # keys of messages and arguments of the template that it does not write

    def prompt(
        self, prompt: Text, source: str, tools: list[Tool] | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[str, bool]:
        """What generation starts from, and whether the chat template wrote it.

        Raises:
            RowError: the template refuses the prompt or leaves out a part of it.
            UserError: a template is needed and there is none.
        """
        if not self._is_templated(prompt, source, tools):
            return str(prompt), False
        messages = _messages(prompt, "user")
        text, _ = self._first_whole(lambda form: self._opened(form, messages, tools, kwargs, source), messages)
        return text, True

    def text(self, messages: list[Message], *, opened: bool) -> str:
        """Messages as the template writes them, whatever it leaves out.

        Args:
            opened: with the beginning of the assistant's next turn.
        Raises:
            RowError: the template refuses them.
            UserError: there is none.
        """
        return self._apply(_Form(False, False, False), messages, None, None, "messages", opened=opened)

    def row(self, row: Feedback) -> Rendered:
        """Prompt and completion.

        Raises:
            RowError: the template refuses the row, leaves out a part of it, or writes the prompt otherwise once a
                completion follows.
            UserError: a template is needed and there is none.
        """
        if not self._is_templated(row.prompt, row.source, row.tools):
            return Rendered(str(row.prompt), str(row.prompt) + str(row.completion))
        prompt, completion = _messages(row.prompt, "user"), _messages(row.completion, "assistant")
        rendered = self._first_whole(lambda form: self._row(form, prompt, completion, row), prompt + completion)
        self._note_unused(prompt + completion, row, rendered.whole)
        return rendered

    def _note_unused(self, messages: list[Message], row: Feedback, text: str) -> None:
        template = self._source(row.tools)
        others = [(key, value) for message in messages for key, value in message.items() if key not in READ]
        given = {**self._chat.kwargs, **(row.template_kwargs or {})}
        for key, value in [*others, *((key, None) for key in given)]:
            if not re.search(rf"\b{re.escape(key)}\b", template) and not (isinstance(value, str) and value in text):
                self.unused.add(key)

    def turn_end(self) -> str | None:
        """The special token that ends an assistant's turn under this template; None: none does, or it cannot be
        told."""
        if self._template == "plain" or not self._has_template():
            return None
        try:
            rendered = self.row(
                Feedback([{"role": "user", "content": "1"}], [{"role": "assistant", "content": "2"}], True, "")
            )
        except UserError:
            return None
        return self._special.findall(rendered.whole)[-1] if rendered.ended else None

    # One row

    def _row(self, form: "_Form", prompt: list[Message], completion: list[Message], row: Feedback) -> Rendered:
        given = (row.tools, row.template_kwargs, row.source)
        opened, behind_prompt = self._opened(form, prompt, *given)
        whole = self._apply(form, prompt + completion, *given, opened=False)
        reopened = not whole.startswith(opened)
        if reopened:
            whole = opened + whole[self._finished(form, prompt, opened, whole, behind_prompt, given) :]
        ends: list[int] = []
        at = len(opened)
        for i, message in enumerate(completion):
            try:
                at = self._find_message(message, whole, at, f"completion[{i}]", row.source)
            except RowError:
                if i:
                    raise  # an opened turn may hold the beginning of its text, such as <think>
                at = max(at, self._find_message(message, whole, behind_prompt, f"completion[{i}]", row.source))
            ends.append(at)
        end = self._end(whole, ends[-1], len(whole), completion[-1])
        if end is None:
            closed = self._apply(form, prompt, *given, opened=False)
            # A template that opens a turn whether or not it is asked to has opened another one here.
            another = common_length(opened[::-1], whole[: ends[-1] - 1 : -1]) if closed == opened else 0
            whole = whole[: len(whole) - another]
        else:
            whole = whole[:end]
        turns = self._turns(form, prompt, completion, whole, ends, given) if len(completion) > 1 else ()
        return Rendered(opened, whole, True, end is not None, reopened, turns)

    def _opened(
        self,
        form: "_Form",
        prompt: list[Message],
        tools: list[Tool] | None,
        kwargs: Mapping[str, Any] | None,
        source: str,
    ) -> tuple[str, int]:
        """The prompt with its opened turn, and where its last message's text ends."""
        text = self._apply(form, prompt, tools, kwargs, source, opened=True)
        for i, tool in enumerate(tools or ()):
            name = tool.get("function", tool)["name"]
            if name not in text:
                raise _omission(source, f"tools[{i}]", f"the tool {name!r}", "")
        at = 0
        for i, message in enumerate(prompt):
            # The system's message may be written anywhere: some templates put it into a user's, the last one even.
            anywhere = message["role"] in ("system", "developer")
            end = self._find_message(message, text, 0 if anywhere else at, f"prompt[{i}]", source)
            at = at if anywhere else end
        return text, at

    def _finished(
        self,
        form: "_Form",
        prompt: list[Message],
        opened: str,
        whole: str,
        behind_prompt: int,
        given: tuple[Any, Any, str],
    ) -> int:
        """Where the completion begins in a text whose turn does not begin as the opened one: behind what the beginnings
        share. Before the turn both must be the same."""
        closed = self._apply(form, prompt, *given, opened=False)
        # A template that always opens a turn, or never, does not show where it begins: behind the last message's text.
        before = behind_prompt if closed == opened else _common_pieces(closed, opened)
        rest = "" if closed == opened else closed[before:]
        if len(opened) <= before or self._special.sub("", rest).strip() or whole[:before] != opened[:before]:
            raise RowError(
                given[2],
                "prompt",
                "the chat template writes it differently once a completion follows, expected the same beginning",
                "Check the order of the roles, or give the row as plain text",
            )
        return _common_pieces(opened, whole)

    def _turns(
        self,
        form: "_Form",
        prompt: list[Message],
        completion: list[Message],
        whole: str,
        ends: Sequence[int],
        given: tuple[Any, Any, str],
    ) -> tuple[Turn, ...]:
        """The assistant's turns that are trained, each from where generation would start it up to its end."""
        turns = []
        for i, message in enumerate(completion):
            if message["role"] != "assistant" or not message.get("train", True):
                continue
            before = prompt + completion[:i]
            opened = self._apply(form, before, *given, opened=True)
            limit = len(whole)
            if i + 1 < len(completion):
                alone = self._apply(form, [*before, message], *given, opened=False)
                limit = _common_pieces(alone, whole)
                # Some end a turn in one way in the midst, and in another at the end.
                if limit < len(alone) and (end := self._special.match(whole, limit)):
                    limit = end.end()
                if limit < ends[i]:  # written otherwise while it is the last: its end is that of any turn
                    end_of_turn = self.turn_end()
                    at = -1 if end_of_turn is None else whole.find(end_of_turn, ends[i], ends[i + 1])
                    limit = at if at < 0 else at + len(end_of_turn or "")
            if not whole.startswith(opened) or limit < ends[i]:
                raise RowError(
                    given[2],
                    f"completion[{i}]",
                    "the chat template writes this turn differently once others follow, expected it as generation "
                    "starts it",
                    "Make a row of each turn, with those before it in the prompt, or set data.chat_template",
                )
            turns.append(Turn(len(opened), self._end(whole, ends[i], limit, message) or limit))
        return tuple(turns)

    def _end(self, text: str, at: int, limit: int, message: Message) -> int | None:
        """Behind the token that ends the turn of a message whose text ends at `at`; None: there is none."""
        found = list(self._special.finditer(text, at, limit))
        own = next((m.group() for m in self._special.finditer(text, max(0, at - 64), at) if m.end() == at), None)
        if own is not None and (not found or own == found[0].group()):
            return at  # the text of the message has its end of turn already
        if not found:
            return None
        if "tool_calls" in message:  # calls may have special tokens behind them
            last = [match for match in found if not self._special.sub("", text[match.end() : limit]).strip()]
            return last[-1].end() if last else found[0].end()
        return found[0].end()

    # The template

    def _is_templated(self, prompt: Text, source: str, tools: list[Tool] | None) -> bool:
        if isinstance(prompt, str) and self._template != "chat":
            if tools:
                raise RowError(
                    source,
                    "tools",
                    "are given to a plain-text prompt, which no chat template writes",
                    "Give the row as messages, set data.template to chat, or drop the column",
                )
            return False
        if self._template == "plain":
            raise RowError(
                source, "prompt", "is a list of messages, expected plain text", "Set data.template to auto or chat"
            )
        if not self._has_template():
            raise UserError(
                f"{source}: the tokenizer has no chat template, which messages and data.template=chat need. Take the "
                "instruction-tuned model or its chat_template.jinja, set data.chat_template, or give prompts and "
                "completions as plain text."
            )
        return True

    def _has_template(self) -> bool:
        return bool(self._tokenizer.chat_template or self._chat.template)

    def _apply(
        self,
        form: "_Form",
        messages: list[Message],
        tools: list[Tool] | None,
        kwargs: Mapping[str, Any] | None,
        source: str,
        *,
        opened: bool,
    ) -> str:
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    [form(message) for message in messages],
                    tools=cast(Any, tools),
                    chat_template=self._source(tools),
                    tokenize=False,
                    add_generation_prompt=opened,
                    **{**self._chat.kwargs, **(kwargs or {})},
                )
            )
        except UserError:
            raise
        except Exception as error:  # a template is a program, which can fail in any way
            roles = ", ".join(message["role"] for message in messages)
            raise RowError(
                source,
                "prompt",
                f"the chat template refuses the roles {roles}: {' '.join(str(error).split()) or type(error).__name__}",
                "Give the roles that the model's template asks for, in its order",
            ) from error
        if form.is_printed(text):
            raise RowError(
                source,
                "prompt",
                "the chat template writes an object as Python prints it, expected what the messages say",
                "Set data.chat_template to a template for such messages, or give the row as plain text",
            )
        return text

    def _source(self, tools: list[Tool] | None) -> str:
        """The template's text: of several the one that is named, or that fits."""
        key = tools is not None
        if key not in self._sources:
            own, chosen = self._tokenizer.chat_template, self._chat.template
            if chosen is not None and "{" not in chosen and not (isinstance(own, dict) and chosen in own):
                names = ", ".join(own) if isinstance(own, dict) else "one without a name"
                raise UserError(
                    f"data.chat_template is {chosen!r}: expected a template's file or text, or the name of one of the "
                    f"model's, which has {names}"
                )
            self._sources[key] = _dated(self._tokenizer.get_chat_template(chosen, tools), self._chat.day)
        return self._sources[key]

    # What must be found again

    def _find_message(self, message: Message, text: str, at: int, name: str, source: str) -> int:
        """Where the text of a message ends that is looked for from `at` on.

        Raises:
            RowError: a part of it is not there.
        """
        end, thoughts = at, (at, at)
        for key in REASONING:
            if message.get(key, "").strip():
                thoughts = _require(text, message[key], at, source, f"{name}.{key}", "the reasoning")
                end = max(end, thoughts[1])
        content = message["content"]
        if content.strip():
            parts = [content] if _find(text, content, at) else THINKING.split(content)
            behind = at
            for part in filter(str.strip, parts):
                span = _require(text, part, behind, source, f"{name}.content", "the text")
                if span[0] < thoughts[1] and thoughts[0] < span[1]:  # the same words once more
                    span = _require(text, part, thoughts[1], source, f"{name}.content", "the text")
                behind = span[1]
            end = max(end, behind)
        for i, call in enumerate(message.get("tool_calls", ())):
            function = call["function"]
            for leaf in (function["name"], *_leaves(function["arguments"])):
                span = _require(text, leaf, at, source, f"{name}.tool_calls[{i}]", "the tool call")
                end = max(end, span[1])
        return end

    def _first_whole(self, render: "Callable[[_Form], R]", messages: list[Message]) -> R:
        """What `render` makes of the first form in which the template leaves nothing out.

        Raises:
            RowError: there is none; of the form in which the most was found.
        """
        errors: list[RowError] = []
        for form in _forms(messages):
            try:
                return render(form)
            except RowError as error:
                errors.append(error)
        raise max(errors, key=_how_far)


def _how_far(error: RowError) -> tuple[bool, list[int]]:
    """How much of a row was found before this was missed."""
    return error.field.startswith("completion"), [int(number) for number in re.findall(r"\d+", error.field)]


class _Form(NamedTuple):
    """One of the forms in which templates take what a message says."""

    parts: bool  # content as a list of parts, instead of text
    text_arguments: bool  # those of tool calls as JSON text, instead of an object
    without_content: bool  # beside tool calls no content, instead of an empty one

    def __call__(self, message: Message) -> Message:
        result: Message = {key: value for key, value in message.items() if key != "train"}
        if self.without_content and "tool_calls" in message and not message["content"]:
            del result["content"]
        elif self.parts:
            result["content"] = [{"type": "text", "text": message["content"]}]
        if self.text_arguments and "tool_calls" in message:
            result["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": _json(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        return result

    def is_printed(self, text: str) -> bool:
        """Whether a template that takes another form has written one of these objects itself."""
        return self.parts and re.search(r"""\[\{['"]type['"]: ?['"]text['"]""", text) is not None


def _forms(messages: Sequence[Message]) -> Iterator[_Form]:
    """Those that differ for these messages, the usual one first."""
    calls = any("tool_calls" in message for message in messages)
    empty = any("tool_calls" in message and not message["content"] for message in messages)
    for parts in (False, True):
        for text_arguments in (False, True)[: 1 + calls]:
            for without_content in (False, True)[: 1 + empty]:
                yield _Form(parts, text_arguments, without_content)


def _messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _require(text: str, part: str, at: int, source: str, name: str, what: str) -> tuple[int, int]:
    found = _find(text, part, at)
    if found is None:
        raise _omission(source, name, what, part)
    return found


def _omission(source: str, name: str, what: str, part: str) -> RowError:
    excerpt = " ".join(part.split())
    excerpt = f" {excerpt[:40] + '…' if len(excerpt) > 40 else excerpt!r}" if excerpt else ""
    return RowError(
        source, name, f"the chat template leaves out {what}{excerpt}, expected all that the row says", REMEDY
    )


def _find(text: str, part: str, at: int) -> tuple[int, int] | None:
    """Where a part stands, white space aside, as it is or as JSON writes it."""
    part = part.strip()
    escaped = _json(part)[1:-1]
    for spelling in dict.fromkeys((part, escaped, json.dumps(part)[1:-1])):
        if (start := text.find(spelling, at)) >= 0:
            return start, start + len(spelling)
    match = re.compile(r"\s*".join(map(re.escape, part.split()))).search(text, at)
    return match.span() if match else None


def _leaves(value: Any) -> Iterator[str]:
    """The names and values that the arguments of a call consist of."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _common_pieces(a: str, b: str) -> int:
    """How many leading characters two texts share, where a tag such as <think> is shared as a whole or not at all."""
    size = common_length(a, b)
    opening = max(a.rfind("<", 0, size), b.rfind("<", 0, size)) if size < max(len(a), len(b)) else -1
    tag = re.compile(r"<[^<>\s]*>")
    cut = opening >= 0 and any((match := tag.match(text, opening)) and match.end() > size for text in (a, b))
    return opening if cut else size


# The date


def _dated(template: str, day: date | None) -> str:
    """A template whose `strftime_now` tells this day instead of today."""
    if day is None or "strftime_now" not in template:
        return template
    moment = datetime(day.year, day.month, day.day)
    # Jinja's own words, since transformers lets no function into a template. The newline keeps lines as they were.
    told = "".join(
        f"|replace('%{letter}', {_json(moment.strftime('%' + letter))})"
        for letter in ("-d", "-m", *"aAbBcdHIjmMpSuUVwWxXyYGzZ")
    )
    return f"{{% macro strftime_now(format) %}}{{{{ format{told}|replace('%%', '%') }}}}{{% endmacro %}}\n{template}"


def asks_for_date(tokenizer: "Tokenizer", chat: Chat) -> bool:
    """Whether the same messages are other text on another day."""
    return "strftime_now" in json.dumps([tokenizer.chat_template, chat.template])
