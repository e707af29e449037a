"""Rules that no linter knows: who may name a backend, paths that are there, warnings that are errors."""

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
# Backends answer for themselves (`bnf_core.protocol.Backend`): the core and the commands name none, but here.
MAY_NAME_A_BACKEND = {
    "bnf_core/models/adapters.py": "mlx is the name of a layout of adapters; a message says whose it is",
    "recipes/bnf_align/commands/convert_adapter.py": "the same layout",
    "recipes/bnf_align/commands/export.py": "the same layout; transformers reads GGUF with PyTorch",
    "recipes/bnf_align/commands/import_gguf.py": "transformers reads GGUF with PyTorch, whatever the backend",
    "recipes/bnf_align/run/remote.py": "the same layout, which one kind of server reads",
    "recipes/bnf_align/judges/reward_model.py": "reward models are transformers' own, which need PyTorch",
    "recipes/bnf_align/__init__.py": "BNFTrainer is a transformers.Trainer, which only PyTorch has",
}
NAMES = re.compile(r"torch|mlx|bnf_torch(\..*)?|bnf_mlx(\..*)?")


def names_of_backends(path: Path) -> Iterator[str]:
    """Strings and imports that are a backend's name; not what is said in docstrings, comments and messages."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value]
        elif isinstance(node, ast.Import):
            found = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module or ""]
        line = getattr(node, "lineno", 0)
        yield from (f"{path.relative_to(ROOT)}:{line} {name}" for name in found if NAMES.fullmatch(name))


def test_the_core_and_the_commands_name_no_backend() -> None:
    files = [path for folder in ("bnf_core", "recipes/bnf_align") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): list(names_of_backends(path)) for path in files}
    assert [name for path, names in found.items() if path not in MAY_NAME_A_BACKEND for name in names] == []
    assert all(found[path] for path in MAY_NAME_A_BACKEND), "an exception that is not needed"


PATHS = re.compile(r"(?<![\w/<{.-])(?:tests|docs|recipes|backends|benchmarks|bnf_core|conformance)/[\w./-]*\w")


def test_every_path_that_is_named_is_there() -> None:
    """In code, its comments and docstrings, and in what is written about it."""
    suffixes = {".py", ".md", ".toml", ".yaml"}
    absent = []
    for folder in ("bnf_core", "backends", "recipes", "conformance", "benchmarks", "tests", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes:
                named = PATHS.findall(path.read_text(encoding="utf-8"))
                absent += [f"{path.relative_to(ROOT)}: {name}" for name in named if not (ROOT / name).exists()]
    for name in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"):
        absent += [f"{name}: {x}" for x in PATHS.findall((ROOT / name).read_text()) if not (ROOT / x).exists()]
    assert absent == []


def warn_in(name: str) -> None:
    module = ModuleType(name)
    exec("import warnings\nwarnings.warn('seen', RuntimeWarning)", vars(module))


@pytest.mark.parametrize("name", ["bnf_core.steps.metrics", "bnf_torch", "benchmarks.step", "test_house", "tiny"])
def test_a_warning_of_our_own_is_an_error(name: str) -> None:
    with pytest.raises(RuntimeWarning, match="seen"):
        warn_in(name)


def test_a_warning_of_a_library_is_none() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warn_in("torch.nn")
    assert len(seen) == 1
