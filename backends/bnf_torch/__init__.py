"""The BNF loss and its training engine on PyTorch. Mirrors bnf_mlx file by file. Nothing loads before it is used."""

from typing import TYPE_CHECKING

from bnf_core.lazy import attributes

if TYPE_CHECKING:
    from bnf_torch.linear import linear_bnf_loss, linear_log_odds
    from bnf_torch.losses import bnf_token_loss, token_log_odds

__all__ = ["bnf_token_loss", "linear_bnf_loss", "linear_log_odds", "token_log_odds"]

_MODULES = {
    "bnf_token_loss": "bnf_torch.losses",
    "linear_bnf_loss": "bnf_torch.linear",
    "linear_log_odds": "bnf_torch.linear",
    "token_log_odds": "bnf_torch.losses",
}

__getattr__ = attributes(__name__, _MODULES)
