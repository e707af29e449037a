import functools
import gc
import importlib.util
import os
import random
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# What loads a framework is imported where it is used: of the processes of xdist, one runs no test.

gc.disable()  # until all is loaded

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing under test may reach for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LD_PRELOAD", "")  # or `bnf` on MLX would replace the process that runs the tests by its own

# MLX compiles a kernel with the system's C++ compiler, a second each, for every sum of small operations that it meets
# first, hundreds in all these tests. Those that are about compiled code ask for it: `mlx_compiles`.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

os.environ["BNF_CACHE"] = tempfile.mkdtemp(prefix="bnf-cache-")  # of this process and those that it starts

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed"),
    )
    for name, module in (("torch", "peft"), ("mlx", "mlx_lm"))
]


def fast_on(backend: str) -> pytest.MarkDecorator:
    """A test of what both backends share: with this one it is fast, with others slow."""
    others = [param for param in BACKENDS if backend not in param.values]
    cases = [param for param in BACKENDS if backend in param.values]
    cases += [pytest.param(*param.values, marks=[*param.marks, pytest.mark.slow]) for param in others]
    return pytest.mark.parametrize("backend_name", cases)


def fast_of(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """All cases of a test that are of one kind; those not named are slow."""
    known = list(cases)
    assert all(case in known for case in fast), fast
    return [case if case in fast else slow(*(case if isinstance(case, tuple) else (case,))) for case in known]


def slow(*values: Any) -> Any:
    """One slow case of a test."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(params=BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    """Each backend that can be installed here, in turn."""
    return str(request.param)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadfile a file's tests run in one process, whose fixtures they share; and those of all files that
    fork in the same one, so that there is one server of forks. (xdist's own groups do not work with pytest 9.2.)"""
    from xdist.scheduler import LoadFileScheduling

    class FilesOfForksTogether(LoadFileScheduling):  # type: ignore[misc]  # it has no types
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "forks" if forks(config.rootpath / file) else file

    return FilesOfForksTogether(config, log) if config.getvalue("dist") == "loadfile" else None


@functools.cache
def forks(file: Path) -> bool:
    return re.search(r"\bforked\.|\blaunch\(", file.read_text(encoding="utf-8")) is not None


def pytest_collection_finish() -> None:
    """The frameworks are loaded, and stay: each collection of garbage would look through a million of their objects.
    And there is memory enough to collect less often than every 700 objects."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_sessionfinish() -> None:  # the last that a process of xdist's comes to
    if "forked" in sys.modules:
        sys.modules["forked"].stop()
    shutil.rmtree(os.environ["BNF_CACHE"], ignore_errors=True)


def seed(name: str) -> None:
    """What is drawn without a seed is the same in every run, in any order: MLX would take the time of day."""
    number = zlib.crc32(name.encode())
    random.seed(number)
    np.random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].random.seed(number)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    seed(f"{fixturedef.baseid}::{fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed(item.nodeid)


@pytest.fixture
def mlx_compiles() -> Iterator[None]:
    """MLX compiles what it is told to, as it does for users."""
    if importlib.util.find_spec("mlx") is None:
        yield
        return
    import mlx.core as mx

    mx.enable_compile()
    yield
    mx.disable_compile()


@pytest.fixture(
    params=[pytest.param(False, id="not compiled"), pytest.param(True, id="compiled", marks=pytest.mark.slow)]
)
def compiled_or_not(request: pytest.FixtureRequest) -> None:
    """What is to be compiled as it stands, and, slow, as MLX compiles it: dozens of kernels, a second each."""
    if request.param:
        request.getfixturevalue("mlx_compiles")


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> None:
    import undrawn

    undrawn.leave_no_pictures()


@pytest.fixture
def drawn() -> Iterator[None]:
    """But this test's do."""
    import undrawn

    undrawn.draw()
    yield
    undrawn.leave_no_pictures()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.write_rows(tmp_path_factory.mktemp("feedback") / "feedback.jsonl")
