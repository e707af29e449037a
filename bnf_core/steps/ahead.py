"""Making the next thing while the last one is used."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

T = TypeVar("T")
END = object()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items in the same order, each made in a thread of its own while the one before it is used; never more
    than one. What making an item raises is raised where that item is due, and leaving early waits for the one that is
    being made.

    Args:
        items: nothing else may take from them; what makes them runs in the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="next-batch") as thread:
        following = thread.submit(next, items, cast(T, END))
        while (item := following.result()) is not END:
            following = thread.submit(next, items, cast(T, END))
            yield item
