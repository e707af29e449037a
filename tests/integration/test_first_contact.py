"""`make gpu` and `make mac`, as far as a CPU goes: every command that they would run is one that there is, what was
done is not done again, and the report says what was found and not whose machine it was."""

import getpass
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("peft")

import benchmarks.first_contact.running as running
from benchmarks.figures import FLOOR
from benchmarks.first_contact import report
from benchmarks.first_contact.__main__ import FirstContactConfig, first_contact
from benchmarks.first_contact.stages import Machine, Place, Stage, stages, write_rows
from benchmarks.first_contact.targets import TARGETS
from bnf_align.arguments import parse
from bnf_align.commands import COMMANDS
from bnf_core.errors import UserError

BENCHMARKS = {"loss": "BenchLossConfig", "step": "BenchStepConfig", "growth": "BenchGrowthConfig"}
BENCHMARKS |= {"same_bits": "SameBitsConfig"}
PLACES: list[tuple[Machine, str]] = [("gpu", "cuda"), ("gpu", "cpu"), ("mac", "gpu"), ("mac", "cpu")]


def place(machine: Machine, device: str, folder: Path, model: str = "model") -> Place:
    return Place(machine, device, model, model, folder, 4)


@pytest.mark.parametrize(("machine", "device"), PLACES)
def test_every_command_can_be_parsed(machine: Machine, device: str, tmp_path: Path) -> None:
    """Rejects a flag that a command no longer has."""
    seen = set()
    for stage in stages(place(machine, device, tmp_path)):
        assert stage.commands or stage.absent, stage.name
        for command in stage.commands:
            assert command[:2] == (sys.executable, "-m")
            words = list(command[2:])
            if words[0] == "torch.distributed.run":
                words = words[words.index("-m") + 1 :]
            module, *words = words
            seen.add(module)
            if module == "bnf_align":
                assert words[0] in COMMANDS
                of = import_module(f"bnf_align.commands.{words[0].replace('-', '_')}")
                parse(of.Config, "bnf", words[1:], getattr(of, "POSITIONAL", ()))
            elif module.startswith("benchmarks."):
                of = import_module(module)
                parse(getattr(of, BENCHMARKS[module.rpartition(".")[2]]), module, words)
            else:
                assert module == "pytest" and Path(words[-1]).is_file()
    assert {"bnf_align", "pytest", "benchmarks.loss", "benchmarks.step"} <= seen


def test_rows_are_pairs_as_long_as_they_are_to_be(tmp_path: Path) -> None:
    where = place("gpu", "cuda", tmp_path)
    write_rows(where)
    first = (tmp_path / "ultrafeedback.jsonl").read_bytes()
    rows = [json.loads(text) for text in first.splitlines()]
    assert len(rows) == where.sizes.rows and len({row["prompt"] for row in rows}) == len(rows)
    lengths = sorted(len(row["chosen"].split()) for row in rows)
    assert 150 < lengths[len(lengths) // 2] < 320 and lengths[-1] > 2 * lengths[len(lengths) // 2]
    write_rows(where)
    assert (tmp_path / "ultrafeedback.jsonl").read_bytes() == first


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    counted = tmp_path / "counted"
    stage = Stage("one", "", (python(f"open({str(counted)!r}, 'a').write('x'); print('said')"),))
    for versions, runs in ({"a": "1"}, 1), ({"a": "1"}, 1), ({"a": "2"}, 2):
        outcome = running.run(stage, tmp_path / "one", versions, {})
        assert outcome.code == 0 and len(counted.read_text()) == runs
    assert "said" in (tmp_path / "one" / "output.txt").read_text()


def test_what_fails_is_said_and_tried_again(tmp_path: Path) -> None:
    stage = Stage("one", "", (python("raise SystemExit(3)"), python("print('never')")))
    for _ in range(2):
        assert running.run(stage, tmp_path, {}, {}).code == 3
    assert "never" not in (tmp_path / "output.txt").read_text().replace("print('never')", "")
    slow = Stage("two", "", (python("import time; time.sleep(60)"),), minutes=0.001)
    assert running.run(slow, tmp_path / "two", {}, {}).code == 124
    absent = running.run(Stage("three", "", (), absent="needs 2 devices"), tmp_path / "three", {}, {})
    assert absent.code is None and absent.note == "needs 2 devices"


def figures(path: Path, title: str, seconds: dict[str, float], memory: float, facts: dict[str, str]) -> None:
    rounds = [seconds] * 3
    case = {"ours": None, "memory": dict.fromkeys(seconds, memory), "notes": {}, "rounds": rounds, "beside": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"facts": facts, "cases": {title: case}}))


def test_targets_are_read_from_figures(tmp_path: Path, tiny_model: Path) -> None:
    card = {"device": "cuda (NVIDIA H100 80GB HBM3)", "step": "a step of 8 rows, 1,000 tokens, 500 of them completions"}
    figures(
        tmp_path / "loss/loss.json", "8,192 tokens, head frozen", {FLOOR: 0.05, "linear_bnf_loss": 0.056}, 2e9, card
    )
    step = {FLOOR: 0.1, "bnf": 0.2, "TRL DPO": 0.5}
    figures(tmp_path / "step-ultrafeedback/step.json", "a step of 8 rows", step, 2e9, card)
    values = [target.measure(tmp_path, str(tiny_model)) for target in TARGETS]
    verdicts = [target.verdict(value) for target, value in zip(TARGETS, values, strict=True)]
    assert verdicts == ["met", "missed", "met", "met", "missed"]
    # Of each token: four square or halved matrices of 32 and three of 32 x 64, in two layers; the head of 304.
    products = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) * 1000 + 32 * 304 * 500
    assert values[4] == pytest.approx(100 * 4 * products / 0.2 / 989e12)
    assert [target.measure(tmp_path / "nothing", "") for target in TARGETS] == [None] * 5


def test_the_report_does_not_say_whose_machine_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "annes-laptop.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "anne")
    monkeypatch.setenv("HOME", "/home/anne")
    stage = Stage("one", "what", (python("print('/home/anne/x of anne on annes-laptop & <b>')"),))
    outcomes = [running.run(stage, tmp_path / "one", {}, {})]
    outcomes.append(running.run(Stage("two", "", (), absent="needs <2> devices"), tmp_path / "two", {}, {}))
    page = report.write_report(tmp_path, "gpu", str(tiny_model), {"torch": "1"}, outcomes)
    texts = {path: path.read_text() for path in page.parent.rglob("*") if path.is_file()}
    assert not any("anne" in text or str(tmp_path) in text for text in texts.values())
    assert "HOME/x of NAME on NAME" in texts[page.parent / "one" / "output.txt"]
    assert "needs &lt;2&gt; devices" in texts[page] and 'href="one/output.txt"' in texts[page]
    assert json.loads(texts[page.parent / "report.json"])["stages"][1]["code"] is None


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--device cpu tries the stages"):
        first_contact(FirstContactConfig(device="cuda:99", output=str(tmp_path)), Console(quiet=True))
    with pytest.raises(UserError, match=r"only is \['rest'\]: expected doctor, conformance,"):
        first_contact(FirstContactConfig(device="cpu", only=["rest"], output=str(tmp_path)), Console(quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["gpu", "mac"])
def test_every_stage_runs_on_a_cpu(machine: str, tiny_model: Path, tmp_path: Path) -> None:
    words = ["--machine", machine, "--device", "cpu", "--model", str(tiny_model), "--small", str(tiny_model)]
    command = [sys.executable, "-m", "benchmarks.first_contact", *words, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=running.ROOT, capture_output=True, text=True)
    outputs = [path.read_text()[-2000:] for path in tmp_path.glob("*/output.txt")]
    assert done.returncode == 0, done.stdout + done.stderr + "\n".join(outputs)
    assert (tmp_path / "report" / "index.html").is_file()
