"""What this project has set itself to reach, and what a machine's figures say of it. docs/performance.md lists them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.figures import FLOOR, Figures, Line, lines
from bnf_core.errors import UserError
from bnf_core.models.architecture import Architecture
from bnf_core.models.model_folder import resolve_model

# Dense bfloat16 products a second, by words of a device's name (NVIDIA's data sheets).
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


@dataclass(frozen=True)
class Target:
    name: str
    kind: Literal["at most", "at least"]
    limit: float
    unit: str
    measure: Callable[[Path, str], float | None]  # of the folder of all stages, and the model of whole steps

    def verdict(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        met = value <= self.limit if self.kind == "at most" else value >= self.limit
        return "met" if met else "missed"


def figures(path: Path, part: str) -> tuple[dict[str, str], Figures] | None:
    """Facts and figures of the case whose title has this in it; None: they are not there."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return next((held["facts"], Figures(**case)) for title, case in held["cases"].items() if part in title)
    except (OSError, ValueError, KeyError, StopIteration):
        return None


def line(path: Path, part: str, contender: str) -> Line | None:
    found = figures(path, part)
    return next((one for one in lines(found[1]) if one.name == contender), None) if found else None


def _loss(folder: Path) -> Line | None:
    return line(folder / "loss" / "loss.json", "frozen", "linear_bnf_loss")


def loss_over_products(folder: Path, model: str) -> float | None:
    found = _loss(folder)
    return found.floors if found else None


def loss_memory(folder: Path, model: str) -> float | None:
    found = _loss(folder)
    return found.memory / 2**30 if found and found.memory is not None else None


def loss_on_an_h100(folder: Path, model: str) -> float | None:
    found = figures(folder / "loss" / "loss.json", "frozen")
    is_one = found is not None and "H100" in found[0].get("device", "")
    loss = _loss(folder) if is_one else None
    return loss.seconds * 1000 if loss else None


def step_over_dpo(folder: Path, model: str) -> float | None:
    found = line(folder / "step-ultrafeedback" / "step.json", "a step", "TRL DPO")
    ours = line(folder / "step-ultrafeedback" / "step.json", "a step", "bnf")
    return ours.seconds / found.seconds if found and ours else None


def share_of_peak(folder: Path, model: str) -> float | None:
    """Products that a LoRA step cannot do without, forward and backward, a second."""
    path = folder / "step-ultrafeedback" / "step.json"
    found, ours = figures(path, "a step"), line(path, "a step", "bnf")
    if found is None or ours is None or FLOOR not in found[1].rounds[0]:
        return None
    facts = found[0]
    peak = next((value for name, value in PEAKS.items() if name in facts.get("device", "")), None)
    counted = re.search(r"([\d,]+) tokens, ([\d,]+) of them", facts.get("step", ""))
    if peak is None or counted is None:
        return None
    tokens, completions = (int(number.replace(",", "")) for number in counted.groups())
    try:
        products = Architecture.of(resolve_model(model, weights=False)).products(tokens, completions)
    except UserError:
        return None
    return 100 * sum(2 * 2 * n * i * o for n, i, o in products) / ours.seconds / peak


TARGETS = [
    Target("fused loss beside its bare products", "at most", 1.15, "×", loss_over_products),
    Target("memory of the fused loss", "at most", 1.0, "GiB", loss_memory),
    Target("trl#7244's workload on an H100", "at most", 60.0, "ms", loss_on_an_h100),
    Target("a step beside TRL's DPO", "at most", 0.5, "×", step_over_dpo),
    Target("a LoRA step's share of the card's bfloat16 peak", "at least", 50.0, "%", share_of_peak),
]
