"""Completing prompts with a loaded model."""

from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from bnf_core.config import SamplingConfig, Template
from bnf_core.data.messages import Text
from bnf_core.data.rendering import Chat
from bnf_core.data.tokenization import prompt_ids
from bnf_core.processes import ALONE, Processes
from bnf_core.protocol import Engine
from bnf_core.sampling import GREEDY, Completion, Sampler, noise_key


def complete(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    template: Template,
    max_tokens: int,
    stops: Sequence[int],
    batch_size: int = 16,
    chat: Chat | None = None,
) -> list[str]:
    """Greedy completions of many prompts, in their order."""
    ids = [prompt_ids(p, tokenizer, template, chat=chat) for p in prompts]
    return complete_ids(engine, tokenizer, ids, max_tokens, stops, batch_size)


def complete_ids(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    max_tokens: int,
    stops: Sequence[int],
    batch_size: int = 16,
    sampling: SamplingConfig = GREEDY,
    seed: int = 0,
) -> list[str]:
    """The same for prompts that are tokens already, greedily or not."""
    rows = completions(tokenizer, ids, 1, sampling, max_tokens=max_tokens, stops=stops, seed=seed)
    draw(engine, rows, batch_size)
    return [row.text for row in rows]


def completions(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    samples: int,
    sampling: SamplingConfig,
    *,
    max_tokens: int,
    stops: Sequence[int],
    seed: int,
    rounds: Sequence[int] | None = None,
    on_token: Callable[[Completion], None] | None = None,
) -> list[Completion]:
    """So many completions of each prompt to be drawn, those of one prompt side by side.

    Args:
        seed: of the noise.
        rounds: how often each prompt has been sampled before; default: never.
    """

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens)))

    return [
        Completion(
            prompt,
            sampling,
            max_tokens=max_tokens,
            stop_ids=stops,
            key=noise_key(seed, prompt, sample, round),
            decode=decode,
            on_token=on_token,
        )
        for prompt, round in zip(ids, rounds or [0] * len(ids), strict=True)
        for sample in range(samples)
    ]


def draw(sampler: Sampler, rows: Sequence[Completion], batch_size: int, processes: Processes = ALONE) -> None:
    """Draw them, so many at a time, those of about as long prompts together; one prompt's are not parted where they
    fit. All processes of a run call it together, each with its own rows or with none."""
    batches = _batches(rows, batch_size)
    count = max(int(other[0]) for other in processes.gather(np.array([len(batches)])))
    for i in range(count):
        # Where a model is dealt over processes, all have to compute as often as any one.
        sampler.sample(batches[i] if i < len(batches) else [Completion([0], max_tokens=1)])


def _batches(rows: Sequence[Completion], batch_size: int) -> list[list[Completion]]:
    units: dict[tuple[int, ...], list[Completion]] = {}
    for row in rows:
        units.setdefault(row.prompt_ids, []).append(row)
    batches: list[list[Completion]] = [[]]
    for unit in sorted(units.values(), key=lambda unit: len(unit[0].prompt_ids)):
        if batches[-1] and len(batches[-1]) + len(unit) > batch_size:
            batches.append([])
        batches[-1] += unit
        while len(batches[-1]) > batch_size:
            batches.append(batches[-1][batch_size:])
            del batches[-2][batch_size:]
    return [batch for batch in batches if batch]
