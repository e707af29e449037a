"""Running the cells of an experiment: one after another or in several processes, each kept as it is done.

<output>/models/…             checkpoints that are made here
<output>/cells/DIGEST.json    what one cell came to; experiments that ask for the same one share it
<output>/NAME/settings.json   what was asked for
<output>/NAME/results.json, table.md, *.png
"""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bnf_align.experiments import cells as cell_module
from bnf_align.experiments.base import Experiment
from bnf_align.experiments.cells import Cell, Result
from bnf_align.experiments.outcome import collapsed
from bnf_align.experiments.references import reference_model
from bnf_align.experiments.scales import SCALES
from bnf_align.experiments.subjects import Subject
from bnf_align.run.progress import Bar, bar
from bnf_core import registry
from bnf_core.errors import TrainingStopped
from bnf_core.storage.digests import json_digest, model_digest
from bnf_core.storage.files import replace_file


@dataclass(frozen=True)
class Plan:
    """Which cells there are."""

    name: str
    experiment: Experiment
    scale: str
    seeds: int
    sweep_seeds: int
    learning_rates: Sequence[float]
    steps: int
    batch_size: int

    @property
    def base(self) -> Cell:
        return Cell("", "bnf", 1.0, 0, self.steps, self.batch_size, self.scale, **self.experiment.common)

    def start(self) -> Cell:
        """The model before any step."""
        return replace(self.base, steps=0)

    def start_of_sweep(self) -> Cell:
        return replace(self.start(), part="valid")

    def sweep(self) -> list[Cell]:
        """Of every objective at every learning rate, on seeds and problems that nothing is compared on."""
        swept = {m.rate_of: (m.objective, m.changes if m.swept else {}) for m in self.experiment.methods.values()}
        base = replace(self.base, part="valid")
        return [
            replace(base, method=name, objective=objective, learning_rate=rate, seed=1000 + seed, **changes)
            for seed in range(self.sweep_seeds)
            for name, (objective, changes) in swept.items()
            for rate in self.learning_rates
        ]

    def cells(self, rates: dict[str, float]) -> list[Cell]:
        """Those that are compared, at the learning rates that the sweep found for their objectives."""
        return [
            replace(
                self.base,
                method=name,
                objective=method.objective,
                learning_rate=rates[method.rate_of],
                seed=seed,
                setting=setting,
                **{**method.changes, **changes},
            )
            for setting, changes in self.experiment.settings.items()
            for seed in range(self.seeds)
            for name, method in self.experiment.methods.items()
            if self.experiment.applies(name, setting)
        ]


class Runner:
    """
    Args:
        output: the folder of all experiments.
        backend: its name.
        jobs: processes at a time.
        subject: what the scale is about.
    """

    def __init__(self, output: Path, scale: str, backend: str, jobs: int, console: Console, subject: Subject):
        self.output, self.scale, self.backend, self.jobs, self.console = output, scale, backend, jobs, console
        self.subject = subject
        self.folder = output / "cells"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = SCALES[scale].model(output / "models", registry.get(backend), console)
        self.digest = model_digest(self.model)
        self.known_by = [self.digest, self.backend, *filter(None, [subject.digest])]
        self.seconds = 0.0

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{json_digest([cell.digest, *self.known_by])[-16:]}.json"

    def run(self, cells: Sequence[Cell], name: str) -> list[Result]:
        """What each cell came to, in their order; those that are done already are read.

        Raises:
            TrainingStopped: interrupted, or a process died; what is done stays.
        """
        missing = {self.path(cell): cell for cell in cells if not self.path(cell).exists()}
        for kind in {cell.reference for cell in missing.values()} - {"start"}:
            reference_model(kind, self.model, SCALES[self.scale], registry.get(self.backend), self.console)
        with bar(name, len(missing), self.console) as progress:
            try:
                for cell, result in self._results(missing):
                    _tell(progress, cell, result)
            except (KeyboardInterrupt, BrokenProcessPool) as error:
                done = sum(path.exists() for path in missing)
                what = "interrupted" if isinstance(error, KeyboardInterrupt) else "a process died"
                raise TrainingStopped(
                    f"{what} after {done} of {len(missing)} cells of {name}, which are kept: --resume goes on"
                ) from error
        found = [json.loads(self.path(cell).read_text(encoding="utf-8")) for cell in cells]
        self.seconds += sum(result["seconds"] for result in found)
        for cell, result in zip(cells, found, strict=True):  # a shared one may have been run under other names
            result["cell"] |= {"method": cell.method, "setting": cell.setting}
        return found

    def _results(self, missing: dict[Path, Cell]) -> Iterator[tuple[Cell, Result]]:
        if self.jobs == 1 or len(missing) < 2:
            for path, cell in missing.items():
                yield cell, run_and_keep(cell, self.model, self.backend, path, self.subject)
            return
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes: one core each
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.jobs, mp_context=context, initializer=_begin, initargs=(self.backend,)) as pool:
            waiting: dict[Future[Result], Cell] = {
                pool.submit(run_and_keep, cell, self.model, self.backend, path, self.subject): cell
                for path, cell in missing.items()
            }
            try:
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def run_and_keep(cell: Cell, model: Path, backend: str, path: Path, subject: Subject) -> Result:
    """Run a cell, and write what it came to, whole or not at all."""
    started = time.process_time()
    result = cell_module.run(cell, model, backend, subject) | {"seconds": round(time.process_time() - started, 2)}
    replace_file(path, json.dumps(result) + "\n")
    return result


def _begin(backend: str) -> None:
    """In each process: quiet, and gone when the one that started it is."""
    from bnf_align.cli import prepare

    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def follow() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    prepare([backend])


def _tell(progress: Bar, cell: Cell, result: Result) -> None:
    right = float(np.mean(result["correct"]))
    progress.advance(last=f"{cell.method} {cell.setting} {cell.learning_rate:g} seed {cell.seed}", right=f"{right:.0%}")


def choose_rates(results: Sequence[Result], start: Result) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """What the sweep saw, and of each objective the learning rate with the most right answers among those at which no
    seed collapsed, or among all where each has one that did; of equal ones the smallest."""
    seen: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        seen.setdefault((result["cell"]["method"], result["cell"]["learning_rate"]), []).append(result)
    sweep: list[dict[str, Any]] = [
        {
            "objective": objective,
            "learning_rate": rate,
            "accuracy": float(np.mean([np.mean(r["correct"]) for r in found])),
            "collapsed": sum(collapsed(r, start) for r in found),
            "seeds": len(found),
            "taken": False,
        }
        for (objective, rate), found in sorted(seen.items())
    ]
    rates: dict[str, float] = {}
    for objective in {line["objective"] for line in sweep}:
        own = [line for line in sweep if line["objective"] == objective]
        standing = [line for line in own if not line["collapsed"]] or own
        best = max(standing, key=lambda line: (line["accuracy"], -line["learning_rate"]))
        best["taken"], rates[objective] = True, best["learning_rate"]
    return sweep, rates
