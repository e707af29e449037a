"""Every command and every piece of code in the README and the docs is real (`tests/pages.py` has the rules)."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from pages import (
    BLOCKS,
    DATA,
    NEVER,
    PAGES,
    REASONS,
    ROOT,
    RUN,
    SHOWN,
    Block,
    blocks,
    check,
    check_data,
    commands,
    not_run,
)

# How many blocks nothing runs but a reader, by reason: whoever adds one raises a number here.
NOT_RUN = {
    "has a test of its own": 4,  # test_streaming.py, test_conformance.py, test_push.py, test_export.py
    "needs a GPU": 3,
    "needs a cluster": 5,
    "needs the network": 1,
    "takes minutes": 1,
    "takes hours": 1,
}
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "models/SmolLM2-135M-Instruct", "Qwen/Qwen3-0.6B", "M", "MODEL")
HERE = "--model M --data feedback.jsonl"  # what `…` stands for
PROMPTS = "--model M --prompts questions.jsonl"  # in `bnf online …`
BEFORE = {  # what a page takes for granted
    "docs/adapters.md": ["python -m mlx_lm convert --hf-path M -q --q-group-size 32 --mlx-path my-4bit"],
    "docs/watching.md": [f"bnf train {HERE} --valid held_out.jsonl --output runs/{name}" for name in ("mine", "other")],
}
# A stand-in never ends an answer, and would write 32 of 256 tokens for each of a hundred steps.
BNF = """if [ "$1" = online ]; then
  shift; exec {bnf} online --iterations 2 --sample-tokens 16 "$@"{more}
fi
exec {bnf} "$@"{more}"""
QUICK = ("README.md",)  # pages whose Python runs in every test run


def called(block: Block) -> str:
    return str(block)


def test_every_block_says_what_it_is() -> None:
    for block in BLOCKS:
        assert block.language in (*RUN, *DATA, *SHOWN), f"{block}: a block of {block.language or 'no language'}"
        assert block.why_not is None or (block.why_not in REASONS and block.language in RUN), (
            f"{block}: {block.why_not}"
        )
    fences = sum(line.startswith("```") for path in PAGES for line in path.read_text().splitlines())
    assert fences == 2 * len(BLOCKS), "a fence that no rule of tests/pages.py sees, such as an indented one"


def test_what_is_not_run_is_counted() -> None:
    assert not_run() == NOT_RUN, "see `python tests/pages.py`"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in ("bash", "console")], ids=called)
def test_a_command_is_read_by_the_parser_of_its_program(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(block):
        check(words)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in DATA], ids=called)
def test_data_and_settings_are_read(block: Block) -> None:
    check_data(block)


@pytest.mark.parametrize(
    "line",
    [
        "bnf trane --model M",
        "bnf train --model M --data F --learning-rat 1",
        "bnf data chek F",
        "python -m benchmarks.step --backend torch --model M --data F --rowz 8",
        "python -m bnf_core.nowhere",
        "make dmeo",
        "make demo BACKENDS=mlx",
        "pip install 'bnf-align[tpu]'",
        "torchrun --process 2 -m bnf_align train …",
        "torchrun --nproc-per-node 2 -m bnf_align train … --lora.rnk 8",
        "accelerate launch --config_file none.yaml -m bnf_align train …",
        "bfn train …",
    ],
)
def test_a_command_that_is_wrong_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (words,) = commands(Block("page.md", 1, "bash", None, None, line))
    with pytest.raises((Exception, SystemExit)):
        check(words)


def test_marks_and_titles_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        'One.\n\n<!-- not run: takes minutes -->\n```bash\nmake demo\n```\n\n```python title="a.py"\n1\n```\n'
    )
    marked, titled = blocks(page)
    assert marked == Block("page.md", 4, "bash", None, "takes minutes", "make demo\n")
    assert titled == Block("page.md", 8, "python", "a.py", None, "1\n") and not titled.runs


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders with tiny stand-ins for all models and data that the pages name, one for each page."""
    model = tiny.make_model(tmp_path_factory.mktemp("stand-in") / "model", hidden_size=64, intermediate_size=128)

    def make(page: str) -> Path:
        folder = tmp_path_factory.mktemp("page")
        for name in MODELS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(model)
        for name in ("feedback", "more", "held_out", "gsm8k/train", "gsm8k/valid", "data/train"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            tiny.write_rows(folder / f"{name}.jsonl")
        questions = [f"What is {i} plus 2?" for i in range(4)]
        (folder / "questions.txt").write_text("\n".join(questions) + "\n")
        rows = [{"prompt": [{"role": "user", "content": q}], "answer": i + 2} for i, q in enumerate(questions)]
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "run.yaml").write_text("model: M\ndata: feedback.jsonl\nvalid_fraction: 0.2\nbatch_size: 4\n")
        (folder / "my_package").mkdir()
        (folder / "my_package" / "my_module.py").write_text("from bnf_torch.backend import TorchBackend as MyBackend\n")
        for block in BLOCKS:
            if block.page == page and block.title:
                (folder / block.title).write_text(block.code)
        return folder

    return make


def python_runs(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(block.code, str(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.page in QUICK and block.language == "python" and block.runs],
    ids=called,
)
def test_quick_python_runs(
    block: Block, workplace: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python_runs(block, workplace(block.page), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.runs}))
def test_a_page_runs(page: str, workplace: Callable[[str], Path], tmp_path: Path) -> None:
    """All of it that runs, in its order, in one folder."""
    folder = workplace(page)
    environment = programs(tmp_path / "bin", mac=page == "docs/laptop.md")
    for before in BEFORE.get(page, ()):
        subprocess.run(["bash", "-c", before], cwd=folder, env=environment, check=True)
    for count, block in enumerate(block for block in BLOCKS if block.page == page and block.runs):
        if block.language == "bash":
            code = "\n".join(
                line.replace("…", f"{PROMPTS if 'online' in line else HERE} --output runs/{count}-{number}")
                for number, line in enumerate(block.code.splitlines())
            )
            command = ["bash", "-euo", "pipefail", "-c", code]
        else:
            command = ["python", "-c", block.code]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, f"{block}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


def programs(folder: Path, *, mac: bool) -> dict[str, str]:
    """An environment in which `bnf` and `python` are those under test, and what no test starts does nothing.

    Args:
        mac: whether `bnf` takes MLX where nothing is said, as on a Mac.
    """
    folder.mkdir()
    scripts = {
        "python": f'exec {sys.executable} "$@"',
        "bnf": BNF.format(bnf=f"{sys.executable} -m bnf_align", more=" --backend mlx" if mac else ""),
        **{name: f"echo '{name} {why}: not run'" for name, why in NEVER.items()},
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    launcher = shutil.which("mlx.launch", path=Path(sys.executable).parent)
    if launcher:
        (folder / "mlx.launch").symlink_to(launcher)
    path = os.pathsep.join((str(folder), os.environ.get("PATH", "")))
    packages = os.pathsep.join(str(ROOT / name) for name in ("", "backends", "recipes", "conformance"))
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return os.environ | {"PATH": path, "PYTHONPATH": packages, **quiet}
