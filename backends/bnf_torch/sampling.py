"""Completions of many prompts at a time, each prompt computed once: transformers' generate, which asks every row of its
batch for its next token."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from bnf_core.sampling import Completion
from bnf_core.types import Array


def sample(generate: Callable[..., Any], rows: Sequence[Completion], device: torch.device, *, sharded: bool) -> None:
    """Draw completions until all are done.

    Args:
        generate: that of a transformers model.
        rows: one or more, in any order; those of one prompt share its keys and values.
        device: the model's.
        sharded: whether other processes compute parts of the model, and have to go on as long as any one samples.
    """
    prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
    of_row = torch.tensor([prompts.index(row.prompt_ids) for row in rows], device=device)
    ids, mask = (tensor.to(device) for tensor in _padded(prompts))  # (prompts, T)
    settings: dict[str, Any] = {"synced_gpus": sharded}
    first = _First()
    output = generate(ids, attention_mask=mask, generation_config=_config(1), logits_processor=[first], **settings)
    tokens = [row.next(first.logits[i]) for row, i in zip(rows, of_row.tolist(), strict=True)]
    left = [i for i, row in enumerate(rows) if not row.done] or ([0] if sharded else [])
    if not left:
        return
    of_row, open_rows = of_row[left], [rows[i] for i in left]
    ids = torch.cat([ids[of_row], torch.tensor([[tokens[i]] for i in left], device=device)], dim=1)
    mask = torch.cat([mask[of_row], torch.ones_like(ids[:, :1])], dim=1)
    cache = output.past_key_values
    if cache is not None:  # None: the model keeps its state elsewhere, and reads its prompts again
        cache.reorder_cache(of_row)
        settings["past_key_values"] = cache
    generate(
        ids,
        attention_mask=mask,
        generation_config=_config(max(row.max_tokens for row in open_rows)),
        logits_processor=LogitsProcessorList([_Next(open_rows)]),
        stopping_criteria=StoppingCriteriaList([_Done(open_rows)]),
        **settings,
    )


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, (prompts, T) int64, padded on the left, so that all end together."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _config(max_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True
    )


class _First(LogitsProcessor):
    """Keeps the logits (prompts, V) of the first tokens."""

    logits: Array

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits = scores.float().cpu().numpy()
        return scores


class _Next(LogitsProcessor):
    """Has each row choose its next token, and leaves no other possible."""

    def __init__(self, rows: Sequence[Completion]):
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float().cpu().numpy()  # (rows, V)
        tokens = [0 if row.done else row.next(of_row) for row, of_row in zip(self.rows, logits, strict=True)]
        at = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, at, 0.0)


class _Done(StoppingCriteria):
    def __init__(self, rows: Sequence[Completion]):
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([row.done for row in self.rows], device=input_ids.device)
