"""Imports point one way, found by walking the packages, and proved in fresh interpreters."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bnf_align
from conftest import slow

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"torch", "mlx", "mlx_lm", "peft"}
FOLDERS = {
    "bnf_core": ROOT / "bnf_core",
    "bnf_torch": ROOT / "backends" / "bnf_torch",
    "bnf_mlx": ROOT / "backends" / "bnf_mlx",
    "bnf_conformance": ROOT / "conformance" / "bnf_conformance",
    "bnf_align": ROOT / "recipes" / "bnf_align",
    "others": ROOT / "conformance" / "others",
    "benchmarks": ROOT / "benchmarks",
}
# What each package may import of the others. Backends are found by entry point: no command names one.
MAY_IMPORT = {
    "bnf_core": set(),
    "bnf_torch": {"bnf_core"},
    "bnf_mlx": {"bnf_core"},
    "bnf_conformance": {"bnf_core"},
    "bnf_align": {"bnf_core", "bnf_conformance"},
    "others": {"bnf_core", "bnf_align", "bnf_conformance", "bnf_torch", "bnf_mlx"},
    "benchmarks": {"bnf_core", "bnf_align", "bnf_torch", "bnf_mlx"},
}
# The face of the package gives BNFTrainer, which only PyTorch has.
EXCEPTIONS = {("bnf_align", "bnf_torch.trainer")}


def modules(package: str) -> dict[str, Path]:
    """Every module by its name."""
    folder = FOLDERS[package]
    found = {}
    for path in folder.rglob("*.py"):
        parts = (package, *path.relative_to(folder).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


EVERYTHING = {name: path for package in FOLDERS for name, path in modules(package).items()}


def imports(path: Path) -> Iterator[str]:
    """What a file imports, anywhere in it: modules of this project, with what is taken from them where that is one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in EVERYTHING else node.module


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stdout.split()}


@pytest.mark.parametrize("package", FOLDERS)
def test_a_package_imports_only_what_stands_below_it(package: str) -> None:
    for name, path in modules(package).items():
        for target in imports(path):
            top = target.partition(".")[0]
            if top in FOLDERS and top != package and (name, target) not in EXCEPTIONS:
                assert top in MAY_IMPORT[package], f"{name} imports {target}"
            assert top != "tests", f"{name} imports {target}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: {t for t in imports(path) if t in EVERYTHING and t != name} for name, path in EVERYTHING.items()}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    while tops := [name for name in graph if all(name not in targets for targets in graph.values())]:
        for name in tops:
            del graph[name]
    assert not graph, f"circles among {sorted(graph)}"


def test_every_module_of_the_core_loads_without_a_framework() -> None:
    names = [name for name in modules("bnf_core") if not name.endswith("__main__")]
    assert len(names) > 20
    found = loaded_after("import " + ", ".join(names))
    assert found.isdisjoint(FRAMEWORKS | {"transformers"})
    assert found.isdisjoint(FOLDERS.keys() - {"bnf_core"})


@pytest.mark.parametrize(
    "statement",
    [
        "import bnf_conformance.runner, bnf_conformance.checks",
        "import bnf_align; bnf_align.__version__",
        "import bnf_align.cli",
        "import bnf_torch, bnf_mlx",
        "from bnf_core import registry; registry.names(); [registry.missing(name) for name in registry.names()]",
    ],
)
def test_no_framework_is_loaded_before_one_is_needed(statement: str) -> None:
    assert loaded_after(statement).isdisjoint(FRAMEWORKS | {"transformers"})


@pytest.mark.parametrize(
    ("backend", "others"),
    [("bnf_mlx", {"torch", "peft", "bnf_torch"}), slow("bnf_torch", {"mlx", "mlx_lm", "bnf_mlx"})],
)
def test_a_backend_never_loads_the_other(backend: str, others: set[str]) -> None:
    assert loaded_after(f"import {backend}.backend, {backend}.engine").isdisjoint(others)


def test_the_face_gives_what_it_names() -> None:
    assert all(getattr(bnf_align, name) for name in bnf_align.__all__)
