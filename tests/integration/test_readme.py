"""The README's commands and code are real."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_tree_names_every_module() -> None:
    tree = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "tree.md").read_text(), re.DOTALL)
    assert tree is not None
    folders = ("bnf_core", "backends", "recipes/bnf_align", "benchmarks")
    modules = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    missing = [name for name in modules if name != "__init__.py" and name not in tree[1]]
    assert not missing


def test_the_backends_mirror_each_other() -> None:
    torch, mlx = ({path.name for path in (ROOT / "backends" / f"bnf_{name}").glob("*.py")} for name in ("torch", "mlx"))
    assert torch - mlx == {"trainer.py", "sharding.py", "saving.py", "tensor_parallel.py", "routing.py", "compiling.py"}
    assert mlx - torch == {"families.py", "corrections.py", "pages.py", "blas.py"}


def test_local_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_files_that_contributors_are_sent_to_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`([\w./-]+/[\w.-]*)`", text):
        assert (ROOT / name).exists() or (ROOT / "recipes" / "bnf_align" / name).exists(), name
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
