"""Finding backends by entry point (`bnf.backends`), and choosing one."""

import importlib
import importlib.util
import platform
from importlib.metadata import entry_points

from bnf_core.errors import UserError
from bnf_core.protocol import Backend

GROUP = "bnf.backends"
# The packages without which a backend that ships here cannot run: missing ones are named before an import fails.
NEEDS = {"torch": ("torch", "peft"), "mlx": ("mlx", "mlx_lm")}


def names() -> list[str]:
    """Every registered backend, installed or not."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def missing(name: str) -> list[str]:
    """Packages that the named backend lacks here."""
    return [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]


def choose(name: str = "auto") -> str:
    """Resolve `auto`: MLX on Apple silicon, else PyTorch, else whichever is installed.

    Raises:
        UserError: nothing is installed.
    """
    if name != "auto":
        return name
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    for candidate in ("mlx", "torch") if apple else ("torch", "mlx"):
        if not missing(candidate):
            return candidate
    raise UserError("no backend is installed: pip install 'bnf-align[torch]' or 'bnf-align[mlx]'")


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
        points = [point for point in entry_points(group=GROUP) if point.name == name]
        if not points:
            raise UserError(f"unknown backend {name!r}: expected auto, {', '.join(names())} or package.module:factory")
        if absent := missing(name):
            raise UserError(
                f"backend {name!r} is not installed (no {', '.join(absent)}): pip install 'bnf-align[{name}]'"
            )
        factory = points[0].load()
    backend = factory()
    if not isinstance(backend, Backend):
        raise UserError(
            f"backend {name!r} is a {type(backend).__name__}, which lacks parts of bnf_core.protocol.Backend"
        )
    return backend
