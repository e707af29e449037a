"""Tokens that are kept: the same run with them and without, made once whoever asks, and cheap to hold."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_train import QUIET, adapter_weights, config, lines

import forked
import tiny
from benchmarks import tokens
from bnf_align import cli
from bnf_align.commands.train import train
from bnf_align.run import feedback as loading
from bnf_core.config import DataConfig
from bnf_core.data import feedback as core_feedback
from bnf_core.data import sources
from bnf_core.data.feedback import FeedbackTokenizer
from bnf_core.data.messages import RowError
from bnf_core.data.token_cache import TokenCache, cache_folder
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import UserError
from conftest import fast_on


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenCache:
    """The cache of this test alone."""
    monkeypatch.setenv("BNF_CACHE", str(tmp_path / "cache"))
    return TokenCache(cache_folder())


def recorder() -> Console:
    return Console(record=True, file=io.StringIO(), width=200)


def unread(*args: object) -> Any:
    raise AssertionError("text is read")


@fast_on("torch")
def test_a_run_is_the_same_with_kept_tokens_and_without(
    tiny_model: Path,
    feedback: Path,
    tmp_path: Path,
    empty: TokenCache,
    backend_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held-out prompts drawn by the seed, bad rows skipped; and the second start reads no text."""
    data = tmp_path / "feedback.jsonl"
    data.write_text('{"prompt": "no completion"}\n' + feedback.read_text())
    settings = {"valid": None, "valid_fraction": 0.3}
    found, said = [], []
    for name, keeps in (("without", False), ("made", True), ("kept", True)):
        if name == "kept":
            monkeypatch.setattr(sources, "load_feedback", unread)
            monkeypatch.setattr(sources, "READERS", dict.fromkeys(sources.READERS, unread))
        run = config(tiny_model, data, tmp_path / name, backend_name, **settings)
        run.data = replace(run.data, cache=keeps, skip_bad_rows=True)
        console = recorder()
        result = train(run, console)
        told = [line for line in console.export_text().splitlines() if "rows" in line and "run folder" not in line]
        said.append([line for line in told if "tok/s" not in line])
        timeless = [
            {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
            for line in lines(result, "train")
        ]
        weights = {k: v.tobytes() for k, v in adapter_weights(result.trained).items()}
        facts = json.loads(next(result.folder.glob("checkpoints/*/state.json")).read_text())["facts"]
        found.append((timeless, lines(result, "eval"), weights, facts))
    assert found[0] == found[1] == found[2]
    assert said[0] == said[1] == said[2]
    assert any("skipped 1 bad rows" in line for line in said[0])
    assert len(empty.entries()) == 1


def ask(data: str, model: str, report: str) -> None:
    """Load the tokens in a process of their own, which says whether it read the text."""
    read = sources.load_feedback

    def load(*args: Any) -> Any:
        Path(report).touch()
        time.sleep(0.5)  # the other process is to come in the meantime
        return read(*args)

    sources.load_feedback = load  # type: ignore[assignment]
    rows = loading.load_split(DataConfig(data), "train", load_tokenizer(Path(model)), QUIET)
    assert len(rows) == 12


def test_one_process_makes_them_while_the_other_waits(
    tiny_model: Path, feedback: Path, tmp_path: Path, empty: TokenCache
) -> None:
    reports = [tmp_path / "0", tmp_path / "1"]
    environment = {"BNF_CACHE": os.environ["BNF_CACHE"]}
    processes = [
        forked.start(ask, str(feedback), str(tiny_model), str(report), environment=environment) for report in reports
    ]
    assert [forked.ended(process) for process in processes] == [0, 0]
    assert sum(report.exists() for report in reports) == 1
    assert [entry.rows for entry in empty.entries()] == [12]


def never_end(data: str, model: str, begun: str) -> None:
    some = core_feedback.tokenize_some

    def stuck(*args: Any) -> Any:
        if Path(begun).exists():
            time.sleep(60)
        Path(begun).touch()
        return some(*args)

    core_feedback.CHUNK, core_feedback.tokenize_some = 5, stuck  # type: ignore[assignment]
    loading.load_split(DataConfig(data), "train", load_tokenizer(Path(model)), QUIET)


def test_a_kill_while_they_are_written_leaves_nothing_that_is_used(
    tiny_model: Path, feedback: Path, tmp_path: Path, empty: TokenCache
) -> None:
    begun = tmp_path / "begun"
    environment = {"BNF_CACHE": os.environ["BNF_CACHE"]}
    process = forked.start(never_end, str(feedback), str(tiny_model), str(begun), environment=environment)
    while not begun.exists():
        time.sleep(0.02)
        assert process.is_alive()
    process.kill()
    process.join()
    (left,) = empty.entries()
    assert left.folder.name.startswith(".") and left.data == ""
    rows = loading.load_split(DataConfig(str(feedback)), "train", load_tokenizer(tiny_model), QUIET)
    assert len(rows) == 12
    assert [entry.rows for entry in empty.entries()] == [12]


def test_what_changes_tokens_makes_new_ones(tiny_model: Path, tmp_path: Path, empty: TokenCache) -> None:
    """The data by content or time, the tokenizer, the template, its settings, and the limit; not what does not."""
    data = tiny.write_rows(tmp_path / "f.jsonl")
    model = shutil.copytree(tiny_model, tmp_path / "model")
    plain = DataConfig(str(data))

    def made(settings: DataConfig = plain) -> int:
        before = len(empty.entries())
        loading.load_split(settings, "train", load_tokenizer(model), QUIET)
        return len(empty.entries()) - before

    assert made() == 1
    assert made() == made(replace(plain, shuffle_buffer=7)) == 0
    for change in ({"max_length": 30}, {"template_kwargs": {"x": 1}}, {"chat_template": tiny.TEMPLATE + " "}):
        assert made(replace(plain, **change)) == 1, change
    assert made(replace(plain, date="2025-12-31")) == 0  # a template that asks for none
    row = data.read_text()
    data.write_text(row.replace("true", "false", 1))
    assert made() == 1
    data.write_text(row.replace("true", "null", 1).replace("null", "true", 1))
    os.utime(data, ns=(1, 1))
    assert made() == 1  # as long as before, at another time
    (model / "chat_template.jinja").write_text("{# other #}" + tiny.TEMPLATE)
    assert made() == 1


def test_a_cache_that_cannot_be_written_is_said_and_done_without(
    tiny_model: Path, feedback: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BNF_CACHE", str(tmp_path / "file"))
    console = recorder()
    settings = DataConfig(str(feedback))
    assert len(loading.load_split(settings, "train", load_tokenizer(tiny_model), console)) == 12
    assert "tokens are kept in memory, not on the disk" in console.export_text()


@pytest.mark.slow
def test_several_processes_make_the_same_and_name_the_same_row(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_feedback, "CHUNK", 3)
    feedback = FeedbackTokenizer.of(load_tokenizer(tiny_model), DataConfig(""))
    loaded = sources.load_feedback(str(tiny.write_rows(tmp_path / "f.jsonl", 10)))
    alone, spread = (feedback.making(loaded, workers).columns() for workers in (0, 2))
    assert alone.digest == spread.digest and alone.names == spread.names
    assert {k: v.tobytes() for k, v in alone.arrays.items()} == {k: v.tobytes() for k, v in spread.arrays.items()}
    for at in (7, 8):
        loaded.rows[at] = replace(loaded.rows[at], prompt="", completion="?")
    with pytest.raises(RowError, match=r"f\.jsonl:8: prompt: is empty") as raised:
        feedback.making(loaded, 2).columns()
    assert raised.value.field == "prompt"


def test_what_tokenises_goes_to_another_process_and_its_errors_come_back(tiny_model: Path, tmp_path: Path) -> None:
    feedback = FeedbackTokenizer.of(
        load_tokenizer(tiny_model), DataConfig("", label="label", columns={"label": "good"})
    )
    rows = sources.load_feedback(str(tiny.write_rows(tmp_path / "f.jsonl", 3))).rows
    here, there = feedback._part(rows), pickle.loads(pickle.dumps(feedback._part))(rows)
    assert here[0].content == there[0].content and here[0].names == there[0].names
    error = pickle.loads(pickle.dumps(RowError("f:1", "prompt", "is x", "Mend it")))
    assert (str(error), error.source, error.field) == ("f:1: prompt: is x. Mend it.", "f:1", "prompt")


def test_data_cache_lists_and_removes(
    tiny_model: Path, feedback: Path, empty: TokenCache, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        assert cli.run(["data", "cache", *words]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "0 tables of tokens, 0.0 MB" in run()
    loading.load_split(DataConfig(str(feedback)), "train", load_tokenizer(tiny_model), QUIET)
    assert "1 tables of tokens" in run() and empty.entries()[0].rows == 12
    assert "removed 0 tables" in run("--remove", "--unused-days", "1")
    assert "removed 1 tables" in run("--remove") and empty.entries() == []
    assert cli.run(["data", "cache", "--unused-days", "-1"]) == 2


MEMORY = """
import sys
from pathlib import Path
from bnf_core.data.table import About, ExampleTable, part_of
from bnf_core.data.token_cache import Making, TokenCache
from bnf_core.data.tokenization import Fate, Tokenized
from bnf_core.steps.batching import Rows
from bnf_core.types import Example

def own_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

def making(count):
    some = [Example((i, i + 1), (i + 2,), i % 2 == 0, group=i // 2, source=f"f.jsonl:{i}") for i in range(1000)]
    part = part_of(Tokenized(some, [Fate(0)] * 1000, []))
    return Making([], (part for _ in range(count // 1000)), About())

def held(count):
    cache = TokenCache(Path(sys.argv[1]))
    table = ExampleTable([cache.table({"data": count}, lambda: making(count), print)])
    rows = Rows(table, 0)
    batches = rows.batches(100)
    for _ in range(100):
        next(batches)
    return table, batches

for count in (1000, 200_000):
    held(count)  # made, and what the allocator keeps for later is kept
few = held(1000)
before = own_memory()
many = held(200_000)
print((own_memory() - before) / 200_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_row_takes_eight_bytes_of_a_process_at_most(tmp_path: Path) -> None:
    """Within an epoch, once its order is drawn. Rejects rows that are kept as objects, 500 bytes each, and an order of
    Python's integers."""
    # What is freed goes back to the system at once, or glibc would keep up to 64 MB of it for later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) <= 8


def test_a_bad_row_is_an_error_of_the_user_with_kept_tokens_too(
    tiny_model: Path, tmp_path: Path, empty: TokenCache
) -> None:
    data = tiny.write_rows(tmp_path / "f.jsonl")
    with data.open("a") as file:
        file.write('{"prompt": "a"}\n')
    for _ in range(2):
        with pytest.raises(UserError, match=r"f\.jsonl:13: "):
            loading.load_split(DataConfig(str(data)), "train", load_tokenizer(tiny_model), QUIET)
    assert empty.entries() == []


def test_the_benchmark_counts_what_there_is(tiny_model: Path, feedback: Path, tmp_path: Path) -> None:
    settings = tokens.BenchTokensConfig(str(tiny_model), DataConfig(str(feedback)))
    made, opened = (tokens._made(settings, tmp_path, workers) for workers in (0, None))
    epoch = tokens._epoch(settings, tmp_path)
    rows = loading.load_split(settings.data, "train", load_tokenizer(tiny_model), QUIET)
    for figures in (made, opened, epoch):
        assert (figures.rows, figures.tokens) == (12, sum(map(len, rows)))
        assert figures.stored > 4 * figures.tokens and figures.seconds > 0
    console = recorder()
    console.print(tokens.table({"made": made, "opened": opened}))
    assert f"12 rows, {made.tokens:,} tokens" in console.export_text()
    with pytest.raises(ValueError, match="workers is"):
        tokens.BenchTokensConfig("m", DataConfig("f"), [])
