"""The live line of a long job: bar, rate, time left and whatever the job wants watched."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Watch = dict[str, str]


class Bar:
    """On a terminal a live bar; elsewhere (a log file) a line at most every tenth of the way, or, where nobody knows
    how long it is, every hundred."""

    def __init__(self, progress: Progress, name: str, total: int | None, console: Console):
        self._progress, self._name, self._total, self._console = progress, name, total, console
        self._task = progress.add_task(name, total=total, watch="")
        self._done, self._printed = 0, 0

    def advance(self, **watch: str) -> None:
        self._done += 1
        text = "  ".join(f"{name} {value}" for name, value in watch.items())
        self._progress.update(self._task, advance=1, watch=text)
        part = self._done // 100 if self._total is None else self._done * 10 // self._total
        if not self._console.is_terminal and watch and part > self._printed:
            self._printed = part
            self._console.print(f"{self._name} {self._done}/{self._total or '?'}  {text}", highlight=False)


@contextmanager
def bar(name: str, total: int | None, console: Console) -> Iterator[Bar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[watch]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress, name, total, console)
