"""What an experiment is: methods × settings × seeds, what the paper claims of them, and what is drawn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from bnf_align.experiments.outcome import Outcome


@dataclass(frozen=True)
class Method:
    """
    Args:
        objective: as `bnf_core.objectives.parse` reads it. Methods of one objective share its learning rate.
        changes: fields of `Cell` that it has otherwise.
    """

    objective: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """
    Args:
        claim: one sentence: what the paper claims.
        methods: by name; the first one is what the others are compared with.
        settings: by name, the fields of `Cell` that each changes. Learning rates are swept without any change.
        seen: one sentence: what was seen.
        pictures: by name.
        axis: what the settings are, for pictures that have them side by side.
        seeds: how many, where the scale's number is more than is needed.
        applies: whether a method can be trained in a setting.
    """

    claim: str
    methods: Mapping[str, Method]
    seen: Callable[["Outcome"], str]
    pictures: Mapping[str, Callable[["Outcome"], Figure]]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"pairs": {}})
    axis: str = ""
    seeds: int | None = None
    applies: Callable[[str, str], bool] = lambda method, setting: True


# With the settings that their papers give; learning rates are swept.
METHODS: Mapping[str, Method] = {
    "BNF": Method("bnf"),
    "DPO": Method("dpo"),
    "IPO": Method("ipo"),
    "KTO": Method("kto"),
    "SimPO": Method("simpo"),
    "ORPO": Method("orpo"),
    "NPO": Method("npo"),
    "NLL + unlikelihood": Method("unlikelihood"),
    "NLL": Method("nll"),
}


def methods(*names: str) -> dict[str, Method]:
    return {name: METHODS[name] for name in names}
