"""The BNF loss and its training engine on PyTorch. Mirrors bnf_mlx file by file."""

from bnf_torch.linear import linear_bnf_loss
from bnf_torch.losses import bnf_token_loss, token_log_odds

__all__ = ["bnf_token_loss", "linear_bnf_loss", "token_log_odds"]
