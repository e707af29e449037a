"""What an experiment is: methods × settings × seeds, what the paper claims of them, and what is drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.pictures import Draw


@dataclass(frozen=True)
class Method:
    """
    Args:
        objective: as `bnf_core.objectives.parse` reads it.
        changes: fields of `Cell` that it has otherwise.
        swept: by which name its learning rate is found, with these changes; default: methods of one objective share
            that of the objective, without any.
    """

    objective: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    swept: str = ""

    @property
    def rate_of(self) -> str:
        return self.swept or self.objective


@dataclass(frozen=True)
class Experiment:
    """
    Args:
        claim: one sentence: what the paper claims.
        methods: by name; the first one is what the others are compared with.
        settings: by name, the fields of `Cell` that each changes. Learning rates are swept without any change.
        common: fields of `Cell` that all have otherwise, those of the sweep as well.
        seen: one sentence: what was seen.
        pictures: by name, the panels of each.
        axis: what the settings are, for pictures that have them side by side.
        seeds: how many, where the scale's number is more than is needed.
        applies: whether a method can be trained in a setting.
        scales: those that it can be run at; the first one is the default.
    """

    claim: str
    methods: Mapping[str, Method]
    seen: Callable[[Outcome], str]
    pictures: Mapping[str, tuple[Draw, ...]]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"pairs": {}})
    common: Mapping[str, Any] = field(default_factory=dict)
    axis: str = ""
    seeds: int | None = None
    applies: Callable[[str, str], bool] = lambda method, setting: True
    scales: tuple[str, ...] = ("didactic", "smollm2")

    def of(self, names: Sequence[str]) -> "Experiment":
        """The same with some of its methods, in its order."""
        return replace(self, methods={name: self.methods[name] for name in self.methods if name in names})


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
