"""The BNF loss and its training engine on MLX. Mirrors bnf_torch file by file."""

from bnf_mlx.linear import linear_bnf_loss
from bnf_mlx.losses import bnf_token_loss, token_log_odds

__all__ = ["bnf_token_loss", "linear_bnf_loss", "token_log_odds"]
