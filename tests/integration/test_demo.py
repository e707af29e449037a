"""The demo on a tiny model, which learns nothing: that the road is whole, and that the pages say what it prints."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from test_online import at_hand, lines, samples  # noqa: F401  (fixtures)

from bnf_align.commands.demo import SIGNS, DemoConfig, demo
from bnf_core.config import HardwareConfig
from conftest import fast_on

DOCS = Path(__file__).parents[2] / "docs"


@fast_on("torch")
@pytest.mark.usefixtures("at_hand", "drawn")
def test_the_road_is_whole(tiny_model: Path, tmp_path: Path, backend_name: str) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    config = DemoConfig(
        str(tiny_model),
        output=str(tmp_path / "demo"),
        hardware=HardwareConfig(backend=backend_name, device="cpu", dtype="float32"),
        warm_up=8,
        prompts=8,
        held_out=3,
        iterations=2,
    )
    result = demo(config, console)
    said = console.export_text()
    assert result.folder == tmp_path / "demo" / "bnf" and result.picture.exists()
    before, after = lines(result.folder, "eval")
    for name, meaning, good in SIGNS:
        assert name in before and name in after and meaning in said and good in said
    # The start is the fine-tuned model, not the model without an adapter.
    assert before["rewards/chosen"] == before["rewards/rejected"] == 0.0
    assert after["rewards/chosen"] != 0.0
    assert {row["iteration"] for row in samples(result.folder)} == {0, 1}


def test_the_pages_say_what_the_demo_prints() -> None:
    rows = (DOCS / "watching.md").read_text(encoding="utf-8").splitlines()
    for name, meaning, good in SIGNS:
        (row,) = [row for row in rows if row.startswith(f"| {meaning} |")]
        assert f"`{name}`" in row and row.endswith(f"| {good} |")
