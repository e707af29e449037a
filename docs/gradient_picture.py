"""Draw docs/bnf_gradient.png: how hard each loss pushes the observed token's logit. Run from the repository root:

    python docs/gradient_picture.py

The BNF curves are the float64 oracle's gradients, not the closed form they illustrate.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnf_align.run.pictures import save
from bnf_core import oracle

OUTPUT = Path(__file__).with_name("bnf_gradient.png")
REFERENCES = {0.2: ("#E69F00", "-"), 0.6: ("#009E73", "--"), 0.9: ("#0072B2", "-.")}  # r: colour, line
PLAIN, UNLIKELIHOOD = "#666666", "#CC79A7"


def push(log_odds: np.ndarray, r: float, label: int) -> np.ndarray:
    """−∂(label · ℓ)/∂z_y where p = σ(log_odds), in a vocabulary of two tokens: (N,) from (N,)."""
    logits = np.stack([log_odds, np.zeros_like(log_odds)], axis=1)
    ref_log_odds = np.full_like(log_odds, np.log(r) - np.log1p(-r))
    _, grad = oracle.token_loss(logits, np.zeros(len(logits), int), ref_log_odds)
    return -label * grad[:, 0]


def panel(axes: Axes, label: int, p: np.ndarray) -> None:
    log_odds = np.log(p) - np.log1p(-p)
    axes.axhline(0, color="black", linewidth=0.8)
    name = "likelihood, − log p" if label > 0 else "negated likelihood, log p"
    axes.plot(p, label * (1 - p), color=PLAIN, linestyle=":", linewidth=2, label=name)
    if label < 0:
        axes.plot(p, -p, color=UNLIKELIHOOD, linestyle=(0, (1, 3)), linewidth=2, label="unlikelihood, − log(1 − p)")
    for r, (colour, line) in REFERENCES.items():
        axes.plot(p, push(log_odds, r, label), color=colour, linestyle=line, linewidth=2, label=f"BNF, r = {r}")
        axes.plot(r, label * (1 - r), "o", color=colour)
    axes.set_xlabel("p, the policy's probability of the token")
    axes.set_xlim(0, 1)
    axes.set_ylim(*sorted((-0.05 * label, 1.05 * label)))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="upper right" if label > 0 else "lower center")


def main() -> None:
    # Dense at both ends, and on every r, where the curve has its corner.
    p = np.union1d(np.linspace(0.001, 0.999, 999), list(REFERENCES))
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    chosen, rejected = figure.subplots(1, 2)
    panel(chosen, +1, p)
    panel(rejected, -1, p)
    chosen.set_title("Chosen rows: pushed up", loc="left", fontsize=11)
    rejected.set_title("Rejected rows: pushed down", loc="left", fontsize=11)
    chosen.set_ylabel("push on the token's logit, −∂(label · loss)/∂z")
    print(save(figure, OUTPUT))


if __name__ == "__main__":
    main()
