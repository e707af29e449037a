"""From words to settings."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bnf_align.arguments import parse
from bnf_core.config import GenerateConfig, TrainConfig
from bnf_core.errors import UserError

HOME = str(Path.home())


def generate(*words: str) -> GenerateConfig:
    return parse(GenerateConfig, "bnf generate", words, ("--prompt",))


@pytest.mark.parametrize("prompt", ["--verbose", "-5", "- a list", "--model", "~/notes say", "[1, 2]", "a=b", "true"])
def test_a_prompt_is_taken_as_it_is(prompt: str) -> None:
    assert generate("--model", "m", "--prompt", prompt).prompt == prompt
    assert generate(f"--prompt={prompt}", "--model", "m").prompt == prompt


@pytest.mark.parametrize("words", [("Hello", "--model", "m"), ("--model", "m", "Hello"), ("--model=m", "Hello")])
def test_what_a_command_is_about_may_stand_anywhere(words: tuple[str, ...]) -> None:
    assert generate(*words) == GenerateConfig(model="m", prompt="Hello")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a", "b"), "unexpected 'b'"),
        (("a", "--prompt", "b"), "prompt is given twice"),
        (("a", "-v"), "unknown setting|unrecognized"),
    ],
)
def test_a_word_too_many_is_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate("--model", "m", *words)


def test_every_path_is_expanded(tmp_path: Path) -> None:
    words = ["--model", "~/m", "~/d.jsonl", "--output=~/runs/mine", "--report-to", "tensorboard"]
    config = parse(TrainConfig, "bnf train", [*words, "--adapter", "~/a"], ("--data",))
    assert [config.model, config.data.path, config.output, config.adapter] == [
        f"{HOME}/{name}" for name in ("m", "d.jsonl", "runs/mine", "a")
    ]
    (tmp_path / "run.yaml").write_text("model: ~/m\ndata: {path: ~/d.jsonl}\nreference: ~/r\n")
    config = parse(TrainConfig, "bnf train", ["--config", str(tmp_path / "run.yaml")])
    assert [config.model, config.data.path, config.reference] == [f"{HOME}/{name}" for name in ("m", "d.jsonl", "r")]


def test_booleans_may_be_bare_and_lists_have_commas() -> None:
    words = ["--model", "m", "--packing", "--overwrite", "false", "--lora.targets", "q_proj,k_proj", "d.jsonl"]
    config = parse(TrainConfig, "bnf train", [*words, "--max-grad-norm", "null"], ("--data",))
    assert config.packing and not config.overwrite and config.data.path == "d.jsonl"
    assert config.lora.targets == ["q_proj", "k_proj"] and config.optimizer.max_grad_norm is None


@dataclass
class Several:
    names: list[str] = field(default_factory=list)
    other: str = ""


def test_a_positional_list_takes_all_the_words() -> None:
    assert parse(Several, "bnf", ["a, b", "c"], ["--names"]).names == ["a, b", "c"]
    assert parse(Several, "bnf", ["a"], ["--names"]).names == ["a"]
    assert parse(Several, "bnf", ["--names", "a,b"], ["--names"]).names == ["a", "b"]
    found = parse(Several, "bnf", ["x", "a", "b"], ["--other", "--names"])
    assert (found.other, found.names) == ("x", ["a", "b"])
