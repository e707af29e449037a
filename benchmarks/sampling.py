"""`python -m benchmarks.sampling`: drawing completions beside the library's own batch generation, and those of one
prompt beside those of as many different ones."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import main
from benchmarks.figures import here
from benchmarks.interleaved import repeated, rounds
from bnf_core import registry
from bnf_core.config import HardwareConfig, SamplingConfig
from bnf_core.models.architecture import Architecture
from bnf_core.models.model_folder import resolve_model
from bnf_core.sampling import Completion, noise_key

OURS, PLAIN, SHARED, APART = "ours", "the library's own", "one prompt", "different prompts"


@dataclass
class BenchSamplingConfig:
    """Time the drawing of completions at temperature 1, of random prompts, and nothing that ends one early."""

    model: str
    """A checkpoint folder or a Hub model."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    prompts: int = 16
    """Different prompts of 64 tokens, one completion each, beside the library's own generation."""
    tokens: int = 32
    """Tokens of a completion."""
    samples: int = 8
    """Completions of one prompt, beside as many different prompts."""
    prompt_tokens: int = 256
    """Of that prompt."""
    rounds: int = 9
    """How often each is timed at most, after it has been warmed up."""
    minutes: float = 9.0
    """Begin no further round after so many, the two comparisons together."""
    cpu: bool = False
    """Count processor seconds, for a machine that does other work as well."""


def bench_sampling(config: BenchSamplingConfig, console: Console) -> None:
    """Measure and print.

    Raises:
        UserError: no such model.
    """
    folder = resolve_model(config.model)
    vocab = Architecture.of(folder).vocab
    hardware = config.hardware
    engine: Any = registry.get(hardware.backend).load(folder, device=hardware.device, dtype=hardware.dtype)
    plain = {"torch": _transformers, "mlx": _mlx_lm}[hardware.backend]
    many = [_prompt(vocab, i, 64) for i in range(config.prompts)]
    long = [_prompt(vocab, i, config.prompt_tokens) for i in range(config.samples)]
    numbers = itertools.count()

    def ours(prompts: Sequence[list[int]]) -> Callable[[], None]:
        def draw() -> None:
            sampling, number = SamplingConfig(temperature=1.0), next(numbers)
            keys = [noise_key(number, prompt, i) for i, prompt in enumerate(prompts)]
            rows = [
                Completion(p, sampling, max_tokens=config.tokens, key=k) for p, k in zip(prompts, keys, strict=True)
            ]
            engine.sample(rows)

        return draw

    cases = {
        f"{config.prompts} prompts of 64 tokens": {OURS: ours(many), PLAIN: plain(engine, many, config.tokens)},
        f"{config.samples} completions after {config.prompt_tokens} tokens": {
            SHARED: ours([long[0]] * config.samples),
            APART: ours(long),
        },
    }
    console.print(f"{here()}, {hardware.backend}, {config.model}, {config.tokens} tokens each", highlight=False)
    table = Table("", "contender", "seconds", "tokens/s", "first ÷ second", "rounds")
    for title, contenders in cases.items():
        works = {name: repeated(job) for name, job in contenders.items()}
        taken, until = [], time.monotonic() + 60 * config.minutes / len(cases)
        for seconds_of in rounds(works, cpu=config.cpu):
            taken.append(seconds_of)
            if len(taken) == config.rounds or time.monotonic() > until:
                break
        first, second = contenders
        ratios = [t[first] / t[second] for t in taken]
        for name in contenders:
            seconds = statistics.median(t[name] for t in taken)
            count = config.tokens * (config.prompts if OURS in contenders else config.samples)
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if name == first else ""
            about = (title, str(len(taken))) if name == first else ("", "")
            table.add_row(about[0], name, f"{seconds:.2f}", f"{count / seconds:,.0f}", ratio, about[1])
    console.print(table)


def _prompt(vocab: int, seed: int, length: int) -> list[int]:
    return np.random.Generator(np.random.PCG64(seed)).integers(vocab, size=length).tolist()


def _transformers(engine: Any, prompts: Sequence[list[int]], tokens: int) -> Callable[[], None]:
    """`generate` with its own sampling."""
    import torch
    from transformers import GenerationConfig

    ids = torch.tensor(prompts, device=engine.device)
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, eos_token_id=None, pad_token_id=0
    )
    engine.base.generation_config = GenerationConfig()  # of the checkpoint, which would come over it

    def generate() -> None:
        with torch.no_grad():
            engine.base.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    return generate


def _mlx_lm(engine: Any, prompts: Sequence[list[int]], tokens: int) -> Callable[[], None]:
    """`BatchGenerator` with its own sampling."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    def generate() -> None:
        with mx.stream(engine.device):
            stream = mx.default_stream(engine.device)
            generator = BatchGenerator(engine.model, sampler=make_sampler(temp=1.0), stream=stream)
            generator.insert(list(prompts), [tokens] * len(prompts))
            while generator.next_generated():
                pass
            generator.close()

    return generate


if __name__ == "__main__":
    main("sampling", BenchSamplingConfig, bench_sampling)
