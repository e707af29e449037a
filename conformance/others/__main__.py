"""`python -m others`: write the scoreboard."""

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bnf_align import cli
from bnf_align.arguments import parse
from bnf_core.errors import UserError
from bnf_core.storage.files import replace_file
from others import scoreboard
from others.backends import FRAMEWORKS


@dataclass
class Config:
    """Hold the published forms of the BNF loss to the conformance suite, beside our backends."""

    output: str = "docs/scoreboard.md"
    """The page to write."""


def main(argv: list[str], console: Console) -> int:
    config = parse(Config, "python -m others", argv)
    path = Path(config.output)
    if not path.parent.is_dir():
        raise UserError(f"output {path}: no folder {path.parent}")
    cli.prepare(list(FRAMEWORKS))
    replace_file(path, scoreboard.page(scoreboard.run()))
    console.print(f"scoreboard  {path}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(sys.argv[1:], cli.console)))
