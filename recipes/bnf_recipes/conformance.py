"""`bnf conformance`: check a backend's losses and gradients against the float64 oracle."""

from pathlib import Path

from rich.console import Console

from bnf_conformance.runner import run
from bnf_core import registry
from bnf_core.config import HardwareConfig


def conformance(hardware: HardwareConfig, report: str | None, console: Console) -> int:
    """Exit code 0 if every check passed, 1 if one failed."""
    result = run(registry.get(hardware.backend), hardware.device)
    console.print(result.table())
    if report is not None:
        result.write(Path(report))
        console.print(f"report  {report}", highlight=False)
    return 0 if result.ok else 1
