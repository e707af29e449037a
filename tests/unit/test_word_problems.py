"""Word problems: right answers are right, wrong ones wrong, nothing leaks into what is held out."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from bnf_align.word_problems import TEMPLATES, Files, last_number, slip, solve, write
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


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write(tmp_path_factory.mktemp("problems"), warm_up=100, prompts=200, held_out=60, seed=8)


def test_answers_and_labels_are_true(files: Files) -> None:
    for row in read(files.warm_up) + read(files.held_out):
        assert (last_number(text(row)) == expected(row)) == row["label"], row
        if row["label"]:
            ((left, operation, right, result),) = re.findall(r"(\d+) (.) (\d+) = (\d+)", text(row))
            assert ARITHMETIC[operation](int(left), int(right)) == int(result)
    for name in ("train", "valid"):
        assert all(row["answer"] == expected(row) for row in read(files.prompts / f"{name}.jsonl"))


def test_what_is_held_out_shares_no_prompt_and_no_calculation(files: Files) -> None:
    warm_up, held_out = read(files.warm_up), read(files.held_out)
    prompts, valid = (read(files.prompts / f"{name}.jsonl") for name in ("train", "valid"))
    assert (len(warm_up), len(prompts), len(valid), len(held_out)) == (100, 200, 60, 120)
    others = warm_up + prompts
    assert len({question(row) for row in others}) == 300 and all(row["label"] for row in warm_up)
    assert not {calculation(row) for row in others} & {calculation(row) for row in held_out}
    for right, wrong, asked in zip(held_out[::2], held_out[1::2], valid, strict=True):
        assert right["prompt"] == wrong["prompt"] == asked["prompt"] and right["label"] and not wrong["label"]


def test_rows_are_chat_messages_with_a_worked_example(files: Files) -> None:
    for row in read(files.held_out):
        assert set(row) == {"prompt", "completion", "label"}
        assert [message["role"] for message in row["prompt"]] == ["system", "user", "assistant", "user"]
        assert [message["role"] for message in row["completion"]] == ["assistant"]


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    def drawn(name: str, seed: int) -> str:
        return write(tmp_path / name, warm_up=9, prompts=9, held_out=9, seed=seed).held_out.read_text()

    assert drawn("a", 6) == drawn("b", 6) != drawn("c", 7)


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
        assert last_number(wrong) != problem.answer
        changed = re.sub(r"[^-+*]", "", right) != re.sub(r"[^-+*]", "", wrong)
        other_operation += changed
        off_by_one += not changed and abs((last_number(wrong) or 0) - problem.answer) == 1
    assert off_by_one + other_operation == 200 and 20 < off_by_one < 80


def test_refuses_more_problems_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are only about"):
        write(tmp_path, warm_up=5, prompts=5, held_out=4000, seed=9)
    with pytest.raises(ValueError, match="at least 0"):
        write(tmp_path, warm_up=-1, prompts=0, held_out=1, seed=9)
    assert not list(tmp_path.iterdir())


def test_last_number_reads_any_wording() -> None:
    assert last_number("He has 4 x 5 = 20 stamps.") == 20
    assert last_number("none") is None
