"""The reference's log-odds: looked up by content, stored in shards, resumed, refused where they do not fit."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

import forked
import tiny
from bnf_align import cli
from bnf_align.commands.reference import reference
from bnf_core.config import DataConfig, HardwareConfig, LoraConfig, OptimizerConfig, ReferenceConfig, TrainConfig
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import TrainingStopped, UserError
from bnf_core.processes import ALONE, Processes
from bnf_core.steps.batching import MicroBatching, collate, micro_batches
from bnf_core.steps.reference import ReferenceCache
from bnf_core.storage import reference_folder as module
from bnf_core.storage.files import held
from bnf_core.storage.reference_folder import ReferenceWriter, StoredReference, fingerprint, open_reference
from bnf_core.types import Array, Batch, Example
from conftest import fast_on
from invariance import launch

QUIET = Console(quiet=True)
FINGERPRINT = {"model": "a", "tokenizer": "b"}


def row(i: int, length: int, label: bool = True) -> Example:
    """Rows i and i + 100 have the same completion and another prompt."""
    return Example((7, i), tuple(range(i % 100, i % 100 + length)), label, source=f"f.jsonl:{i + 1}")


# Of many lengths, 1 among them; every third comes twice.
ROWS = [row(i + 100 * j, 1 + i * 5 % 7, j == 0) for i in range(10) for j in range(2)]
ROWS += [replace(e, source="again") for e in ROWS[::3]]
DIFFERENT = 20


def truth(example: Example) -> Array:
    """What the stand-in for a model gives: each token of each row a number of its own."""
    return np.asarray([sum(example.prompt_ids) * 100 + i + t / 64 for i, t in enumerate(example.completion_ids)], "f4")


class Model:
    """Computes `truth` from what is in a batch, and counts the batches."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: Batch) -> Array:
        self.calls += 1
        starts = np.flatnonzero(np.diff(batch.sequence_ids, prepend=-1))
        place = np.arange(len(batch.sequence_ids)) - np.repeat(starts, np.bincount(batch.sequence_ids))
        prompts = batch.input_ids.ravel()[batch.positions - place] + 7  # the last token of the prompt, and the first
        return prompts * 100 + place + batch.targets / 64


def batch_of(rows: Sequence[Example]) -> Batch:
    return collate(rows, len(rows))


def check(cache: ReferenceCache, rows: Sequence[Example]) -> None:
    np.testing.assert_array_equal(cache(batch_of(rows)), np.concatenate([truth(e) for e in rows]))


def compute(rows: Iterable[Example], folder: Path, processes: Processes = ALONE, **settings: Any) -> StoredReference:
    """What the job does, with the stand-in for a model."""
    settings = {"shard_rows": 4, "processes": processes} | settings
    writer = ReferenceWriter(folder, FINGERPRINT, {"backend": "none"}, **settings)
    for window in writer.windows(rows, "f.jsonl"):
        cache = ReferenceCache(Model())
        batches = micro_batches(window, MicroBatching(3, multiple_of=processes.count))
        cache.fill(batches[processes.share(batches)], processes)
        writer.write(cache.state(e.key for e in window))
    return StoredReference(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Thread(Processes):
    """One of several processes, played by a thread."""

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list[bytes]):
        self.rank, self.count, self._barrier, self._slots = rank, len(slots), barrier, slots

    def gather_bytes(self, data: bytes) -> list[bytes]:
        self._slots[self.rank] = data
        self._barrier.wait(10)
        given = list(self._slots)
        self._barrier.wait(10)
        return given


def together(work: Callable[[Processes], None], count: int = 2) -> list[BaseException | None]:
    """What each of several processes raised."""
    barrier, slots = threading.Barrier(count), [b""] * count
    raised: list[BaseException | None] = [None] * count

    def run(rank: int) -> None:
        try:
            work(Thread(rank, barrier, slots))
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


# In memory


def test_rows_are_known_by_their_tokens_wherever_they_are_met() -> None:
    model = Model()
    cache = ReferenceCache(model)
    check(cache, ROWS)
    assert model.calls == 1 and len(cache.state()["keys"]) == DIFFERENT
    for order in (ROWS[::-1], ROWS[3:9], ROWS[5:6], [ROWS[2], ROWS[2], replace(ROWS[2], label=False, group=9)]):
        check(cache, order)
    for batch in micro_batches(ROWS, MicroBatching(4, pack_to=30)):
        assert len(cache(batch)) == len(batch.targets)
    assert model.calls == 1


def test_a_packed_batch_gives_the_same_as_a_padded_one() -> None:
    packed = ReferenceCache(Model())
    for batch in micro_batches(ROWS, MicroBatching(4, pack_to=30)):
        packed(batch)
    assert len(packed(batch_of([]))) == 0
    other = ReferenceCache(None)
    other.load_state(packed.state())
    check(other, ROWS)


def test_state_and_merge_carry_everything() -> None:
    first, second = ReferenceCache(Model()), ReferenceCache(Model())
    check(first, ROWS[:8])
    check(second, ROWS[4:])
    other = ReferenceCache(None)
    other.load_state(first.state())
    assert not other.missing(batch_of(ROWS[:8])) and other.missing(batch_of(ROWS[7:9]))
    other.merge(second.state())
    check(other, ROWS)
    other.load_state(first.state())  # instead of what it knew
    assert other.missing(batch_of(ROWS))
    other.merge({name: values + (name == "log_odds") for name, values in first.state().items()})
    check(other, ROWS[:8])  # what was known first stays


def test_nothing_to_compute_with_says_what_to_run() -> None:
    with pytest.raises(UserError, match=r"lacks rows of this data: run `bnf reference`"):
        ReferenceCache(None)(batch_of(ROWS))


def test_processes_learn_what_the_others_computed() -> None:
    """Process 0 knows its rows already and computes all the same, because the others cannot without it."""
    models, parts = [Model(), Model()], [ROWS[:6], ROWS[6:12]]
    caches = [ReferenceCache(model) for model in models]
    check(caches[0], parts[0])

    def fill(process: Processes) -> None:
        part = parts[process.rank]
        for _ in range(2):  # the second time all is known
            caches[process.rank].fill([batch_of(part[:4]), batch_of(part[4:]), batch_of([])], process)

    assert together(fill) == [None, None]
    assert [model.calls for model in models] == [3, 2]
    check(caches[0], ROWS[:12])
    assert not caches[1].missing(batch_of(parts[1])) and models[1].calls == 2
    check(caches[1], parts[1])


def test_filling_alone_computes_what_is_missing() -> None:
    model = Model()
    cache = ReferenceCache(model)
    cache.fill([batch_of(ROWS[:4]), batch_of(ROWS[:4]), batch_of(ROWS[4:])], ALONE)
    assert model.calls == 2
    check(cache, ROWS)


# In a folder


def test_stored_rows_are_looked_up_and_the_others_computed(tmp_path: Path) -> None:
    stored = compute(ROWS[:12], tmp_path / "ref")
    check(ReferenceCache(None, stored), ROWS[:12][::-1])
    model = Model()
    cache = ReferenceCache(model, stored)
    check(cache, ROWS[:12])
    assert model.calls == 0 and len(cache.state()["keys"]) == 0
    check(cache, ROWS[8:])
    assert model.calls == 1
    assert not set(cache.state()["keys"].tolist()) & {e.key for e in ROWS[:12]}  # the stored ones stay on the disk


def test_a_shard_holds_a_number_for_every_token_in_the_order_of_the_data(tmp_path: Path) -> None:
    compute(ROWS, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    different = ROWS[:DIFFERENT]
    assert index["rows"] == DIFFERENT and [s["rows"] for s in index["shards"]] == [4] * 5
    for number, shard in enumerate(index["shards"]):
        arrays = safetensors.numpy.load_file(tmp_path / shard["file"])
        rows = different[4 * number : 4 * number + 4]
        assert arrays["keys"].tolist() == [e.key for e in rows]
        assert arrays["lengths"].tolist() == [len(e.completion_ids) for e in rows]
        np.testing.assert_array_equal(arrays["log_odds"], np.concatenate([truth(e) for e in rows]))
        assert shard["tokens"] == len(arrays["log_odds"]) and arrays["log_odds"].dtype == np.float32


def dying(kill_at: int) -> Callable[[Path, str | bytes], None]:
    """Writes files until it is killed in the middle of one."""
    calls, original = iter(range(1, 100)), module.replace_file

    def replace_file(path: Path, content: str | bytes) -> None:
        if next(calls) == kill_at:
            torn = content.encode() if isinstance(content, str) else content
            path.with_name(f".{path.name}.partial").write_bytes(torn[: len(torn) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, content)

    return replace_file


def test_a_kill_at_any_write_loses_one_shard_at_most_and_leaves_the_same_bytes(tmp_path: Path) -> None:
    compute(ROWS, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for kill_at in range(1, 13):  # the index, then a shard and the index five times, and the index with the data's name
        folder = tmp_path / str(kill_at)
        child = os.fork()
        if child == 0:
            try:
                module.replace_file = dying(kill_at)  # type: ignore[assignment]
                compute(ROWS, folder)
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        if kill_at > 1:
            stored = StoredReference(folder)
            assert not stored.damaged and len(stored.keys) == 4 * ((kill_at - 2) // 2)
        assert len(compute(ROWS, folder).keys) == DIFFERENT
        assert contents(folder) == expected, kill_at


def test_rows_are_read_a_shard_at_a_time(tmp_path: Path) -> None:
    read = []
    writer = ReferenceWriter(tmp_path, FINGERPRINT, {}, shard_rows=4)
    next(writer.windows((read.append(e) or e for e in ROWS), "f.jsonl"))
    assert read == ROWS[:4]


def test_several_processes_write_what_one_does(tmp_path: Path) -> None:
    compute(ROWS, tmp_path / "one")
    for rows in (ROWS[:9], ROWS):  # and go on together
        assert together(lambda process, rows=rows: compute(rows, tmp_path / "three", process), 3) == [None] * 3  # type: ignore[misc]
    assert StoredReference(tmp_path / "three").keys.tolist() == StoredReference(tmp_path / "one").keys.tolist()
    check(ReferenceCache(None, StoredReference(tmp_path / "three")), ROWS)
    together(lambda process: compute(ROWS, tmp_path / "anew", process), 3)
    assert contents(tmp_path / "anew") == contents(tmp_path / "one")


def test_a_full_disk_stops_all_processes_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = iter(range(1, 100)), module.replace_file

    def full(path: Path, content: str | bytes) -> None:
        if next(calls) == 4:  # the second shard
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(module, "replace_file", full)
    raised = together(lambda process: compute(ROWS, tmp_path, process))
    assert all(isinstance(error, OSError) and "No space left" in str(error) for error in raised)
    assert len(StoredReference(tmp_path).keys) == 4


def test_more_data_is_added_and_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    compute(ROWS[:6], tmp_path)
    before = contents(tmp_path)
    writer = ReferenceWriter(tmp_path, FINGERPRINT, {}, shard_rows=100)
    windows = []
    for window in writer.windows(ROWS, "more"):
        windows.append(window)
        cache = ReferenceCache(Model())
        cache(batch_of(window))
        writer.write(cache.state())
    assert windows == [ROWS[6:DIFFERENT]]
    after = contents(tmp_path)
    assert all(after[name] == before[name] for name in before if name != "index.json")
    check(ReferenceCache(None, StoredReference(tmp_path)), ROWS)
    data = json.loads(after["index.json"])["data"]
    assert list(data) == ["f.jsonl", "more"] and data["more"].startswith(f"{len(ROWS)} rows")
    shuffled = compute(ROWS[::-1], tmp_path)
    assert shuffled.index["data"]["f.jsonl"] == data["more"]  # the digest does not depend on the order


@pytest.mark.parametrize("harm", ["flipped", "batching", "gone"])
def test_a_damaged_shard_is_refused_by_name_and_computed_again(tmp_path: Path, harm: str) -> None:
    compute(ROWS, tmp_path / "ref")
    expected = contents(tmp_path / "ref")
    shard = tmp_path / "ref" / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.unlink()
    if harm != "gone":
        shard.write_bytes(data if harm == "flipped" else data[:-40])
    with pytest.raises(UserError, match=r"damaged: .*shard-00002\.safetensors: .*Run the `bnf reference`"):
        open_reference(tmp_path / "ref", FINGERPRINT)
    writer = ReferenceWriter(tmp_path / "ref", FINGERPRINT, {}, shard_rows=4)
    assert len(writer.damaged) == 1 and "shard-00002" in writer.damaged[0]
    assert StoredReference(tmp_path / "ref").index["data"] == {}  # nothing is complete any more
    compute(ROWS, tmp_path / "ref")
    assert contents(tmp_path / "ref") == expected


def test_a_shard_that_is_cut_short_while_in_use_is_named(tmp_path: Path) -> None:
    stored = compute(ROWS, tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"shard-00001\.safetensors was cut short"):
        check(ReferenceCache(None, stored), ROWS)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.safetensors can no longer be read"):
        check(ReferenceCache(None, stored), ROWS)


def test_missing_rows_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    stored = compute(ROWS[:6], tmp_path)
    stored.require(ROWS[2:5])  # a part is fine
    with pytest.raises(UserError, match=r"lacks 2 of 5 rows, the first is f\.jsonl:4\b.* It is of f\.jsonl: 6 rows"):
        stored.require(ROWS[3:8])
    with pytest.raises(UserError, match=f"{tmp_path} lacks rows of this data"):
        check(ReferenceCache(None, stored), ROWS)


def test_a_changed_completion_prompt_or_length_is_another_row(tmp_path: Path) -> None:
    e = ROWS[3]
    stored = compute([e], tmp_path)
    changed = [
        replace(e, completion_ids=(*e.completion_ids, 3)),
        replace(e, prompt_ids=(8, *e.prompt_ids[1:])),
        replace(e, prompt_ids=(*e.prompt_ids, e.completion_ids[0]), completion_ids=e.completion_ids[1:]),
    ]
    for other in changed:
        with pytest.raises(UserError, match="lacks 1 of 1 rows"):
            stored.require([other])
    stored.require([replace(e, label=not e.label, group=5, source="elsewhere")])


def test_what_is_not_a_reference_cache_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "shard-00000.safetensors").write_text("precious")
    with pytest.raises(UserError, match=r"holds shard-00000\.safetensors, but no index\.json"):
        compute(ROWS, folder)
    for text in ("precious", "[]", '{"weight_map": {}}', '{"format": 1, "shards": [{"file": "../x"}]}'):
        (folder / "index.json").write_text(text)
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"index\.json is not the index of a reference cache"):
                compute(ROWS, folder, overwrite=overwrite)
        assert contents(folder) == {"shard-00000.safetensors": b"precious", "index.json": text.encode()}
    (folder / "index.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match=r"has format 2, and this version of bnf-align reads format 1"):
        open_reference(folder, FINGERPRINT)
    with pytest.raises(UserError, match="is not a reference cache: it has no"):
        open_reference(tmp_path, FINGERPRINT)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        compute(ROWS, tmp_path / "file")


def test_overwriting_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    compute(ROWS, tmp_path / "ref", shard_rows=1)
    writer = ReferenceWriter(tmp_path / "ref", {"model": "other"}, {}, shard_rows=4, overwrite=True)
    assert len(writer.keys) == 0 and list(contents(tmp_path / "ref")) == ["index.json"]
    with pytest.raises(UserError, match=r"of another model \(other; this run's: a\) and another tokenizer"):
        compute(ROWS, tmp_path / "ref")


def test_memory_holds_keys_and_places_not_log_odds(tmp_path: Path) -> None:
    import tracemalloc

    rows = [Example((1,), tuple(range(i, i + 500)), True) for i in range(300)]  # 600 kB of log-odds
    compute(rows, tmp_path, shard_rows=300)
    tracemalloc.start()
    cache = ReferenceCache(None, StoredReference(tmp_path))
    for e in rows:
        cache(batch_of([e]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000


# What it is of


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit_weights(model: Path) -> None:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_template(model: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|end|>", "<|end|> "))


def edit_merges(model: Path) -> None:
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))


def edit_special(model: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<|end|>"', '"eos_token": "<|system|>"'))


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (edit_weights, "model"),
        (edit_template, "chat template"),
        (edit_merges, "tokenizer"),
        (edit_special, "tokenizer"),
        ({"template": "plain"}, "data.template"),
        ({"max_length": 99}, "data.max_length"),
        ("bfloat16", "dtype"),
        ({"load_in_4bit": True}, "dtype"),
    ],
)
def test_every_part_that_differs_is_named(
    model: Path, tmp_path: Path, edit: Callable[[Path], None] | dict[str, Any] | str, part: str
) -> None:
    def now(data: DataConfig, hardware: HardwareConfig, dtype: str = "float32") -> dict[str, str]:
        tokenizer = load_tokenizer(model)
        tokenizer("used", truncation=True, max_length=1)  # which the tokenizer remembers
        return fingerprint(model, tokenizer, data, hardware, dtype)

    data, hardware = DataConfig("f"), HardwareConfig()
    before = fingerprint(model, load_tokenizer(model), data, hardware, "float32")
    ReferenceWriter(tmp_path / "ref", before, {}, shard_rows=1)
    open_reference(tmp_path / "ref", now(DataConfig("elsewhere"), HardwareConfig(backend="mlx", device="gpu")))
    if callable(edit):
        edit(model)
        after = now(data, hardware)
    elif isinstance(edit, str):
        after = now(data, hardware, edit)
    elif "load_in_4bit" in edit:
        after = now(data, HardwareConfig(**edit))
    else:
        after = now(DataConfig("f", **edit), hardware)
    with pytest.raises(UserError) as refused:
        open_reference(tmp_path / "ref", after)
    message = str(refused.value)
    assert (
        f"the reference cache {tmp_path / 'ref'} is of another {part} (" in message and ") and another" not in message
    )
    assert before[part] in message and after[part] in message
    with pytest.raises(UserError, match="--overwrite"):
        ReferenceWriter(tmp_path / "ref", after, {}, shard_rows=1)


# The job, on real models


def settings(model: Path, data: Path, output: Path, backend: str, **overrides: Any) -> ReferenceConfig:
    hardware = HardwareConfig(backend, "cpu", "float32")
    config: dict[str, Any] = {"micro_batch_size": 3, "shard_rows": 5}
    return ReferenceConfig(
        str(model), DataConfig(str(data)), output=str(output), hardware=hardware, **config | overrides
    )


@pytest.fixture(scope="module")
def made(tiny_model: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that a backend makes of the feedback, made once."""
    folders: dict[str, Path] = {}

    def make(backend: str) -> Path:
        if backend not in folders:
            folders[backend] = tmp_path_factory.mktemp("made") / backend
            reference(settings(tiny_model, feedback, folders[backend], backend), QUIET)
        return folders[backend]

    return make


def test_a_folder_that_another_one_writes_to_is_left_alone(tiny_model: Path, feedback: Path, tmp_path: Path) -> None:
    run = settings(tiny_model, feedback, tmp_path / "reference", "torch")
    with (
        held(tmp_path / "reference", "run"),
        pytest.raises(UserError, match=r"another `bnf reference` is writing to .*reference: choose another --output"),
    ):
        reference(run, QUIET)
    assert [path.name for path in (tmp_path / "reference").iterdir()] == [".lock"]


@pytest.fixture(scope="module")
def examples(tiny_model: Path, feedback: Path) -> Sequence[Example]:
    from bnf_align.run.feedback import load_split

    return load_split(DataConfig(str(feedback)), "train", load_tokenizer(tiny_model), QUIET)


def test_the_folder_holds_what_the_model_says(
    made: Callable[[str], Path], tiny_model: Path, examples: list[Example], backend_name: str
) -> None:
    """One row at a time and from a transformers model on its own: log p − log(1 − p) of every completion token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    cache = ReferenceCache(None, StoredReference(made(backend_name)))
    assert len(examples) == 12
    for e in examples:
        with torch.no_grad():
            logits = model(torch.tensor([e.prompt_ids + e.completion_ids])).logits[0].double()
        log_p = logits.log_softmax(-1)[len(e.prompt_ids) - 1 : -1].gather(1, torch.tensor([e.completion_ids]).T)[:, 0]
        expected = log_p - torch.log(-torch.expm1(log_p))
        np.testing.assert_allclose(cache(batch_of([e])), expected.numpy(), atol=1e-4)


def test_one_backend_reads_what_the_other_made(
    made: Callable[[str], Path], tiny_model: Path, feedback: Path, examples: list[Example]
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("mlx_lm")
    names = ("torch", "mlx")
    one, two = (ReferenceCache(None, StoredReference(made(name)))(batch_of(examples)) for name in names)
    np.testing.assert_allclose(one, two, atol=1e-4)
    indices = [StoredReference(made(name)).index for name in names]
    assert indices[0]["fingerprint"] == indices[1]["fingerprint"] and indices[0]["data"] == indices[1]["data"]
    assert [index["made_by"]["backend"] for index in indices] == list(names)
    before = contents(made("torch"))
    reference(settings(tiny_model, feedback, made("torch"), "mlx"), QUIET)  # nothing is left to do
    assert contents(made("torch")) == before


def test_all_splits_of_a_folder_are_computed(tiny_model: Path, tmp_path: Path) -> None:
    lines = tiny.write_rows(tmp_path / "all.jsonl", 9).read_text().splitlines(keepends=True)
    (tmp_path / "data").mkdir()
    for name, part in (("train", lines[:4]), ("valid", lines[3:6]), ("test", lines[6:])):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(part))
    run = settings(tiny_model, tmp_path / "data", tmp_path / "ref", "torch")
    assert len(reference(run, QUIET).keys) == 9
    run = settings(tiny_model, tmp_path / "data", tmp_path / "valid", "torch", split="valid")
    assert len(reference(run, QUIET).keys) == 3


def test_streamed_data_give_the_same_bytes(
    made: Callable[[str], Path], tiny_model: Path, feedback: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings(tiny_model, feedback, tmp_path / "ref", "torch")
    run.data = replace(run.data, streaming=True)
    reference(run, QUIET)
    assert contents(tmp_path / "ref") == contents(made("torch"))
    lines = feedback.read_text().splitlines(keepends=True)
    (tmp_path / "bad.jsonl").write_text("".join([*lines[:7], '{"prompt": 3}\n', *lines[7:]]))
    run.data = replace(run.data, path=str(tmp_path / "bad.jsonl"))
    run.output = str(tmp_path / "bad")
    with pytest.raises(UserError, match=r"bad\.jsonl:8"):
        reference(run, QUIET)
    run.data = replace(run.data, skip_bad_rows=True)
    reference(run, Console(width=300))
    out = capsys.readouterr().out
    assert "skipped 1 bad rows" in out and "bad.jsonl:8" in out
    assert StoredReference(tmp_path / "bad").keys.tolist() == StoredReference(made("torch")).keys.tolist()


def killed_at_the_second_shard(words: list[str]) -> None:
    def dying(self: ReferenceWriter, state: Any) -> None:
        if len(self.keys):
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, state)

    write = ReferenceWriter.write
    ReferenceWriter.write = dying  # type: ignore[method-assign]
    cli.run(words)


def test_the_command_killed_and_run_again_leaves_the_same_bytes(
    made: Callable[[str], Path], tiny_model: Path, feedback: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reference", "--model", tiny_model, "--data", feedback, "--output", tmp_path / "ref", "--backend", "torch"]
    words += ["--device", "cpu", "--dtype", "float32", "--micro-batch-size", 3, "--shard-rows", 5]
    command = [str(word) for word in words]
    process = forked.start(killed_at_the_second_shard, command, output=tmp_path / "said")
    assert forked.ended(process) == -signal.SIGKILL, (tmp_path / "said").read_text()
    assert len(StoredReference(tmp_path / "ref").keys) == 5
    assert cli.run(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "7 of 12 rows are still to be computed" in out and "12 different rows" in out
    assert contents(tmp_path / "ref") == contents(made("torch"))
    assert cli.run([*command, "--dtype", "bfloat16"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "is of another dtype (float32; this run's: bfloat16): change it back, or choose another" in error
    assert contents(tmp_path / "ref") == contents(made("torch"))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | BaseException | float], None]:
    """Makes the second shard's computation raise that, or give that number."""
    from bnf_torch.engine import TorchEngine

    def arm(failure: BaseException | float) -> None:
        calls: Iterator[int] = iter(range(100))

        def compute(self: TorchEngine, batch: Batch) -> Array:
            values = original(self, batch)
            if next(calls) < 2:
                return values
            if isinstance(failure, BaseException):
                raise failure
            return np.where(batch.sequence_ids == 1, failure, values)

        monkeypatch.setattr(TorchEngine, "reference_log_odds", compute)

    original = TorchEngine.reference_log_odds
    return arm


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (KeyboardInterrupt(), "interrupted; 5 rows are stored. The same command resumes"),
        (OSError(28, "No space left on device"), "No space left on device; 5 rows are stored"),
        (float("nan"), r"log-odds of .*feedback\.jsonl:\d+ are not a number under this model in float32: try"),
    ],
)
def test_what_stops_the_job_keeps_whole_shards(
    tiny_model: Path, feedback: Path, tmp_path: Path, failing: Callable[[Any], None], failure: Any, message: str
) -> None:
    failing(failure)
    run = settings(tiny_model, feedback, tmp_path / "ref", "torch")
    with pytest.raises(TrainingStopped, match=message):
        reference(run, QUIET)
    assert len(StoredReference(tmp_path / "ref").keys) == 5


def test_two_processes_compute_what_one_does(
    made: Callable[[str], Path], tiny_model: Path, feedback: Path, tmp_path: Path, examples: list[Example]
) -> None:
    words = ["reference", "--model", tiny_model, "--data", feedback, "--output", tmp_path, "--backend", "torch"]
    words += ["--device", "cpu", "--shard-rows", 5, "--micro-batch-size", 2]
    results = launch("ddp", [("", list(map(str, words)))], [tmp_path] * 2)
    assert [code for code, _ in results] == [0, 0], results
    two, one = (ReferenceCache(None, StoredReference(path))(batch_of(examples)) for path in (tmp_path, made("torch")))
    np.testing.assert_allclose(two, one, atol=1e-5)


# Training with it


def train_config(model: Path, data: Path, output: Path, backend: str, **overrides: Any) -> TrainConfig:
    return TrainConfig(
        str(model),
        DataConfig(str(data)),
        valid_fraction=0.2,
        output=str(output),
        hardware=HardwareConfig(backend, "cpu", "float32"),
        lora=LoraConfig(rank=4, alpha=8),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        epochs=2,
        batch_size=4,
        micro_batch_size=3,
        **overrides,
    )


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@fast_on("mlx")
def test_training_reads_the_reference_and_never_computes_it(
    made: Callable[[str], Path],
    tiny_model: Path,
    feedback: Path,
    tmp_path: Path,
    backend_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the folder of either backend: the losses of a run that computes it, to float32 round-off."""
    from bnf_align.commands.train import train
    from bnf_core import registry

    plain = train(train_config(tiny_model, feedback, tmp_path / "plain", backend_name), QUIET)

    def forbidden(self: Any, batch: Batch) -> Array:
        raise AssertionError("a reference pass")

    engine = type(registry.get(backend_name).load(tiny_model, device="cpu"))
    monkeypatch.setattr(engine, "reference_log_odds", forbidden)
    for maker in ("torch", "mlx"):
        config = train_config(tiny_model, feedback, tmp_path / maker, backend_name, reference=str(made(maker)))
        run = train(config, QUIET)
        np.testing.assert_allclose(losses(run.folder), losses(plain.folder), rtol=2e-4, atol=2e-5)


def test_training_refuses_a_reference_that_does_not_fit(
    made: Callable[[str], Path], tiny_model: Path, feedback: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tiny.write_rows(tmp_path / "more.jsonl", 14)
    words = ["train", "--model", tiny_model, "--output", tmp_path / "run", "--reference", made("torch")]
    words += ["--backend", "torch", "--device", "cpu"]
    for change, message in (
        (["--data", more], r"lacks 2 of 14 rows, the first is"),
        (["--data", feedback, "--max-length", "77"], "is of another data.max_length (1024; this run's: 77)"),
        (["--data", feedback, "--reference", tmp_path], "is not a reference cache"),
    ):
        assert cli.run([str(word) for word in [*words, *change]]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
