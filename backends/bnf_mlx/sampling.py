"""Completions of many prompts at a time, each prompt computed once: mlx-lm's BatchGenerator, which asks every row of
its batch for its next token."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from bnf_core.sampling import Completion


def sample(model: nn.Module, rows: Sequence[Completion], device: mx.Device) -> None:
    """Draw completions until all are done.

    Args:
        model: of mlx-lm.
        rows: one or more, in any order; those of one prompt share its keys and values.
        device: the model's.
    """
    from mlx_lm.generate import BatchGenerator

    caches = _caches(model, list(dict.fromkeys(row.prompt_ids for row in rows)))
    generator = BatchGenerator(model, prefill_batch_size=len(rows), stream=mx.default_stream(device))
    try:
        numbers = generator.insert(
            [[row.prompt_ids[-1]] for row in rows],
            [row.max_tokens + 2 for row in rows],  # it looks a token ahead, and is not to end a row before the row does
            [caches[row.prompt_ids] for row in rows],
            samplers=[_last_token(row) for row in rows],
            logits_processors=[[_next_token(row)] for row in rows],
        )
        going = dict(zip(numbers, rows, strict=True))
        while going:
            generator.next_generated()
            done = [number for number, row in going.items() if row.done]
            generator.remove(done)
            for number in done:
                del going[number]
    finally:
        generator.close()


def _caches(model: nn.Module, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[Any]]:
    """Keys and values of each prompt but its last token, which the generator begins with; those of one length are
    computed at a time, so that none is padded."""
    from mlx_lm.generate import PromptProcessingBatch
    from mlx_lm.models.cache import make_prompt_cache

    caches = {prompt: make_prompt_cache(model) for prompt in prompts}
    for length, of_length in itertools.groupby(sorted(prompts, key=len), len):
        some = list(of_length)
        if length > 1:
            batch = PromptProcessingBatch(model, list(range(len(some))), [caches[prompt] for prompt in some])
            batch.prompt([list(prompt[:-1]) for prompt in some])
            caches |= {prompt: batch.extract_cache(i) for i, prompt in enumerate(some)}
    return caches


def _next_token(row: Completion) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor: the only place where mlx-lm shows them as the model gave them."""

    def processor(context: mx.array, logits: mx.array) -> mx.array:
        if not row.done:
            row.next(np.array(logits[0].astype(mx.float32)))
        return logits

    return processor


def _last_token(row: Completion) -> Callable[[mx.array], mx.array]:
    return lambda log_probs: mx.array([row.ids[-1]])
