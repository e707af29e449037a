"""`bnf push` and `--push-to-hub`, to a stand-in for the Hub."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import hub
from bnf_align import cli
from bnf_core.storage.files import lock

pytest.importorskip("peft")
pytest.importorskip("mlx_lm")
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
    """A Hub that is reached as the real one would be."""
    with hub.running() as running:
        reach(monkeypatch, running.url)
        yield running


def reach(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", url, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)


def train_words(backend: str, model: Path, feedback: Path, output: Path) -> list[object]:
    words: list[object] = ["train", "--model", model, "--data", feedback, "--output", output, "--backend", backend]
    return [*words, "--device", "cpu", "--dtype", "float32", "--max-steps", 1, "--rank", 2]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, feedback: Path) -> Path:
    """A finished run with samples."""
    folder = tmp_path_factory.mktemp("push") / "mine"
    words = train_words("torch", tiny_model, feedback, folder)
    more = ["--valid-fraction", 0.2, "--sample-every", 1, "--sample-tokens", 2]
    assert cli.run([str(word) for word in [*words, *more]]) == 0
    return folder


def push(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.run(["push", *map(str, words)])
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return code, " ".join((said.err if code else said.out).split())


def test_the_adapter_tokenizer_and_card_are_pushed_byte_by_byte(
    server: hub.Hub, run_folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = push(capsys, run_folder, "me/aligned", "--private", "--base-model", "owner/tiny")
    assert code == 0 and f"pushed {server.url}/me/aligned" in said
    pushed = server.repos["me/aligned"]
    adapter = {path.name for path in (run_folder / "adapter").iterdir()}
    assert set(pushed) == adapter | TOKENIZER  # neither checkpoints nor metrics, data or samples
    assert pushed["adapter_model.safetensors"] == (run_folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert all(pushed[name] == (tiny_model / name).read_bytes() for name in TOKENIZER)
    config = json.loads((run_folder / "adapter" / "adapter_config.json").read_text())
    assert json.loads(pushed["adapter_config.json"]) == config | {"base_model_name_or_path": "owner/tiny"}
    assert server.private["me/aligned"] and server.commits == ["Upload adapter trained with bnf-align"]
    card = pushed["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == "owner/tiny" and header["base_model_relation"] == "adapter"
    assert "from_pretrained('owner/tiny'), 'me/aligned')" in card and "path/to" not in card
    assert str(run_folder.parent) not in card and str(tiny_model.parent) not in card
    # Once more, with samples: a repository that is there is added to.
    code, _ = push(capsys, run_folder, "me/aligned", "--samples", "--base-model", "owner/tiny")
    assert code == 0 and server.private["me/aligned"]
    assert set(server.repos["me/aligned"]) == adapter | TOKENIZER | {"samples.jsonl", "samples.md"}
    assert server.repos["me/aligned"]["samples.jsonl"] == (run_folder / "samples.jsonl").read_bytes()


def test_a_name_alone_is_among_ones_own_and_public(
    server: hub.Hub, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = push(capsys, run_folder, "aligned")
    assert code == 0 and "name it for others with --base-model" in said
    assert set(server.repos) == {"me/aligned"} and not server.private["me/aligned"]


@pytest.mark.parametrize(("backend_name", "kind"), [("torch", "full"), ("mlx", "lora")])
def test_a_run_pushes_at_its_end(
    server: hub.Hub,
    backend_name: str,
    kind: str,
    tiny_model: Path,
    feedback: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*train_words(backend_name, tiny_model, feedback, tmp_path / "run"), "--fine-tune-type", kind]
    assert cli.run([str(word) for word in [*words, "--push-to-hub", "lab/at-its-end"]]) == 0
    assert f"pushed {server.url}/lab/at-its-end" in " ".join(capsys.readouterr().out.split())
    trained = tmp_path / "run" / ("model" if kind == "full" else "adapter")
    pushed = server.repos["lab/at-its-end"]
    for path in trained.iterdir():
        if path.suffix == ".safetensors":
            assert pushed[path.name] == path.read_bytes()
    assert {path.name for path in trained.iterdir()} | TOKENIZER == set(pushed)
    assert "push_to_hub" not in pushed["README.md"].decode()


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("a/b/c", "repo is 'a/b/c': expected OWNER/NAME"),
        ("me/b@d", "repo is 'me/b@d': expected OWNER/NAME"),
        ("stranger/model", "this token may not write to stranger/model"),
    ],
)
def test_a_repository_that_cannot_be_is_said(
    server: hub.Hub, run_folder: Path, repo: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = push(capsys, run_folder, repo)
    assert code == 2 and message in said and not server.repos


def test_no_token_and_a_wrong_one_are_said_before_a_run_begins(
    server: hub.Hub,
    run_folder: Path,
    tiny_model: Path,
    feedback: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*train_words("torch", tiny_model, feedback, tmp_path / "run"), "--push-to-hub", "me/x"]
    for token, message in ((None, "no token for the Hub: log in with"), ("hf_wrong", "does not know this token")):
        monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda token=token: token)
        code, said = push(capsys, run_folder, "me/x")
        assert code == 2 and message in said
        assert cli.run([str(word) for word in words]) == 2
        assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


def test_a_hub_that_does_not_answer_or_take_it_is_no_mistake_of_the_user(
    server: hub.Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.full = True
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    code, said = push(capsys, run_folder, "me/x")
    assert code == 1, said
    assert "the Hub did not take me/x" in said and "507" in said
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        reach(monkeypatch, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        code, said = push(capsys, run_folder, "me/x")
    assert code == 1 and "the Hub cannot be reached" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, said = push(capsys, run_folder, "me/x")
    assert code == 2 and "HF_HUB_OFFLINE is set" in said


def test_a_run_whose_push_failed_says_how_to_push_it_later(
    server: hub.Hub,
    tiny_model: Path,
    feedback: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.full = True
    monkeypatch.setattr("time.sleep", lambda _: None)
    words = [*train_words("torch", tiny_model, feedback, tmp_path / "run"), "--push-to-hub", "me/x"]
    assert cli.run([str(word) for word in words]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"The run itself is complete; to push it later: bnf push {tmp_path / 'run'} me/x" in said
    server.full = False
    assert push(capsys, tmp_path / "run", "me/x")[0] == 0


def test_what_is_no_finished_run_is_refused(
    server: hub.Hub, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, *words: object) -> str:
        code, said = push(capsys, folder, "me/x", *words)
        assert code == 2 and not server.repos
        return said

    assert f"{tmp_path} is no run, it has no config.yaml: expected the folder" in refused(tmp_path)
    assert f"name the run itself, {run_folder}" in refused(run_folder / "adapter")
    unfinished = tmp_path / "unfinished"
    (unfinished / "adapter").mkdir(parents=True)
    (unfinished / "config.yaml").write_bytes((run_folder / "config.yaml").read_bytes())
    assert "has trained nothing yet: there is no adapter with weights in it" in refused(unfinished)
    (unfinished / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    said = refused(unfinished)
    assert "has not come to its end" in said and f"--config {unfinished / 'config.yaml'} --resume" in said
    held = lock(run_folder / ".lock", wait=False)
    assert f"a run is writing to {run_folder}: wait for its end" in refused(run_folder)
    held.release()
    (run_folder / "samples.md").rename(run_folder / "elsewhere.md")
    assert "has no samples.md: it sampled nothing" in refused(run_folder, "--samples")
    (run_folder / "elsewhere.md").rename(run_folder / "samples.md")
    (unfinished / "config.yaml").write_text("- a list")
    assert "holds no settings of a run" in refused(unfinished)


@pytest.mark.slow
def test_the_command_reaches_the_endpoint_that_the_environment_names(run_folder: Path) -> None:
    with hub.running() as server:
        changed: dict[str, Any] = {"HF_ENDPOINT": server.url, "HF_TOKEN": hub.TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | changed
        words = [sys.executable, "-m", "bnf_align", "push", str(run_folder), "me/outside"]
        subprocess.run(words, env=environment, check=True)
        assert "adapter_model.safetensors" in server.repos["me/outside"]
