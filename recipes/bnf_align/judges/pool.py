"""Judging in worker processes, with a time limit: whatever a judge does, the run goes on."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooSlow
from typing import Any, Self

from pebble import ProcessExpired, ProcessPool

from bnf_align.judges.base import Judge, Judgement, Row
from bnf_align.judges.table import ONCE, Term, make_judge, parse_judge
from bnf_core.data.messages import Text
from bnf_core.errors import UserError

Judged = tuple[Text, str, Row]  # prompt, completion, and the row of the prompt

_judge: Judge | UserError  # a worker's


class Judges:
    """Workers that judge by an expression of `judges.table`. They are made at first use, and end with the context.

    Args:
        expression: which judge.
        workers: processes.
        time_limit: seconds for one completion; a worker that takes longer is ended, and another takes its place.
    Raises:
        UserError: no such judge.
    """

    def __init__(self, expression: str, *, workers: int, time_limit: float):
        self._terms = parse_judge(expression)
        self._time_limit = time_limit
        self._workers = 1 if any(term.name in ONCE for term in self._terms) else workers
        self._pool: Any = None

    def __call__(self, judged: Sequence[Judged]) -> list[Judgement]:
        """
        Raises:
            UserError: the judge cannot be made.
        """
        if self._pool is None:
            self._start()
        futures = [self._pool.schedule(_score, args=one, timeout=self._time_limit) for one in judged]
        return [self._result(future) for future in futures]

    def _start(self) -> None:
        # Not forked: the run's own process has threads, and perhaps a GPU.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(
            self._workers, initializer=_make, initargs=(self._terms, [*sys.path, os.getcwd()]), context=context
        )
        self._pool.schedule(_made).result()

    def _result(self, future: "Future[float | None]") -> Judgement:
        try:
            return Judgement(future.result())
        except TooSlow:
            return Judgement(error=f"took longer than {self._time_limit:g} s")
        except ProcessExpired as error:
            return Judgement(error=f"its process ended with {error.exitcode}")
        except Exception as error:  # a judge may raise anything
            return Judgement(error=f"{type(error).__name__}: {error}")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make(terms: Sequence[Term], path: list[str]) -> None:
    """In a worker, before anything is judged: what takes time, such as loading a model, has no limit."""
    global _judge
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which is meant for the run
    sys.path[:] = path
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        _judge = make_judge(terms)
    except UserError as error:
        _judge = error


def _made() -> None:
    if isinstance(_judge, UserError):
        raise _judge


def _score(prompt: Text, completion: str, row: Row) -> float | None:
    assert not isinstance(_judge, UserError)
    score: float | None = _judge(prompt, completion, row)
    return score
