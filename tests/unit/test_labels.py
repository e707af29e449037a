"""Rules from numbers and words to labels."""

from typing import Any

import pytest

from bnf_core.data.labels import LabelRule, kind_of_label
from bnf_core.data.messages import RowError
from bnf_core.errors import UserError


def labels(rule: str, *values: Any) -> list[float]:
    parsed = LabelRule.parse(rule)
    return parsed.labels([parsed.read({parsed.field: value}, "rows.jsonl:1") for value in values])


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ("score >= 4", [3, 4, 5.0], [-1, 1, 1]),
        ("score>4", ["4", " 4.5 ", "-1e1"], [-1, 1, -1]),  # a table of text
        ("rank <= 1", [1, 2], [1, -1]),
        ("delta < -.5", [-0.6, -0.5], [1, -1]),
        ("stars == 5", [5, 5.0, 4], [1, 1, -1]),
        ("label == 1", [1, 0, 1], [1, -1, 1]),
        ("correct == true", [True, False, "TRUE", "false"], [1, -1, 1, -1]),
        ("correct != true", [True, False], [-1, 1]),
        ("verdict == thumbs up", ["thumbs up", "thumbs down "], [1, -1]),
        ("verdict != 'true'", ["true", "bad"], [-1, 1]),
        ("'my score' >= 1", [0, 1], [-1, 1]),
        ("user-feedback > 0", [1, 0], [1, -1]),
        # Beside the prompt's other completions.
        ("score > mean", [1, 2, 6], [-1, -1, 1]),
        ("score >= mean", [1, 2, 3], [-1, 1, 1]),
        ("score > mean", [1, 2, 3], [-1, -1, 1]),
        ("rank < mean", [1, 2, 3, 4], [1, 1, -1, -1]),
        ("score > mean", [0.1, 0.1, 0.1], [0, 0, 0]),  # whose mean in floating point is above them
        ("score >= mean", [7], [0]),
        ("score in top 1", [3, 9, 5], [-1, 1, -1]),
        ("score in top 2", [3, 9, 5], [-1, 1, 1]),
        ("rank in bottom 1", [3, 1, 2], [-1, 1, -1]),
        ("score in top 1", [9, 9, 5], [0, 0, -1]),  # which of the two is best is not said
        ("score in top 2", [9, 9, 5], [1, 1, -1]),
        ("score in top 3", [9, 5, 5], [1, 1, 1]),
        ("score in top 1", [5, 5], [0, 0]),
        # Labels as they stand.
        ("label", [True, False], [1, -1]),
        ("label", [1, 0], [1, -1]),
        ("label", ["true", "False"], [1, -1]),
        ("label", [0.6, -0.25, 0.0, 1.0], [0.6, -0.25, 0, 1]),
    ],
)
def test_a_rule_gives_each_completion_its_label(rule: str, values: list[Any], expected: list[float]) -> None:
    assert labels(rule, *values) == expected


def test_which_rules_compare() -> None:
    assert [LabelRule.parse(rule).compares for rule in ("s > mean", "s in top 1", "s > 0", "s == mean-ish", "s")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("rule", ["score >= 4", "score > mean", "rank in bottom 2", "label", "ok == true", "x != bad"])
def test_a_rule_is_written_as_it_is_read(rule: str) -> None:
    assert str(LabelRule.parse(rule)) == rule.replace("4", "4.0")
    assert LabelRule.parse(str(LabelRule.parse(rule))) == LabelRule.parse(rule)


def test_a_field_may_lie_deeper() -> None:
    rule = LabelRule.parse("annotations.helpfulness.Rating >= 4")
    assert rule.read({"annotations": {"helpfulness": {"Rating": "5"}}}, "a:1") == 5
    assert LabelRule.parse("a.b > 0").read({"a.b": 2, "a": {"b": 1}}, "a:1") == 2
    assert LabelRule.parse("a.b.c > 0").read({"a.b": {"c": 3}}, "a:1") == 3


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("", "cannot be read"),
        (">= 4", "cannot be read"),
        ("score >=", "cannot be read"),
        ("score => 4", "cannot be read"),
        ("score >= 4 > 3", "no number"),
        ("score >= high", "high is no number"),
        ("score < true", "true is no number"),
        ("score == mean", "hardly ever the mean"),
        ("score in top 0", "top 0 is no completion"),
        ("score >= inf", "no number"),
    ],
)
def test_what_is_no_rule(rule: str, why: str) -> None:
    with pytest.raises(UserError, match=f"data.label is .*{why}.*score >= 4"):
        LabelRule.parse(rule)


@pytest.mark.parametrize(
    ("rule", "row", "message"),
    [
        ("score > 4", {"scores": 5}, "a:1: score: no such column.*found scores.*a rule for 'scores'"),
        ("score > 4", {"score": None}, "a:1: score: no such column, or none with a value"),
        ("score > 4", {"score": "high"}, 'a:1: score: is the text "high", expected a number'),
        ("score > 4", {"score": True}, "a:1: score: is true, expected a number"),
        ("score > 4", {"score": [5]}, "a:1: score: is a list, expected a number"),
        ("score > 4", {"score": float("inf")}, "a:1: score: is Infinity, expected a number"),
        ("score > 4", {"score": 10**400}, "a:1: score: is 1000"),
        ("score > mean", {"score": "1_0"}, "a:1: score: is the text"),
        ("ok == true", {"ok": 1}, "a:1: ok: is 1, expected true or false"),
        ("ok == good", {"ok": 1}, "a:1: ok: is 1, expected text"),
        ("label", {"label": 2}, "a:1: label: is 2, expected a label.*label > 0"),
        ("label", {"label": -1.5}, "a:1: label: is -1.5, expected a label"),
        ("label", {"label": "yes"}, 'a:1: label: is the text "yes", expected a label'),
    ],
)
def test_what_a_rule_cannot_judge(rule: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        LabelRule.parse(rule).read(row, "a:1")


def test_the_kinds_of_label() -> None:
    kinds = [kind_of_label(value) for value in (True, 1, 0, "True", 0.5, 2, "yes", None)]
    assert kinds == ["true or false", "0 or 1", "0 or 1", '"true" or "false"', "a number from -1 to 1", "", "", ""]
