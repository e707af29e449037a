"""`bnf doctor`: what is installed, what each backend can do here, and what to do about the rest."""

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnf_core import oracle, registry
from bnf_core.errors import UserError
from bnf_core.protocol import Backend

PACKAGES = ("bnf-align", "numpy", "transformers", "datasets", "safetensors", "gguf")
COMMANDS = "train, evaluate, generate, demo, conformance"


@dataclass
class DoctorConfig:
    """What is installed, what each backend can do here, and what to do about the rest."""


@dataclass
class Section:
    """One part of the report: facts by name, as plain text."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    works: bool | None = None  # of a backend: whether it can be used here


def doctor(console: Console) -> int:
    """Print the report; 0 if at least one backend works, else 1."""
    sections = examine()
    for section in sections:
        table = Table(show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")  # a path to copy must not be cut
        for name, value in section.facts.items():
            table.add_row(f"  {name}", Text(value))  # Text: brackets such as bnf-align[torch] are no markup
        console.print(Text(section.title, style="bold"), table, "")
    return 0 if any(section.works for section in sections) else 1


def examine() -> list[Section]:
    """The installation, then every registered backend. A backend that is missing or broken is reported, whatever
    it raises."""
    here = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    here |= {package: _version(package) for package in PACKAGES}
    if here["gguf"] == "not installed":
        here["gguf"] += " (only `bnf import-gguf` needs it): pip install 'bnf-align[gguf]'"
    backends = [_backend(name) for name in registry.names()]
    try:
        here["--backend auto"] = registry.choose()
    except UserError as error:
        here["--backend auto"] = str(error)
    return [Section("bnf-align", here), *backends]


def _backend(name: str) -> Section:
    section = Section(f"backend {name}", {"from": _origin(name)}, works=False)
    if absent := registry.missing(name):
        section.facts["status"] = f"not installed (no {', '.join(absent)}): pip install 'bnf-align[{name}]'"
        return section
    try:
        backend = registry.get(name)
        section.facts["devices"] = ", ".join(backend.devices())
        section.facts |= backend.describe()
        section.facts["loss"] = _compare_with_oracle(backend)
        section.facts["status"] = f"works: {COMMANDS}"
        section.works = True
    except Exception as error:  # a broken installation may raise anything; saying what is the point
        section.facts["status"] = f"broken: {type(error).__name__}: {error}"
    return section


def _compare_with_oracle(backend: Backend) -> str:
    """Run the loss once, forwards and backwards, on a few tokens.

    Raises:
        ArithmeticError: the result is not the oracle's.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    logits = rng.normal(0, 3, (4, 16)).astype(np.float32)
    targets = np.arange(4, dtype=np.int64)
    ref_log_odds = rng.normal(-1, 2, 4).astype(np.float32)
    loss, grad = oracle.token_loss(logits, targets, ref_log_odds)
    result = backend.losses().dense(logits, targets, ref_log_odds, np.ones(4, np.float32), dtype="float32")
    worst = max(float(np.abs(result.token_loss - loss).max()), float(np.abs(result.grad_logits - grad).max()))
    if not worst < 1e-4:  # float32 gives 1e-6; anything like 1e-4 is another loss
        raise ArithmeticError(f"its loss is {worst:.1g} away from the float64 oracle's")
    return f"within {worst:.0e} of the float64 oracle on 4 tokens (`bnf conformance` checks it all)"


def _origin(name: str) -> str:
    points = [point for point in entry_points(group=registry.GROUP) if point.name == name]
    packages = sorted({point.dist.name for point in points if point.dist is not None})
    return f"{', '.join(point.value for point in points)} ({', '.join(packages)})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


Config = DoctorConfig


def backends(_: DoctorConfig) -> list[str]:
    return [name for name in registry.names() if not registry.missing(name)]  # examined as their commands run


def run(_: DoctorConfig, console: Console) -> int:
    return doctor(console)
