"""`python -m benchmarks.tokens`: making tokens, by threads and by processes, and opening those that are kept."""

import gc
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.command import main
from bnf_core.config import DataConfig
from bnf_core.data import sources
from bnf_core.data.feedback import FeedbackTokenizer
from bnf_core.data.reading import RowReader
from bnf_core.data.table import ExampleTable
from bnf_core.data.token_cache import TokenCache, made_of
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.models.model_folder import resolve_model
from bnf_core.steps.batching import Rows


@dataclass
class BenchTokensConfig:
    """Time and memory that it takes to make the tokens of feedback, and to open them again."""

    model: str
    """A checkpoint folder or a Hub model, whose tokenizer is used."""
    data: DataConfig
    workers: list[int] = field(default_factory=lambda: [0, os.cpu_count() or 1])
    """How many processes tokenise; 0: none besides this one, whose tokenizer has threads."""

    def __post_init__(self) -> None:
        if not self.workers or min(self.workers) < 0:
            raise ValueError(f"workers is {self.workers}: expected numbers of at least 0")


@dataclass(frozen=True)
class Figures:
    rows: int
    tokens: int
    seconds: float
    cpu_seconds: float  # of all processes
    resident: int  # bytes of memory of this process's own that remain
    stored: int = 0  # bytes on the disk


def bench_tokens(config: BenchTokensConfig, console: Console) -> dict[str, Figures]:
    """Measure each way in a process of its own, and print."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in config.workers:
            name = f"made, {workers} processes" if workers else "made, threads"
            place = Path(folder, str(workers))
            found[name] = _apart(_made, config, place, workers)
        found["opened"] = _apart(_made, config, place, None)
        found["opened, and an epoch"] = _apart(_epoch, config, place)
    console.print(table(found))
    return found


def table(figures: dict[str, Figures]) -> Table:
    some = next(iter(figures.values()))
    result = Table("", "s", "CPU s", "tokens/CPU s", "bytes a token", "bytes a row")
    result.title = f"{some.rows:,} rows, {some.tokens:,} tokens, {some.stored / some.tokens:.2f} bytes a token stored"
    result.caption = "bytes of memory of a process's own that remain"
    for name, f in figures.items():
        per_second = f"{f.tokens / f.cpu_seconds:,.0f}" if f.cpu_seconds else ""
        kept = (f"{f.resident / f.tokens:.2f}", f"{f.resident / f.rows:.1f}")
        result.add_row(name, f"{f.seconds:.2f}", f"{f.cpu_seconds:.2f}", per_second, *kept)
    return result


def _apart(measure: Callable[..., Figures], *args: object) -> Figures:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def _made(config: BenchTokensConfig, place: Path, workers: int | None) -> Figures:
    """By so many workers; None: opened, where they are."""
    source, tokenizer = sources.find_source(config.data.where, "train"), load_tokenizer(resolve_model(config.model))
    of, cache = made_of(source, config.data, tokenizer), TokenCache(place)
    feedback = FeedbackTokenizer.of(tokenizer, config.data)
    _warm(feedback, source)
    before, memory = _clock(), own_memory()

    def make() -> object:
        loaded = sources.load_feedback(source, "train", config.data.skip_bad_rows, feedback.reading)
        return feedback.making(loaded, workers)

    columns = cache.table(of, make, print)  # type: ignore[arg-type]
    seconds, cpu = (now - then for now, then in zip(_clock(), before, strict=True))
    gc.collect()
    (entry,) = cache.entries()
    rows = ExampleTable([columns])
    return Figures(len(rows), entry.tokens, seconds, cpu, own_memory() - memory, entry.size)


def _epoch(config: BenchTokensConfig, place: Path) -> Figures:
    source, tokenizer = sources.find_source(config.data.where, "train"), load_tokenizer(resolve_model(config.model))
    of = made_of(source, config.data, tokenizer)
    before, memory = _clock(), own_memory()
    cache = TokenCache(place)
    rows = Rows(ExampleTable([cache.table(of, lambda: None, print)]), 0)  # type: ignore[arg-type, return-value]
    batches = rows.batches(16)
    for _ in range(rows.steps_per_epoch(16)):
        next(batches)
    seconds, cpu = (now - then for now, then in zip(_clock(), before, strict=True))
    (entry,) = cache.entries()
    return Figures(len(rows.examples), entry.tokens, seconds, cpu, own_memory() - memory, entry.size)


def _warm(feedback: FeedbackTokenizer, source: sources.Source) -> None:
    """One row, so that what is loaded with the first is not counted."""
    first = next(iter(source.read()))
    feedback(RowReader(feedback.reading)(first.columns(), first.source)[:1])


def _clock() -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)


def own_memory() -> int:
    """Bytes of resident memory that this process shares with no file; elsewhere than on Linux 0, which nobody knows."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


if __name__ == "__main__":
    main("tokens", BenchTokensConfig, bench_tokens)
