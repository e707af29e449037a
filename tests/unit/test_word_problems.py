"""Word problems: right answers are right, wrong ones wrong, nothing leaks into the held-out set."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from bnf_align.word_problems import TEMPLATES, final_answer, generate, last_number, slip, solve, write
from bnf_align.word_problems import _problems as problems

ARITHMETIC = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def text(row: dict[str, Any]) -> str:
    return row["completion"][-1]["content"]


def question(row: dict[str, Any]) -> str:
    return row["prompt"][-1]["content"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def calculation(row: dict[str, Any]) -> tuple[str, ...]:
    """The operation of a row's question and the numbers in it, found without the generator."""
    for template, operation in TEMPLATES:
        pattern = re.sub(r"\\{(name|things)\\}", r"\\w+", re.escape(template))
        pattern = re.sub(r"\\{([ab])\\}", r"(?P<\1>\\d+)", pattern)
        if match := re.fullmatch(pattern, question(row)):
            return operation, match["a"], match["b"]
    raise AssertionError(question(row))


def expected(row: dict[str, Any]) -> int:
    operation, a, b = calculation(row)
    return ARITHMETIC[operation](int(a), int(b))


def test_labels_say_whether_the_answer_is_right() -> None:
    rows = generate(400, seed=1)
    assert {row["label"] for row in rows} == {True, False}
    for row in rows:
        assert (final_answer(text(row)) == expected(row)) == row["label"], row


def test_right_answers_have_no_wrong_line() -> None:
    for row in generate(400, seed=2):
        if row["label"]:
            for left, operation, right, result in re.findall(r"(\d+) (.) (\d+) = (\d+)", text(row)):
                assert ARITHMETIC[operation](int(left), int(right)) == int(result)


def test_right_and_wrong_answers_look_alike() -> None:
    """The label must not show in the layout, only in the numbers and operations."""
    rng = random.Random(3)
    for problem in problems(200, rng):
        layouts = {
            re.sub(r"[-+*] ", "? ", re.sub(r"\d+", "#", answer)) for answer in (solve(problem), slip(problem, rng))
        }
        assert len(layouts) == 1


def test_slips_are_of_every_kind() -> None:
    rng = random.Random(4)
    off_by_one = other_operation = 0
    for problem in problems(200, rng):
        right, wrong = solve(problem), slip(problem, rng)
        assert final_answer(wrong) not in (problem.answer, None)
        changed = re.sub(r"[^-+*]", "", right) != re.sub(r"[^-+*]", "", wrong)
        other_operation += changed
        off_by_one += not changed and abs((final_answer(wrong) or 0) - problem.answer) == 1
    assert off_by_one + other_operation == 200 and 20 < off_by_one < 80


def test_rows_are_chat_messages_with_a_worked_example_and_mostly_right() -> None:
    rows = generate(500, seed=5)
    for row in rows:
        assert set(row) == {"prompt", "completion", "label"}
        assert [message["role"] for message in row["prompt"]] == ["system", "user", "assistant", "user"]
        assert [message["role"] for message in row["completion"]] == ["assistant"]
    assert len({question(row) for row in rows}) == 500
    assert 0.6 < sum(row["label"] for row in rows) / len(rows) < 0.8


def test_the_seed_decides_everything() -> None:
    assert generate(50, seed=6) == generate(50, seed=6) != generate(50, seed=7)


def test_writes_two_files_that_share_no_prompt_and_no_calculation(tmp_path: Path) -> None:
    assert write(tmp_path / "data", 300, 60, seed=8) == tmp_path / "data"
    train, valid = read(tmp_path / "data" / "train.jsonl"), read(tmp_path / "data" / "valid.jsonl")
    assert len({question(row) for row in train}) == 300 and len(valid) == 120
    assert not {question(row) for row in train} & {question(row) for row in valid}
    assert not {calculation(row) for row in train} & {calculation(row) for row in valid}
    for good, bad in zip(valid[::2], valid[1::2], strict=True):
        assert good["prompt"] == bad["prompt"] and good["label"] is True and bad["label"] is False


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("14 + 9 = 23", 23),
        ("5 - 8 = -3", -3),
        (" 7 * 2 = 14\n", 14),
        ("", None),
        ("23", None),
        ("14 + 9 = 23 pens", None),
        ("14 + 9 = 23.5", None),
        ("14 + 9 = 23\n23 - 5 = 18", None),
        ("It is 14 + 9 = 23", None),
    ],
)
def test_final_answer_reads_one_form_only(answer: str, number: int | None) -> None:
    assert final_answer(answer) == number


def test_refuses_more_prompts_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are only about"):
        write(tmp_path, 10, 4000, seed=9)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="at least 0"):
        generate(-1, seed=9)


def test_last_number_reads_any_wording() -> None:
    assert last_number("He has 4 x 5 = 20 stamps.") == 20
    assert last_number("none") is None
