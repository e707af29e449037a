"""The report on an installation: it says what is missing or broken, and never fails itself."""

import io
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bnf_align.commands import doctor
from bnf_core import oracle, registry
from bnf_core.protocol import DenseResult


class Losses:
    """The oracle itself, or something that is not quite it."""

    def __init__(self, sign: float = 1.0):
        self.sign = sign

    def dense(self, logits: Any, targets: Any, ref_log_odds: Any, weights: Any, *, dtype: str) -> DenseResult:
        loss, grad = oracle.token_loss(logits, targets, ref_log_odds)
        empty = np.zeros(len(loss))
        return DenseResult(empty, empty, loss, self.sign * grad)


class Fake:
    name = "fake"
    sign = 1.0

    def losses(self, device: str = "auto") -> Losses:
        return Losses(self.sign)

    def devices(self) -> list[str]:
        return ["abacus"]

    def load(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def describe(self) -> dict[str, str]:
        return {"beads": "100"}


class FlippedGradient(Fake):
    sign = -1.0


class Broken(Fake):
    def devices(self) -> list[str]:
        raise OSError("libabacus.so.1: cannot open shared object file")


def report(monkeypatch: pytest.MonkeyPatch, backend: type | None) -> tuple[int, str]:
    """Exit code and output with one backend registered, or with none of its packages there."""
    point = entry_points(group=registry.GROUP)["torch"]
    monkeypatch.setattr(registry, "names", lambda: [point.name])
    monkeypatch.setattr(registry, "missing", lambda name: [] if backend else ["torch", "peft"])
    monkeypatch.setattr(registry, "get", lambda name: backend() if backend else pytest.fail("loaded it"))
    output = io.StringIO()
    code = doctor.doctor(Console(file=output, width=200))
    return code, output.getvalue()


def test_describes_a_backend_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = report(monkeypatch, Fake)
    assert code == 0
    for expected in ("abacus", "beads", "100", "works", "bnf_torch.backend:TorchBackend (bnf-align)"):
        assert expected in text


def test_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = report(monkeypatch, None)
    assert code == 1
    assert "not installed (no torch, peft): pip install 'bnf-align[torch]'" in text


def test_reports_a_broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = report(monkeypatch, Broken)
    assert code == 1
    assert "broken: OSError: libabacus.so.1" in text


def test_reports_a_backend_with_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = report(monkeypatch, FlippedGradient)
    assert code == 1
    assert "away from the float64 oracle" in text


def test_cuts_no_long_path(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/usr/lib/" + "x" * 300 + "/the-end"
    monkeypatch.setattr(Fake, "describe", lambda self: {"library": path})
    _, text = report(monkeypatch, Fake)
    assert path in "".join(line.strip() for line in text.splitlines())


def test_the_backends_installed_here_work() -> None:
    installed = [name for name in registry.names() if not registry.missing(name)]
    if not installed:
        pytest.skip("no backend is installed")
    sections = {section.title: section for section in doctor.examine()}
    for name in installed:
        assert sections[f"backend {name}"].works, sections[f"backend {name}"].facts
