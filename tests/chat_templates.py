"""Chat templates of real models, as TRL ships them, and conversations of every shape that people keep: what of each row
is trained, judged without the code under test."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TAG = re.compile(r"<[|｜][^<>\s'\"{}]*>|<[^<>\s'\"{}]*[|｜]>|<(?:start|end)_of_\w+>|</?s>|<bos>|\[/?INST\]")


def template_files() -> list[Path]:
    """Those that models come with, without TRL's own versions for training."""
    import importlib.util

    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return []
    return sorted(p for p in Path(spec.origin).parent.glob("chat_templates/*.jinja") if "_training" not in p.name)


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the tags of the template as special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(sorted({*TAG.findall(template), "<bos>", "<eos>"}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(**arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": arguments}}]


RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "21 degrees"}
QUESTION = [user("Is it warm in Ulm?")]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a town.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "description": "its name"}},
                "required": ["town"],
            },
        },
    }
]

SHAPES: dict[str, dict[str, Any]] = {
    "one turn": {"prompt": QUESTION, "completion": [assistant("Yes, it is.")]},
    "system": {
        "prompt": [{"role": "system", "content": "Be brief today."}, *QUESTION],
        "completion": [assistant("Yes, it is.")],
    },
    "several turns": {
        "prompt": [*QUESTION, assistant("Yes, rather."), user("And in Bonn?")],
        "completion": [assistant("No, it is cold.")],
    },
    "reasoning in the text": {
        "prompt": QUESTION,
        "completion": [assistant("<think>\nSummer, south.\n</think>\n\nYes, it is.")],
    },
    "reasoning of its own": {
        "prompt": QUESTION,
        "completion": [assistant("Yes, it is.", reasoning_content="Summer, south.")],
    },
    "reasoning before": {
        "prompt": [*QUESTION, assistant("<think>\nSummer, south.\n</think>\n\nYes, it is."), user("And in Bonn?")],
        "completion": [assistant("No, it is cold.")],
    },
    "tool call": {
        "prompt": QUESTION,
        "completion": [assistant("", tool_calls=call(town="Ulm"))],
        "tools": TOOLS,
    },
    "tool call beside text": {
        "prompt": QUESTION,
        "completion": [assistant("Let me look.", tool_calls=call(town="Ulm"))],
        "tools": TOOLS,
    },
    "tool call without content": {
        "prompt": QUESTION,
        "completion": [{"role": "assistant", "tool_calls": call(town="Ulm")}],
        "tools": TOOLS,
    },
    "after a tool": {
        "prompt": [*QUESTION, assistant("", tool_calls=call(town="Ulm")), RESULT],
        "completion": [assistant("Yes, warm enough.")],
        "tools": TOOLS,
    },
    "text parts": {
        "prompt": [user([{"type": "text", "text": "Is it warm "}, {"type": "text", "text": "in Ulm?"}])],
        "completion": [assistant([{"type": "text", "text": "Yes, it is."}])],
    },
    "call, result, answer": {
        "prompt": QUESTION,
        "completion": [assistant("", tool_calls=call(town="Ulm")), RESULT, assistant("Yes, warm enough.")],
        "tools": TOOLS,
    },
}


def texts_of(message: dict[str, Any]) -> Iterator[str]:
    """All that a message says."""
    content = message.get("content") or ""
    content = content if isinstance(content, str) else "".join(part["text"] for part in content)
    yield from re.split(r"</?think>", content)
    yield message.get("reasoning_content", "")
    for one in message.get("tool_calls", ()):
        yield one["function"]["name"]
        yield from map(str, one["function"]["arguments"].values())


def missing(row: dict[str, Any], prompt: str, completion: str, trained: str) -> list[str]:
    """What is wrong with the text that a row became: parts of it that are nowhere, of the completion that are not
    trained, and others' words that are."""

    def bare(text: str) -> str:
        return "".join(text.split())

    found = []
    for message in row["prompt"]:
        found += [f"lost: {t}" for t in texts_of(message) if bare(t) not in bare(prompt)]
    for message in row["completion"]:
        for text in texts_of(message):
            if bare(text) not in bare(completion):
                found.append(f"lost: {text}")
            elif message["role"] == "assistant" and bare(text) not in bare(trained):
                found.append(f"not trained: {text}")
            elif message["role"] != "assistant" and bare(text) and bare(text) in bare(trained):
                found.append(f"trained: {text}")
    found += [f"lost: {t['function']['name']}" for t in row.get("tools", ()) if t["function"]["name"] not in prompt]
    last = next(texts_of(row["prompt"][-1]))
    if bare(last) in bare(trained):
        found.append(f"trained: {last}")
    return found


def as_row(shape: str) -> dict[str, Any]:
    return json.loads(json.dumps(SHAPES[shape] | {"label": True}))
