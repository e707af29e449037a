"""Rows in the shapes that others write: recognised, named, and read as what they say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bnf_core.config import DataConfig
from bnf_core.data.labels import LabelRule
from bnf_core.data.messages import RowError
from bnf_core.data.reading import Reading, RowReader
from bnf_core.data.records import Feedback
from bnf_core.errors import UserError

AT = "rows.jsonl:1"
DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
FRUIT, SUM, HELLO = "Name a fruit.", "2 + 2?", "Say hello."


def reader(rule: str | None = None, alone: bool = False, **columns: str) -> RowReader:
    return RowReader(Reading(columns, LabelRule.parse(rule) if rule else None), alone=alone)


def said(row: Feedback) -> tuple[Any, Any, bool]:
    """The contents of the prompt, the content of the completion, and whether it is chosen."""
    prompt = row.prompt if isinstance(row.prompt, str) else " / ".join(m["content"] for m in row.prompt)
    completion = row.completion if isinstance(row.completion, str) else row.completion[-1]["content"]
    return prompt, completion, row.label


PAIRS = [(FRUIT, "A pear.", True), (FRUIT, "Iron.", False)]
ADDITION = [(SUM, "4", True), (SUM, "5", False)]
GREETING = [(HELLO, "Hello.", True), (HELLO, "No.", False)]
# Of each section: what its three rows say, and the shapes that they are of.
SECTIONS: dict[str, tuple[list[tuple[str, str, bool]], list[str]]] = {
    "KTO mixes and other unpaired rows": ([*PAIRS, ADDITION[0]], ["unpaired rows"]),
    "UltraFeedback": ([*PAIRS, ADDITION[1], ADDITION[0]], ["UltraFeedback's completions"]),
    "HelpSteer": (
        [*PAIRS, (f"Hello / Hello, how can I help? / {FRUIT}", "A plum.", True)],
        ["HelpSteer's ratings"],
    ),
    "hh-rlhf": (
        [*PAIRS, *((f"Hi / Hello! / {p}", c, label) for p, c, label in ADDITION), *GREETING],
        ["hh-rlhf's conversations"],
    ),
    "ShareGPT": (
        [PAIRS[0], (f"Be brief. / {FRUIT}", "Iron.", False), *GREETING],
        ["ShareGPT's conversations", "ShareGPT's ranking pairs"],
    ),
    "LLaMA-Factory": (
        [PAIRS[0], ("Add.\n2 + 2", "5", False), *((f"Hi / Yes? / {p}", c, label) for p, c, label in GREETING)],
        ["LLaMA-Factory's KTO rows", "LLaMA-Factory's ranking pairs"],
    ),
    "ms-swift": (
        [*PAIRS, ADDITION[0], (f"Be brief. / {SUM}", "5", False)],
        ["ms-swift's pairs", "ms-swift's KTO rows"],
    ),
    "OpenAI's preference fine-tuning": (
        [*PAIRS, *ADDITION, *((f"Be brief. / {p}", c, label) for p, c, label in GREETING)],
        ["OpenAI's preference pairs"],
    ),
    "Open WebUI": ([PAIRS[0], (f"Be brief. / {FRUIT}", "Iron.", False), ADDITION[0]], ["Open WebUI's feedback"]),
    "Langfuse": ([*PAIRS, ADDITION[0]], ["Langfuse's traces"]),
    "Argilla": ([*PAIRS, ADDITION[0]], ["Argilla's records"]),
}


def section(name: str) -> tuple[str, list[dict[str, Any]]]:
    """The text of a section of the docs, and its rows."""
    (text,) = re.findall(rf"^### {re.escape(name)}\n(.*?)(?=^##)", DOCS, re.S | re.M)
    (block,) = re.findall(r"```jsonl\n(.*?)```", text, re.S)
    return text, [json.loads(line) for line in block.splitlines()]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_rows_of_the_docs(name: str) -> None:
    text, rows = section(name)
    rule = next(iter(re.findall(r'--data\.label "([^"]+)"', text)), None)
    read = reader(rule)
    found = [feedback for i, row in enumerate(rows, 1) for feedback in read(row, f"rows.jsonl:{i}")]
    expected, shapes = SECTIONS[name]
    assert len(rows) == 3 and [said(row) for row in found] == expected
    assert all(any(shape in described for described in read.shapes) for shape in shapes)
    assert all(any(shape in described for shape in shapes) for described in read.shapes)
    assert read.neither == (2 if name == "UltraFeedback" else 0)
    assert all(isinstance(row.prompt, list) for row in found)


def test_every_shape_of_the_docs_is_tried() -> None:
    part = DOCS[DOCS.index("## Shapes that others write") :]
    part = part[: re.search(r"^## ", part[3:], re.M).start() + 3]
    assert re.findall(r"^### (.+)$", part, re.M) == list(SECTIONS)


def test_other_rules_of_the_docs() -> None:
    _, rows = section("UltraFeedback")
    for rule in ("annotations.helpfulness.Rating >= 4", "overall_score >= 7"):
        assert [f.label for f in reader(rule)(rows[0], AT)] == [True, False]
    _, rows = section("Open WebUI")
    assert [f.label for f in reader("data.details.rating >= 10")(rows[0], AT)] == [False]


def test_rows_of_scores_alone_need_a_rule() -> None:
    for name in ("UltraFeedback", "HelpSteer", "Langfuse", "Argilla"):
        with pytest.raises(RowError, match=f"{AT}: {name}'s .* have scores and no labels, .*--data.label"):
            reader()(section(name)[1][0], AT)
    with pytest.raises(RowError, match=r'label: no such column.*--data.label "stars >= 4"'):
        reader()({"prompt": "q", "completion": "a", "stars": 5}, AT)


def test_tools_and_calls_of_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "Rain in Ulm?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Ulm"}}'},
        {"from": "observation", "value": "21 degrees"},
        {"from": "gpt", "value": "No."},
    ]
    tools = '[{"name": "weather", "parameters": {"type": "object", "properties": {}}}]'
    (row,) = reader()({"conversations": turns, "kto_tag": True, "tools": tools}, AT)
    assert [m["role"] for m in row.completion] == ["assistant", "tool", "assistant"]
    assert row.completion[0]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"town": "Ulm"}}
    assert row.tools == json.loads(tools)


def test_reasoning_of_open_webui() -> None:
    (row, _, _), thoughts = (
        section("Open WebUI")[1],
        '<details type="reasoning" done="true" duration="3">\n<summary>Thought',
    )
    messages = row["snapshot"]["chat"]["chat"]["history"]["messages"]
    messages["b"]["content"] = thoughts + " for 3 seconds</summary>\n> 1 &lt; 2.\n> So.\n</details>\nA pear."
    (found,) = reader()(row, AT)
    assert found.completion == [{"role": "assistant", "content": "A pear.", "reasoning_content": "1 < 2.\nSo."}]
    messages |= {"c": {"id": "c", "parentId": "b", "role": "user", "content": "And?"}}
    messages |= {"d": {"id": "d", "parentId": "c", "role": "assistant", "content": "A plum."}}
    (found,) = reader()(row | {"meta": {"message_id": "d"}}, AT)
    assert found.prompt[1] == {"role": "assistant", "content": "A pear."} and said(found)[1] == "A plum."


def test_argilla_ranks_its_fields() -> None:
    fields = {"prompt": FRUIT, "response-1": "Iron.", "response-2": "A pear."}
    for answer in (
        ["response-2", "response-1"],
        [{"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}],
    ):
        row = {"fields": fields, "responses": {"ranking": [{"value": answer, "user_id": "u"}]}}
        assert sorted(map(said, reader("ranking <= 1")(row, AT))) == sorted(PAIRS)
    row = {"fields": fields, "responses": {"best": [{"value": "response-2", "user_id": "u"}]}}
    assert sorted(map(said, reader("best <= 1")(row, AT))) == sorted(PAIRS)


@pytest.mark.parametrize(
    ("items", "beside", "rule", "expected"),
    [
        (["A pear.", "Iron."], {"scores": [9, 1]}, "score > mean", [True, False]),
        (["A pear.", "Iron."], {"ranks": [1, 2]}, "rank <= 1", [True, False]),
        (["A pear.", "Iron."], {"labels": [True, False]}, None, [True, False]),
        ([{"text": "A pear.", "rank": 1}, {"text": "Iron.", "rank": 4}], {}, "rank in bottom 1", [True, False]),
        ([{"answer": "A pear.", "label": True}, {"answer": "Iron.", "label": -0.5}], {}, None, [True, False]),
    ],
)
def test_a_list_of_completions(
    items: list[Any], beside: dict[str, Any], rule: str | None, expected: list[bool]
) -> None:
    found = reader(rule)({"prompt": FRUIT, "completions": items, **beside}, AT)
    assert [said(row) for row in found] == [
        (FRUIT, text, label) for text, label in zip(("A pear.", "Iron."), expected, strict=True)
    ]
    assert not any(row.paired for row in found)


def test_lists_by_other_names() -> None:
    answers = [{"answer": "A pear.", "rank": 1.0, "model": "a"}, {"answer": "Iron.", "rank": 2.0, "model": "b"}]
    assert (
        list(map(said, reader("rank <= 1", completions="answers")({"prompt": FRUIT, "answers": answers}, AT))) == PAIRS
    )
    row = {"instruction": FRUIT, "responses": [{"response": "A pear."}, {"response": "Iron."}]}
    row |= {"annotations": [{"rating": "5"}, {"rating": "2"}]}
    read = reader("annotations.rating > mean", prompt="instruction", completions="responses")
    assert list(map(said, read(row, AT))) == PAIRS and read.unused == set()


def test_graded_labels_and_weights() -> None:
    read = reader()
    rows = [
        {"prompt": "q", "completion": "a", "label": 0.6},
        {"prompt": "q", "completion": "b", "label": -0.25, "weight": 2},
        {"prompt": "q", "completion": "c", "label": 0.0},
        {"prompt": "q", "completion": "d", "label": True, "weight": 0},
        {"prompt": "q", "chosen": "a", "rejected": "b", "weight": 0.5},
        {
            "prompt": "q",
            "completions": [{"text": "a", "label": 0.5, "weight": 3}, {"text": "b", "label": False}],
            "weight": 2,
        },
    ]
    found = [(row.label, row.weight) for i, r in enumerate(rows, 1) for row in read(r, f"rows.jsonl:{i}")]
    assert found == [(True, 0.6), (False, 0.5), (True, 0.5), (False, 0.5), (True, 3.0), (False, 2.0)]
    assert read.neither == 2


def test_rows_of_one_prompt_are_compared_over_the_whole_file() -> None:
    read = reader("score > mean")
    rows = [("q", 1), ("q", 5), ("p", 3), ("r", 2), ("q", 3), ("r", 4)]
    found = [
        f for i, (p, s) in enumerate(rows, 1) for f in read({"prompt": p, "completion": str(i), "score": s}, f"a:{i}")
    ]
    kept = read.finish(found, [hash(row.prompt) for row in found])
    assert [(row.completion, row.label) for row in kept] == [
        ("1", False),
        ("2", True),
        ("4", False),
        ("5", False),
        ("6", True),
    ]
    assert read.neither == 1  # the only one of its prompt
    with pytest.raises(UserError, match=r"a:1: score > mean compares .*data.streaming"):
        reader("score > mean", alone=True)({"prompt": "q", "completion": "a", "score": 1}, "a:1")
    alone = reader("score > mean", alone=True)({"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]}, "a:1")
    assert [row.label for row in alone] == [False, True]


def test_one_kind_of_label_in_a_file() -> None:
    def labels(rule: str | None, *values: Any) -> list[bool]:
        read = reader(rule)
        found = [
            f for i, v in enumerate(values, 1) for f in read({"prompt": "q", "completion": "a", "label": v}, f"a:{i}")
        ]
        return [row.label for row in read.finish(found, [0] * len(found))]

    assert labels("label", 1, 0) == labels("label", "true", "False") == labels("label == 1", 1, 0) == [True, False]
    with pytest.raises(RowError, match=r"a:2: label: is 0.5 where a:1 has 0 or 1, expected one kind"):
        labels("label", 1, 0.5)
    with pytest.raises(RowError, match='a:2: label: is true where a:1 has "true" or "false"'):
        labels("label", "true", True)
    for value in (1, 0, "true"):
        with pytest.raises(RowError, match="expected true or false"):
            labels(None, value)
    with pytest.raises(UserError, match=r'a:2: label is 0.0, and all labels are 0.0 or 1.0: .*"label == 1"'):
        labels(None, 1.0, 0.0)
    assert labels(None, 1.0, 0.0, -0.5) == [True, False]
    assert labels("label == 1", 1.0, 0.0) == [True, False]


def test_columns_by_other_names() -> None:
    read = reader(prompt="question", completion="answer.text", label="correct")
    row = {"question": "q", "answer": {"text": "a"}, "correct": True, "id": 7}
    assert read(row, AT) == [Feedback("q", "a", True, AT)]
    assert read.unused == {"id"}
    # What is named is all that is meant.
    both = {"prompt": "q", "completion": "a", "label": True, "chosen": "b", "rejected": "c"}
    assert [f.completion for f in reader(chosen="chosen", rejected="rejected", prompt="prompt")(both, AT)] == ["b", "c"]
    assert reader("grade >= 4", prompt="question", completion="answer")(
        {"question": "q", "answer": "a", "grade": 5}, AT
    )[0].label
    with pytest.raises(RowError, match=rf"{AT}: question: no such column: found query.*what data.columns calls prompt"):
        reader(prompt="question")({"query": "q", "completion": "a", "label": True}, AT)
    with pytest.raises(RowError, match=rf"{AT}: answer: is empty"):
        reader(completion="answer")({"prompt": "q", "answer": " ", "label": True}, AT)
    with pytest.raises(UserError, match=r"data.columns has 'promt', .*did you mean prompt\?"):
        Reading.of(DataConfig("x", columns={"promt": "question"}))


@pytest.mark.parametrize(
    ("row", "rule", "message"),
    [
        (
            {"conversations": [{"from": "human", "value": "q"}], "messages": [], "label": True},
            None,
            "may be ShareGPT's conversations .* and ms-swift's KTO rows .*, expected one shape.*data.columns",
        ),
        ({"instruction": "q", "output": 3, "kto_tag": True}, None, "output: is 3, expected text"),
        ({"instruction": "q", "output": "a", "kto_tag": "yes"}, None, 'kto_tag: is the text "yes", expected true'),
        ({"instruction": "q", "output": "a", "label": 1}, None, "label: is 1, expected true or false"),
        ({"instruction": "q", "output": "", "kto_tag": True}, None, r"output\[0\].content: is empty"),
        ({"conversations": [{"from": "elf", "value": "q"}], "label": True}, None, r"conversations\[0\].from: .*elf"),
        (
            {"conversations": [{"from": "human", "value": "q"}], "label": True},
            None,
            "conversations: ends with the role",
        ),
        ({"messages": [{"role": "user", "content": "q"}], "label": True}, None, "messages: ends with the role 'user'"),
        ({"input": 3, "preferred_output": [], "non_preferred_output": []}, None, "input: is 3, expected an object"),
        ({"data": {}, "meta": {"message_id": "z"}, "snapshot": {}}, None, "snapshot.chat: is null, expected an object"),
        (
            {"prompt": "q", "completion": "a", "label": True, "weight": -1},
            None,
            "weight: is -1, expected a number from 0",
        ),
        ({"prompt": "q", "completions": []}, None, "completions: is a list, expected a list of completions"),
        ({"prompt": "q", "completions": ["a"], "score": 1}, "score > 1", r"completions\[0\].score: no such column"),
        ({"prompt": "q", "completions": [{"x": 1}]}, None, r"completions\[0\]: has no text: found x"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score": 1},
            "score > 1",
            "is a pair.*data.label is score > 1",
        ),
    ],
)
def test_what_is_wrong_is_named_as_the_file_names_it(row: dict[str, Any], rule: str | None, message: str) -> None:
    with pytest.raises(RowError, match=f"^{AT}: .*{message}"):
        reader(rule)(row, AT)
