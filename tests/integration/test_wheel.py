"""The wheel: what is in it, and that it works where no deep-learning framework is."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"bnf_core", "bnf_torch", "bnf_mlx", "bnf_align", "bnf_conformance"}
ABSENT = ("torch", "functorch", "mlx", "peft", "accelerate", "triton", "bnf_align", "_bnf_align")

pytest.importorskip("hatchling")  # of the extra `dev`: nothing is downloaded here


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of what git knows or would add, so that nothing else that lies about gets into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(out), str(source)], check=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel and what it depends on, but without the extras."""
    environment, dependencies = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("dependencies")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    for path in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        for entry in path.iterdir():
            if not entry.name.startswith(ABSENT):
                (dependencies / entry.name).symlink_to(entry)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    return environment / "bin"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """A command that sees nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(word) for word in words]
    return subprocess.run(command, cwd="/", env=environment | {"COLUMNS": "120"}, capture_output=True, text=True)


def test_it_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {name.partition("/")[0] for name in names} == PACKAGES | {f"bnf_align-{version}.dist-info"}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert {"bnf_conformance/tolerances.toml", "bnf_conformance/vectors/L0.safetensors"} <= set(names)


def test_no_framework_is_there(installed: Path) -> None:
    code = """
import importlib.util, json, bnf_align
frameworks = ("torch", "mlx", "mlx_lm", "peft", "accelerate")
print(json.dumps([bnf_align.__file__, bnf_align.__version__, [n for n in frameworks if importlib.util.find_spec(n)]]))
"""
    result = run(installed / "python", "-c", code)
    assert result.returncode == 0, result.stderr
    path, version, found = json.loads(result.stdout)
    assert Path(path).is_relative_to(installed.parent) and version and not found


def test_help_is_shown(installed: Path) -> None:
    result = run(installed / "python", "-m", "bnf_align", "--help")
    assert result.returncode == 0 and "usage: bnf COMMAND" in result.stdout, result.stderr
    result = run(installed / "bnf", "train", "--help")
    assert result.returncode == 0 and "--optimizer.learning_rate" in result.stdout, result.stderr


def test_feedback_is_checked(installed: Path, feedback: Path) -> None:
    result = run(installed / "bnf", "data", "check", feedback)
    assert result.returncode == 0 and "all 12 rows are good" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
def test_a_command_that_needs_a_backend_says_how_to_get_one(installed: Path) -> None:
    result = run(installed / "bnf", "generate", "--model", "nowhere", "--prompt", "a")
    assert result.returncode == 2 and "no backend is installed: pip install" in " ".join(result.stderr.split())
