"""`bnf reference`: the reference's log-odds of every row, computed once into a folder for `bnf train --reference`."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from bnf_core import registry, sources
from bnf_core.batching import Cut, Example, micro_batches
from bnf_core.config import ReferenceConfig, TrainConfig
from bnf_core.errors import TrainingStopped
from bnf_core.model_folder import resolve_model
from bnf_core.protocol import Engine
from bnf_core.reference import ReferenceCache, ReferenceWriter, StoredReference, fingerprint
from bnf_core.reference import open_reference as open_folder
from bnf_core.tokenization import load_tokenizer
from bnf_recipes.feedback import load_split, pad_id
from bnf_recipes.progress import bar


def reference(config: ReferenceConfig, console: Console) -> StoredReference:
    """Compute what the output folder lacks.

    Raises:
        UserError: bad input, or the folder holds the reference of something else; it is as it was.
        TrainingStopped: interrupted, no more can be written, or the model gives no number. What was computed stays,
            and the same call goes on from there.
    """
    backend = registry.get(config.hardware.backend)
    model = resolve_model(config.model)
    tokenizer = load_tokenizer(model)
    path, split = config.data.path, config.split
    splits = [split] if split != "all" else [s for s in sources.SPLITS if sources.has_split(path, s)] or ["train"]
    rows = [e for name in splits for e in load_split(path, name, config.data, tokenizer, console)]
    hardware = config.hardware
    engine = backend.load(model, device=hardware.device, dtype=hardware.dtype, load_in_4bit=hardware.load_in_4bit)
    folder = Path(config.output).expanduser()
    writer = ReferenceWriter(
        folder,
        fingerprint(model, tokenizer, config.data, hardware, engine.dtype),
        {"backend": backend.name},
        shard_rows=config.shard_rows,
        overwrite=config.overwrite,
    )
    for message in writer.damaged:
        console.print(f"[yellow]computed again: {escape(message)}[/yellow]", highlight=False, soft_wrap=True)
    try:
        _compute(rows, f"{path} ({', '.join(splits)})", engine, writer, config, pad_id(tokenizer), console)
    except (OSError, KeyboardInterrupt) as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{folder} could not be written: {error}"
        raise TrainingStopped(
            f"{reason}; {len(writer.keys):,} rows are stored. The same command goes on from there"
        ) from error
    stored = StoredReference(folder)
    tokens = sum(shard["tokens"] for shard in stored.shards)
    console.print(
        f"{escape(str(folder))}: {len(stored.keys):,} different rows, {tokens:,} completion tokens",
        highlight=False,
        soft_wrap=True,
    )
    return stored


def open_reference(
    config: TrainConfig,
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    rows: Sequence[Example] = (),
) -> StoredReference | None:
    """The reference that a run was given, if any.

    Args:
        rows: what must be in it.
    Raises:
        UserError: it is damaged, of another model, tokenizer, …, or lacks rows.
    """
    if config.reference is None:
        return None
    expected = fingerprint(model, tokenizer, config.data, config.hardware, engine.dtype)
    stored = open_folder(config.reference, expected)
    stored.require(rows)
    return stored


def _compute(
    rows: Sequence[Example],
    name: str,
    engine: Engine,
    writer: ReferenceWriter,
    config: ReferenceConfig,
    pad: int,
    console: Console,
) -> None:
    cut = Cut(config.micro_batch_size)
    new = len({e.key for e in rows}.difference(writer.keys.tolist()))
    if new < len(rows):
        console.print(f"{new:,} of {len(rows):,} rows are still to be computed, each once", highlight=False)
    whole, rest = divmod(new, writer.shard_rows)
    batches = whole * -(-writer.shard_rows // cut.micro_batch_size) + -(-rest // cut.micro_batch_size)
    with bar("reference", batches, console) as progress:
        for window in writer.windows(rows, name):
            cache = ReferenceCache(engine.reference_log_odds)
            for batch in micro_batches(window, cut, pad):
                started = time.perf_counter()
                values = cache(batch)
                if np.isnan(values).any():
                    bad = set(batch.keys[batch.rows[np.isnan(values)]].tolist())
                    sources_of_bad = ", ".join(e.source for e in window if e.key in bad)
                    raise TrainingStopped(
                        f"the model's log-odds are not a number for {sources_of_bad}: try --dtype float32 or bfloat16"
                    )
                speed = batch.lengths.sum() / (time.perf_counter() - started)
                progress.advance(**{"tok/s": f"{speed:,.0f}"})
            writer.write(cache.state([e.key for e in window]))
