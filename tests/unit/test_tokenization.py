"""Tokenisation, on small tokenizers made here: the exact boundary, special tokens, chat templates and cutting."""

import itertools
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import chat_templates
from bnf_core.config import Template
from bnf_core.data import tokenization
from bnf_core.data.messages import Message, RowError, Text
from bnf_core.data.records import Feedback, parse_row
from bnf_core.data.rendering import Chat
from bnf_core.data.tokenization import load_tokenizer, prompt_ids, save_stops, stop_ids, tokenize
from bnf_core.errors import UserError
from bnf_core.storage.digests import rows_digest
from bnf_core.types import Example

SENTENCES = ["The capital of France is Paris.", "The capital of Italy is Rome.", "12 12 12 user assistant system"] * 9

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes BOS itself, trims, ends turns with a token that is not EOS, and accepts only user and assistant in turn.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make(template: str | None = None, *, bos: bool = False, eos: bool = False, **roles: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose post-processor adds BOS and EOS if asked."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<turn>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(SENTENCES, trainer)
    single = [*(["<s>"] if bos else []), "$A", *(["</s>"] if eos else [])]
    core.post_processor = processors.TemplateProcessing(
        single=" ".join(single), special_tokens=[(t, core.token_to_id(t)) for t in ("<s>", "</s>")]
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>"} | roles
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in roles.items() if v is not None})
    tokenizer.chat_template = template
    return tokenizer


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


QUESTION, ANSWER = [user("The capital of France?")], [assistant("Paris.")]


def row(prompt: Text, completion: Text, label: bool = True, at: int = 1) -> Feedback:
    return Feedback(prompt, completion, label, f"f.jsonl:{at}")


def one(
    tokenizer: Any, prompt: Text, completion: Text, template: Template = "auto", max_length: int = 512
) -> tuple[str, str]:
    """Prompt and completion as text, special tokens shown, of the one example that this row becomes."""
    (e,) = tokenize([row(prompt, completion)], tokenizer, template=template, max_length=max_length).examples
    return tokenizer.decode(e.prompt_ids), tokenizer.decode(e.completion_ids)


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


# The boundary


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("The capital of France is", " Paris.", ("The capital of France is", " Paris.</s>")),
        ("The capital of France is ", "Paris.", ("The capital of France is", " Paris.</s>")),
        ("The answer: 1", "2", ("The answer:", " 12</s>")),
        ("The cap", "ital of Italy", ("The", " capital of Italy</s>")),
    ],
)
def test_merges_across_the_boundary_belong_to_the_completion(
    prompt: str, completion: str, expected: tuple[str, str]
) -> None:
    """Rejects tokenising the two apart, or taking the prompt's own length as the boundary."""
    tokenizer = make()
    (e,) = tokenize([row(prompt, completion)], tokenizer, template="auto", max_length=99).examples
    assert (tokenizer.decode([*e.prompt_ids]), tokenizer.decode([*e.completion_ids])) == expected
    assert e.prompt_ids + e.completion_ids == (*encode(tokenizer, prompt + completion), tokenizer.eos_token_id)


def test_a_prompt_that_is_merged_away_is_an_error() -> None:
    assert len(encode(make(), "12")) == 1
    rows = [row("The capital", " is"), row("1", "2", at=2)]
    with pytest.raises(RowError, match=r"f\.jsonl:2: prompt: its first token runs on into the completion"):
        tokenize(rows, make(bos_token=None), template="auto", max_length=99)
    assert one(make(bos=True), "1", "2") == ("<s>", "12</s>")


def test_rows_are_independent_of_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "CHUNK", 2)
    tokenizer = make(CHATML)
    rows = [
        row("The capital of Italy is ", "Rome.", False, 1),
        row(QUESTION, ANSWER, True, 2),
        row("The capital of Italy is ", "Paris.", True, 3),
        row("Paris", " is a city", True, 4),
        row(QUESTION, [assistant("Rome, I think.")], False, 5),
    ]
    result = tokenize(rows, tokenizer, template="auto", max_length=99)
    alone = [tokenize([r], tokenizer, template="auto", max_length=99).examples[0] for r in rows]
    assert [(e.prompt_ids, e.completion_ids) for e in result.examples] == [
        (e.prompt_ids, e.completion_ids) for e in alone
    ]
    assert [(e.label, e.source) for e in result.examples] == [(r.label, r.source) for r in rows]
    groups = [e.group for e in result.examples]
    assert [groups.index(group) for group in groups] == [0, 1, 0, 3, 1]
    assert groups == [e.group for e in alone]


# BOS and EOS


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("prompt", ["The capital is", "<s>The capital is"])
def test_bos_comes_once_and_eos_only_at_the_end(prompt: str, eos: bool) -> None:
    """Rejects the tokenizer's own EOS behind the prompt, which ends the common prefix early or late, and a
    second BOS or EOS."""
    assert one(make(bos=True, eos=eos), prompt, " Paris.") == ("<s>The capital is", " Paris.</s>")


def test_an_eos_that_the_tokenizer_adds_is_not_taken_for_shared() -> None:
    # The prompt alone would become "The capital is</s>", and this completion begins with that very token.
    assert one(make(eos=True), "The capital is", "</s>", "plain") == ("The capital is", "</s>")


def test_no_bos_is_added_that_the_tokenizer_would_not_add() -> None:
    assert one(make(), "The capital is", " Paris.") == ("The capital is", " Paris.</s>")


def test_a_plain_completion_that_ends_in_eos_gets_no_second() -> None:
    assert one(make(), "The capital is", " Paris.</s>") == ("The capital is", " Paris.</s>")


def test_an_empty_prompt_needs_bos() -> None:
    assert one(make(bos=True), "", "Paris.") == ("<s>", "Paris.</s>")
    assert one(make(), "", "Paris.") == ("<s>", "Paris.</s>")  # it has a BOS token, though it does not add it
    with pytest.raises(RowError, match=r"f\.jsonl:1: prompt: is empty, .* no BOS token"):
        one(make(bos_token=None), "", "Paris.")


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(UserError, match=r"no EOS token.* Set eos_token in tokenizer_config\.json"):
        one(make(eos_token=None), "a", "b")


# Chat templates


def test_the_newline_that_a_template_writes_after_the_turn_is_not_trained() -> None:
    tokenizer = make(CHATML, eos_token="<|im_end|>")
    assert one(tokenizer, QUESTION, ANSWER) == (
        "<|im_start|>user\nThe capital of France?<|im_end|>\n<|im_start|>assistant\n",
        "Paris.<|im_end|>",
    )


def test_an_end_of_turn_that_is_not_eos_is_kept_without_eos_and_bos_is_not_doubled() -> None:
    tokenizer = make(GEMMA, bos=True)
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)])
    assert one(tokenizer, QUESTION, ANSWER) == (
        "<s><turn>user\nThe capital of France?<end_of_turn>\n<turn>assistant\n",
        "Paris.<end_of_turn>",
    )


def test_a_template_without_end_of_turn_gets_eos() -> None:
    assert one(make(BARE), QUESTION, ANSWER) == (
        "user: The capital of France?\nassistant:",
        " Paris.\n</s>",
    )


def test_eos_that_is_also_the_unknown_token_ends_a_turn() -> None:
    template = BARE.replace("{{ m.content }}\n", "{{ m.content }}{{ eos_token }}\n")
    assert one(make(template, unk_token="</s>"), QUESTION, ANSWER)[1] == " Paris.</s>"


def test_a_completion_that_ends_its_turn_itself_gets_no_second_end() -> None:
    tokenizer = make(CHATML, eos_token="<|im_end|>")
    assert one(tokenizer, QUESTION, [assistant("Paris.<|im_end|>")])[1] == "Paris.<|im_end|>"
    assert one(tokenizer, QUESTION, [assistant("Paris.<|im_end|>\n")])[1] == "Paris.<|im_end|>"
    assert one(make(BARE), QUESTION, [assistant("Paris.</s>")])[1] == " Paris.</s>"


@pytest.mark.parametrize("header", ["<|im_start|>assistant\n", "<turn>assistant<|im_start|>\n\n", "assistant:\n"])
def test_a_turn_that_the_template_always_opens_is_not_trained(header: str) -> None:
    """Rejects the last special token as the end of turn, and EOS behind the header of a turn that nobody takes."""
    template = (
        "{% set header = " + repr(header) + " %}{% for m in messages %}"
        "{{ header if m.role == 'assistant' else '<|im_start|>user\n' }}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ header }}"
    )
    assert one(make(template), QUESTION, ANSWER)[1] == "Paris.<|im_end|>"
    other = template.replace("{{ header }}", "{{ header }}<turn>")  # than what a finished turn begins with
    prompt, completion = one(make(other), QUESTION, ANSWER)
    assert prompt.endswith(header + "<turn>") and completion == "Paris.<|im_end|>"
    bare = make(BARE.replace("{% if add_generation_prompt %}assistant:{% endif %}", "assistant:"))
    assert one(bare, QUESTION, ANSWER)[1] == " Paris.</s>"


def test_a_special_token_amid_the_answer_does_not_end_it() -> None:
    answer = [assistant("Paris.<|im_end|> Rome.")]
    assert one(make(BARE), QUESTION, answer)[1] == " Paris.<|im_end|> Rome.\n</s>"


THINKER = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}").replace(
    "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
)


def test_a_completion_follows_the_turn_as_generation_opens_it() -> None:
    """Rejects ending the prompt where a finished turn's beginning differs."""
    tokenizer = make(THINKER, eos_token="<|im_end|>")
    prompt, completion = one(tokenizer, QUESTION, ANSWER)
    assert prompt == str(tokenizer.decode(prompt_ids(QUESTION, tokenizer)))
    assert prompt.endswith("assistant\n<think>\n")
    assert completion == "Paris.<|im_end|>"
    assert tokenize([row(QUESTION, ANSWER)], tokenizer, max_length=99).reopened == 1
    assert tokenize([row(QUESTION, ANSWER)], make(CHATML), max_length=99).reopened == 0


def test_a_tag_is_never_cut_in_two() -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert one(make(template), QUESTION, [assistant("<tool>Paris</tool>")])[1] == "<tool>Paris</tool><|im_end|>"
    # What the opened turn begins with already belongs to the prompt.
    thought = [assistant("<think>\nFrance.\n</think>\nParis.")]
    assert one(make(template), QUESTION, thought)[1] == "France.\n</think>\nParis.<|im_end|>"


def test_a_template_that_rewrites_the_prompt_is_refused_rather_than_training_on_it() -> None:
    template = "{% for m in messages %}{{ loop.length }}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    with pytest.raises(RowError, match=r"f\.jsonl:1: prompt: the chat template writes it differently"):
        one(make(template), QUESTION, ANSWER)


# The system's words stand in the last user's turn, as Mistral's older templates have it.
LAST_TURN = (
    "{% if messages[0].role == 'system' %}{% set system, turns = messages[0].content, messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{% for m in turns %}{% if m.role == 'user' %}"
    "[INST] {{ system + ' ' if loop.last and system is defined else '' }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_a_question_that_was_asked_before_is_no_proof_that_the_prompt_is_the_same() -> None:
    """Rejects looking for the last question anywhere in what both texts begin with: `Paris?` would be trained."""
    system = {"role": "system", "content": "Be brief."}
    asked = [system, user("Paris?"), assistant("Rome."), user("Paris?")]
    with pytest.raises(RowError, match=r"f\.jsonl:1: prompt: the chat template writes it differently"):
        one(make(LAST_TURN), asked, [assistant("No.")])
    assert one(make(LAST_TURN), asked[1:], [assistant("No.")])[1] == " No.</s>"


# What the template leaves out

SAYS = "{% for m in messages if X %}{{ m.content }}</s>{% endfor %}"
CALL = {"type": "function", "function": {"name": "look", "arguments": {"town": "Paris"}}}

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("template", "prompt", "answer", "field", "what"),
    [
        (THINKER, QUESTION, assistant("<think>a b</think>Paris."), "completion[0].content", "the text 'a b'"),
        (THINKER, [*QUESTION, assistant("<think>a b</think>1"), user("2")], ANSWER[0], "prompt[1].content", "'a b'"),
        (CHATML, QUESTION, ANSWER[0] | {"thinking": "a b"}, "completion[0].thinking", "the reasoning 'a b'"),
        (CHATML, QUESTION, ANSWER[0] | {"thinking": "Paris."}, "completion[0].content", "the text 'Paris.'"),
        (CHATML, QUESTION, ANSWER[0] | {"tool_calls": [CALL]}, "completion[0].tool_calls[0]", "the tool call 'look'"),
        (SAYS.replace("X", "m.role != 'system'"), [SYSTEM, *QUESTION], ANSWER[0], "prompt[0].content", "'Be brief.'"),
        (SAYS.replace("X", "m.role == 'user'"), QUESTION, ANSWER[0], "completion[0].content", "the text 'Paris.'"),
    ],
)
def test_what_the_template_leaves_out_is_named_with_a_remedy(
    template: str, prompt: list[Message], answer: Message, field: str, what: str
) -> None:
    with pytest.raises(RowError) as caught:
        one(make(template), prompt, [answer])
    assert caught.value.field == field
    assert "the chat template leaves out" in str(caught.value) and what in str(caught.value)
    assert "data.template_kwargs" in str(caught.value) and "data.chat_template" in str(caught.value)


def test_a_list_of_parts_that_a_template_prints_is_no_text() -> None:
    """Rejects taking the words for found where the template wrote a Python list with them."""
    split = "m.content.split('</think>')[-1]"
    template = THINKER.replace(split, f"{split} if m.content is string else m.content")
    with pytest.raises(RowError, match="the chat template leaves out the text 'a b'"):
        one(make(template), QUESTION, [assistant("<think>a b</think>Paris.")])


def test_white_space_is_the_templates_own_affair() -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content.split() | join(' ') }}")
    assert (
        one(make(template), [user(" The\n capital ?")], [assistant("Paris,\n\nI think.")])[1]
        == "Paris, I think.<|im_end|>"
    )


TOOLS_TEMPLATE = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}",
)
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def test_tools_are_given_to_the_template_and_part_prompts() -> None:
    tokenizer = make(TOOLS_TEMPLATE)
    rows = [replace(row(QUESTION, ANSWER), tools=[LOOK]), row(QUESTION, ANSWER)]
    with_tools, without = tokenize(rows, tokenizer, max_length=999).examples
    assert str(tokenizer.decode(with_tools.prompt_ids)).startswith('{"type": "function", "function": {"name": "look"')
    assert with_tools.group != without.group
    with pytest.raises(RowError, match=r"tools\[0\]: the chat template leaves out the tool 'look'"):
        tokenize(rows, make(CHATML), max_length=999)
    with pytest.raises(RowError, match=r"tools: are given to a plain-text prompt"):
        tokenize([replace(row("a", "b"), tools=[LOOK])], tokenizer, max_length=999)


@pytest.mark.parametrize(
    "write",
    [
        "{{ c.function.arguments | tojson }}",  # wants an object
        "{{ '' + c.function.arguments }}",  # wants text
    ],
)
@pytest.mark.parametrize("content", ["{{ '' if m.content is none else m.content }}", "{{ m.content or '' }}"])
def test_tool_calls_are_given_in_the_form_that_the_template_takes(write: str, content: str) -> None:
    template = TOOLS_TEMPLATE.replace("{{ c.function.arguments | tojson }}", write).replace("{{ m.content }}", content)
    (e,) = tokenize([row(QUESTION, [assistant("") | {"tool_calls": [CALL]}])], make(template), max_length=999).examples
    assert make().decode(e.completion_ids) == 'look({"town": "Paris"})<|im_end|>'


def test_a_template_that_wants_parts_gets_them() -> None:
    template = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p['text'] }}{% endfor %}")
    assert one(make(template), QUESTION, ANSWER)[1] == "Paris.<|im_end|>"


# Several turns

TURNS = [
    assistant("") | {"tool_calls": [CALL]},
    {"role": "tool", "content": "Rain."},
    assistant("It rains."),
]


def trained_text(template: str, completion: list[Message], **roles: Any) -> str:
    """What is trained, with · for each stretch that is not."""
    tokenizer = make(template, **roles)
    (e,) = tokenize([row(QUESTION, completion)], tokenizer, max_length=999).examples
    mask = e.trained or (True,) * len(e.completion_ids)
    parts = [
        tokenizer.decode([t for t, _ in group]) if on else "·"
        for on, group in itertools.groupby(zip(e.completion_ids, mask, strict=True), lambda pair: pair[1])
    ]
    return "".join(parts)


def test_only_the_assistants_turns_are_trained() -> None:
    """Rejects training a tool's words, and the header that opens a turn."""
    assert trained_text(TOOLS_TEMPLATE, TURNS) == 'look({"town": "Paris"})<|im_end|>·It rains.<|im_end|>'
    assert trained_text(CHATML, [assistant("Paris."), assistant("Yes.")]) == "Paris.<|im_end|>·Yes.<|im_end|>"
    assert trained_text(BARE, [assistant("Paris."), user("Sure?"), assistant("Yes.")]) == " Paris.\n· Yes.\n</s>"


def test_a_turn_can_be_switched_off() -> None:
    first, result, last = TURNS
    assert trained_text(TOOLS_TEMPLATE, [first | {"train": False}, result, last]) == "·It rains.<|im_end|>"
    assert trained_text(TOOLS_TEMPLATE, [first, result, last | {"train": False}]).endswith("</s>") is False
    assert trained_text(TOOLS_TEMPLATE, [first, result, last | {"train": False}]).startswith("look(")
    with pytest.raises(RowError, match=r"none of its first 9 tokens is to be trained.*data\.max_length"):
        tokenize([row(QUESTION, [first | {"train": False}, result, last])], make(TOOLS_TEMPLATE), max_length=10)


def test_a_turn_that_ends_otherwise_in_the_midst_is_trained_with_its_own_end() -> None:
    template = CHATML.replace("<|im_end|>\n", "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}")
    completion = [assistant("Paris."), user("Sure?"), assistant("Yes.")]
    assert trained_text(template, completion) == "Paris.<|im_end|>·Yes.</s>"


def test_a_turn_that_is_written_otherwise_once_others_follow_is_refused() -> None:
    completion = [assistant("Paris."), user("Sure?"), assistant("Yes.")]
    with pytest.raises(RowError, match=r"completion\[2\]: the chat template writes this turn differently"):
        one(make(THINKER), QUESTION, completion)


def test_the_mask_is_part_of_what_a_row_is_known_by() -> None:
    first, result, last = TURNS
    rows = [row(QUESTION, TURNS), row(QUESTION, [first | {"train": False}, result, last])]
    both, one_turn = tokenize(rows, make(TOOLS_TEMPLATE), max_length=999).examples
    assert both.completion_ids == one_turn.completion_ids
    assert both.key != one_turn.key
    assert rows_digest([both]) != rows_digest([one_turn])


# Which template, and with what


def test_template_kwargs_of_the_run_and_of_the_row() -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n{{ '<think></think>' if quiet }}{% endif %}")
    tokenizer = make(template)
    rows = [row(QUESTION, ANSWER), replace(row(QUESTION, ANSWER), template_kwargs={"quiet": False})]
    quiet, loud = tokenize(rows, tokenizer, chat=Chat(kwargs={"quiet": True}), max_length=99).examples
    assert [str(tokenizer.decode(e.prompt_ids)).endswith("<think></think>") for e in (quiet, loud)] == [True, False]
    assert prompt_ids(QUESTION, tokenizer, chat=Chat(kwargs={"quiet": True})) == list(quiet.prompt_ids)
    assert quiet.group != loud.group


def test_another_template_as_text_file_or_name(tmp_path: Path) -> None:
    (tmp_path / "bare.jinja").write_text(BARE)
    assert Chat.of(str(tmp_path / "bare.jinja"), {}) == Chat(BARE)
    (e,) = tokenize([row(QUESTION, ANSWER)], make(CHATML), chat=Chat(BARE), max_length=99).examples
    assert make().decode(e.completion_ids) == " Paris.\n</s>"
    assert tokenize([row(QUESTION, ANSWER)], make(), chat=Chat(BARE), max_length=99).examples == [e]
    several = make()
    several.chat_template = {"default": CHATML, "tool_use": TOOLS_TEMPLATE, "bare": BARE}
    assert tokenize([row(QUESTION, ANSWER)], several, chat=Chat("bare"), max_length=99).examples == [e]
    assert one(several, QUESTION, ANSWER)[1] == "Paris.<|im_end|>"
    (e,) = tokenize([replace(row(QUESTION, ANSWER), tools=[LOOK])], several, max_length=999).examples
    assert str(several.decode(e.prompt_ids)).startswith('{"type": "function"')
    with pytest.raises(UserError, match=r"chat_template is 'rag': expected .* has default, tool_use, bare"):
        tokenize([row(QUESTION, ANSWER)], several, chat=Chat("rag"), max_length=99)
    with pytest.raises(UserError, match=r"chat_template is .*none\.jinja: the file cannot be read"):
        Chat.of(str(tmp_path / "none.jinja"), {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}" + CHATML,
        "{% macro day(f) %}{{ strftime_now(f) }}{% endmacro %}\n  {% if strftime_now is defined %}\n"
        "{{ day('%d %b %Y') }}{% endif %}" + CHATML,
    ],
)
def test_the_day_that_the_template_is_told(template: str) -> None:
    tokenizer = make(template)
    texts = [
        tokenizer.decode(prompt_ids(QUESTION, tokenizer, chat=Chat(day=day)))
        for day in (date(2025, 3, 7), date.today(), None)
    ]
    assert "07 Mar 2025" in texts[0] and texts[0].replace("07 Mar 2025", f"{date.today():%d %b %Y}") == texts[1]
    assert texts[1] == texts[2]


# All templates of real models


QUICK = ("qwen3", "llama3_2", "deepseek_r1_distill", "gptoss", "smolvlm", "phi3", "mistral")


@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])
    for path in chat_templates.template_files()
])  # fmt: skip
def test_a_row_is_trained_whole_or_refused(path: Path) -> None:
    tokenizer = chat_templates.tokenizer_of(path.read_text(encoding="utf-8"))
    for shape in chat_templates.SHAPES:
        raw = chat_templates.as_row(shape)
        try:
            (feedback,) = parse_row(raw, "f.jsonl:1")
            (e,) = tokenize([feedback], tokenizer, max_length=9999).examples
        except RowError as error:
            # A single turn is written by every template, and what is refused has a place and a reason.
            assert shape not in ("one turn", "several turns", "text parts"), (shape, str(error))
            assert error.field and ("leaves out" in str(error) or "refuses" in str(error) or "this turn" in str(error))
            continue
        mask = e.trained or (True,) * len(e.completion_ids)
        trained = tokenizer.decode([t for t, on in zip(e.completion_ids, mask, strict=True) if on])
        begun = str(tokenizer.decode(e.prompt_ids))
        begun = "<think>" if begun.rstrip().endswith("<think>") else ""  # of the turn, by the prompt
        completion = begun + str(tokenizer.decode(e.completion_ids))
        prompt = str(tokenizer.decode(e.prompt_ids))
        assert chat_templates.missing(raw, prompt, completion, begun + str(trained)) == [], shape
        assert prompt_ids(feedback.prompt, tokenizer, tools=feedback.tools) == list(e.prompt_ids), shape


def test_the_template_setting() -> None:
    tokenizer = make(CHATML, eos_token="<|im_end|>")
    assert one(tokenizer, "Hi", " there", "auto") == ("Hi", " there<|im_end|>")
    assert one(tokenizer, "Hi", " there", "plain") == ("Hi", " there<|im_end|>")
    assert one(tokenizer, "Hi", "there", "chat") == one(tokenizer, [user("Hi")], [assistant("there")], "auto")
    with pytest.raises(RowError, match=r"f\.jsonl:1: prompt: is a list of messages, .* data\.template to auto or chat"):
        one(tokenizer, QUESTION, ANSWER, "plain")
    for prompt, completion, template in ((QUESTION, ANSWER, "auto"), ("Hi", "there", "chat")):
        with pytest.raises(UserError, match=r"no chat template, which messages and data.template=chat need"):
            one(make(), prompt, completion, template)


def test_a_row_that_the_template_refuses_is_named_and_can_be_skipped() -> None:
    tokenizer = make(GEMMA)
    rows = [row(QUESTION, ANSWER, at=1), row([*QUESTION, user("Well?")], ANSWER, at=2), row("", "b", at=3)]
    with pytest.raises(RowError, match=r"f\.jsonl:2: .* refuses the roles user, user: roles must alternate"):
        tokenize(rows, tokenizer, template="auto", max_length=99)
    result = tokenize(rows, tokenizer, template="auto", max_length=99, skip_bad_rows=True)
    assert [e.source for e in result.examples] == ["f.jsonl:1", "f.jsonl:3"]
    assert len(result.skipped) == 1
    with pytest.raises(UserError, match=r"none of the 1 rows can be tokenised; the first: f.jsonl:2"):
        tokenize(rows[1:2], tokenizer, template="auto", max_length=99, skip_bad_rows=True)


# Cutting


def cut(bos: bool, max_length: int) -> tuple[Example, int, int, Example]:
    rows = [row("The capital of France is", " Paris. Rome.")]
    tokenizer = make(bos=bos)
    (whole,) = tokenize(rows, tokenizer, template="auto", max_length=999).examples
    result = tokenize(rows, tokenizer, template="auto", max_length=max_length)
    return result.examples[0], result.prompts_cut, result.completions_cut, whole


@pytest.mark.parametrize("bos", [False, True])
def test_what_does_not_fit_is_cut(bos: bool) -> None:
    *_, whole = cut(bos, 999)
    prompt, completion = whole.prompt_ids, whole.completion_ids
    assert (len(prompt), len(completion)) == (5 + bos, 5)

    at_limit, *counts, _ = cut(bos, len(whole))
    assert ((at_limit.prompt_ids, at_limit.completion_ids), counts) == ((prompt, completion), [0, 0])

    shorter, *counts, _ = cut(bos, len(completion) + 3)  # three tokens of prompt: the last ones, after BOS
    assert (shorter.prompt_ids, shorter.completion_ids) == (
        (prompt[0], *prompt[-2:]) if bos else prompt[-3:],
        completion,
    )
    assert counts == [1, 0]

    edge, *counts, _ = cut(bos, len(completion) + 1)  # the completion just fits behind one token
    assert (edge.prompt_ids, edge.completion_ids, counts) == (prompt[-1:], completion, [1, 0])

    shortest, *counts, _ = cut(bos, len(completion))  # now it does not
    assert (shortest.prompt_ids, shortest.completion_ids, counts) == (prompt[-1:], completion[:-1], [1, 1])


def test_a_limit_without_room_for_prompt_and_completion_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.max_length is 1: expected at least 2"):
        cut(False, 1)


# Generation and loading


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "template"),
    [
        (make(bos=True, eos=True), "The capital is", "auto"),
        (make(bos=True), "<s>The capital is", "auto"),
        (make(), "", "plain"),
        (make(CHATML), QUESTION, "auto"),
        (make(CHATML, bos=True), "The capital of France?", "chat"),
    ],
)
def test_generation_begins_as_training_does(tokenizer: Any, prompt: Text, template: Template) -> None:
    completion: Text = " Paris." if isinstance(prompt, str) else [assistant(" Paris.")]
    (e,) = tokenize([row(prompt, completion)], tokenizer, template=template, max_length=99).examples
    assert tuple(prompt_ids(prompt, tokenizer, template)) == e.prompt_ids


def test_generation_from_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="prompt: prompt: is empty"):
        prompt_ids("", make(bos_token=None))


def test_a_saved_tokenizer_is_loaded_with_its_template(tmp_path: Path) -> None:
    tokenizer = make(CHATML, bos=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert one(loaded, QUESTION, ANSWER) == one(tokenizer, QUESTION, ANSWER)
    assert one(loaded, "Paris", " is") == one(tokenizer, "Paris", " is")


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer that can be loaded .*Expected tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("listed", "expected"), [(None, [1]), (5, [1, 5]), ([5, 1, 3], [1, 5, 3])])
def test_stop_ids(listed: Any, expected: list[int], tmp_path: Path) -> None:
    assert stop_ids(make(), tmp_path) == [1]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert stop_ids(make(), tmp_path) == expected
    assert stop_ids(make(eos_token=None), tmp_path) == [
        i for i in (listed if isinstance(listed, list) else [listed]) if i
    ]


def test_the_end_of_turn_is_a_stop_though_it_is_not_eos(tmp_path: Path) -> None:
    tokenizer = make(CHATML)
    eos, end = tokenizer.eos_token_id, tokenizer.get_vocab()["<|im_end|>"]
    assert stop_ids(tokenizer, tmp_path) == [eos, end]
    assert stop_ids(make(), tmp_path, chat=Chat(CHATML)) == [eos, end]
    assert stop_ids(make(BARE), tmp_path) == [eos]
    assert stop_ids(make("{{ raise_exception('no') }}"), tmp_path) == [eos]
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 1}')
    save_stops(tmp_path, [eos, end])
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "temperature": 0.5,
        "eos_token_id": [eos, end],
    }
    assert stop_ids(make(), tmp_path) == [eos, end]


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not a JSON object"), ("[]", "not a JSON object"), ('{"eos_token_id": "x"}', "expected a token id")],
)
def test_a_broken_generation_config(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        stop_ids(make(), tmp_path)


def test_keys_and_arguments_that_the_template_does_not_use_are_named() -> None:
    tokenizer = make(CHATML, eos_token="<|im_end|>")
    question = [user("Hi") | {"name": "Ada", "id": "1"}]
    chat = Chat(kwargs={"enable_thinking": False})
    rows = [replace(row(question, ANSWER), template_kwargs={"style": "brief"})]
    assert tokenize(rows, tokenizer, chat=chat, max_length=99).unused == {"name", "enable_thinking", "style"}
    writes = Chat(CHATML.replace("{{ m.content }}", "{{ m.name }}{{ m.content }}"))
    assert tokenize(rows, tokenizer, chat=writes, max_length=99).unused == {"style"}
    assert tokenize([row("Hi", "Ho")], tokenizer, max_length=99).unused == set()
