"""Draw docs/objectives.png: how hard each objective pushes a row's tokens. Run from the repository root:

    python docs/objectives_picture.py

The curves are PyTorch's gradients of the objectives as training takes them; the policy that drew samples is the
reference.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnf_align.run.pictures import save
from bnf_core.objectives import OBJECTIVES, Objective, Seen, batch_loss, structure
from bnf_core.steps.batching import collate
from bnf_core.types import Drawn, Example
from bnf_torch.ops import OPS

OUTPUT = Path(__file__).with_name("objectives.png")
TOKENS = 20  # of every row
R = 0.5  # the reference's probability of each token
P = np.linspace(0.01, 0.99, 393)  # the policy's; R is among them
CHOSEN, REJECTED = "#0072B2", "#D55E00"
MOST = 6.0  # of the push at p = r: what is beyond leaves the picture


def pushes(objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    """−∂loss/∂z summed over the tokens of a chosen and of a rejected row, (len(P),) each, as p changes in that row and
    stays r in the other row of its prompt."""
    rows = [
        Example((1, i + 2), (1,) * TOKENS, label, i, i + 1, drawn=Drawn((np.log(R),) * TOKENS, advantage))
        for i in range(2 * len(P))
        for label, advantage in ((True, 1.0), (False, -1.0))
    ]
    moved = np.full((2, len(P), 2), R)  # which row of a pair moves, how far, its chosen and its rejected row
    moved[0, :, 0] = moved[1, :, 1] = P
    p = torch.tensor(moved, dtype=torch.float64).flatten().repeat_interleave(TOKENS)
    log_odds = torch.logit(p).requires_grad_()
    reference = torch.zeros_like(log_odds) + np.log(R / (1 - R))
    layout = _tensors(structure(objective, collate(rows, len(rows))))
    batch_loss(objective, OPS, Seen(log_odds, torch.zeros_like(log_odds), reference, layout)).backward()
    assert log_odds.grad is not None
    push = -len(P) * log_odds.grad.numpy().reshape(2, len(P), 2, TOKENS).sum(3)
    return push[0, :, 0], push[1, :, 1]


def _tensors(tree: Any) -> Any:
    """Arrays in named tuples as tensors, their floats as float64."""
    if isinstance(tree, tuple):
        parts = [_tensors(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    array = torch.as_tensor(np.asarray(tree))
    return array.double() if array.is_floating_point() else array.long()


def panel(axes: Axes, objective: Objective) -> None:
    chosen, rejected = pushes(objective)
    start = np.argmin(np.abs(P - R))
    both = np.abs([chosen, rejected])
    scale = min(both.max(), MOST * both[:, start].max())
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(R, color="#999999", linewidth=0.8, linestyle=":")
    for push, colour in ((rejected, REJECTED), (chosen, CHOSEN)):
        axes.plot(P, push / scale, color=colour, linewidth=2)
        axes.plot(R, push[start] / scale, "o", color=colour, markersize=5)
    axes.set(xlim=(0, 1), ylim=(-1.08, 1.08), xticks=[0, R, 1], yticks=[])
    axes.set_xticklabels(["0", "r", "1"])
    axes.set_title(objective.name, loc="left", fontsize=11)


def main() -> None:
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    grid = figure.subplots(4, 5)
    for axes, objective in zip(grid.flat, OBJECTIVES.values(), strict=False):
        panel(axes, objective())
    for axes in grid.flat[len(OBJECTIVES) :]:
        axes.remove()
    figure.supxlabel("p, the policy's probability of each token of the row; its partner stays at p = r", fontsize=10)
    figure.supylabel("push on the tokens' logits", fontsize=10)
    grid[0, 0].text(0.97, 0.75, "chosen", color=CHOSEN, ha="right", fontsize=10)
    grid[0, 0].text(0.97, -0.85, "rejected", color=REJECTED, ha="right", fontsize=10)
    print(save(figure, OUTPUT))


if __name__ == "__main__":
    main()
