"""Reading published solutions of GSM8K: which rows are taken, and what a bad file is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from bnf_align.experiments import gsm8k
from bnf_core.errors import UserError

A, B = ("6b_finetuning", "175b_verification")


def line(question: Any = "2 + 3 ?", **solutions: Any) -> dict[str, Any]:
    own = {A: said("It is <<2+3=5>>5\nA: 5", True), B: said("It is <<2+3=6", False)}
    return {"question": question, "ground_truth": "A: 5", **own, **solutions}


def said(solution: Any, is_correct: Any) -> dict[str, Any]:
    return {"is_correct": is_correct, "solution": solution}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "example_model_solutions.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def test_what_is_taken(tmp_path: Path) -> None:
    """Without the calculator's annotations, of questions with a right and a wrong solution that are short."""
    long = "It is 5 " * 40
    path = written(
        tmp_path,
        line(),
        line("all right", **{B: said("5", True)}),
        line(long),
        line("one is long", **{A: said(long, True), "6b_verification": said("It is 5", True)}),
        line("the right one is long", **{A: said(long, True)}),
    )
    assert list(gsm8k.read(path)) == [
        gsm8k.Solved("2 + 3 ?", ("It is 5\nA: 5",), ("It is",)),
        gsm8k.Solved("one is long", ("It is 5",), ("It is",)),
    ]


def test_a_question_is_in_one_part() -> None:
    found = [gsm8k.Solved(f"{i} + 3 ?", ("a",), ("b",)).part for i in range(400)]
    assert found == [gsm8k.Solved(f"{i} + 3 ?", ("c",), ("d",)).part for i in range(400)]
    for part, share in (("train", 0.5), ("valid", 0.25), ("test", 0.25)):
        assert found.count(part) / 400 == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line(7), "question: found 7, expected text"),
        ([], "question: found a list, expected text"),
        ({"question": "2 + 3 ?", "answer": "5"}, "no solutions, expected objects with is_correct and solution"),
        (line(**{A: said("5", "yes")}), f'{A}.is_correct: found the text "yes", expected true or false'),
        (line(**{A: said("5", 1)}), f"{A}.is_correct: found 1, expected true or false"),
        (line(**{A: said(None, True)}), f"{A}.solution: found null, expected text"),
    ],
)
def test_a_bad_line_is_named(bad: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, line(), bad)
    with pytest.raises(UserError) as error:
        list(gsm8k.read(path))
    text = str(error.value)
    assert text.startswith(f"{path}:2: {message}") and gsm8k.SOURCE in text


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(gsm8k.read(tmp_path / "none.jsonl"))
