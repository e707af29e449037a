"""Work spread over processes comes back in order, and so do errors."""

import os
import signal
import sys

import pytest

from bnf_core.data.cores import MANY, PARALLELISM, on_all_cores, workers_for
from bnf_core.errors import TrainingStopped


def work(item: int) -> tuple[int, int]:
    if item < 0:
        raise ValueError(f"item {item}")
    return item * item, os.getpid()


def test_results_come_in_order_from_other_processes_and_errors_in_their_turn() -> None:
    main, found = sys.modules["__main__"], []
    results = on_all_cores(work, [*range(20), -1, -2], 2)
    with pytest.raises(ValueError, match="item -1"):
        for result in results:
            found.append(result)
    assert [square for square, _ in found] == [i * i for i in range(20)]
    assert os.getpid() not in {process for _, process in found}
    assert sys.modules["__main__"] is main


def killed(item: int) -> int:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(TrainingStopped, match="a process that makes tokens has ended"):
        list(on_all_cores(killed, range(5), 1))


def test_without_processes_the_tokenizers_threads_are_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARALLELISM, "false")
    assert list(on_all_cores(lambda _: os.environ[PARALLELISM], [1, 2], 0)) == ["true", "true"]
    assert os.environ[PARALLELISM] == "false"
    monkeypatch.delenv(PARALLELISM)
    assert list(on_all_cores(lambda _: os.environ[PARALLELISM], [1], 0)) == ["true"]
    assert PARALLELISM not in os.environ


def test_few_rows_are_not_worth_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert [workers_for(rows) for rows in (0, MANY - 1, MANY, 10 * MANY)] == [0, 0, 4, 8]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert workers_for(10 * MANY) == 0
