"""Align language models with the Bidirectional Negative Feedback loss. Nothing loads before it is used.

`train`, `online`, `evaluate` and `generate` are the commands of `bnf` as functions; `BNFTrainer` and `BNFConfig` are
for those who know transformers' Trainer; `linear_bnf_loss` is that of the backend at hand; `objectives` is what
training can minimise.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from bnf_core.lazy import attributes

if TYPE_CHECKING:
    from bnf_align.commands.evaluate import evaluate
    from bnf_align.commands.generate import generate
    from bnf_align.commands.online import online
    from bnf_align.commands.train import train
    from bnf_core import objectives
    from bnf_torch.trainer import BNFConfig, BNFTrainer

__all__ = [
    "BNFConfig",
    "BNFTrainer",
    "__version__",
    "evaluate",
    "generate",
    "linear_bnf_loss",
    "objectives",
    "online",
    "train",
]

_of_module = attributes(
    __name__,
    {
        "BNFConfig": "bnf_torch.trainer",
        "BNFTrainer": "bnf_torch.trainer",
        "evaluate": "bnf_align.commands.evaluate",
        "generate": "bnf_align.commands.generate",
        "online": "bnf_align.commands.online",
        "train": "bnf_align.commands.train",
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("bnf-align")
    if name == "linear_bnf_loss":
        from bnf_core import registry

        return registry.get().fused_loss()
    if name == "objectives":
        return import_module("bnf_core.objectives")
    return _of_module(name)
