"""The command line as a user meets it: exit codes, messages, and nothing half-written."""

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

import tiny
from bnf_align import cli
from bnf_conformance import checks, runner
from bnf_mlx import blas


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.run([str(word) for word in words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return code, captured.out, " ".join(captured.err.split())


@pytest.fixture
def train_words(tiny_model: Path, feedback: Path, tmp_path: Path) -> list[object]:
    words: list[object] = ["train", "--model", tiny_model, "--data", feedback, "--output", tmp_path / "run"]
    return [*words, "--backend", "torch", "--device", "cpu", "--max-steps", "1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--learnin-rate", "1"], "unknown setting 'learnin_rate': did you mean optimizer.learning_rate?"),
        (["--learning-rate", "fast"], "optimizer.learning_rate: expected float, got fast"),
        (["--rank", "0"], "lora.rank is 0: expected an integer of at least 1"),
        (["--schedule", "steep"], "optimizer.schedule"),
        (["--model", "nowhere/to/be/found"], "nowhere/to/be/found"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--device", "abacus"], "device 'abacus' is not present: PyTorch"),
        (["--backend", "abacus"], "unknown backend 'abacus': expected auto, mlx, torch"),
        (["--lora.targets", "[q_porj]"], "no linear layer is called q_porj; this model has"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_usage_is_one_message_and_exit_code_2(
    train_words: list[object], change: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, error = run(capsys, *train_words, *change)
    assert code == 2 and message in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_unknown_key_in_yaml_names_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndata:\n  path: f\n  max_lenght: 4\n")
    code, _, error = run(capsys, "train", "--config", tmp_path / "run.yaml")
    assert code == 2 and "unknown setting 'max_lenght': did you mean data.max_length?" in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "completion": "b"', "bad.jsonl:2"),
        ('{"prompt": "a", "completion": "b", "label": "yes"}', "label"),
        ('{"prompt": "a", "completion": "", "label": true}', "completion"),
        ('{"question": "a", "answer": "b"}', "bad.jsonl:2"),
    ],
)
def test_a_bad_row_names_file_line_and_field_or_is_skipped(
    train_words: list[object],
    feedback: Path,
    line: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    bad = tmp_path / "bad.jsonl"
    rows = feedback.read_text().splitlines()
    bad.write_text("\n".join([rows[0], line, *rows[1:]]) + "\n")
    code, _, error = run(capsys, *train_words, "--data", bad)
    assert code == 2 and "bad.jsonl:2" in error and message in error
    code, out, _ = run(capsys, *train_words, "--data", bad, "--skip-bad-rows")
    assert code == 0 and "skipped 1 bad rows" in out and "bad.jsonl:2" in out


def test_missing_settings_and_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "train")[::2] == (
        2,
        "bnf: missing --model, --data (`bnf train --help` explains every setting)",
    )
    assert "unknown command 'trian'" in run(capsys, "trian")[2]


@pytest.mark.parametrize(
    "words", [["--report-to", "wandb,trackio"], ["--report-to=wandb,trackio"], ["--report-to", "[wandb, trackio]"]]
)
def test_a_list_may_be_given_with_commas(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(["train", "--model", "m", *words, "--data", "a,b", "--print-config"])
    out = capsys.readouterr().out
    assert "report_to:\n- wandb\n- trackio\n" in out and "path: a,b\n" in out


@pytest.mark.parametrize("command", [["data-check"], ["data", "check"]])
@pytest.mark.parametrize("flag", [[], ["--data"]])
def test_data_check_is_one_word_or_two(
    command: list[str], flag: list[str], feedback: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = run(capsys, *command, *flag, feedback, "--report", tmp_path / "report.json")
    assert code == 0 and "different prompts" in out
    assert (tmp_path / "report.json").exists()
    code, _, error = run(capsys, *command, *flag, tmp_path / "missing.jsonl")
    assert code == 2 and "missing.jsonl: no such file" in error


def test_the_printed_config_is_a_config(
    train_words: list[object], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run([str(word) for word in [*train_words, "--lr", "1e-3", "--print-config"]])
    assert stop.value.code == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert run(capsys, "train", "--config", tmp_path / "run.yaml")[0] == 0
    assert "learning_rate: 0.001" in (tmp_path / "run" / "config.yaml").read_text()


def test_train_evaluate_generate(
    train_words: list[object], tiny_model: Path, feedback: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(capsys, *train_words, "--valid-fraction", "0.2")[0] == 0
    adapter = tmp_path / "run" / "adapter"
    hardware = ["--backend", "torch", "--device", "cpu"]
    mode = stat.S_IMODE((tmp_path / "run" / "config.yaml").stat().st_mode)  # as the umask says
    assert {stat.S_IMODE(path.stat().st_mode) for path in adapter.iterdir()} == {mode}
    report = tmp_path / "reports" / "today" / "report.json"
    words = ["evaluate", "--model", tiny_model, "--adapter", adapter, "--data", feedback, "--report", report]
    code, out, _ = run(capsys, *words, *hardware)
    assert code == 0 and "preference_accuracy" in out
    assert json.loads(report.read_text())["tokens"] > 0
    words = ["generate", "--model", tiny_model, "--adapter", adapter, "--prompt", "What is 2 plus 2?"]
    assert run(capsys, *words, "--max-tokens", "3", *hardware)[0] == 0


def test_where_a_report_cannot_go_is_said_before_the_work(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["evaluate", "--backend", "torch", "--model", tiny_model, "--data", "not/looked/for", "--report"]
    code, _, error = run(capsys, *words, tmp_path)
    assert code == 2 and f"report {tmp_path} is a folder: expected the name of a file" in error
    (tmp_path / "file").touch()
    code, _, error = run(capsys, *words, tmp_path / "file" / "e.json")
    assert code == 2 and "its folder cannot be made" in error


def test_an_adapter_of_another_model_is_refused(
    train_words: list[object], feedback: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(capsys, *train_words)[0] == 0
    other = tiny.make_model(tmp_path / "other", hidden_size=48)
    words = ["evaluate", "--model", other, "--adapter", tmp_path / "run" / "adapter", "--data", feedback]
    code, _, error = run(capsys, *words, "--backend", "torch")
    assert code == 2 and "does not fit the model" in error


def test_models_without_what_is_needed_are_refused(
    train_words: list[object], tiny_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    for absent, message in (("model.safetensors", "weights"), ("tokenizer.json", "tokenizer")):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(tiny_model, model)
        (model / absent).unlink()
        code, _, error = run(capsys, *train_words, "--model", model)
        assert code == 2 and message in error, absent
    shutil.rmtree(model)
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").unlink()
    code, _, error = run(capsys, *train_words, "--model", model)
    assert code == 2 and "chat template" in error


def test_peft_loads_the_adapter_as_it_is(
    train_words: list[object], tiny_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert run(capsys, *train_words, "--lr", "0.05")[0] == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(4).unsqueeze(0)
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))(ids).logits
    assert (adapted - before).abs().max() > 1e-3


def test_conformance_writes_a_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "suite", lambda: [check for check in checks.suite() if check.name == "L1 batches"])
    code, out, _ = run(capsys, "conformance", "--backend", "torch", "--device", "cpu", "--report", tmp_path / "r.json")
    assert code == 0 and "conforms" in out
    assert json.loads((tmp_path / "r.json").read_text())["ok"] is True


@pytest.mark.parametrize("name", ["laptop", "gpu"])
def test_ready_made_configs_hold_known_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "recipes" / "configs" / f"{name}.yaml"
    with pytest.raises(SystemExit) as stop:
        cli.run(["train", "--config", str(path), "--print-config"])
    assert stop.value.code == 0 and f"output: runs/{name}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["-m", "benchmarks.step", "--backend", "mlx"], ["/usr/bin/bnf", "train"]])
def test_openblas_is_put_in_front_of_the_same_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(blas.platform, "system", lambda: "Linux")
    monkeypatch.setattr(blas, "find_openblas", lambda: "libopenblas.so.0")
    monkeypatch.setattr(blas.os, "execv", lambda program, argv: started.append(argv))
    monkeypatch.setattr(sys, "orig_argv", ["python", *words])
    monkeypatch.setenv("LD_PRELOAD", "")  # puts back what is changed below
    blas.preload_openblas()  # set by the user, even to nothing
    assert not started
    monkeypatch.delenv("LD_PRELOAD")
    blas.preload_openblas()
    assert started == [[sys.executable, *words]] and os.environ["LD_PRELOAD"] == "libopenblas.so.0"
