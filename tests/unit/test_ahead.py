"""The next item is made while the last one is used: the same items, and errors where they are due."""

import threading
from collections.abc import Iterator

import pytest

from bnf_core.config import OptimizerConfig
from bnf_core.processes import Processes
from bnf_core.steps.ahead import ahead
from bnf_core.steps.batching import MicroBatching
from bnf_core.steps.reference import NoReference
from bnf_core.steps.steps import steps
from bnf_core.types import Example, Position


def test_the_next_item_is_made_while_one_is_used() -> None:
    """Rejects making it when it is asked for, which would wait here for ever, and making more than one."""
    made = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for i, event in enumerate(made):
            event.set()
            yield i

    taken = []
    for i in ahead(items()):
        taken.append(i)
        if i < 3:
            assert made[i + 1].wait(10), "the next one is made without being asked for"
        assert not any(event.is_set() for event in made[i + 2 :])
    assert taken == [0, 1, 2, 3]


def test_what_goes_wrong_is_raised_where_the_item_is_due() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("no third row")

    taken: list[int] = []
    with pytest.raises(OSError, match="no third row"):
        taken.extend(ahead(items()))
    assert taken == [0, 1]


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    items = ahead(iter(range(10)))
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]  # it is a generator
    assert threading.active_count() == before
    assert list(ahead(iter(()))) == []


class Drawing:
    """Rows of which the policy says what they are."""

    def __init__(self, ahead: bool):
        self.ahead = ahead
        self.in_time: list[bool] = []  # of each step, whether its rows were asked for when it was due

    def batches(self, batch_size: int, position: Position | None = None) -> Iterator[tuple[list[Example], Position]]:
        while True:
            self.in_time.append(threading.current_thread() is threading.main_thread())
            yield [Example((1,), (2,), True)], {"step": len(self.in_time)}

    def drawn(self, batch_size: int, position: Position) -> dict[str, int]:
        return {}


@pytest.mark.parametrize("ahead", [False, True])
def test_what_the_policy_draws_waits_for_the_step_before(ahead: bool) -> None:
    """Rejects samples of a policy that is a step behind."""
    data = Drawing(ahead)
    taking = steps(
        data,
        batch_size=1,
        num_steps=4,
        optimizer=OptimizerConfig(),
        batching=MicroBatching(1),
        reference=NoReference(),
        processes=Processes(),
    )
    assert [step.number for step in taking] == [0, 1, 2, 3]
    assert data.in_time == [not ahead] * 4
