"""A Modelfile for Ollama, whose templates are Go's text/template and not Jinja.

A Jinja template is a program, and is not translated. It is asked instead: from what it writes for a few conversations
follow the texts before and after a system's, a user's and an assistant's message. They are what the Go template
writes, and they are used only where they give, character by character, what Jinja writes for other conversations, up
to the opening of the assistant's turn. What is not of that form (tools, dates, text that depends on the turn's number)
is refused.

Ollama by itself looks for the Jinja template of a GGUF among some twenty that it knows, takes the nearest by edit
distance, and where none is near writes the prompt alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

from bnf_align.run.gguf_writer import adds_bos
from bnf_core.data.messages import Message, RowError
from bnf_core.data.rendering import Chat, Renderer
from bnf_core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTEAD = (
    "export gguf, and write the Modelfile's TEMPLATE yourself, as Ollama's documentation says, or train with "
    "--data.chat-template and one that it can say"
)


@dataclass(frozen=True)
class Turns:
    """What stands around the messages of a conversation."""

    default: str  # at the beginning, without a system's message
    system: tuple[str, str] | None  # before and after the first message, a system's; None: the template takes none
    folded: bool  # whether the user's message after it has no beginning of its own
    user: tuple[str, str]
    assistant: tuple[str, str]
    opened: str  # for the assistant to go on

    def text(self, messages: Sequence[Message]) -> str:
        """As the Go template writes them."""
        has_system = messages[0]["role"] == "system"
        parts = [] if has_system else [self.default]
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        for i, message in enumerate(messages):
            before, after = around[message["role"]]
            inside = self.folded and has_system and i == 1
            parts += ["" if inside else before, message["content"], after]
        return "".join([*parts, self.opened])

    def template(self) -> str:
        """In Go's language."""
        user = self.user[0]
        if self.folded and self.system is not None:
            user = "{{ if not (and $.System (eq $i 1)) }}" + user + "{{ end }}"
        default = "{{ if not .System }}" + self.default + "{{ end }}" if self.default else ""
        turns = [
            ("user", user, self.user[1]),
            ("assistant", *self.assistant),
            *([] if self.system is None else [("system", *self.system)]),
        ]
        written = "{{ else ".join(
            'if eq .Role "' + role + '" }}' + before + "{{ .Content }}" + after for role, before, after in turns
        )
        return default + "{{ range $i, $_ := .Messages }}{{ " + written + "{{ end }}{{ end }}" + self.opened


def modelfile(gguf: str, tokenizer: "PreTrainedTokenizerBase", chat: Chat, stops: Sequence[int]) -> str:
    """
    Args:
        gguf: the file's name, in the same folder.
        chat: the chat template that the model was trained with.
        stops: token ids that end a turn.
    Raises:
        UserError: there is no chat template, or Ollama cannot say it.
    """
    if tokenizer.chat_template is None and chat.template is None:
        raise UserError(f"the model has no chat template, and Ollama needs one: {INSTEAD}")
    found = turns(tokenizer, chat)
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{found.template()}"""']
    if found.system is None:
        lines.insert(1, "# The chat template takes no system message: one that is set has no effect.")
    lines += [f'PARAMETER stop "{text}"' for text in map(str, tokenizer.convert_ids_to_tokens(list(stops)))]
    return "\n".join(lines) + "\n"


def turns(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> Turns:
    """What a chat template writes around messages.

    Raises:
        UserError: that is not all it does.
    """
    day = chat.day or date.today()
    write = _Writer(tokenizer, chat, day)
    try:
        found = _found(write)
        others = [_Writer(tokenizer, chat, day + timedelta(days=400))] if chat.day is None else []
        for messages in _conversations(found.system is not None):
            expected = write(messages, opened=True)
            if any(other(messages, opened=True) != expected for other in others):
                raise _cannot_be_said("it writes the date")
            if found.text(messages) != expected:
                raise _cannot_be_said("what it writes depends on more than the roles")
    except RowError as error:
        raise _cannot_be_said(str(error)) from error
    written = [found.default, *(found.system or ()), *found.user, *found.assistant, found.opened]
    if any(mark in text for text in written for mark in ('"""', "{{", "}}")):
        raise _cannot_be_said("it writes characters that a Modelfile has a use for")
    return found


class _Writer:
    """The chat template, without the BOS that Ollama puts before the text itself."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat: Chat, day: date):
        self._renderer = Renderer(tokenizer, "chat", Chat(chat.template, chat.kwargs, day))
        self._bos = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
        self._eos = str(tokenizer.eos_token or "")

    def __call__(self, messages: Sequence[Message], *, opened: bool = False) -> str:
        text = self._renderer.text(list(messages), opened=opened)
        if not text.startswith(self._bos):
            raise _cannot_be_said(f"it does not begin with {self._bos}, which Ollama would write all the same")
        return text.removeprefix(self._bos)

    def beginning(self, text: str, end: str) -> str:
        """How a message ends with which another text begins: as at the end, but for an EOS after all."""
        for found in (end, end.removesuffix(self._eos)):
            if text.startswith(found):
                return found
        raise _cannot_be_said("a message ends otherwise once others follow")


def _found(write: _Writer) -> Turns:
    """By the conversations whose messages have contents that stand nowhere else.

    Raises:
        UserError: they do not show it.
    """
    system, user, answer, more = (
        Message(role=role, content=f"Content{i}") for i, role in enumerate(("system", "user", "assistant", "user"))
    )
    first, after_user = _around(write, user)
    _, _, after_answer = _around(write, user, answer)
    _, between, before_more, _ = _around(write, user, answer, more)
    after_user, after_answer = write.beginning(between, after_user), write.beginning(before_more, after_answer)
    before_user = before_more.removeprefix(after_answer)
    if not first.endswith(before_user):
        raise _cannot_be_said("the first message begins otherwise than later ones")
    try:
        before_system, after_system, _ = _around(write, system, user)
        folded = not after_system.endswith(before_user)
        around_system = before_system, after_system if folded else after_system.removesuffix(before_user)
    except (RowError, UserError):  # refused, or left out
        around_system, folded = None, False
    return Turns(
        default=first.removesuffix(before_user),
        system=around_system,
        folded=folded,
        user=(before_user, after_user),
        assistant=(between.removeprefix(after_user), after_answer),
        opened=_around(write, user, opened=True)[1].removeprefix(after_user),
    )


def _around(write: _Writer, *messages: Message, opened: bool = False) -> list[str]:
    """The texts before, between and after what the messages say."""
    rest, texts = write(messages, opened=opened), []
    for message in messages:
        before, found, rest = rest.partition(message["content"])
        if not found or message["content"] in rest:
            raise _cannot_be_said(f"it does not write each {message['role']}'s message once")
        texts.append(before)
    return [*texts, rest]


def _conversations(with_system: bool) -> list[list[Message]]:
    """Up to where the assistant's turn is opened."""
    said = ["What is 2 + 2?", "It's 4.\n\nReally: {4}.", 'And "3" + <b>1</b>?', "4 | 4", "x", "The same.", "Why?"]
    turns = [Message(role="user" if i % 2 == 0 else "assistant", content=content) for i, content in enumerate(said)]
    system = Message(role="system", content="Be brief.\nBe kind.")
    begun = [turns[:count] for count in (1, 3, 5, 7)]
    return begun + ([[system, *some] for some in begun] if with_system else [])


def _cannot_be_said(why: str) -> UserError:
    return UserError(f"the chat template cannot be said in Ollama's language: {why}. Instead {INSTEAD}")
