"""Sampling on each backend: what is drawn depends on the prompt, the sample and the seed alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnf_core import registry
from bnf_core.config import SamplingConfig
from bnf_core.errors import UserError
from bnf_core.protocol import Engine
from bnf_core.sampling import Completion, noise_key
from bnf_core.steps.batching import collate
from bnf_core.types import Example

PROMPTS = [[5, 6, 7, 8], [9, 10], [11], [18, 19], [12, 13, 14, 15, 16, 17]]
SAMPLES = 3


@pytest.fixture(scope="module")
def engines(tiny_model: Path) -> dict[str, Engine]:
    return {n: registry.get(n).load(tiny_model, device="cpu", dtype="float32") for n in ("torch", "mlx")}


@pytest.fixture
def engine(engines: dict[str, Engine], backend_name: str) -> Engine:
    return engines[backend_name]


def rows_of(prompts: Sequence[Sequence[int]], max_tokens: int = 12, **settings: Any) -> list[Completion]:
    sampling = SamplingConfig(**({"temperature": 1.0} | settings))
    return [
        Completion(p, sampling, max_tokens=max_tokens, stop_ids=[0], key=noise_key(3, p, i))
        for p in prompts
        for i in range(SAMPLES)
    ]


def drawn(engine: Engine, rows: Sequence[Completion]) -> list[list[int]]:
    engine.sample(rows)
    assert all(row.done for row in rows)
    return [row.ids for row in rows]


def test_batch_and_order_do_not_change_what_is_drawn(engine: Engine) -> None:
    together = drawn(engine, rows_of(PROMPTS))
    assert len(set(map(tuple, together))) > len(PROMPTS)  # they do differ
    backwards = rows_of(PROMPTS)[::-1]
    assert drawn(engine, backwards)[::-1] == together
    assert [ids for row in rows_of(PROMPTS) for ids in drawn(engine, [row])] == together


def test_both_backends_draw_the_same(engines: dict[str, Engine]) -> None:
    for settings in ({}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5, "repetition_penalty": 1.3}, {"min_p": 0.05}):
        rows = {name: rows_of(PROMPTS, **settings) for name in engines}
        assert drawn(engines["torch"], rows["torch"]) == drawn(engines["mlx"], rows["mlx"])
        for a, b in zip(*rows.values(), strict=True):
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-5)


def test_log_probabilities_are_those_that_scoring_gives(engine: Engine) -> None:
    rows = rows_of(PROMPTS, top_k=20)
    engine.sample(rows)
    batch = collate([Example(row.prompt_ids, tuple(row.ids), True) for row in rows], len(rows))
    log_odds = engine.evaluate(batch, np.zeros(len(batch.targets), np.float32)).log_odds
    found = np.concatenate([row.log_probs for row in rows])
    np.testing.assert_allclose(found, -np.logaddexp(0, -log_odds), atol=2e-5)


def test_a_prompt_is_computed_once_for_its_samples(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, tokens = [[5 + i % 40 for i in range(60)], [6] * 60], []
    cls = type(engine.model.model)  # type: ignore[attr-defined]
    name = "forward" if hasattr(cls, "forward") else "__call__"
    original = getattr(cls, name)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens.append(int(np.prod((args[0] if args else kwargs["input_ids"]).shape)))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, counted)
    rows = rows_of(prompts, max_tokens=4)
    engine.sample(rows)
    assert len(rows) == 6 and sum(tokens) <= 2 * 60 + 6 * 6


def test_settings_that_end_a_completion(engine: Engine) -> None:
    sampling = SamplingConfig(stop=["7"])
    greedy = Completion(PROMPTS[0], max_tokens=20)
    engine.sample([greedy])
    token = greedy.ids[5]
    first = greedy.ids.index(token)

    def decode(ids: Sequence[int]) -> str:
        return "".join("7" if i == token else "x" for i in ids)

    at_string = Completion(PROMPTS[0], sampling, max_tokens=20, decode=decode)
    at_token = Completion(PROMPTS[0], max_tokens=20, stop_ids=[token])
    engine.sample([at_string, at_token])
    assert at_string.ids == at_token.ids == greedy.ids[: first + 1]
    assert at_string.text == "x" * first and not at_string.cut and greedy.cut


def test_what_does_not_fit_into_the_model_is_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="token id 304"):
        engine.sample([Completion([5, 304], max_tokens=1)])
