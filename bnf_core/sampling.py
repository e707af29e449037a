"""How completions are drawn, token by token: one recipe, in NumPy, for every backend.

A token is the winner of a race: each token v of the vocabulary waits E_v / p(v), with E_v drawn from the exponential
distribution of mean 1, and the first one is taken. That is a draw from p (the Gumbel-max trick). Each E_v is a hash of
the run's seed, the prompt, the number of the sample, the position and v, so what is drawn depends on nothing else: not
on the batch, its order or the number of processes. Round-off in p changes a token only where two of them arrive within
it of each other, one token in some hundred thousand of float32.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from bnf_core.config import SamplingConfig
from bnf_core.errors import TrainingStopped
from bnf_core.types import Array

GREEDY = SamplingConfig()
HEAD = np.float32(2.0**-10)  # tokens at least so likely beside the likeliest run by themselves, the others as one
REST = np.uint64(2**63)  # the number of those others, where a token's is its id
Decode = Callable[[Sequence[int]], str]


class Sampler(Protocol):
    """What draws completions: an engine, or another machine's."""

    def sample(self, rows: Sequence["Completion"]) -> None:
        """Draw these completions until all are done."""
        ...


class Completion:
    """One completion as it is drawn. A backend asks for `next` with the logits of each position until it is `done`.

    Args:
        prompt_ids: what it goes on from.
        sampling: how its tokens are chosen.
        max_tokens: most tokens of it, the one that ends it included.
        stop_ids: tokens that end it.
        key: 128 bits from which its noise is drawn, of `noise_key`.
        decode: token ids to text; needed for stop strings and for `text`.
        on_token: called after each token.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingConfig = GREEDY,
        *,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        key: int = 0,
        decode: Decode | None = None,
        on_token: Callable[["Completion"], None] | None = None,
    ):
        self.prompt_ids = tuple(prompt_ids)
        self.ids: list[int] = []  # the token that ended it included
        self.log_probs: list[float] = []  # of these, as the model has them: at temperature 1, with nothing left out
        self.done = False
        self.cut = False  # whether it is done because it has `max_tokens`
        self.sampling, self.max_tokens, self.key = sampling, max_tokens, key
        self._stop_ids, self._decode, self._on_token = frozenset(stop_ids), decode, on_token

    @property
    def content(self) -> list[int]:
        """Its tokens without the one that ended it."""
        return self.ids[:-1] if self.ids and self.ids[-1] in self._stop_ids else self.ids

    @property
    def text(self) -> str:
        """What it says, up to a stop string."""
        assert self._decode is not None
        text = self._decode(self.content)
        return text[: min((at for at in map(text.find, self.sampling.stop) if at >= 0), default=len(text))]

    @property
    def withheld(self) -> int:
        """How many of the last characters of its text may become a stop string."""
        longest = max(map(len, self.sampling.stop), default=1) - 1
        text = self.text
        return max(
            (n for n in range(longest + 1) if any(s.startswith(text[len(text) - n :]) for s in self.sampling.stop)),
            default=0,
        )

    @property
    def settled(self) -> str:
        """What it says so far, without what may yet become part of something else: half a character, or the beginning
        of a stop string."""
        text = self.text
        return text if self.done else text.rstrip("\ufffd")[: len(text) - self.withheld]

    def fill(self, ids: Sequence[int], log_probs: Sequence[float], cut: bool) -> None:
        """Take what somebody else has drawn, up to a token that ends it here.

        Args:
            cut: whether it ended at `max_tokens`.
        """
        end = next((i + 1 for i, token in enumerate(ids) if token in self._stop_ids), None)
        self.ids, self.log_probs = list(ids)[:end], list(log_probs)[:end]
        self.cut, self.done = cut and end is None, True

    def next(self, logits: Array) -> int:
        """Choose the next token.

        Args:
            logits: (V,) float32, the model's own.
        Raises:
            TrainingStopped: they are not finite.
        """
        seen = (*self.prompt_ids, *self.ids) if self.sampling.repetition_penalty != 1.0 else ()
        token, log_prob = choose(logits, self.sampling, self.key, len(self.ids), seen)
        self.ids.append(token)
        self.log_probs.append(log_prob)
        ended = token in self._stop_ids or self._says_stop()
        self.cut = not ended and len(self.ids) == self.max_tokens
        self.done = ended or self.cut
        if self._on_token is not None:
            self._on_token(self)
        return token

    def _says_stop(self) -> bool:
        """Whether a stop string is in its last tokens; each of its characters is four of them at most."""
        if not self.sampling.stop:
            return False
        assert self._decode is not None
        tail = self._decode(self.ids[-4 * max(map(len, self.sampling.stop)) - 4 :])
        return any(stop in tail for stop in self.sampling.stop)


def greedy(
    engine: Sampler, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """The likeliest tokens after each prompt, without the stop token."""
    rows = [Completion(prompt, max_tokens=max_tokens, stop_ids=stop_ids) for prompt in prompts]
    engine.sample(rows)
    return [row.content for row in rows]


def noise_key(seed: int, prompt_ids: Sequence[int], sample: int, round: int = 0) -> int:
    """128 bits that no other sample of a run shares.

    Args:
        seed: of the run.
        prompt_ids: of the prompt, which is known by its tokens wherever it stands.
        sample: which of its samples.
        round: how often it has been sampled before, such as the iteration of a run.
    """
    numbers = np.asarray((seed, round, sample), "<u8").tobytes() + np.asarray(prompt_ids, "<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(numbers, digest_size=16, person=b"sample").digest(), "little")


def choose(
    logits: Array, sampling: SamplingConfig, key: int, position: int, seen: Sequence[int] = ()
) -> tuple[int, float]:
    """A token and its log-probability under the model, before sampling has changed anything.

    Args:
        logits: (V,) float32.
        sampling: what is done to them, in this order: repetition penalty, temperature, top-k, top-p, min-p.
        key, position: of the noise.
        seen: tokens that the repetition penalty is for.
    Raises:
        TrainingStopped: the logits are not finite.
    """
    largest = logits.max()
    if not np.isfinite(largest):
        raise TrainingStopped("the model's logits are not finite: nothing can be sampled from them")
    own = np.exp(logits - largest)  # (V,) p up to a factor
    log_sum = float(largest) + float(np.log(own.sum(dtype=np.float64)))
    if sampling.temperature == 0.0:
        token = int(_penalised(logits, sampling.repetition_penalty, seen).argmax())
    else:
        p = own
        if sampling.temperature != 1.0 or (seen and sampling.repetition_penalty != 1.0):
            changed = _penalised(logits, sampling.repetition_penalty, seen)
            p = np.exp((changed - changed.max()) / np.float32(sampling.temperature))
        token = _race(_truncated(p, sampling), key, position)
    return token, float(logits[token]) - log_sum


def exponentials(key: int, position: int, numbers: Array) -> Array:
    """From the exponential distribution of mean 1, float64, one for each number, uint64: SplitMix64's output function
    (Steele, Lea and Flood, 2014) of a start that the key and position give."""
    start = hashlib.blake2b(key.to_bytes(16, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    z: Array = np.frombuffer(start, "<u8") + numbers * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) >> np.uint64(11)
    drawn: Array = -np.log((z + 0.5) * 2.0**-53)
    return drawn


def _race(p: Array, key: int, position: int) -> int:
    """Who arrives first; p (V,), 1 at its largest. The first arrival of many is drawn at once, as of one token with
    all of their probability, so that the noise of the unlikely ones is made only where one of them wins."""

    def first(tokens: Array) -> tuple[int, float]:
        waits = exponentials(key, position, tokens.astype(np.uint64)) / p[tokens]
        at = int(waits.argmin())
        return int(tokens[at]), float(waits[at])

    likely = p >= HEAD
    winner, wait = first(np.flatnonzero(likely))
    rest = float(p.sum(where=~likely, dtype=np.float64))
    if rest > 0 and exponentials(key, position, np.array([REST]))[0] / rest < wait:
        return first(np.flatnonzero(~likely & (p > 0)))[0]
    return winner


def _penalised(logits: Array, penalty: float, seen: Sequence[int]) -> Array:
    """With the logits of tokens seen before divided by the penalty, or multiplied where they are negative
    (arXiv 1909.05858)."""
    if penalty == 1.0 or not seen:
        return logits
    result, at = logits.copy(), np.unique(np.asarray(seen))
    result[at] = np.where(logits[at] > 0, logits[at] / penalty, logits[at] * penalty)
    return result


def _truncated(p: Array, sampling: SamplingConfig) -> Array:
    """p (V,), 1 at its largest, with zeros where a token is not among those to choose from; ties stay."""
    least = np.float32(sampling.min_p)
    if 0 < sampling.top_k < len(p):
        least = max(least, np.partition(p, -sampling.top_k)[-sampling.top_k])
    if sampling.top_p < 1.0:
        some = p[p >= least]
        wanted = sampling.top_p * float(some.sum(dtype=np.float64))
        ordered = mass = some
        for part in (some[some >= HEAD], some):  # all are sorted only where the likely ones are not enough
            ordered = np.sort(part)[::-1]
            mass = np.cumsum(ordered, dtype=np.float64)
            if mass[-1] >= wanted:
                break
        least = max(least, ordered[min(int(np.searchsorted(mass, wanted)), len(ordered) - 1)])
    return np.where(p >= least, p, np.float32(0.0)) if least > 0 else p
