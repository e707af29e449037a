"""Finding and choosing backends."""

import platform
import sys
import types

import pytest

from bnf_core import registry
from bnf_core.errors import UserError
from bnf_core.protocol import Backend


def test_both_backends_are_found_by_entry_point(backend_name: str) -> None:
    assert backend_name in registry.names()
    backend = registry.get(backend_name)
    assert isinstance(backend, Backend) and backend.name == backend_name
    assert "cpu" in backend.devices()


@pytest.mark.parametrize(
    ("system", "machine", "absent", "expected"),
    [
        ("Darwin", "arm64", (), "mlx"),
        ("Darwin", "arm64", ("mlx",), "torch"),
        ("Darwin", "x86_64", (), "torch"),
        ("Linux", "x86_64", (), "torch"),
        ("Linux", "x86_64", ("torch",), "mlx"),
    ],
)
def test_auto(
    system: str, machine: str, absent: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(registry, "missing", lambda name: ["x"] if name in absent else [])
    assert registry.choose() == expected


def test_a_registered_backend_is_chosen_by_its_own_account(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Backend):
        name = "own"
        liked = 0

        def preference(self) -> int:
            return self.liked

    class Point:
        load = staticmethod(lambda: Own)

    class Broken:
        @staticmethod
        def load() -> None:
            raise ImportError("a package that it lacks")

    points = registry._points()
    monkeypatch.setattr(registry, "_points", lambda: points | {"own": Point, "broken": Broken})
    monkeypatch.setattr(registry, "missing", lambda name: ["x"] if name == "torch" else [])
    assert registry.choose() == "mlx" and set(registry.ranked()) == {"mlx", "torch"}
    Own.liked = 9
    assert registry.choose() == "own" and registry.ranked()[0] == "own"


def test_nothing_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "missing", lambda name: ["x"])
    with pytest.raises(UserError, match=r"pip install 'bnf-align\[torch\]'"):
        registry.choose()
    with pytest.raises(UserError, match=r"backend 'mlx' is not installed.*pip install 'bnf-align\[mlx\]'"):
        registry.get("mlx")


@pytest.mark.parametrize("name", ["abacus", "no.such.module:Thing", "json:no_such", "collections:OrderedDict"])
def test_what_is_no_backend_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="backend"):
        registry.get(name)


def test_a_backend_can_be_named_by_module_and_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("third_party")

    class Own(Backend):
        name = "own"

    module.Own = Own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "third_party", module)
    assert registry.get("third_party:Own").name == "own"
