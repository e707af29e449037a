"""What the losses of every backend ask of their arguments. All raise ValueError; shapes are plain tuples."""

import math

Shape = tuple[int, ...]


def require_logits(logits: Shape, targets: Shape) -> None:
    """(..., V) of at least two tokens, and a target for each."""
    if logits[-1] < 2:
        raise ValueError(f"logits {logits}: a vocabulary needs at least 2 tokens")
    if targets != logits[:-1]:
        raise ValueError(f"targets {targets} do not fit logits {logits}")


def require_one_shape(log_odds: Shape, other_entropy: Shape, ref_log_odds: Shape) -> None:
    if not log_odds == other_entropy == ref_log_odds:
        shapes = f"{log_odds}, {other_entropy}, {ref_log_odds}"
        raise ValueError(f"log_odds, other_entropy and ref_log_odds must have one shape, got {shapes}")


def require_linear(
    hidden: Shape, head: Shape, targets: Shape, bias: Shape | None, soft_cap: float | None, chunk_tokens: int | None
) -> None:
    """hidden (N, D), head (V, D) of at least two tokens, targets (N,), bias (V,); the settings positive."""
    if len(hidden) != 2 or len(head) != 2 or hidden[1] != head[1]:
        raise ValueError(f"hidden {hidden} does not fit head_weight {head}")
    if head[0] < 2:
        raise ValueError(f"head_weight {head}: a vocabulary needs at least 2 tokens")
    if targets != hidden[:1]:
        raise ValueError(f"targets {targets} do not fit hidden {hidden}: one for each")
    if bias is not None and bias != head[:1]:
        raise ValueError(f"bias {bias} does not fit head_weight {head}")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be positive, got {chunk_tokens}")


def require_one_for_each(num_tokens: int, targets: Shape, ref_log_odds: Shape, coefficients: Shape) -> None:
    if not targets == ref_log_odds == coefficients:
        raise ValueError(f"targets, ref_log_odds and coefficients must be ({num_tokens},), one for each hidden state")
