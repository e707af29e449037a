"""A few steps of a run, recorded as a trace."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack

from bnf_core.steps.steps import Step

TRACE = "trace"  # in the run folder; the backend gives it its ending
BEFORE, RECORDED = 2, 3  # steps; those before fill caches


def profiled(steps: Iterator[Step], trace: AbstractContextManager[None]) -> Iterator[Step]:
    """The same steps; `trace` is entered before some of them, and left when the last of these is done, or the run."""
    with ExitStack() as recording:
        for number, step in enumerate(steps):
            if number == BEFORE:
                recording.enter_context(trace)
            elif number == BEFORE + RECORDED:
                recording.close()
            yield step
