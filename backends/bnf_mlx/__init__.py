"""The BNF loss and its training engine on MLX. Mirrors bnf_torch file by file. Nothing loads before it is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnf_mlx.linear import linear_bnf_loss, linear_log_odds
    from bnf_mlx.losses import bnf_token_loss, token_log_odds

__all__ = ["bnf_token_loss", "linear_bnf_loss", "linear_log_odds", "token_log_odds"]

_MODULES = {
    "bnf_token_loss": "losses",
    "linear_bnf_loss": "linear",
    "linear_log_odds": "linear",
    "token_log_odds": "losses",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
