"""`bnf chat`, on both backends: with lines from the standard input, and on a terminal."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bnf_align import cli
from bnf_align.commands import chat as module
from bnf_core.sampling import Completion
from conftest import fast_on

ASKED = "What is 2?"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, feedback: Path) -> Any:
    made: dict[tuple[str, str], Path] = {}

    def run(backend: str, kind: str = "lora") -> Path:
        if (backend, kind) not in made:
            folder = tmp_path_factory.mktemp("chat") / "run"
            words: list[object] = ["train", "--model", tiny_model, "--data", feedback, "--output", folder]
            words += ["--backend", backend, "--device", "cpu", "--dtype", "float32", "--fine-tune-type", kind]
            words += ["--max-steps", 2, "--lr", 0.1 if kind == "lora" else 0.01, "--warmup-steps", 0]
            assert cli.run([str(word) for word in words]) == 0
            made[backend, kind] = folder
        return made[backend, kind]

    return run


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def chat(run: Path, *lines: str, words: list[object] | None = None, code: int = 0) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        hardware = ["--device", "cpu", "--dtype", "float32", "--max-tokens", "6"]
        found = cli.run(["chat", str(run), *hardware, *map(str, words or [])])
        captured = capsys.readouterr()
        assert found == code, captured.err
        assert "Traceback" not in captured.err
        text = captured.err if code else captured.out
        return [part.strip("\n") for part in re.split(r"^(?:base|aligned): ", text, flags=re.MULTILINE)]

    return chat


def generated(model: Path, run: Path, backend: str, capsys: pytest.CaptureFixture[str], *more: object) -> str:
    words = ["generate", "--model", model, "--prompt", ASKED, "--backend", backend, "--device", "cpu"]
    words += ["--dtype", "float32", "--max-tokens", 6, *more]
    capsys.readouterr()
    assert cli.run([str(word) for word in words]) == 0
    return capsys.readouterr().out.removesuffix("\n")


@fast_on("torch")
def test_both_sides_say_what_they_say_alone(
    runs: Any, said: Any, tiny_model: Path, backend_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(backend_name)
    _, base, aligned, base_then, aligned_then, base_anew, aligned_anew = said(run, ASKED, "Paris?", "/reset", ASKED)
    assert base == base_anew == generated(tiny_model, run, backend_name, capsys)
    adapter = ["--adapter", run / "adapter"]
    assert aligned == aligned_anew == generated(tiny_model, run, backend_name, capsys, *adapter)
    assert aligned != base and (base_then, aligned_then) != (base, aligned)


def test_of_a_run_of_all_weights_there_are_two_models(
    runs: Any, said: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("torch", "full")
    _, base, aligned = said(run, ASKED)
    assert base == generated(tiny_model, run, "torch", capsys)
    assert aligned == generated(run / "model", run, "torch", capsys) != base


def test_commands(runs: Any, said: Any) -> None:
    run = runs("torch")
    plain = said(run, ASKED)
    system = said(run, "/system Be brief.", ASKED, "/reset", ASKED, "/system", ASKED)
    assert system[1:3] == system[3:5] != plain[1:] and system[5:] == plain[1:]
    assert said(run, ASKED, words=["--system", "Be brief."])[1:] == system[1:3]
    short = said(run, "/set max_tokens 1", ASKED)
    assert plain[1].startswith(short[1]) and len(short[1]) < len(plain[1])
    hot = said(run, "/set temperature 3", ASKED)
    assert hot == said(run, ASKED, words=["--temperature", "3"]) != plain
    assert hot != said(run, ASKED, words=["--temperature", "3", "--seed", "1"])
    assert said(run, "//reset")[1:] != said(run, "/reset")[1:] == []
    for line, message in (
        ("/set temperature -1", "temperature is -1.0: expected a number of at least 0"),
        ("/set top_p much", "could not convert string to float"),
        ("/set warmth 1", "warmth 1: expected one of temperature, top_p"),
        ("/rest", "unknown command /rest: /help lists them"),
        ("/help", "/reset              forget the conversation"),
    ):
        assert message in said(run, line)[0]
    assert said(run, "/quit", ASKED) == [""] and said(run, "", "  ") == [""]


def test_what_cannot_be_is_said(said: Any, tmp_path: Path) -> None:
    assert "is no run, it has no config.yaml" in said(tmp_path, code=2)[0]
    assert "max_tokens is 0: expected an integer of at least 1" in said(tmp_path, words=["--max-tokens", 0], code=2)[0]


class Typed:
    """A terminal at which these lines are typed; an exception is raised in the place of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]):
        self.lines: Iterator[str | type[BaseException]] = iter(lines)
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=True, width=80, color_system=None)
        monkeypatch.setattr("builtins.input", self.input)

    def input(self, prompt: str) -> str:
        line = next(self.lines)
        if isinstance(line, str):
            return line
        raise line

    def run(self, folder: Path) -> str:
        config = module.ChatConfig(str(folder), max_tokens=6)
        config.hardware.device, config.hardware.dtype = "cpu", "float32"
        module.backends(config)
        assert module.run(config, self.console) == 0
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue())


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_on_a_terminal_the_answers_stand_side_by_side(
    runs: Any, said: Any, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    run = runs("torch")
    _, base, aligned = said(run, ASKED)
    shown = Typed(monkeypatch, ASKED, end).run(run)
    assert re.search(r"base +.+aligned", shown)
    last = shown.rpartition("aligned")[2]
    assert all(text.split("\n")[0][:20] in last for text in (base, aligned))


def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(
    runs: Any, said: Any, monkeypatch: pytest.MonkeyPatch, backend_name: str
) -> None:
    run, stopped = runs(backend_name), []
    own = Completion.next

    def interrupted(row: Completion, logits: Any) -> int:
        if not stopped and len(row.ids) == 3:
            stopped.append(True)
            raise KeyboardInterrupt
        return own(row, logits)

    _, base, _ = said(run, ASKED)
    monkeypatch.setattr(Completion, "next", interrupted)
    shown = Typed(monkeypatch, "Paris?", ASKED, EOFError).run(run)
    assert "stopped: neither question nor answers are remembered" in shown
    assert base.split("\n")[0][:20] in shown.rpartition("aligned")[2]
