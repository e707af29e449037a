"""Finding backends by entry point (`bnf.backends`), and choosing one."""

import importlib
import importlib.util
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from bnf_core.errors import UserError
from bnf_core.models.adapters import Layout
from bnf_core.protocol import Backend

GROUP = "bnf.backends"


def names() -> list[str]:
    """Every registered backend, installed or not."""
    return sorted(_points())


def missing(name: str) -> list[str]:
    """Packages that the named backend lacks here, by its own account (`Backend.requires`)."""
    point = _points().get(name)
    requires = getattr(point.load(), "requires", ()) if point else ()
    return [package for package in requires if importlib.util.find_spec(package) is None]


def ranked() -> list[str]:
    """Those that may be chosen for the user, installed or not, the best for this machine first
    (`Backend.preference`)."""
    preferences = {name: _preference(point) for name, point in sorted(_points().items())}
    return sorted(filter(preferences.get, preferences), key=lambda name: -preferences[name])


def choose(name: str = "auto") -> str:
    """Resolve `auto`: the installed backend that is best for this machine.

    Raises:
        UserError: nothing is installed.
    """
    if name != "auto":
        return name
    candidates = ranked()
    if here := [candidate for candidate in candidates if not missing(candidate)]:
        return here[0]
    wanted = " or ".join(f"'bnf-align[{candidate}]'" for candidate in candidates)
    raise UserError(f"no backend is installed: pip install {wanted}")


def for_layout(layout: Layout) -> Backend:
    """The installed backend whose adapters have this layout.

    Raises:
        UserError: there is none.
    """
    found = sorted(name for name, point in _points().items() if getattr(point.load(), "adapter_layout", "") == layout)
    here = [name for name in found if not missing(name)]
    if not here:
        wanted = " or ".join(f"'bnf-align[{name}]'" for name in found) or "a backend for it"
        raise UserError(f"no backend for adapters of {layout} is installed: pip install {wanted}")
    return get(here[0])


def get(name: str = "auto") -> Backend:
    """The backend of that name, or `package.module:factory` of one that is not registered.

    Raises:
        UserError: unknown, not installed, or not a backend.
    """
    name = choose(name)
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"backend {name!r}: {error}; expected package.module:factory") from error
    else:
        point = _points().get(name)
        if point is None:
            raise UserError(f"unknown backend {name!r}: expected auto, {', '.join(names())} or package.module:factory")
        if absent := missing(name):
            raise UserError(
                f"backend {name!r} is not installed (no {', '.join(absent)}): pip install 'bnf-align[{name}]'"
            )
        factory = point.load()
    backend = factory()
    if not isinstance(backend, Backend):
        raise UserError(
            f"backend {name!r} is a {type(backend).__name__}, which lacks parts of bnf_core.protocol.Backend"
        )
    return backend


def _preference(point: EntryPoint) -> int:
    try:
        return int(point.load()().preference())
    except (ImportError, AttributeError):  # a broken package is told of once it is asked for by name
        return 0


@cache
def _points() -> dict[str, EntryPoint]:
    """By name; of several of one name, the first. Found once: the record of every installed package is read for it."""
    return {point.name: point for point in reversed([*entry_points(group=GROUP)])}
