"""The command line `bnf`. Exit codes: 0 done, 1 failed, 2 bad usage or bad input."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from rich.console import Console

from bnf_align.arguments import parse
from bnf_align.commands import COMMANDS
from bnf_core import registry
from bnf_core.errors import Failed, UserError

console = Console()
errors = Console(stderr=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `bnf`; exits with the command's code."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        console.print("usage: bnf COMMAND [--config FILE] [settings]   (bnf COMMAND --help)\n", markup=False)
        for name, text in COMMANDS.items():
            console.print(f"  {name:<17}{text}", highlight=False)
        return 0 if argv else 2
    if "-".join(argv[:2]) in COMMANDS:  # `bnf data check` is `bnf data-check`
        argv = ["-".join(argv[:2]), *argv[2:]]
    return guarded(lambda: _command(argv[0], argv[1:]))


def guarded(command: Callable[[], int]) -> int:
    """The exit code of a command, whose errors for people are printed without a traceback."""
    try:
        return command()
    except UserError as error:
        errors.print(f"bnf: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except Failed as error:
        errors.print(f"bnf: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        errors.print("bnf: interrupted", style="red")
        return 1


def _command(name: str, argv: Sequence[str]) -> int:
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: expected {', '.join(COMMANDS)}")
    module = import_module(f"bnf_align.commands.{name.replace('-', '_')}")
    config = parse(module.Config, f"bnf {name}", argv, getattr(module, "POSITIONAL", ()))
    prepare(module.backends(config) if hasattr(module, "backends") else backend_of(config))
    return int(module.run(config, console))


def backend_of(config: object) -> list[str]:
    """The one backend of a configuration that names any, settled for good."""
    hardware = getattr(config, "hardware", None)
    if hardware is None:
        return []
    hardware.backend = registry.choose(hardware.backend)
    return [hardware.backend]


def prepare(backends: Sequence[str]) -> None:
    """Before a framework is loaded: what each backend sees to, and quiet. The libraries' own bars and advice would cut
    through ours."""
    for name in backends:
        registry.get(name).prepare()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
