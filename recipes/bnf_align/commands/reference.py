"""`bnf reference`: the reference's log-odds of every row, computed once into a folder for `bnf train --reference`."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from bnf_align.run.feedback import load_split, read_once, splits_of, with_date
from bnf_align.run.progress import Bar, bar
from bnf_core import registry
from bnf_core.config import DataConfig, ReferenceConfig, TrainConfig
from bnf_core.data import sources
from bnf_core.data.table import ExampleTable
from bnf_core.data.tokenization import load_tokenizer, pad_id
from bnf_core.errors import TrainingStopped
from bnf_core.models.model_folder import resolve_model
from bnf_core.protocol import Engine
from bnf_core.steps.batching import MicroBatching
from bnf_core.steps.reference import ReferenceCache
from bnf_core.steps.steps import my_share
from bnf_core.storage.files import held
from bnf_core.storage.reference_folder import ReferenceWriter, StoredReference, fingerprint, recorded_date
from bnf_core.storage.reference_folder import open_reference as open_folder
from bnf_core.types import Array, Example


def reference(config: ReferenceConfig, console: Console) -> StoredReference:
    """Compute what the output folder lacks, on one process or many.

    Raises:
        UserError: bad input, or the folder holds the reference of something else; it is as it was.
        TrainingStopped: interrupted, no more can be written, or the model gives no number. What was computed stays,
            and the same call goes on from there.
    """
    processes = registry.get(config.hardware.backend).processes()
    folder = Path(config.output).expanduser()
    if processes.rank > 0:
        console = Console(quiet=True)
    model = resolve_model(config.model)
    tokenizer = load_tokenizer(model)
    with held(folder, "`bnf reference`", processes):
        _store(config, folder, model, tokenizer, console)
    stored = StoredReference(folder)
    tokens = sum(shard["tokens"] for shard in stored.shards)
    console.print(
        f"{escape(str(folder))}: {len(stored.keys):,} different rows, {tokens:,} completion tokens",
        highlight=False,
        soft_wrap=True,
    )
    return stored


def _store(
    config: ReferenceConfig, folder: Path, model: Path, tokenizer: PreTrainedTokenizerBase, console: Console
) -> None:
    """Compute what a folder lacks that nobody else writes to."""
    backend, hardware = registry.get(config.hardware.backend), config.hardware
    processes = backend.processes()
    known = None if config.overwrite else recorded_date(folder)
    config = replace(config, data=with_date(config.data, tokenizer, known))
    splits = splits_of(config.data) if config.split == "all" else [config.split]
    path = ", ".join(str(of.where) for of in config.data.each().values())
    rows = _rows(splits, config.data, tokenizer, console)
    engine = backend.load(model, device=hardware.device, dtype=hardware.dtype, load_in_4bit=hardware.load_in_4bit)
    writer = ReferenceWriter(
        folder,
        fingerprint(model, tokenizer, config.data, hardware, engine.dtype),
        {"backend": backend.name},
        shard_rows=config.shard_rows,
        overwrite=config.overwrite,
        processes=processes,
    )
    for message in writer.damaged:
        console.print(f"[yellow]computed again: {escape(message)}[/yellow]", highlight=False, soft_wrap=True)
    batching = MicroBatching(config.micro_batch_size, multiple_of=processes.shares, share_prompts=engine.shares_prompts)
    pad = pad_id(tokenizer)
    try:
        with bar("reference", _batches(rows, writer, batching, console), console) as progress:
            for window in writer.windows(rows, f"{path} ({', '.join(splits)})"):
                writer.write(_compute(window, engine, batching, pad, progress))
    except (OSError, KeyboardInterrupt) as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{folder} could not be written: {error}"
        raise TrainingStopped(
            f"{reason}; {len(writer.keys):,} rows are stored. The same command resumes from there"
        ) from error


def open_reference(
    config: TrainConfig,
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    rows: Iterable[Sequence[Example]] = (),
) -> StoredReference | None:
    """The reference that a run was given, if any.

    Args:
        rows: tables of what must be in it.
    Raises:
        UserError: it is damaged, of another model, tokenizer, …, or lacks rows.
    """
    if config.reference is None:
        return None
    expected = fingerprint(model, tokenizer, config.data, config.hardware, engine.dtype)
    stored = open_folder(config.reference, expected)
    for some in rows:
        stored.require(some)
    return stored


def _rows(
    splits: Sequence[str], data: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> Iterable[Example]:
    """A table, or, streamed, an iterator."""
    if data.streaming:
        each = [(split, of) for of in data.each().values() for split in _own_splits(of, splits)]
        return chain.from_iterable(read_once(split, of, tokenizer, console) for split, of in each)
    each_split = [(name, of, split) for name, of in data.each().items() for split in _own_splits(of, splits)]
    return ExampleTable.joined(load_split(of, split, tokenizer, console, name) for name, of, split in each_split)


def _own_splits(data: DataConfig, splits: Sequence[str]) -> list[str]:
    """Those that one of several sources has."""
    return [s for s in splits if len(splits) == 1 or s == "train" or sources.has_split(data.where, data.called(s))]


def _batches(rows: Iterable[Example], writer: ReferenceWriter, batching: MicroBatching, console: Console) -> int | None:
    """How many batches are to be computed; of streamed rows nobody knows."""
    if not isinstance(rows, ExampleTable):
        return None
    new = len(np.setdiff1d(rows.column("keys"), writer.keys))
    if new < len(rows):
        console.print(f"{new:,} of {len(rows):,} rows are still to be computed, each once", highlight=False)
    whole, rest = divmod(new, writer.shard_rows)
    at_once = batching.micro_batch_size * batching.multiple_of
    return whole * -(-writer.shard_rows // at_once) + -(-rest // at_once)


def _compute(
    window: Sequence[Example], engine: Engine, batching: MicroBatching, pad: int, progress: Bar
) -> dict[str, Array]:
    """The state of a cache that knows these rows and no others, in their order."""
    cache = ReferenceCache(engine.reference_log_odds)
    for batch in my_share(window, batching, engine.processes, pad):
        started = time.perf_counter()
        cache.fill([batch], engine.processes)
        speed = batch.lengths.sum() * engine.processes.shares / (time.perf_counter() - started)
        progress.advance(**{"tok/s": f"{speed:,.0f}"})
    state = cache.state(e.key for e in window)
    rows = np.repeat(np.arange(len(window)), state["lengths"])[np.isnan(state["log_odds"])]
    if len(rows):
        raise TrainingStopped(
            f"the log-odds of {', '.join(window[i].source for i in np.unique(rows)[:3])} are not a number under this "
            f"model in {engine.dtype}: try another --dtype, or leave the rows out"
        )
    return state


Config = ReferenceConfig
POSITIONAL = ("--data",)


def run(config: ReferenceConfig, console: Console) -> int:
    reference(config, console)
    return 0
