"""What judges say, what is refused, and what a judge that fails costs."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from bnf_align.judges.base import Judgement, NoAnswer
from bnf_align.judges.pool import Judges
from bnf_align.judges.table import JUDGES, Term, make_judge, parse_judge
from bnf_core.errors import UserError

SCHEMA = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}


def said(expression: str, completion: str, **row: Any) -> Any:
    return make_judge(parse_judge(expression))("prompt", completion, row)


@pytest.mark.parametrize(
    ("judge", "row", "right", "wrong"),
    [
        ("math", {"answer": r"$\frac{1}{2}$"}, ["So it is 0.5", r"$x = \frac{2}{4}$"], ["0.6", "no idea"]),
        ("number", {"answer": "12 apples"}, ["It is 3 + 9 = 12.", "12.0"], ["12 or 13", "none", "-12"]),
        ("number(answer='n', tolerance=0.1)", {"n": 1234.5}, ["1,234.56"], ["1,234.7"]),
        ("number", {"answer": "−3"}, ["−3", "-3"], ["3"]),
        (r"regex(pattern='^\d+\)$')", {}, ["12)"], ["12) ", "a"]),
        ("regex(pattern='(yes|no)', whole=True)", {}, [" yes\n"], ["yes, sir"]),
        ("json-schema", {"schema": SCHEMA}, ['{"a": 1}', '```json\n{"a": 1}\n```'], ['{"a": "1"}', "{", "[]"]),
        ("contains", {"answer": "Paris"}, ["in PARIS."], ["London"]),
        ("contains(text='Pa', case=True)", {}, ["Paris"], ["paris"]),
        ("equals", {"answer": "Paris "}, [" paris"], ["Paris."]),
        ("length(most=3, least=2)", {}, ["a b", "a b c"], ["a", "a b c d"]),
        ("length(most=3, unit='characters')", {}, ["abc"], ["", "abcd"]),
    ],
)
def test_judges_that_need_no_model(judge: str, row: Any, right: list[str], wrong: list[str]) -> None:
    assert [said(judge, text, **row) for text in right] == [1.0] * len(right)
    assert [said(judge, text, **row) for text in wrong] == [0.0] * len(wrong)


def test_sums_are_weighted_and_an_opinion_that_is_missing_is_none(tmp_path: Path) -> None:
    assert said("0.5*equals(text='a') + 2 * length(most=1)+-1*contains(text='a')", "a") == pytest.approx(1.5)
    (tmp_path / "mine.py").write_text("def none(*_):\n    return None\ndef half(*_, of=1):\n    return of / 2\n")
    assert said(f"{tmp_path}/mine.py:half + {tmp_path}/mine.py:half(of=3)", "") == 2.0
    assert said(f"{tmp_path}/mine.py:half + {tmp_path}/mine.py:none", "") is None


def test_what_is_no_judge_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    for expression, message in (
        ("maths", "did you mean math"),
        ("", "expected a name"),
        ("math +", "expected a name"),
        ("number(tolerance=0.1", "expected a name"),
        ("number(0.1)", "expected a name"),
        ("number(tolerances=0.1)", "judge number has no setting 'tolerances': it has answer, tolerance"),
        ("regex", r"judge regex needs the setting pattern, as regex\(pattern=...\)"),
        ("regex(pattern='(')", "is no regular expression"),
        ("nowhere:judge", "nowhere:judge cannot be imported: ModuleNotFoundError"),
        (f"{tmp_path}/mine.py:x", "is no function"),
        (f"{tmp_path}/mine.py:y", "has no attribute 'y'"),
        ("json-schema(schema='nowhere.json')", "nowhere.json cannot be read"),
        ("length(unit='tokens')", "expected words or characters"),
    ):
        with pytest.raises(UserError, match=message):
            make_judge(parse_judge(expression))
    with pytest.raises(NoAnswer, match="no column 'answer' to judge by: found question"):
        said("number", "1", question="?")


BROKEN = """
import os, time
def judge(prompt, completion, row):
    if completion == "hang":
        time.sleep(60)
    if completion == "raise":
        raise ValueError("no idea")
    if completion == "exit":
        os._exit(3)
    return {"nonsense": "good", "nan": float("nan"), "none": None}.get(completion, completion == "right")
"""


def test_a_judge_that_fails_costs_that_completion_alone(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    words = ["right", "hang", "raise", "exit", "nonsense", "nan", "none", "wrong"]
    began = time.monotonic()
    with Judges(f"{tmp_path}/broken.py:judge", workers=1, time_limit=1.0) as judges:
        found = judges([("prompt", word, {}) for word in words])
        assert judges([("prompt", "right", {})]) == [Judgement(1.0)]
    assert time.monotonic() - began < 40
    assert found[0] == Judgement(1.0) and found[6] == Judgement(None) and found[7] == Judgement(0.0)
    errors = [judgement.error or "" for judgement in found[1:6]]
    assert errors[0] == "took longer than 1 s" and errors[1] == "ValueError: no idea"
    assert errors[2] == "its process ended with 3"
    assert all("expected true or false, a finite number, or None" in error for error in errors[3:])
    assert all(judgement.failed == (judgement.error is not None) for judgement in found)


def test_a_judge_that_cannot_be_made_is_refused_before_anything_is_judged() -> None:
    with Judges("nowhere:judge", workers=1, time_limit=1.0) as judges, pytest.raises(UserError, match="ModuleNotFound"):
        judges([])


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[Any]]]:
    """An OpenAI-compatible server that is busy at first and then gives every answer with an `a` an 8, and others none;
    and what it was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            text = "Fine.\nSCORE: **8**" if "answer a" in body["messages"][0]["content"] else "Hm."
            self.send_response(503 if len(asked) == 1 else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

        def log_message(self, *_: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_another_model_judges_by_a_rubric_and_is_asked_once(endpoint: tuple[str, list[Any]], tmp_path: Path) -> None:
    url, asked = endpoint
    judge = JUDGES["llm"](url=url, model="m", rubric="Is it kind?", cache=str(tmp_path / "cache"))
    prompt = [{"role": "user", "content": "Hello"}]
    assert [judge(prompt, "answer a", {}) for _ in range(2)] == [8.0, 8.0]
    assert len(asked) == 2  # once in vain
    assert asked[1]["model"] == "m" and asked[1]["temperature"] == 0
    text = asked[1]["messages"][0]["content"]
    assert "Is it kind?" in text and "user: Hello" in text and "answer a" in text
    with pytest.raises(ValueError, match="SCORE"):
        judge(prompt, "b", {})


def test_a_reward_model_scores_prompt_and_completion(tiny_model: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer
    from transformers.models.llama import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig.from_pretrained(tiny_model)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    judge = make_judge([Term(1.0, "reward-model", {"model": str(tmp_path / "reward")})])
    prompt = [{"role": "user", "content": "What is 2?"}]
    ids = tokenizer("<|user|>What is 2?<|end|>\n<|assistant|>It is 2.<|end|>\n")["input_ids"]
    expected = model(torch.tensor([ids])).logits[0, 0].item()
    assert judge(prompt, "It is 2.", {}) == pytest.approx(expected, abs=1e-5)
    assert judge("What is 2?", "It is 2.", {}) == pytest.approx(expected, abs=1e-5)
    assert judge(prompt, "No.", {}) != pytest.approx(expected, abs=1e-3)


def test_reasoning_gym_asks_and_scores() -> None:
    pytest.importorskip("reasoning_gym")
    from bnf_align.judges.gym import gym_prompts

    prompts = gym_prompts("chain_sum", {"size": 3}, seed=1)
    assert len(prompts) == 3 and prompts[0].text != prompts[1].text
    assert gym_prompts("chain_sum", {"size": 3}, seed=1) == prompts
    judge = make_judge(parse_judge("reasoning-gym"))
    row = prompts[0].row
    assert judge(prompts[0].text, f"So: <answer>{row['answer']}</answer>", row) == 1.0
    assert judge(prompts[0].text, "<answer>x</answer>", row) < 0.5
    with pytest.raises(UserError, match="reasoning-gym:no_such_task"):
        gym_prompts("no_such_task", {}, seed=1)
