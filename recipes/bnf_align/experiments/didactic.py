"""A transformer of a million parameters, made from nothing but a seed in minutes on one CPU core: large enough to be
aligned, small enough for ten seeds of every method.

Its pre-training text, `bnf_align.experiments.tasks`, misreads four of eight kinds of word problem, so that there is
something to align. It is trained by the project's own loop with `nll` on all weights, and saved as a checkpoint that
transformers and mlx-lm load like any other.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from bnf_align.experiments import tasks
from bnf_align.run.progress import bar
from bnf_align.word_problems import NAMES, TEMPLATES, THINGS, draw
from bnf_core.config import OptimizerConfig
from bnf_core.data.tokenization import load_tokenizer, pad_id
from bnf_core.errors import TrainingStopped
from bnf_core.objectives import parse
from bnf_core.protocol import Backend
from bnf_core.steps import loop, steps
from bnf_core.steps.batching import MicroBatching, Rows
from bnf_core.steps.metrics import Meter
from bnf_core.steps.reference import NoReference
from bnf_core.steps.steps import Step
from bnf_core.storage.digests import json_digest
from bnf_core.storage.files import replace_file, replacing
from bnf_core.types import Array, Example, TokenScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

USER, ASSISTANT, TEXT, END, UNKNOWN = "<|user|>", "<|assistant|>", "<|text|>", "<|end|>", "<|unknown|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LARGEST_NUMBER = 150  # of those that are a token each
MODEL, STALE = "model", "stale"  # the folders of the model when its pre-training was done, and in the midst of it


@dataclass(frozen=True)
class Pretraining:
    """All that decides what the model is."""

    hidden_size: int = 160
    intermediate_size: int = 480
    layers: int = 3
    heads: int = 5
    steps: int = 450
    batch_size: int = 48
    learning_rate: float = 3e-3
    stale_after: float = 0.6  # share of the steps
    seed: int = 0
    version: int = 1  # of the text it is trained on

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"didactic-{json_digest(asdict(self))[-8:]}"


# A quarter of the width: what `reference` compares with.
SMALLER = Pretraining(hidden_size=64, intermediate_size=192, layers=2, heads=2)


def didactic(folder: Path, backend: Backend, console: Console, settings: Pretraining | None = None) -> Path:
    """The checkpoint, pre-trained where it is not in `folder` yet.

    Returns:
        Its folder; `STALE` beside it holds the model as it was before it was done.
    Raises:
        TrainingStopped: the loss or gradient is not finite.
    """
    settings = settings or Pretraining()
    if not (folder / settings.name).exists():
        with replacing(folder / settings.name) as partial:
            _pretrain(settings, partial, backend, console)
    return folder / settings.name / MODEL


def _pretrain(settings: Pretraining, folder: Path, backend: Backend, console: Console) -> None:
    start = folder / "untrained"
    start.mkdir()
    make_tokenizer(start)
    write_start(settings, start)
    tokenizer = load_tokenizer(start)
    rows = Rows(pretraining_rows(settings, tokenizer), settings.seed)
    objective = parse("nll")
    optimizer = OptimizerConfig(learning_rate=settings.learning_rate, warmup_steps=settings.steps // 20)
    engine = backend.load(
        start, device="cpu", dtype="float32", fine_tune_type="full", optimizer=optimizer, objective=objective
    )
    losses = []

    def after(step: Step, scores: list[TokenScores], norm: float) -> None:
        if not np.isfinite(norm):
            raise TrainingStopped(f"pre-training: the gradient of step {step.number + 1} is not finite")
        meter = Meter(objective)
        for (batch, reference), said in zip(step.batches, scores, strict=True):
            meter.add(batch, said, reference)
        losses.append(meter.result()["loss"])
        progress.advance(loss=f"{losses[-1]:.3f}")
        if step.number + 1 == int(settings.steps * settings.stale_after):
            engine.save(folder / STALE)

    with bar(f"pre-train {settings.name}", settings.steps, console) as progress:
        schedule = steps.steps(
            rows,
            batch_size=settings.batch_size,
            num_steps=settings.steps,
            optimizer=optimizer,
            batching=MicroBatching(settings.batch_size),
            reference=NoReference(),
            processes=engine.processes,
            pad_id=pad_id(tokenizer),
        )
        loop.train(engine, schedule, after, optimizer.max_grad_norm)
    engine.save(folder / MODEL)
    record = {"settings": asdict(settings), "loss": losses}
    replace_file(folder / "pretraining.json", json.dumps(record) + "\n")


# Tokens


def vocabulary() -> list[str]:
    """Special tokens, then every word and number that the tasks can say."""
    rng = random.Random(0)
    text = [template.format(name="", things="", a="", b="") for template, _ in TEMPLATES]
    text += [*NAMES, *THINGS, *(" ".join(words) for words in tasks.TEXT), tasks.completion("1 + 1 = 2"), "- * ."]
    text += [tasks.others(name, 1, rng, held_out=False)[0].question for name in tasks.OTHERS]
    words = {word for part in text for word in _split(part) if not word.isdigit()}
    return [END, USER, ASSISTANT, TEXT, UNKNOWN, *sorted(words), *map(str, range(LARGEST_NUMBER))]


def _split(text: str) -> list[str]:
    from tokenizers.pre_tokenizers import Whitespace

    return [word for word, _ in Whitespace().pre_tokenize_str(text)]


def make_tokenizer(folder: Path) -> None:
    """A token for every word, number and mark."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, TEXT],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def task_row(question: str, answer: str, tokenizer: "Tokenizer") -> Example:
    """A question and its answer as the chat template writes them."""
    prompt, completion = _ids([f"{USER}{question}{ASSISTANT}", f"{answer}{END}"], tokenizer)
    return Example(tuple(prompt), tuple(completion), True)


def text_row(sentence: str, tokenizer: "Tokenizer") -> Example:
    """Plain text, of which every word is predicted."""
    prompt, completion = _ids([TEXT, f"{sentence}{END}"], tokenizer)
    return Example(tuple(prompt), tuple(completion), True)


def _ids(texts: list[str], tokenizer: "Tokenizer") -> list[list[int]]:
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def pretraining_rows(settings: Pretraining, tokenizer: "Tokenizer") -> list[Example]:
    """One epoch: half word problems, a third other tasks, the rest text."""
    rng, count = random.Random(settings.seed), settings.steps * settings.batch_size
    rows = list(_word_problems(count // 2, rng, tokenizer))
    each = count // (3 * len(tasks.OTHERS))
    for name in tasks.OTHERS:
        known = tasks.others(name, min(each, tasks.PRETRAINED[name]), rng, held_out=False)
        rows += [task_row(task.question, task.answer, tokenizer) for task in _repeated(known, each)]
    text = tasks.sentences(min(count - len(rows), 4000), rng, held_out=False)
    return rows + [text_row(sentence, tokenizer) for sentence in _repeated(text, count - len(rows))]


def _word_problems(count: int, rng: random.Random, tokenizer: "Tokenizer") -> Iterator[Example]:
    for _ in range(count):
        problem = draw(rng)
        yield task_row(problem.question, tasks.as_pretrained(problem, rng), tokenizer)


def _repeated(items: list[Any], count: int) -> list[Any]:
    return [items[i % len(items)] for i in range(count)]


# Weights


def write_start(settings: Pretraining, folder: Path) -> None:
    """A llama before its first step: config.json and weights drawn by NumPy, the same for every framework."""
    from safetensors.numpy import save_file

    size = len(vocabulary())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "head_dim": settings.hidden_size // settings.heads,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    replace_file(folder / "config.json", json.dumps(config, indent=2) + "\n")
    save_file(dict(start_weights(settings, size)), folder / "model.safetensors", metadata={"format": "pt"})


def start_weights(settings: Pretraining, vocabulary_size: int) -> Mapping[str, Array]:
    """By the names of transformers' llama; matrices (out, in) of deviation 1/√in, those that add to the stream less."""
    rng, d, m = np.random.default_rng(settings.seed), settings.hidden_size, settings.intermediate_size

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Array:
        drawn = rng.standard_normal((rows, columns)) * (scale / np.sqrt(columns))
        return np.asarray(drawn, np.float32)

    less = 1 / np.sqrt(2 * settings.layers)
    weights = {"model.embed_tokens.weight": matrix(vocabulary_size, d), "model.norm.weight": np.ones(d, np.float32)}
    for i in range(settings.layers):
        layer = f"model.layers.{i}"
        weights |= {f"{layer}.self_attn.{name}_proj.weight": matrix(d, d) for name in "qkv"}
        weights[f"{layer}.self_attn.o_proj.weight"] = matrix(d, d, less)
        weights |= {f"{layer}.mlp.{name}_proj.weight": matrix(m, d) for name in ("gate", "up")}
        weights[f"{layer}.mlp.down_proj.weight"] = matrix(d, m, less)
        for name in ("input", "post_attention"):
            weights[f"{layer}.{name}_layernorm.weight"] = np.ones(d, np.float32)
    return weights
