"""`bnf objectives`, and the objectives as `import bnf_align` gives them."""

from dataclasses import fields

import pytest

import bnf_align
from bnf_align import cli
from bnf_align.commands.objectives import needs, settings_of
from bnf_core.objectives import OBJECTIVES


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(["objectives", *words])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def test_every_objective_and_setting_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = shown(capsys)
    assert code == 0
    for name, objective in OBJECTIVES.items():
        assert name in text
        for f in fields(objective):
            assert f"{f.name}={f.default}" in text


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_says_what_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = shown(capsys, name)
    objective = OBJECTIVES[name]
    assert code == 0 and " ".join(objective.wants.split()) in text and objective.source.split(",")[0] in text
    meanings = settings_of(objective)
    assert list(meanings) == [f.name for f in fields(objective)]
    assert all(meaning.strip() and meaning != "None" for meaning in meanings.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bnf", "rows, reference"),
        ("nll", "chosen rows"),
        ("npo", "rejected rows, reference"),
        ("grpo", "samples of the policy, reference"),
        ("dpo", "pairs, reference"),
        ("simpo", "pairs"),
        ("d2o", "prompts with chosen and rejected rows, reference"),
        ("kto", "rows, reference, a forward pass more, of mismatched rows"),
    ],
)
def test_what_an_objective_needs(name: str, expected: str) -> None:
    assert needs(OBJECTIVES[name]) == expected


def test_a_sum_shows_its_parts_with_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = shown(capsys, "bnf + 0.2*dpo(beta=0.3)")
    assert code == 0 and text.startswith("bnf ") and "0.2 · dpo(beta=0.3," in text


def test_an_unknown_name_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = shown(capsys, "dop")
    assert code == 2 and not out and "unknown objective 'dop': did you mean dpo?" in error


def test_the_face_gives_the_objectives() -> None:
    assert bnf_align.objectives.OBJECTIVES is OBJECTIVES
    assert str(bnf_align.objectives.parse("dpo(beta=0.3)").terms[0][1]).startswith("dpo(beta=0.3")
