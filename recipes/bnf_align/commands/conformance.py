"""`bnf conformance`: check backends' losses and gradients against the float64 oracle."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from bnf_align.run.results import result_file
from bnf_conformance import goldens, runner
from bnf_conformance.goldens import Comparison
from bnf_conformance.page import to_html
from bnf_conformance.report import Report, number, to_json
from bnf_core import registry
from bnf_core.config import HardwareConfig
from bnf_core.errors import UserError
from bnf_core.protocol import Backend
from bnf_core.storage.files import replace_file


@dataclass
class ConformanceConfig:
    """Check a backend's losses and gradients against the float64 oracle. `--device` takes several: cpu,cuda."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    all: bool = False
    """Check every installed backend."""
    tier: str = "auto"
    """Which tolerances hold: cpu, cuda, tf32 or metal; by default those of the device."""
    report: str | None = None
    """Write every result to this file: .html for a person, .json for a CI."""
    golden: str | None = None
    """Instead of the checks, take the twenty steps of a golden and compare: of a release, such as 0.1.0, or in a
    .json file."""

    def __post_init__(self) -> None:
        if self.report is not None and Path(self.report).suffix not in (".html", ".json"):
            raise ValueError(f"report is {self.report!r}: expected a name that ends in .html or .json")
        if self.all and self.hardware.backend != "auto":
            raise ValueError(f"all is true: expected false with backend {self.hardware.backend!r}")
        if self.golden is not None and self.report is not None:
            raise ValueError("golden is given: expected no report, which is of the checks")
        if self.golden is not None and self.hardware.device not in ("auto", "cpu"):
            raise ValueError(f"golden is given: expected device cpu, not {self.hardware.device!r}")


def conformance(config: ConformanceConfig, console: Console) -> int:
    """Exit code 0 if every check passed, 1 if one failed.

    Raises:
        UserError: no such backend, device or tier, or a report that cannot be written.
    """
    written = None if config.report is None else result_file(config.report, "report")
    absent: dict[str, str] = {}
    backends = _installed(absent) if config.all else [registry.get(config.hardware.backend)]
    reports = []
    for backend in backends:
        for device in config.hardware.device.split(","):
            if config.all and device != "auto" and device not in backend.devices():
                absent[f"{backend.name} on {device}"] = f"it offers {', '.join(backend.devices())}"
                continue
            report = runner.run(backend, device, tier=config.tier)
            console.print(report.table())
            reports.append(report)
    for name, why in absent.items():
        console.print(f"{name}: not checked, {why}", markup=False, highlight=False)
    if not reports:
        raise UserError(f"device {config.hardware.device!r}: no installed backend has it")
    if written is not None:
        _write(written, reports, absent)
        console.print(f"report  {config.report}", highlight=False)
    return 0 if all(report.ok for report in reports) else 1


def compare_with_golden(config: ConformanceConfig, console: Console) -> int:
    """Exit code 0 if the backends compute what the golden has, 1 if one does not.

    Raises:
        UserError: no such golden, one of another format, or one without results of the backend.
    """
    golden = goldens.load(config.golden or "")
    absent: dict[str, str] = {}
    backends = _installed(absent) if config.all else [registry.get(config.hardware.backend)]
    ok = True
    for backend in backends:
        if config.all and backend.name not in golden.results:
            absent[backend.name] = f"the golden has results of {', '.join(golden.results)}"
            continue
        comparison = goldens.compare(golden, backend)
        console.print(f"{backend.name} and the golden of {golden.release} ({golden.date}):", highlight=False)
        for line in told(comparison):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        ok = ok and comparison.ok
    for name, why in absent.items():
        console.print(f"{name}: not compared, {why}", markup=False, highlight=False)
    return 0 if ok else 1


def told(comparison: Comparison) -> Iterator[str]:
    """What a comparison found, line by line."""
    for name, (error, allowed) in comparison.errors.items():
        verdict = "" if error <= allowed else ": too far"
        yield f"{name}: off by {number(error)}, allowed {number(allowed)}{verdict}"
    if comparison.same_bits:
        yield "the same bits"
    elif comparison.other:
        differ = comparison.other.items()
        made = ", ".join(f"{name} {was or 'none'} (here {here or 'none'})" for name, (was, here) in differ)
        yield f"the bits differ, as they may: the golden was made with {made}"
    else:
        yield "other bits, with the same versions on the same CPU: what is computed has changed"


def _installed(absent: dict[str, str]) -> list[Backend]:
    found = []
    for name in registry.names():
        if missing := registry.missing(name):
            absent[name] = f"not installed (no {', '.join(missing)})"
        else:
            found.append(registry.get(name))
    return found


def _write(path: Path, reports: list[Report], absent: dict[str, str]) -> None:
    try:
        replace_file(path, (to_html if path.suffix == ".html" else to_json)(reports, absent))
    except OSError as error:
        raise UserError(f"report {path}: {error.strerror}") from error


Config = ConformanceConfig


def backends(config: ConformanceConfig) -> list[str]:
    if config.all:
        return [name for name in registry.names() if not registry.missing(name)]
    return [config.hardware.backend]


def run(config: ConformanceConfig, console: Console) -> int:
    return (conformance if config.golden is None else compare_with_golden)(config, console)
