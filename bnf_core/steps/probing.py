"""Whether a model's code heeds the layout of a grid in which sequences share rows or prompts: found out by comparing,
on the same rows and by the same measure for every backend. Surer than a list of families."""

from typing import NamedTuple

import numpy as np

from bnf_core.steps.batching import collate
from bnf_core.types import Array, Batch, Example

TOLERANCE = 1e-4  # of the states' root mean square, in float32
HALF_TOLERANCE = 5e-2  # in half precision
LEAK_SHARE = 1 / 5  # what is left of a leak must be round-off, even of a small one


class Probe(NamedTuple):
    """The same scored tokens in the same order, laid out in two ways."""

    alone: Batch  # a sequence to a row of the grid
    together: Batch  # in rows that they share


def packing_probe() -> Probe:
    """Two sequences, packed into a row in either order: two rows, so that a mask cannot pass for one of heads. Their
    lengths and tokens differ, so that it shows where one sees the other."""
    long, short = ([i % 8 for i in ids] for ids in (range(7, 27), range(12)))
    rows = [Example((ids[0],), tuple(ids[1:]), True) for ids in (short, long, long, short)]
    return Probe(collate(rows, len(rows)), collate(rows, len(rows), bins=[[0, 1], [2, 3]]))


def sharing_probe() -> Probe:
    """Two completions of one prompt; their lengths and tokens differ."""
    prompt, *completions = (tuple(i * step % 8 for i in range(length)) for length, step in ((11, 1), (6, 3), (9, 5)))
    rows = [Example(prompt, completion, True) for completion in completions]
    return Probe(collate(rows, len(rows)), collate(rows, len(rows), bins=[[0, 1]], share_prompts=True))


def heeds_layout(alone: Array, without_layout: Array, with_layout: Array, *, half: bool) -> bool:
    """Whether the states of a shared grid are those of rows of their own, up to round-off.

    An error that is small may still be a leak: attention hardly matters in a model that is not trained. So it must be
    small as well beside what the model does where it is not told the layout. A model that ignores the layout, whose
    error is the leak, is refused whatever its size.

    Args:
        alone: hidden states or logits of the probe's scored tokens, (N, D), each sequence in a row of its own.
        without_layout: the same in the shared grid, of a model that is not told what is where.
        with_layout: the same of a model that is told.
        half: whether any weights are in half precision.
    """
    truth = np.asarray(alone, np.float64)
    leak, error = (_rms(np.asarray(states, np.float64) - truth) for states in (without_layout, with_layout))
    return bool(error <= min((HALF_TOLERANCE if half else TOLERANCE) * _rms(truth), LEAK_SHARE * leak))


def _rms(x: Array) -> float:
    return float(np.sqrt(np.square(x).mean()))
