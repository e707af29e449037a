"""The tolerances, data in tolerances.toml, for the tier of a device."""

import platform
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bnf_core.errors import UserError

FILE = Path(__file__).parent / "tolerances.toml"
BITS = {"float32": 24, "bfloat16": 8, "float16": 11}  # significant, the hidden one included
LEAST_EXPONENT = {"float32": -126, "bfloat16": -126, "float16": -14}  # of the smallest normal number


@dataclass(frozen=True)
class Tolerances:
    """What holds on one kind of device."""

    tier: str = "cpu"

    def __call__(self, level: str, quantity: str, dtype: str) -> tuple[float, float]:
        """(rtol, atol) of one quantity: the tier's own entry, else the CPU's."""
        for entries in (tiers()[self.tier].get(level, {}).get(quantity, {}), _file()[level][quantity]):
            if entry := entries.get(dtype) or entries.get("any"):
                return entry["rtol"], entry["atol"]
        raise KeyError(f"tolerances.toml has none for {level}.{quantity} in {dtype}")


def tiers() -> dict[str, dict[str, Any]]:
    """Every tier by name: what it is for (`about`), whether it was `measured`, and where it departs from the CPU."""
    found: dict[str, dict[str, Any]] = _file()["tier"]
    return found


def tier_of(device: str) -> str:
    """The tier of a device as backends call it: cpu, cuda, cuda:1, mps, gpu. One that is not known gets the CPU's
    tolerances, the strictest."""
    if device.startswith("cuda") or (device == "gpu" and platform.system() != "Darwin"):
        return "cuda"
    return "metal" if device in ("mps", "gpu") else "cpu"


def choose(tier: str, device: str) -> Tolerances:
    """The tolerances of a tier, or with `auto` of the device's.

    Raises:
        UserError: there is no such tier.
    """
    name = tier_of(device) if tier == "auto" else tier
    if name not in tiers():
        raise UserError(f"unknown tier {tier!r}: expected auto, {', '.join(tiers())}")
    return Tolerances(name)


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text("utf-8"))
