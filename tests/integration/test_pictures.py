"""Pictures of a run: the right numbers in the right panel, and no metrics file that breaks them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from bnf_align.run.pictures import CHOSEN, REJECTED, run_figure, run_picture
from conftest import slow


def train(step: int, good: float | None = 0.1, bad: float | None = -0.2, **more: Any) -> dict[str, Any]:
    shifts = {"rewards/chosen": good, "rewards/rejected": bad}
    return {
        "kind": "train",
        "step": step,
        "loss": 0.5,
        "target_weight": 0.9,
        "share_below_reference": 0.3,
        **shifts,
    } | more


def evaluation(step: int, preference: float | None, answer: float | None) -> dict[str, Any]:
    shifts = {"rewards/chosen": 0.7, "rewards/rejected": -0.7}
    return {
        "kind": "eval",
        "step": step,
        "loss": 0.4,
        "preference_accuracy": preference,
        "answer_accuracy": answer,
    } | shifts


def curve(axes: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def colour(axes: Axes, label: str) -> object:
    return next(line.get_color() for line in axes.lines if line.get_label() == label)


def texts(axes: Axes) -> str:
    return " ".join(text.get_text() for text in axes.texts)


def test_a_run_on_samples_shows_how_many_are_right_in_place_of_its_loss() -> None:
    lines = [
        evaluation(0, 0.5, None) | {"pass_at_1": 0.25},
        train(1, pass_at_1=0.5),
        train(2),
        train(3, pass_at_1=0.75),
    ]
    samples = run_figure(lines).axes[0]
    assert curve(samples, "samples of each iteration") == [(1, 0.5), (3, 0.75)]
    assert curve(samples, "held-out prompts") == [(0, 0.25)]


def test_draws_each_metric_where_it_belongs() -> None:
    lines = [
        evaluation(0, 0.5, 0.25),
        train(1),
        train(2, good=0.3, bad=-0.6, target_weight=0.8),
        evaluation(2, 1.0, 0.75),
    ]
    loss, shift, weight, held_out = run_figure(lines).axes
    assert curve(loss, "training batches") == [(1, 0.5), (2, 0.5)]
    assert curve(loss, "held-out rows") == [(0, 0.4), (2, 0.4)]
    assert curve(shift, "chosen rows, training") == [(1, 0.1), (2, 0.3)]
    assert curve(shift, "rejected rows, training") == [(1, -0.2), (2, -0.6)]
    assert (colour(shift, "chosen rows, training"), colour(shift, "rejected rows, training")) == (CHOSEN, REJECTED)
    assert curve(weight, "mean target weight t = min(1, p/r)") == [(1, 0.9), (2, 0.8)]
    assert [bar.get_height() for bar in held_out.patches] == [0.5, 1.0, 0.25, 0.75]  # type: ignore[attr-defined]
    assert "50%\nstep 0" in texts(held_out) and "75%\nstep 2" in texts(held_out)


def test_leaves_out_what_was_not_measured() -> None:
    lines = [train(1, good=None), train(2, loss=float("nan")), train(3, good=0.3), evaluation(3, 0.5, None)]
    loss, shift, _, held_out = run_figure(lines).axes
    assert curve(shift, "chosen rows, training") == [(2, 0.1), (3, 0.3)]
    assert curve(loss, "training batches") == [(1, 0.5), (3, 0.5)]
    assert [bar.get_height() for bar in held_out.patches] == [0.5]  # type: ignore[attr-defined]


def test_one_step_shows_as_a_dot() -> None:
    loss = run_figure([train(1)]).axes[0]
    assert loss.lines[0].get_marker() == "o"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [train(1)],
        slow([evaluation(0, 0.5, 0.5)]),
        slow([train(1, good=None, bad=None)]),
        [{"kind": "other"}],
        [{"kind": "train"}],
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_run_gives_a_picture(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    cut_short = '{"kind": "train", "st'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut_short)
    picture = run_picture(tmp_path)
    assert picture == tmp_path / "run.png" and picture.read_bytes().startswith(b"\x89PNG")


def test_leaves_the_callers_matplotlib_alone() -> None:
    """In a fresh interpreter, because another test may have loaded pyplot."""
    code = "import sys; from bnf_align.run.pictures import run_figure; run_figure([])"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'matplotlib.pyplot' not in sys.modules"], check=True)
