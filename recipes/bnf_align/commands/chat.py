"""`bnf chat`: the base model and the aligned one, side by side.

Of a run that trained an adapter one model is in memory, and its adapter is switched on and off.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from bnf_align.run.completions import completions, draw
from bnf_align.run.finished import FinishedRun, finished_run
from bnf_align.run.run_folder import recorded_setting
from bnf_core import registry
from bnf_core.config import HardwareConfig, SamplingConfig
from bnf_core.data.messages import Message
from bnf_core.data.rendering import Chat
from bnf_core.data.tokenization import load_tokenizer, prompt_ids, stop_ids
from bnf_core.errors import UserError
from bnf_core.models.model_folder import resolve_model
from bnf_core.protocol import Engine
from bnf_core.sampling import Completion

HELP = """/reset              forget the conversation
/system TEXT        begin anew, with a system message; without TEXT: with none
/set NAME VALUE     temperature, top_p, top_k, min_p, repetition_penalty or max_tokens
/quit               end, as Ctrl-D does; Ctrl-C stops an answer
//text              say /text"""


@dataclass
class ChatConfig:
    """Talk to the base model and to the aligned one, side by side. Each keeps to its own answers. Without a terminal,
    lines are read from the standard input."""

    run: str
    """The folder of a run."""
    system: str | None = None
    """A system message."""
    sample: SamplingConfig = field(default_factory=SamplingConfig)
    max_tokens: int = 512
    """Longest answer."""
    seed: int = 0
    """Of the samples."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: expected an integer of at least {least}")


@dataclass
class Side:
    """One of the two, with its conversation."""

    name: str
    engine: Engine
    switched: Callable[[], AbstractContextManager[None]]  # within it the engine is this one
    messages: list[Message]


class Conversation:
    """What both are told, and what each answers.

    Raises:
        UserError: the model, its tokenizer or its chat template is not there, or the adapter does not fit.
    """

    def __init__(self, run: FinishedRun, config: ChatConfig):
        self.sampling, self.max_tokens, self.seed = config.sample, config.max_tokens, config.seed
        source = resolve_model(run.model)
        self._chat: Chat = run.chat()
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(source)
        self._stops = stop_ids(self._tokenizer, source, run.trained, chat=self._chat)
        self._turn = 0
        hardware = config.hardware

        def load(model: Path, adapter: Path | None = None) -> Engine:
            backend = registry.get(hardware.backend)
            return backend.load(model, device=hardware.device, dtype=hardware.dtype, adapter=adapter)

        if run.adapter is not None:
            engine = load(source, run.adapter)
            self.sides = [Side("base", engine, engine.adapter_off, []), Side("aligned", engine, nullcontext, [])]
        else:
            models = {"base": source, "aligned": run.trained}
            self.sides = [Side(name, load(model), nullcontext, []) for name, model in models.items()]
        self.begin(config.system)

    def begin(self, system: str | None) -> None:
        """Anew."""
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        for side in self.sides:
            side.messages = list(self._system)

    def reset(self) -> None:
        self.begin(self._system[0]["content"] if self._system else None)

    def say(self, text: str, show: Callable[[str, str], None]) -> dict[str, Completion]:
        """Both answers, by name; they become part of the conversation once both are there.

        Args:
            show: called as an answer grows, with whose it is and the answer so far.
        Raises:
            UserError: the conversation is longer than the model has positions, or the chat template refuses it.
        """
        asked: Message = {"role": "user", "content": text}
        answers = {}
        for side in self.sides:
            ids = prompt_ids([*side.messages, asked], self._tokenizer, "chat", "the conversation", self._chat)
            rows = completions(
                self._tokenizer,
                [ids],
                1,
                self.sampling,
                max_tokens=self.max_tokens,
                stops=self._stops,
                seed=self.seed,
                rounds=[self._turn],
                on_token=lambda row, side=side: show(side.name, row.settled),  # type: ignore[misc]
            )
            with side.switched():
                draw(side.engine, rows, 1)
            (answers[side.name],) = rows
        self._turn += 1
        for side in self.sides:
            side.messages += [asked, {"role": "assistant", "content": answers[side.name].text}]
        return answers

    def set(self, name: str, value: str) -> None:
        """A setting of how tokens are chosen, or `max_tokens`.

        Raises:
            ValueError: there is none of that name, or the value does not fit.
        """
        kinds = {f.name: type(getattr(self.sampling, f.name)) for f in fields(SamplingConfig) if f.name != "stop"}
        if name == "max_tokens" and value.isdecimal() and int(value) >= 1:
            self.max_tokens = int(value)
        elif name in kinds:
            self.sampling = replace(self.sampling, **{name: kinds[name](value)})
        else:
            raise ValueError(f"{name} {value}: expected one of {', '.join(kinds)}, max_tokens, and its value")


def chat(config: ChatConfig, console: Console) -> None:
    """Until the end of the input.

    Raises:
        UserError: no run, or what `Conversation` says; without a terminal also a line that cannot be answered.
    """
    with finished_run(Path(config.run), whole=False) as run:
        conversation = Conversation(run, config)
    if console.is_terminal:
        console.print(f"{run.model} beside {run.trained}; /help for commands", highlight=False, markup=False)
    for line in _lines(console):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command in COMMANDS:
            try:
                COMMANDS[command](conversation, rest.strip(), console)
            except ValueError as error:
                console.print(f"{error}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        elif line.startswith("/") and not line.startswith("//"):
            console.print(f"unknown command {command}: /help lists them", style="yellow", highlight=False, markup=False)
        else:
            _answer(conversation, line.removeprefix("/") if line.startswith("//") else line, console)


def _lines(console: Console) -> Iterator[str]:
    """What is typed, or what the standard input holds, without empty lines."""
    if console.is_terminal:
        with suppress(ImportError):  # with it, the arrows bring back earlier lines
            import readline  # noqa: F401
    while True:
        try:
            line = input("you> ") if console.is_terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        except UnicodeDecodeError as error:
            raise UserError(f"the standard input is not UTF-8: {error}") from error
        if not line and not console.is_terminal:
            return
        if line.strip():
            yield line.strip()


def _answer(conversation: Conversation, text: str, console: Console) -> None:
    if not console.is_terminal:
        for name, answer in conversation.say(text, lambda name, text: None).items():
            print(f"{name}: {answer.text}", flush=True)
        return
    shown = {side.name: "" for side in conversation.sides}
    try:
        with Live(_side_by_side(shown), console=console, transient=True, auto_refresh=False) as live:

            def show(name: str, text: str) -> None:
                shown[name] = text
                live.update(_side_by_side(shown), refresh=True)

            answers = conversation.say(text, show)
        shown = {name: answer.text + (" […]" if answer.cut else "") for name, answer in answers.items()}
        console.print(_side_by_side(shown))
    except KeyboardInterrupt:
        console.print(_side_by_side(shown))
        console.print("stopped: neither question nor answers are remembered", style="yellow")
    except UserError as error:
        console.print(f"{error}. /reset begins anew", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _side_by_side(texts: Mapping[str, str]) -> Table:
    table = Table(expand=True, show_lines=False)
    for name in texts:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts.values()))
    return table


def _reset(conversation: Conversation, rest: str, console: Console) -> None:
    conversation.reset()


def _system(conversation: Conversation, rest: str, console: Console) -> None:
    conversation.begin(rest or None)


def _set(conversation: Conversation, rest: str, console: Console) -> None:
    name, _, value = rest.partition(" ")
    conversation.set(name, value.strip())


def _help(conversation: Conversation, rest: str, console: Console) -> None:
    console.print(HELP, highlight=False, markup=False)


COMMANDS = {"/reset": _reset, "/system": _system, "/set": _set, "/help": _help}
Config = ChatConfig
POSITIONAL = ("--run",)


def backends(config: ChatConfig) -> list[str]:
    """That which trained the run, where none is asked for."""
    if config.hardware.backend == "auto":
        recorded = recorded_setting(Path(config.run), "hardware.backend")
        here = recorded in registry.names() and not registry.missing(recorded)
        config.hardware.backend = recorded if here else registry.choose()
    return [config.hardware.backend]


def run(config: ChatConfig, console: Console) -> int:
    chat(config, console)
    return 0
