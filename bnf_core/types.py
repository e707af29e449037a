"""What flows through a run: rows of feedback as tokens, batches of them, and what a backend says of each token."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Position = dict[str, int]  # where in the data a run is; JSON
Unit = Literal["row", "pair", "prompt"]  # rows that a loss compares with each other, and nothing may part


class Drawn(NamedTuple):
    """What is known of a completion that a policy drew."""

    log_probs: tuple[float, ...]  # of its tokens, under that policy
    advantage: float  # how much better it was judged than the prompt's other samples


@dataclass(frozen=True)
class Example:
    """One tokenised row of feedback."""

    prompt_ids: tuple[int, ...]  # at least one token, or nothing predicts the first of the completion
    completion_ids: tuple[int, ...]  # at least one token, the end-of-turn token included
    label: bool  # True: chosen, False: rejected
    group: int = 0  # rows with one prompt share a number: they are compared with each other
    pair: int = 0  # the chosen and the rejected row of one pair share a number; 0: it is none's
    source: str = ""  # file:line, for messages
    trained: tuple[bool, ...] | None = None  # which tokens of the completion are trained, one at least; None: all
    weight: float = 1.0  # how much the row counts: the size of a graded label times the row's own weight
    drawn: Drawn | None = None  # None: nobody knows who wrote it
    mismatched: "Example | None" = (
        None  # its prompt with a completion of another, where the run's rows have given it one
    )

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def trained_positions(self) -> Array:
        """(|y|,) int64: which tokens of the completion are trained."""
        return np.arange(len(self.completion_ids)) if self.trained is None else np.flatnonzero(self.trained)

    @property
    def key(self) -> int:
        """64 bits of a hash of the tokens: what the row is known by, wherever it is met."""
        ids = np.asarray((len(self.prompt_ids), *self.prompt_ids, *self.completion_ids), "<i4").tobytes()
        mask = b"" if self.trained is None else bytes(self.trained)
        return int.from_bytes(hashlib.blake2b(ids + mask, digest_size=8).digest(), "little")


class Counts(NamedTuple):
    """Of a global batch: what losses are divided by."""

    rows: int
    chosen: int
    rejected: int
    pairs: int
    compared: int  # rejected rows of prompts that have chosen ones as well

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Counts":
        chosen = [e for e in examples if e.label]
        rejected = [e for e in examples if not e.label]
        groups, pairs = {e.group for e in chosen}, {e.pair for e in chosen} - {0}
        return cls(
            len(examples),
            len(chosen),
            len(rejected),
            sum(e.pair in pairs for e in rejected),
            sum(e.group in groups for e in rejected),
        )


@dataclass(frozen=True)
class Batch:
    """A grid of token ids and, flat, every completion token to be scored.

    S sequences (rows of feedback) lie in a grid of B rows and T columns, one to a row or, packed, several one
    after another, padded on the right; N of their tokens are completion tokens. The hidden state (or logits) at
    `positions[i]` of the flattened (B·T) grid predicts `targets[i]`: what is not listed does not count, so
    nothing needs to be shifted or masked. A grid that is neither packed nor shared needs no attention mask in a
    causal model; otherwise a token sees the earlier tokens of its own segment, and all of the segment that its own one
    goes on from.

    Where sequences share a prompt, it is a segment, and each completion is another that goes on from it. The last
    token of the prompt then predicts the first of every completion, so that `positions` names it several times.
    """

    input_ids: Array  # (B, T) int32
    position_ids: Array  # (B, T) int32, from 0 in each sequence
    segment_ids: Array  # (B, T) int32, from 0 in each grid row; padding is a segment of its own
    prefix_ids: Array  # (B, T) int32, the segment that a token's own goes on from: a shared prompt, or itself
    uses: Array  # (B, T) int32, the sequences that a token is part of, how many: a shared prompt's, 1, or 0 of padding
    packed: bool  # whether any grid row holds sequences of more than one prompt, or one prompt more than once
    shared: bool  # whether any prompt is there once for several sequences
    lengths: Array  # (S,) int32, tokens of each sequence
    positions: Array  # (N,) int64
    targets: Array  # (N,) int32
    sequence_ids: Array  # (N,) int32, the sequence in this batch, 0..S
    coefficients: Array  # (N,) float32: label · weight / (|y| · sequences in the global batch)
    labels: Array  # (S,) int32: +1 chosen, −1 rejected
    weights: Array  # (S,) float32, `Example.weight`
    groups: Array  # (S,) int64, `Example.group`
    pairs: Array  # (P, 2) int32: the chosen and the rejected sequence of each pair in this batch
    counts: Counts  # of the global batch
    keys: Array  # (S,) uint64, `Example.key`
    drawn_log_p: Array  # (N,) float32, `Drawn.log_probs` of the targets; 0 where nobody knows
    advantages: Array  # (S,) float32, `Drawn.advantage`; 0 where there is none

    def row_sums(self, tokens: Array) -> Array:
        """Sums over the tokens of each sequence: (S,) float64, of (N,)."""
        return np.bincount(self.sequence_ids, weights=tokens, minlength=len(self.labels))


class TokenScores(NamedTuple):
    """What the policy says of each completion token, detached, float32, (N,)."""

    log_odds: Any
    other_entropy: Any


class TokenStats(NamedTuple):
    """The same, and the BNF loss; arrays of whichever framework made it."""

    log_odds: Any
    other_entropy: Any
    token_loss: Any
