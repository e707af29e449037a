"""`bnf online`: complete prompts, judge the completions, learn from them, and again."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from bnf_align.commands.push import push_run, require_hub
from bnf_align.commands.train import Evaluator, RunResult, Training, run_training, tell_result
from bnf_align.judges.gym import PREFIX, gym_prompts
from bnf_align.judges.pool import Judges
from bnf_align.judges.table import parse_terms
from bnf_align.run.feedback import TrainingData
from bnf_align.run.on_policy import OnPolicy, TokenPrompt
from bnf_align.run.remote import RemoteSampler, require_layout
from bnf_core import registry
from bnf_core.config import OnlineConfig, Where
from bnf_core.data import sources
from bnf_core.data.labels import LabelRule
from bnf_core.data.prompts import Prompt, load_prompts
from bnf_core.data.rendering import chat_of
from bnf_core.data.tokenization import prompt_ids
from bnf_core.errors import UserError
from bnf_core.models.model_folder import resolve_model
from bnf_core.objectives.numpy_ops import NumPyOps
from bnf_core.steps.metrics import Metrics
from bnf_core.steps.steps import Step
from bnf_core.storage.digests import json_digest
from bnf_core.types import Array, Batch, TokenScores


def online(config: OnlineConfig, console: Console, evaluator: Evaluator | None = None) -> RunResult:
    """Train on the model's own samples, and leave them with all else in the run folder.

    Args:
        evaluator: measures more at each evaluation of the held-out prompts.
    Raises:
        As `train`, and TrainingStopped where the judge fails too often or nothing can be learned from the samples.
    """
    LabelRule.parse(config.label)
    with Judges(config.judge, workers=config.judge_workers, time_limit=config.judge_seconds) as judges:

        def load(config: OnlineConfig, tokenizer: PreTrainedTokenizerBase, console: Console) -> TrainingData:
            train, held_out = (_tokens(prompts, tokenizer, config) for prompts in _prompts(config))
            console.print(f"{len(train):,} prompts, {len(held_out):,} held out", highlight=False)
            digest = json_digest([[p.ids, p.prompt.row] for p in [*train, *held_out]])
            return TrainingData(
                rows=OnPolicy(config, tokenizer, train, held_out, judges, console),
                examples=None,
                digest=digest,
                held_out={},
            )

        return run_training(config, console, load, partial(OnlineTraining, evaluator=evaluator))


class OnlineTraining(Training):
    """A run whose rows are sampled as it goes."""

    config: OnlineConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.data.rows, OnPolicy)
        self.rows = self.data.rows
        self.rows.begin(
            self.engine,
            remote=self._remote() if self.config.sampler else None,
            objective=self.objective,
            reference=self.reference,
            batching=self.batching,
            folder=self.folder.path,
            stops=self.stops,
            pad=self.pad,
        )

    def _remote(self) -> RemoteSampler:
        config = self.config
        assert config.sampler is not None
        require_layout(config.sampler_kind, registry.get(config.hardware.backend).adapter_layout)
        return RemoteSampler(
            config.sampler,
            config.sampler_kind,
            model=resolve_model(config.model),
            folder=self.folder.path / "sampler",
            requests=config.sample_batch_size,
            tokenizer=self.tokenizer,
        )

    def _steps(self, start: int) -> Any:
        self.rows.policy_step = start
        return super()._steps(start)

    @property
    def _loses_reference(self) -> bool:
        """A run that trains an adapter on starts from it, and not from the model without it."""
        return super()._loses_reference or self.config.adapter is not None

    def _keep_reference(self) -> None:
        """A second copy of what is trained: rows to come cannot be scored beforehand."""
        self.engine.refresh_reference()

    def _more(self, step: Step, scores: list[TokenScores]) -> Metrics:
        self.rows.policy_step = step.number + 1
        metrics, drawn = self.rows.metrics(), self.rows.sampled_log_p
        sums = [_seen(batch, some, drawn) for (batch, _), some in zip(step.batches, scores, strict=True)]
        entropy, gap, tokens = self.processes.sum(np.sum([np.zeros(3), *sums], axis=0))
        more: Metrics = {"entropy": float(entropy / tokens), **metrics}
        if metrics:
            more["sampler_gap"] = float(gap / tokens)
            sampling, judging = metrics["sampling_seconds"] or 0.0, metrics["judging_seconds"] or 0.0
            learning = time.perf_counter() - self.started - sampling - judging
            more["sampling_tokens_per_second"] = (metrics["sampled_tokens"] or 0.0) / sampling
            more["training_tokens_per_second"] = sum(map(len, step.examples)) / learning
        return more

    def _watched(self, more: Metrics) -> dict[str, str]:
        passed = more.get("pass_at_1")
        return {} if passed is None else {"pass@1": f"{passed:.2f}"}

    def _evaluate(self) -> Metrics:
        return self.rows.evaluate() | (self.evaluator(self.engine) if self.evaluator else {})

    @property
    def _holds_out(self) -> bool:
        return bool(self.rows.held_out)


def _seen(batch: Batch, scores: TokenScores, drawn: Mapping[int, float]) -> Array:
    """Of the tokens of a batch, summed: the policy's entropy in nats; how far their log-probabilities are, row by row,
    from those that the sampler gave; and how many they are."""
    ops = NumPyOps()
    odds, other = scores.log_odds.astype(np.float64), scores.other_entropy.astype(np.float64)
    log_p, log_rest = -ops.softplus(-odds), -ops.softplus(odds)
    entropy = -np.exp(log_p) * log_p + np.exp(log_rest) * (other - log_rest)
    rows = np.bincount(batch.sequence_ids, weights=log_p, minlength=len(batch.keys))
    gap = sum(abs(row - drawn[key]) for row, key in zip(rows, batch.keys.tolist(), strict=True))
    return np.array([entropy.sum(), gap, len(odds)])


def _prompts(config: OnlineConfig) -> tuple[list[Prompt], list[Prompt]]:
    """To train on, and held out."""
    column = config.data.columns.get("prompt", "prompt")
    where, valid = config.data.where, config.valid
    train = _load(where, config.data.called("train"), column, config.seed)
    if isinstance(valid, str):
        return train, _load(Where(valid), "valid", column, config.seed + 1)
    is_file = where.path.startswith(PREFIX) or where.path.lower().endswith(".txt")
    if not is_file and sources.has_split(where, "valid"):
        return train, load_prompts(where, "valid", column)
    if config.valid_fraction == 0:
        return train, []
    count = min(max(round(config.valid_fraction * len(train)), 1), len(train) - 1)
    order = np.random.Generator(np.random.PCG64(config.seed)).permutation(len(train))
    held_out = set(order[:count].tolist())
    return [p for i, p in enumerate(train) if i not in held_out], [p for i, p in enumerate(train) if i in held_out]


def _load(where: Where, split: str, column: str, seed: int) -> list[Prompt]:
    if not where.path.startswith(PREFIX):
        return load_prompts(where, split, column)
    (term,) = parse_terms(where.path.removeprefix(PREFIX))
    return gym_prompts(term.name, term.settings, seed)


def _tokens(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, config: OnlineConfig) -> list[TokenPrompt]:
    """
    Raises:
        UserError: a prompt that cannot be tokenised, or is too long.
    """
    chat, data = chat_of(config.data), config.data
    made = []
    for p in prompts:
        ids = tuple(prompt_ids(p.text, tokenizer, data.template, p.source, chat, p.tools, p.template_kwargs))
        if len(ids) + config.sample_tokens > data.max_length:
            raise UserError(
                f"{p.source}: a prompt of {len(ids)} tokens and a completion of up to {config.sample_tokens} are more "
                f"than data.max_length, {data.max_length}: set it higher, or sample_tokens lower, or drop the prompt"
            )
        made.append(TokenPrompt(p, ids))
    return made


Config = OnlineConfig


def run(config: OnlineConfig, console: Console) -> int:
    require_hub(config)
    result = online(config, console)
    places = {"trained": result.trained, "samples": result.folder / "samples", "picture": result.picture}
    tell_result(result, console, "held-out prompts", places)
    if result.first:
        push_run(config, console)
    return 0
