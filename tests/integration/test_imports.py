"""Imports point one way, proved in fresh interpreters."""

import subprocess
import sys

import pytest

FRAMEWORKS = ("torch", "mlx", "transformers", "mlx_lm", "peft")
CORE = ("batching", "config", "errors", "files", "lora", "metrics", "oracle", "protocol", "records", "reference")
CORE += ("registry", "schedule", "sources", "tokenization", "model_folder", "checkpoints", "pieces", "families")


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stdout.split()}


@pytest.mark.parametrize(
    "statement",
    [
        "import " + ", ".join(f"bnf_core.{name}" for name in CORE),
        "import bnf_conformance.runner, bnf_conformance.checks",
        "import bnf_align",
    ],
)
def test_the_core_and_the_conformance_suite_load_no_framework(statement: str) -> None:
    assert loaded_after(statement).isdisjoint(FRAMEWORKS)


def test_the_core_needs_none_of_the_other_packages() -> None:
    names = loaded_after("import " + ", ".join(f"bnf_core.{name}" for name in CORE))
    assert names.isdisjoint({"bnf_torch", "bnf_mlx", "bnf_align", "bnf_conformance"})


def test_a_backend_never_loads_the_other() -> None:
    assert loaded_after("import bnf_torch.backend, bnf_torch.engine").isdisjoint({"mlx", "mlx_lm", "bnf_mlx"})
    assert loaded_after("import bnf_mlx.backend, bnf_mlx.engine").isdisjoint({"torch", "peft", "bnf_torch"})
