"""Several sources in one run: shares, resuming, held-out sets by name, and what else reads them."""

import io
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from test_streaming import completions, good, pair
from test_streaming import stream as stream_of
from test_train import QUIET, adapter_weights, config

import tiny
from bnf_align import cli
from bnf_align.commands.data_check import data_check
from bnf_align.commands.evaluate import evaluate
from bnf_align.commands.plan import plan
from bnf_align.commands.reference import reference
from bnf_align.commands.train import train
from bnf_core.config import DataCheckConfig, DataConfig, EvaluateConfig, HardwareConfig, ReferenceConfig, Where
from bnf_core.data.sources import find_source, has_split
from bnf_core.data.streaming import MixedStream
from bnf_core.errors import UserError
from bnf_core.types import Example
from conftest import fast_on, slow


def said_by(work: Any, *args: Any) -> str:
    console = Console(record=True, file=io.StringIO(), width=200)
    work(*args, console)
    return console.export_text()


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    """A folder with a valid file, and a file."""
    (tmp_path / "helpful").mkdir()
    tiny.write_rows(tmp_path / "helpful" / "train.jsonl", 20)
    tiny.write_rows(tmp_path / "helpful" / "valid.jsonl", 6)
    math = tiny.write_rows(tmp_path / "math.jsonl", 8)
    math.write_text(math.read_text().replace("What is", "How much is"))
    return [{"path": str(tmp_path / "helpful"), "weight": 1}, {"path": str(math), "weight": 3}]


def told(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def back_to(folder: Path, step: int) -> None:
    """As if the run had been killed soon after this step."""
    for later in folder.glob("checkpoints/step-*"):
        if int(later.name[-6:]) > step:
            shutil.rmtree(later)


def without_times(folder: Path) -> list[dict[str, Any]]:
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in logged]


@fast_on("mlx")
@pytest.mark.parametrize("streaming", [slow(False), True])
def test_a_run_of_two_sources_resumes_bit_for_bit_and_says_what_it_drew(
    tiny_model: Path, sources: list[dict[str, Any]], tmp_path: Path, backend_name: str, streaming: bool
) -> None:
    """And evaluates each held-out set under its name: the folder's own, and of the file a share of its prompts."""
    run = config(tiny_model, Path(), tmp_path / "run", backend_name, valid=None, save_every=3, keep_checkpoints=9)
    run.data = DataConfig(sources, streaming=streaming, shuffle_buffer=5)
    if streaming:
        run.max_steps = 8
    else:
        run.valid_fraction = 0.25
    text = said_by(train, run)
    if not streaming:
        assert told(text, "an epoch has") == "an epoch has 6 of the 20 rows of helpful, 20 of the 6 rows of math"
        assert told(text, "rows drawn") == "rows drawn: helpful 12 (23.1%), math 40 (76.9%)"
        assert told(text, "math: valid") == "math: valid: 2 rows (1 chosen, 1 rejected), 66 tokens"
    share = re.search(r"helpful (\d+) .*math (\d+)", told(text, "rows drawn"))
    assert share is not None and int(share[1]) + int(share[2]) == (40 if streaming else 52)
    ended = without_times(tmp_path / "run"), adapter_weights(tmp_path / "run" / "adapter")
    back_to(tmp_path / "run", 3)
    again = said_by(train, replace(run, resume=True))
    assert "resuming after step 3" in again and told(again, "rows drawn") == told(text, "rows drawn")
    assert without_times(tmp_path / "run") == ended[0]
    weights = adapter_weights(tmp_path / "run" / "adapter")
    assert {k: v.tobytes() for k, v in weights.items()} == {k: v.tobytes() for k, v in ended[1].items()}
    last = [line for line in ended[0] if line["kind"] == "eval"][-1]
    names = {"helpful"} if streaming else {"helpful", "math"}
    assert {f"{name}/{metric}" for name in names for metric in ("loss", "rewards/margins")} <= last.keys()
    assert "loss" not in last


def test_other_shares_are_another_run(
    tiny_model: Path, sources: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for streaming in (False, True):
        run = config(tiny_model, Path(), tmp_path / f"run{streaming}", "torch", valid=None, max_steps=2)
        run.data = DataConfig(sources, streaming=streaming)
        train(run, QUIET)
        back_to(run_folder := Path(run.output), 2)
        run.data = DataConfig([{**sources[0], "weight": 2}, sources[1]], streaming=streaming)
        with pytest.raises(UserError, match=r"(?s)is of another run than this:.*training rows"):
            train(replace(run, resume=True), QUIET)
        assert run_folder.exists()


def test_held_out_sets_by_name_are_evaluated_and_drawn(
    tiny_model: Path, feedback: Path, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    where = [source["path"] for source in sources]
    data = DataConfig([{"path": where[0], "name": "a"}, {"path": where[1], "name": "b"}])
    hardware = HardwareConfig("torch", "cpu", "float32")
    found = evaluate(EvaluateConfig(str(tiny_model), data, split="train", hardware=hardware), QUIET)
    alone = [
        evaluate(EvaluateConfig(str(tiny_model), DataConfig(path), split="train", hardware=hardware), QUIET)
        for path in where
    ]
    assert found == {f"{name}/{k}": v for name, of in zip("ab", alone, strict=True) for k, v in of.items()}
    run = config(tiny_model, feedback, tmp_path / "run", "torch", max_steps=1)
    run.valid = DataConfig([{"path": where[0], "name": "a"}, where[1]]).path
    result = train(run, QUIET)
    assert result.after is not None and {"a/loss", "math/loss"} <= result.after.keys()


def test_a_reference_holds_every_source(tiny_model: Path, sources: list[dict[str, Any]], tmp_path: Path) -> None:
    hardware = HardwareConfig("torch", "cpu", "float32")
    data = DataConfig(sources)
    stored = reference(ReferenceConfig(str(tiny_model), data, output=str(tmp_path / "ref"), hardware=hardware), QUIET)
    assert len(stored.keys) == 20 + 8  # the valid rows are among the training rows
    run = config(tiny_model, Path(), tmp_path / "run", "torch", valid=None, max_steps=2)
    run.data = data
    train(replace(run, reference=str(tmp_path / "ref")), QUIET)


def test_plan_and_data_check_count_every_source(
    tiny_model: Path, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = config(tiny_model, Path(), tmp_path / "run", "torch", valid=None)
    run.data = DataConfig(sources)
    planned = plan(run, QUIET)
    assert planned.rows == 28 and planned.steps == 2 * -(-28 // 5)
    report = data_check(DataCheckConfig(DataConfig(sources)), QUIET)
    assert [Path(name).name for name in report.files] == ["train.jsonl", "valid.jsonl", "math.jsonl"]


def test_the_command_line_and_yaml_take_sources(
    tiny_model: Path, sources: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model", str(tiny_model), "--backend", "torch", "--max-steps", "1", "--overwrite"]
    words += ["--output", str(tmp_path / "run")]
    (tmp_path / "run.yaml").write_text(json.dumps({"data": sources}))  # JSON is YAML
    for given in (["--data", json.dumps(sources)], ["--config", str(tmp_path / "run.yaml")]):
        assert cli.run([*words, *given]) == 0
        assert "math: train: 8 rows" in capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(json.dumps({"data": [{**sources[0], "wieght": 1}]}))
    assert cli.run([*words, "--config", str(tmp_path / "run.yaml")]) == 2
    assert "unknown setting data[0].wieght: did you mean weight?" in " ".join(capsys.readouterr().err.split())
    assert cli.run(["train", "--config", str(tmp_path / "run" / "config.yaml"), "--overwrite"]) == 0


# Streams


def mixed(*weights: float, seed: int = 0, rows: int = 40, unit: Any = "row") -> MixedStream:
    streams = {
        name: stream_of([pair(f"{name}{i}") for i in range(rows + 3 * k)], seed=seed, unit=unit)
        for k, name in enumerate("abc"[: len(weights)])
    }
    return MixedStream(streams, weights, seed)


def given(batches: Iterator[tuple[list[Example], Any]], count: int) -> Counter[str]:
    return Counter(c[0] for batch, _ in islice(batches, count) for c in completions(batch))


def test_streams_give_their_shares_in_an_order_of_the_seed() -> None:
    found = given(mixed(3, 1, 0).batches(10), 400)
    assert found.keys() == {"a", "b"} and abs(found["a"] / 4000 - 0.75) < 0.03
    assert list(islice(mixed(3, 1).batches(4), 9)) == list(islice(mixed(3, 1).batches(4), 9))
    assert list(islice(mixed(3, 1, seed=1).batches(4), 9)) != list(islice(mixed(3, 1).batches(4), 9))
    once = Counter(c for batch, _ in islice(mixed(1).batches(8), 10) for c in completions(batch))
    assert set(once.values()) == {1}  # an epoch of one source has each row once


@pytest.mark.parametrize("unit", ["row", "pair"])
def test_mixed_streams_resume_anywhere(unit: Any) -> None:
    """Between the two completions of a pair too, where the loss does not compare them, and over the ends of epochs."""
    whole = list(islice(mixed(2, 1, rows=7, unit=unit).batches(3), 30))
    for at in range(0, 29, 3):
        rest = islice(mixed(2, 1, rows=7, unit=unit).batches(3, whole[at][1]), 29 - at)
        assert list(rest) == whole[at + 1 :]
    if unit == "pair":
        assert all(len({c[:-1] for c in completions(batch)}) * 2 == len(batch) for batch, _ in whole if len(batch) == 4)
    stream = mixed(2, 1, rows=7, unit=unit)
    total = Counter(c[0] for batch, _ in whole for c in completions(batch))
    assert stream.drawn(3, whole[-1][1]) == {"a": total["a"], "b": total["b"]}


def test_a_position_of_other_streams_is_refused() -> None:
    _, position = next(mixed(1, 1).batches(2))
    for other in (mixed(1, 1, 1).batches(2, position), stream_of([good(1)]).batches(2, position)):
        with pytest.raises(UserError, match="is no position in"):
            next(other)


# The Hub


def test_a_subset_and_a_revision_of_a_hub_data_set_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((path, options))
        return [good(1), good(2)]

    def split_names(name: str, **options: Any) -> list[str]:
        asked.append((name, options))
        return ["train_prefs", "test_prefs"]

    fake = SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=split_names)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = find_source(Where("owner/name", "math", "v2"), "train_prefs")
    assert source.name == "owner/name/math@v2[train_prefs]" and len(list(source.read())) == 2
    options = {"name": "math", "revision": "v2", "split": "train_prefs", "streaming": False}
    assert asked == [
        ("owner/name", {"config_name": "math", "revision": "v2"}),
        ("owner/name", options),
    ]
    assert has_split(Where("owner/name"), "test_prefs") and not has_split(Where("owner/name"), "valid")
    with pytest.raises(UserError, match="owner/name: this Hub data set has no train split, only train_prefs, test_"):
        find_source(Where("owner/name"), "train")
