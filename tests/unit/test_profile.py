"""Which steps of a run a trace has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bnf_align.run.profile import profiled


@pytest.mark.parametrize(("count", "recorded"), [(8, [2, 3, 4]), (4, [2, 3]), (2, [])])
def test_a_few_steps_are_recorded_whole(count: int, recorded: list[int]) -> None:
    """Rejects a trace that is begun too late, goes on to the end of the run, or is never written."""
    going: list[bool] = []
    within: list[Any] = []

    @contextmanager
    def trace() -> Iterator[None]:
        going.append(True)
        yield
        going.clear()

    steps: Any = range(count)
    for step in profiled(iter(steps), trace()):
        within += [step] if going else []
    assert within == recorded and not going
