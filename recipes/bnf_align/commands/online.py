"""`bnf online`: complete prompts, judge the completions, learn from them, and again."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from bnf_align.commands.train import RunResult, Training, run_training
from bnf_align.judges.gym import PREFIX, gym_prompts
from bnf_align.judges.pool import Judges
from bnf_align.judges.table import parse_terms
from bnf_align.run.feedback import TrainingData
from bnf_align.run.on_policy import OnPolicy, TokenPrompt
from bnf_align.run.scoring import table
from bnf_core.config import OnlineConfig
from bnf_core.data import sources
from bnf_core.data.labels import LabelRule
from bnf_core.data.prompts import Prompt, load_prompts
from bnf_core.data.rendering import chat_of
from bnf_core.data.tokenization import prompt_ids
from bnf_core.errors import UserError
from bnf_core.objectives.numpy_ops import NumPyOps
from bnf_core.steps.metrics import Metrics
from bnf_core.steps.steps import Step
from bnf_core.storage.digests import json_digest
from bnf_core.types import TokenScores


def online(config: OnlineConfig, console: Console) -> RunResult:
    """Train on the model's own samples, and leave them with all else in the run folder.

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
                held_out=None,
            )

        return run_training(config, console, load, OnlineTraining)


class OnlineTraining(Training):
    """A run whose rows are sampled as it goes."""

    config: OnlineConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert isinstance(self.data.rows, OnPolicy)
        self.rows = self.data.rows
        self.rows.begin(
            self.engine,
            objective=self.objective,
            reference=self.reference,
            batching=self.batching,
            folder=self.folder.path,
            stops=self.stops,
            pad=self.pad,
        )

    def _steps(self, start: int) -> Any:
        self.rows.policy_step = start
        return super()._steps(start)

    def _keep_reference(self) -> None:
        """A second copy of the weights: rows to come cannot be scored beforehand."""
        self.engine.refresh_reference()

    def _more(self, step: Step, scores: list[TokenScores]) -> Metrics:
        self.rows.policy_step = step.number + 1
        entropy, tokens = self.processes.sum(np.array(_entropy(scores)))
        metrics = self.rows.metrics()
        more: Metrics = {"entropy": float(entropy / tokens), **metrics}
        if metrics:
            sampling, judging = metrics["sampling_seconds"] or 0.0, metrics["judging_seconds"] or 0.0
            learning = time.perf_counter() - self.started - sampling - judging
            more["sampling_tokens_per_second"] = (metrics["sampled_tokens"] or 0.0) / sampling
            more["training_tokens_per_second"] = sum(map(len, step.examples)) / learning
        return more

    def _watched(self, more: Metrics) -> dict[str, str]:
        passed = more.get("pass_at_1")
        return {} if passed is None else {"pass@1": f"{passed:.2f}"}

    def _evaluate(self) -> Metrics:
        return self.rows.evaluate()

    @property
    def _holds_out(self) -> bool:
        return bool(self.rows.held_out)


def _entropy(scores: Sequence[TokenScores]) -> tuple[float, int]:
    """Of the policy at each token that was scored, in nats, summed; and how many tokens."""
    ops, total, count = NumPyOps(), 0.0, 0
    for some in scores:
        odds, other = some.log_odds.astype(np.float64), some.other_entropy.astype(np.float64)
        p, q = (np.exp(-ops.softplus(sign * odds)) for sign in (-1, 1))
        total += float((p * ops.softplus(-odds) + q * (ops.softplus(odds) + other)).sum())
        count += len(odds)
    return total, count


def _prompts(config: OnlineConfig) -> tuple[list[Prompt], list[Prompt]]:
    """To train on, and held out."""
    train = _load(config.data.path, "train", config.seed)
    if config.valid is not None:
        return train, _load(config.valid, "valid", config.seed + 1)
    is_file = config.data.path.startswith(PREFIX) or config.data.path.lower().endswith(".txt")
    if not is_file and sources.has_split(config.data.path, "valid"):
        return train, load_prompts(config.data.path, "valid")
    if config.valid_fraction == 0:
        return train, []
    count = min(max(round(config.valid_fraction * len(train)), 1), len(train) - 1)
    order = np.random.Generator(np.random.PCG64(config.seed)).permutation(len(train))
    held_out = set(order[:count].tolist())
    return [p for i, p in enumerate(train) if i not in held_out], [p for i, p in enumerate(train) if i in held_out]


def _load(path: str, split: str, seed: int) -> list[Prompt]:
    if not path.startswith(PREFIX):
        return load_prompts(path, split)
    (term,) = parse_terms(path.removeprefix(PREFIX))
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
    result = online(config, console)
    if not result.first:
        return 0
    if result.before is not None and result.after is not None:
        console.print(table({"before": result.before, "after": result.after}, "held-out prompts"))
    console.print(
        f"trained  {result.trained}\nsamples  {result.folder / 'samples'}\npicture  {result.picture}",
        highlight=False,
        markup=False,
    )
    return 0
