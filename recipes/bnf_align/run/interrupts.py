"""SIGINT, SIGTERM and SIGHUP during a long job."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

NUMBERS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class Interrupts:
    """Notes these signals until the work at hand is complete, or raises KeyboardInterrupt `at_once` where that does no
    harm. A second one ends the job wherever it is. Signals that this process was told to ignore, as by nohup, stay
    ignored."""

    def __init__(self) -> None:
        self.received = False
        self._at_once = False

    def __enter__(self) -> Self:
        heeded = [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        end_now = self.received or self._at_once
        self.received = True
        if end_now:
            signal.default_int_handler(number, frame)

    @contextmanager
    def at_once(self, allowed: bool = True) -> Iterator[None]:
        """Within it an interrupt raises KeyboardInterrupt."""
        self._at_once = allowed
        try:
            yield
        finally:
            self._at_once = False
