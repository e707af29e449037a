"""A benchmark as a command: `python -m benchmarks.step --help`."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console

from bnf_align import cli
from bnf_align.arguments import parse

Config = TypeVar("Config")


def main(name: str, settings: type[Config], run: Callable[[Config, Console], Any]) -> None:
    """Parse the settings, run, and exit as `bnf` does."""

    def command(argv: list[str]) -> int:
        config = parse(settings, f"python -m benchmarks.{name}", argv)
        cli.prepare(cli.backend_of(config))
        run(config, cli.console)
        return 0

    sys.exit(cli.guarded(lambda: command(sys.argv[1:])))
