"""Rows of feedback: the three column sets, and what is said about each kind of bad row."""

import json
from typing import Any

import pytest

from bnf_core.data.messages import RowError
from bnf_core.data.records import Feedback, parse_row
from bnf_core.errors import UserError

AT = "feedback.jsonl:17"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


QUESTION = [user("Capital of France?")]


def test_unpaired_text_and_messages_and_other_columns_are_ignored() -> None:
    assert parse_row({"prompt": "2+2=", "completion": "4", "label": True, "id": 7, "score": None}, AT) == [
        Feedback("2+2=", "4", True, AT)
    ]
    answer = [assistant("Paris.")]
    assert parse_row({"prompt": QUESTION, "completion": answer, "label": False}, AT) == [
        Feedback(QUESTION, answer, False, AT)
    ]


def test_a_pair_is_a_chosen_and_a_rejected_row() -> None:
    assert parse_row({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, AT) == [
        Feedback("2+2=", "4", True, AT, True),
        Feedback("2+2=", "5", False, AT, True),
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Capital? Paris", "Capital? Rome", "Capital?"),  # the shared space goes with the completions
        ("Capital?\nParis", "Capital?\nRome", "Capital?\n"),  # other white space does not
        ("Capital?  Paris", "Capital?  Rome", "Capital? "),  # only one space does
        ("A: 12", "A: 13", "A: 1"),  # text has no better boundary than where it differs
        ("yes", "no", ""),
        (" yes", " no", ""),
    ],
)
def test_implicit_prompt_of_text(chosen: str, rejected: str, prompt: str) -> None:
    good, bad = parse_row({"chosen": chosen, "rejected": rejected}, AT)
    assert (good.prompt, bad.prompt) == (prompt, prompt)
    assert (good.prompt + good.completion, bad.prompt + bad.completion) == (chosen, rejected)
    assert (good.label, bad.label) == (True, False)


def test_implicit_prompt_of_messages_is_the_shared_leading_messages() -> None:
    start = [user("Hi"), assistant("Hello"), user("Capital of France?")]
    row = {"chosen": [*start, assistant("Paris")], "rejected": [*start, assistant("Rome")]}
    assert parse_row(row, AT) == [
        Feedback(start, [assistant("Paris")], True, AT, True),
        Feedback(start, [assistant("Rome")], False, AT, True),
    ]


def test_a_text_prompt_repeated_in_both_conversations_is_taken_from_them() -> None:
    row = {
        "prompt": "Capital of France?",
        "chosen": [*QUESTION, assistant("Paris")],
        "rejected": [*QUESTION, assistant("Rome")],
    }
    assert parse_row(row, AT)[0] == Feedback(QUESTION, [assistant("Paris")], True, AT, True)
    with pytest.raises(RowError, match="chosen: is a list of messages where the prompt is the text"):
        parse_row(row | {"prompt": "Capital of Spain?"}, AT)


def test_nulls_that_a_table_filled_in_are_absent() -> None:
    row = {"prompt": "q", "completion": None, "label": None, "chosen": "a", "rejected": "b"}
    assert [r.completion for r in parse_row(row, AT)] == ["a", "b"]
    message = assistant("Paris") | {"tool_calls": None}
    assert parse_row({"prompt": QUESTION, "completion": [message], "label": True}, AT)[0].completion == [
        assistant("Paris")
    ]


def test_a_text_prompt_repeated_in_both_texts_is_taken_from_them() -> None:
    row = {"prompt": "Name a fruit.", "chosen": "Name a fruit. A pear.", "rejected": "Name a fruit. Iron."}
    assert [(r.prompt, r.completion) for r in parse_row(row, AT)] == [
        ("Name a fruit.", " A pear."),
        ("Name a fruit.", " Iron."),
    ]
    row = {"prompt": "1", "chosen": "12", "rejected": "13"}  # no word of its own
    assert [(r.prompt, r.completion) for r in parse_row(row, AT)] == [("1", "12"), ("1", "13")]
    row = {"prompt": "Yes", "chosen": "Yes it is", "rejected": "No"}  # in one of them only
    assert [(r.prompt, r.completion) for r in parse_row(row, AT)] == [("Yes", "Yes it is"), ("Yes", "No")]


LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def test_tools_calls_and_turns() -> None:
    call = {"name": "look", "arguments": '{"town": "Ulm", "unit": null}'}  # JSON text keeps its nulls
    completion = [
        {"role": "assistant", "tool_calls": [{"id": "1", "function": call}], "weight": 0},
        {"role": "tool", "content": [{"type": "text", "text": "21 "}, {"type": "text", "text": "degrees"}]},
        assistant("Warm.") | {"train": True},
    ]
    row = {"prompt": QUESTION, "completion": completion, "label": True}
    (found,) = parse_row(row | {"tools": json.dumps([LOOK]), "chat_template_kwargs": '{"thinking": false}'}, AT)
    arguments = {"town": "Ulm", "unit": None}
    calls = [{"type": "function", "id": "1", "function": {"name": "look", "arguments": arguments}}]
    assert found.completion == [
        {"role": "assistant", "content": "", "tool_calls": calls, "train": False},
        {"role": "tool", "content": "21 degrees"},
        assistant("Warm."),
    ]
    assert (found.tools, found.template_kwargs) == ([LOOK], {"thinking": False})


TEXT = {"prompt": "q", "completion": "a", "label": True}
CHAT = {"prompt": QUESTION, "completion": [assistant("Paris")], "label": True}


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        (TEXT | {"label": 1}, "label", "is 1, expected true or false. Write true"),
        (TEXT | {"label": 0}, "label", "is 0, expected true or false. .* 0 -> false"),
        (TEXT | {"label": 1.5}, "label", "is 1.5, expected true or false, or a number from -1.0 to 1.0"),
        (TEXT | {"label": "yes"}, "label", 'is the text "yes", expected true or false. Write true .* without quotes'),
        (TEXT | {"label": "true"}, "label", 'is the text "true", expected true or false'),
        (TEXT | {"label": None}, "label", "is null, expected true or false"),
        (TEXT | {"completion": ""}, "completion", "is empty"),
        (TEXT | {"completion": " \n"}, "completion", "is empty"),
        (TEXT | {"prompt": 5}, "prompt", "is 5, expected text or a list of messages"),
        (TEXT | {"completion": [assistant("a")]}, "completion", "is a list of messages where the prompt is the text"),
        (TEXT | {"prompt": "a\ud83d"}, "prompt", "character 2 is half of a surrogate pair"),
        (CHAT | {"completion": "Paris"}, "completion", 'is the text "Paris" where the prompt is a list of messages'),
        (CHAT | {"prompt": []}, "prompt", "is an empty list, expected at least one message"),
        (CHAT | {"prompt": ["hi"]}, "prompt[0]", 'is the text "hi", expected a message'),
        (CHAT | {"prompt": [{"content": "hi"}]}, "prompt[0]", 'no "role": found content'),
        (CHAT | {"prompt": [{"role": "user"}]}, "prompt[0]", 'no "content": found role'),
        (CHAT | {"prompt": [{"role": 1, "content": "hi"}]}, "prompt[0].role", "is 1, expected text"),
        (CHAT | {"prompt": [{"role": "user", "content": [1]}]}, "prompt[0].content[0]", "is 1, expected text"),
        (
            CHAT | {"prompt": [user([{"type": "image_url", "image_url": {}}])]},
            "prompt[0].content[0]",
            "is a part of the type 'image_url', expected text",
        ),
        (CHAT | {"completion": []}, "completion", "has no message after the prompt"),
        (CHAT | {"completion": [assistant(" ")]}, "completion[0].content", "is empty"),
        (
            CHAT | {"completion": [user("hi")]},
            "completion",
            "begins with a message of the role 'user'",
        ),
        (CHAT | {"completion": [assistant("a"), user("b")]}, "completion", "ends with a message of the role 'user'"),
        (
            CHAT | {"completion": [assistant("a") | {"train": False}]},
            "completion",
            "none of its turns is to be trained",
        ),
        (CHAT | {"completion": [assistant("a") | {"train": "no"}]}, "completion[0].train", 'is the text "no"'),
        (CHAT | {"completion": [assistant("a") | {"weight": 0.5}]}, "completion[0].weight", "is 0.5, expected 0 or 1"),
        (CHAT | {"completion": [assistant("") | {"tool_calls": [{}]}]}, "completion[0].tool_calls[0]", "is an object"),
        (
            CHAT | {"completion": [assistant("") | {"tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "completion[0].tool_calls[0].function.arguments",
            "which is not JSON",
        ),
        (CHAT | {"tools": "f"}, "tools", 'is the text "f", which is not JSON'),
        (CHAT | {"tools": {"name": "f"}}, "tools", "is an object, expected a list of functions"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools[0]", "expected a function with a name"),
        (CHAT | {"tools": [{"name": "f", "parameters": ["a"]}]}, "tools[0].parameters", "expected a JSON Schema"),
        (CHAT | {"chat_template_kwargs": [1]}, "chat_template_kwargs", "is a list, expected an object"),
        ({"prompt": "q", "completion": "a", "lable": True}, "label", "no such column: .* Rename 'lable' to 'label'"),
        ({"prompt": "q", "choosen": "a", "rejected": "b"}, "chosen", "Rename 'choosen' to 'chosen'"),
        ({"promt": "q", "chosen": "a"}, "prompt", "no such column: found promt, chosen, .* Rename 'promt' to 'prompt'"),
        ({"chosen": "a"}, "rejected", "no such column: found chosen, expected prompt, chosen, rejected. Add it"),
        ({"prompt": "q", "completion": "a"}, "label", "no such column: .* Add it"),
        ({"instruction": "q", "output": "a"}, "", "unknown columns: found instruction, output. .* chosen, rejected"),
        ({}, "", "unknown columns: found none"),
        ([1], "", "found a list, expected an object"),
        (TEXT | {"chosen": "a", "rejected": "b"}, "", "has both completion and label, and chosen and rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "rejected", "is the same as chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": [assistant("a")]}, "rejected", "where chosen is the text"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "rejected", "is empty"),
        ({"chosen": "q: a", "rejected": "q: a b"}, "chosen", "ends where chosen and rejected begin to differ"),
        ({"chosen": "q a", "rejected": "q "}, "rejected", "ends where chosen and rejected begin to differ"),
        ({"chosen": [*QUESTION, assistant("a")], "rejected": QUESTION}, "rejected", "ends where chosen and rejected"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "prompt", "share no leading message"),
        (
            {"chosen": [user("a"), assistant("b"), user("c")], "rejected": [user("a"), assistant("d")]},
            "chosen",
            "role 'user'",
        ),
    ],
)
def test_bad_rows_name_place_field_and_expectation(row: Any, field: str, says: str) -> None:
    with pytest.raises(RowError, match=says) as caught:
        parse_row(row, AT)
    assert isinstance(caught.value, UserError)
    assert (caught.value.source, caught.value.field) == (AT, field)
    assert str(caught.value).startswith(f"{AT}: {field}")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": [user("q") | {"name": "\ud83d"}]}, r"prompt\[0\].name"),
        ({"prompt": [user("q") | {"meta": {"a": ["\ud83d"]}}]}, r"prompt\[0\].meta"),
        ({"chat_template_kwargs": {"date": "\ud83d"}}, "chat_template_kwargs"),
        ({"completion": [assistant("a") | {"reasoning": "\ud83d"}]}, r"completion\[0\].reasoning"),
    ],
)
def test_half_a_surrogate_is_found_wherever_a_template_may_write_it(row: dict[str, Any], field: str) -> None:
    with pytest.raises(RowError, match=f"{field}: character .* is half of a surrogate pair"):
        parse_row({"prompt": QUESTION, "completion": [assistant("a")], "label": True} | row, AT)
