"""What a run keeps of its chat template: the day that it was told, and the token that ends a turn."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from test_train import QUIET, config

import tiny
from bnf_align.commands.evaluate import evaluate
from bnf_align.commands.fuse import fuse
from bnf_align.commands.reference import reference
from bnf_align.commands.train import train
from bnf_align.run import feedback as loading
from bnf_align.run.run_folder import recorded_setting
from bnf_core.config import DataConfig, EvaluateConfig, HardwareConfig, ReferenceConfig
from bnf_core.data.tokenization import load_tokenizer, stop_ids
from bnf_core.errors import UserError
from conftest import fast_on

# Today's date in the prompt, and turns that end in what is not EOS.
TEMPLATE = "{{ strftime_now('%d %b %Y') }}" + tiny.TEMPLATE.replace("<|end|>", "<|system|>")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set the day."""

    def set_day(day: str) -> None:
        class Day(date):
            @classmethod
            def today(cls) -> Any:
                return date.fromisoformat(day)

        monkeypatch.setattr(loading, "date", Day)

    return set_day


@fast_on("mlx")
def test_a_run_a_reference_and_an_evaluation_keep_the_day_they_began(
    model: Path, feedback: Path, tmp_path: Path, on: Callable[[str], None], backend_name: str
) -> None:
    on("2025-12-31")
    run = config(model, feedback, tmp_path / "run", backend_name, save_every=1, keep_checkpoints=9)
    done = train(run, QUIET)
    assert recorded_setting(done.folder, "data.date") == "2025-12-31"
    data, hardware = DataConfig(str(feedback)), HardwareConfig(backend=backend_name, device="cpu", dtype="float32")
    stored = ReferenceConfig(str(model), data, output=str(tmp_path / "ref"), hardware=hardware)
    rows = len(reference(stored, QUIET).keys)
    scored = EvaluateConfig(str(model), data, adapter=str(done.trained), split="train", hardware=hardware)
    before = evaluate(scored, QUIET)

    on("2026-01-01")
    last = max((done.folder / "checkpoints").iterdir())
    shutil.rmtree(last)
    train(replace(run, resume=True), QUIET)  # refused as another run, if the day were another
    assert recorded_setting(done.folder, "data.date") == "2025-12-31"
    assert len(reference(stored, QUIET).keys) == rows
    again = train(replace(run, output=str(tmp_path / "again"), reference=str(tmp_path / "ref")), QUIET)
    assert recorded_setting(again.folder, "data.date") == "2025-12-31"
    assert evaluate(scored, QUIET) == before
    assert evaluate(replace(scored, data=replace(data, date="2026-01-01")), QUIET) != before
    with pytest.raises(UserError, match=r"data\.date \(2025-12-31; this run's: 2026-01-01\)"):
        train(
            replace(
                run,
                data=replace(run.data, date="2026-01-01"),
                output=str(tmp_path / "b"),
                reference=str(tmp_path / "ref"),
            ),
            QUIET,
        )


def test_the_end_of_turn_is_saved_with_what_was_trained(
    model: Path, feedback: Path, tmp_path: Path, backend_name: str
) -> None:
    done = train(config(model, feedback, tmp_path / "run", backend_name, max_steps=1), QUIET)
    tokenizer = load_tokenizer(model)
    end = tokenizer.get_vocab()["<|system|>"]
    saved = json.loads((done.trained / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [tokenizer.eos_token_id, end]
    fuse(str(model), done.trained, tmp_path / "fused")
    assert stop_ids(tokenizer, tmp_path / "fused", of_template=False)[:2] == [tokenizer.eos_token_id, end]
