"""How a token is chosen, against hand-worked cases and the distribution that it is to be drawn from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bnf_core.config import SamplingConfig
from bnf_core.errors import TrainingStopped
from bnf_core.sampling import Completion, choose, exponentials, noise_key

P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
LOGITS = np.log(P).astype(np.float32) + np.float32(3.0)  # a model's logits are not normalised
DRAWS = 4000


def shares(**settings: Any) -> np.ndarray:
    """How often each token is drawn."""
    sampling = SamplingConfig(**({"temperature": 1.0} | settings))
    tokens = [choose(LOGITS, sampling, noise_key(0, [1], i), i % 7)[0] for i in range(DRAWS)]
    return np.bincount(tokens, minlength=len(P)) / DRAWS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, P**2),
        ({"top_k": 2}, P * (P >= 0.3)),
        ({"top_p": 0.7}, P * (P >= 0.3)),  # 0.4 + 0.3 is just enough
        ({"top_p": 0.71}, P * (P >= 0.15)),
        ({"min_p": 0.3}, P * (P >= 0.12)),
        ({"top_k": 3, "top_p": 0.8}, P * (P >= 0.3)),  # of 0.85: the first two have 0.82 of it
        ({"temperature": 0.0}, P == 0.4),
    ],
)
def test_tokens_are_drawn_from_the_distribution_that_is_asked_for(settings: Any, expected: np.ndarray) -> None:
    expected = expected / expected.sum()
    found = shares(**settings)
    assert (found[expected == 0] == 0).all()
    error = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(found - expected) <= 4 * error).all(), (found, expected)


def test_the_log_probability_is_the_models_own() -> None:
    for settings in ({"temperature": 1.0}, {"temperature": 0.3, "top_k": 2, "repetition_penalty": 2.0}, {}):
        token, log_prob = choose(LOGITS, SamplingConfig(**settings), 5, 0, [0, 1])
        assert log_prob == pytest.approx(np.log(P[token]), abs=1e-6)


def test_the_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_not() -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.5], np.float32)
    greedy = SamplingConfig(repetition_penalty=2.0)
    assert choose(logits, greedy, 0, 0, [0, 0])[0] == 1  # 2 / 2 < 1.5
    assert choose(logits - 4, greedy, 0, 0, [0])[0] == 1  # −2 · 2 < −2.5
    assert choose(logits, greedy, 0, 0)[0] == 0


def test_noise_is_of_the_key_and_position_and_goes_on_from_no_other() -> None:
    keys = {noise_key(0, [1, 2], 0), noise_key(1, [1, 2], 0), noise_key(0, [1, 2], 1), noise_key(0, [1, 2], 0, 1)}
    keys |= {noise_key(0, [1], 2), noise_key(0, [1, 2, 0], 0)}
    assert len(keys) == 6
    numbers = np.arange(400, dtype=np.uint64)
    np.testing.assert_array_equal(exponentials(7, 3, numbers)[5:9], exponentials(7, 3, numbers[5:9]))
    rows = np.stack([exponentials(key, position, numbers) for key in (7, 8) for position in range(3)])
    assert np.abs(np.corrcoef(rows) - np.eye(6)).max() < 0.2
    assert rows.mean() == pytest.approx(1.0, abs=0.08)
    ordered = np.sort(rows.ravel())
    expected = -np.expm1(-ordered)  # Kolmogorov and Smirnov: the distribution is that of exponentials
    assert np.abs(expected - np.arange(1, 2401) / 2400).max() < 1.63 / np.sqrt(2400)


def test_unlikely_tokens_are_drawn_as_often_as_they_should_be() -> None:
    """Half of the probability is one token's, and half that of 5,000 others."""
    logits = np.log(np.r_[0.5, np.full(5000, 1e-4)]).astype(np.float32)
    sampling = SamplingConfig(temperature=1.0)
    tokens = np.array([choose(logits, sampling, noise_key(0, [1], i), 0)[0] for i in range(2000)])
    assert abs((tokens == 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)
    few = SamplingConfig(temperature=1.0, top_p=0.4)
    many = SamplingConfig(temperature=1.0, top_p=0.6)
    assert {choose(logits, few, i, 0)[0] for i in range(50)} == {0}
    # The others tie with each other, and so they all stay.
    assert len({choose(logits, many, i, 0)[0] for i in range(50)}) > 15
    others = (tokens[tokens > 0] - 0.5) / 5000
    assert abs(others.mean() - 0.5) < 4 * 0.29 / np.sqrt(len(others)) and len(set(tokens)) > 800


def test_impossible_tokens_are_never_drawn_and_broken_logits_end_the_run() -> None:
    banned = np.where(np.arange(5) == 2, 0.0, -np.inf).astype(np.float32)
    assert choose(banned, SamplingConfig(temperature=1.0), 3, 0) == (2, 0.0)
    with pytest.raises(TrainingStopped, match="not finite"):
        choose(np.array([1.0, np.nan], np.float32), SamplingConfig(), 0, 0)


def say(*tokens: int, most: int = 9, **settings: Any) -> Completion:
    """A completion of the tokens that come next, in letters."""
    letters = "abcdefgh"

    def decode(ids: Sequence[int]) -> str:
        return "".join(letters[i] for i in ids)

    sampling = SamplingConfig(**settings)
    row = Completion([0], sampling, max_tokens=most, stop_ids=[7], decode=decode)
    for token in tokens:
        assert not row.done
        row.next(np.eye(8, dtype=np.float32)[token])
    return row


def test_a_completion_ends_at_a_stop_token_a_stop_string_or_the_limit() -> None:
    ended = say(1, 2, 7)
    assert (ended.ids, ended.content, ended.text, ended.done, ended.cut) == ([1, 2, 7], [1, 2], "bc", True, False)
    cut = say(1, 2, most=2)
    assert (cut.content, cut.done, cut.cut) == ([1, 2], True, True)
    at_limit = say(1, 7, most=2)
    assert (at_limit.content, at_limit.done, at_limit.cut) == ([1], True, False)
    stopped = say(1, 2, 3, stop=["cd", "zz"])
    assert (stopped.ids, stopped.text, stopped.done, stopped.cut) == ([1, 2, 3], "b", True, False)
    assert say(1, 2, 3, most=3, stop=["cd"]).cut is False
    assert not say(1, 2).done


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}, {"repetition_penalty": 0}):
        with pytest.raises(ValueError, match="expected"):
            SamplingConfig(**wrong)
    with pytest.raises(ValueError, match="stop"):
        SamplingConfig(stop=[""])
