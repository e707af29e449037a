"""The on-policy loop on a tiny model, on each backend: sampled, judged, learned from, and resumed bit-for-bit."""

import io
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from test_train import QUIET

import bnf_align.commands.online as commands
import bnf_align.run.on_policy as module
import forked
from bnf_align import cli
from bnf_align.commands.online import online
from bnf_align.judges.base import Judgement
from bnf_align.judges.table import make_judge, parse_judge
from bnf_core.config import DataConfig, HardwareConfig, LoraConfig, OnlineConfig, OptimizerConfig
from bnf_core.data.feedback import FeedbackTokenizer
from bnf_core.data.sources import load_feedback
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import TrainingStopped
from bnf_core.types import Example
from conftest import fast_on, slow

pytestmark = pytest.mark.usefixtures("at_hand")

TIMES = ("seconds", "tokens_per_second")
PROMPTS = [{"prompt": [{"role": "user", "content": f"What is {i}?"}], "answer": i} for i in range(5)]
CHAT_OF_ANOTHER = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}[assistant]"
JUDGE = "regex(pattern='[a-n]')"  # about half of what an untrained model says


class AtHand:
    """Judges in this process: starting others takes longer than the rest of a test."""

    def __init__(self, expression: str, *, workers: int, time_limit: float):
        self.judge = make_judge(parse_judge(expression))

    def __call__(self, judged: Any) -> list[Judgement]:
        found = []
        for one in judged:
            try:
                score = self.judge(*one)
                found.append(Judgement(None if score is None else float(score)))
            except Exception as error:
                found.append(Judgement(error=f"{type(error).__name__}: {error}"))
        return found

    def __enter__(self) -> "AtHand":
        return self

    def __exit__(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def at_hand() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnf_align.commands.online.Judges", AtHand)
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


@pytest.fixture
def settings(tiny_model: Path, prompts: Path, tmp_path: Path, backend_name: str) -> Callable[..., OnlineConfig]:
    def make(output: str = "run", **overrides: Any) -> OnlineConfig:
        common: dict[str, Any] = {
            "judge": JUDGE,
            "hardware": HardwareConfig(backend=backend_name, device="cpu", dtype="float32"),
            "lora": LoraConfig(rank=4, alpha=8, dropout=0.1),
            "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=1, epsilon=1e-5),
            "iterations": 3,
            "prompts_per_iteration": 3,
            "samples_per_prompt": 4,
            "updates_per_batch": 2,
            "sample_tokens": 6,
            "micro_batch_size": 5,
            "save_every": 1,
            "valid": str(prompts),
        }
        data = DataConfig(str(prompts), max_length=64)
        return OnlineConfig(str(tiny_model), data, output=str(tmp_path / output), **(common | overrides))

    return make


def lines(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in logged if line["kind"] == kind]


def samples(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "samples").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@fast_on("torch")
def test_every_sample_is_kept_and_learned_from(settings: Callable[..., OnlineConfig]) -> None:
    result = online(settings(), QUIET)
    rows, train = samples(result.folder), lines(result.folder)
    assert len(rows) == 3 * 3 * 4 and [line["step"] for line in train] == list(range(1, 7))
    for i in range(3):
        of_iteration = [row for row in rows if row["iteration"] == i]
        assert {row["policy_step"] for row in of_iteration} == {2 * i}
        first, second = train[2 * i : 2 * i + 2]
        assert first["tokens"] == second["tokens"] == sum(len(row["completion_ids"]) for row in of_iteration)
        right = [row["label"] for row in of_iteration]
        assert first["pass_at_1"] == pytest.approx(np.mean(right)) and "pass_at_1" not in second
        groups = [right[at : at + 4] for at in range(0, 12, 4)]
        assert first["pass_at_k"] == np.mean([any(g) for g in groups])
        assert first["both_labels"] == np.mean([len(set(g)) == 2 for g in groups])
        assert first["cut"] == np.mean([row["cut"] for row in of_iteration])
        assert (i or first["sampler_gap"] < 1e-4) and "sampler_gap" not in second  # dropout parts them later
        assert first["entropy"] > 0 and first["sampling_tokens_per_second"] > 0 < first["training_tokens_per_second"]
    for row in rows:
        assert row["label"] == (row["score"] >= 0.5) and row["error"] is None and row["seed"] == 0
        assert len(row["log_probs"]) == len(row["completion_ids"]) <= 6
        assert row["answer"] in range(5) and row["completion"][0]["role"] == "assistant"
    # The first iteration's policy is the reference: the log-probabilities are the same numbers.
    early = [row for row in rows if row["iteration"] == 0]
    chosen = [np.sum(row["log_probs"]) for row in early if row["label"]]
    assert train[0]["logps/chosen"] == pytest.approx(np.mean(chosen), abs=2e-4)
    assert result.before is not None and result.after is not None and result.before["pass_at_1"] is not None
    card = (result.trained / "README.md").read_text()
    assert f"judged by `{JUDGE}`" in card and "bnf online --config run.yaml" in card and "| `pass_at_1` |" in card


@pytest.mark.slow
def test_training_raises_what_the_judge_likes(settings: Callable[..., OnlineConfig]) -> None:
    made = settings(
        iterations=12,
        prompts_per_iteration=5,
        samples_per_prompt=8,
        micro_batch_size=40,
        updates_per_batch=1,
        optimizer=OptimizerConfig(learning_rate=5e-2, schedule="constant", warmup_steps=0, epsilon=1e-5),
        lora=LoraConfig(rank=4, alpha=8),
        save_every=None,
        valid=None,
    )
    train = lines(online(made, QUIET).folder)
    early, late = (np.mean([line["pass_at_1"] for line in part]) for part in (train[:2], train[-3:]))
    assert late > early + 0.2, [line["pass_at_1"] for line in train]


def test_samples_are_feedback_of_the_tokens_that_were_drawn(settings: Callable[..., OnlineConfig]) -> None:
    made = settings(iterations=1, updates_per_batch=1, valid=None)
    learned: list[list[Example]] = []
    original = module.OnPolicy._examples

    def kept(self: Any, *args: Any) -> list[Example]:
        learned.append(original(self, *args))
        return learned[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.OnPolicy, "_examples", kept)
        result = online(made, QUIET)
    tokenizer = load_tokenizer(Path(made.model))
    rows = load_feedback(str(result.folder / "samples")).rows
    examples = FeedbackTokenizer.of(tokenizer, made.data)(rows).examples
    # A rejected row counts as much as a chosen one.
    assert {(e.label, e.weight) for e in learned[0]} == {(True, 1.0), (False, 1.0)}
    assert [replace(e, source="") for e in examples] == [replace(e, source="", drawn=None) for e in learned[0]]
    by_text = FeedbackTokenizer.of(tokenizer, replace(made.data, chat_template=CHAT_OF_ANOTHER))(
        [row for row in rows if row.completion[0]["content"].strip()]
    )
    assert all(e.completion_ids[-1] == tokenizer.eos_token_id for e in by_text.examples)


FLAKY = """
calls = []
def judge(prompt, completion, row):
    calls.append(completion)
    if len(calls) % 6 == 0:
        raise ValueError("no idea")
    return None if len(calls) % 6 == 1 else len(calls) % 2
"""


@fast_on("mlx")
def test_a_judge_that_fails_is_counted_shown_and_at_last_ends_the_run(
    settings: Callable[..., OnlineConfig], tmp_path: Path
) -> None:
    (tmp_path / "flaky.py").write_text(FLAKY)
    judge = f"{tmp_path}/flaky.py:judge"
    console = Console(file=io.StringIO(), width=400)
    result = online(settings(judge=judge, iterations=2, updates_per_batch=1, valid=None), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("the judge failed on 2 of 12 completions; the first: ValueError: no idea") == 1
    assert [(line["failed"], line["unlabelled"]) for line in lines(result.folder)] == [(2 / 12, 4 / 12)] * 2
    unlabelled = [row for row in samples(result.folder) if row["label"] is None]
    assert len(unlabelled) == 8 and {row["error"] for row in unlabelled} == {None, "ValueError: no idea"}
    with pytest.raises(TrainingStopped, match=r"failed on 2 of 12 completions; the first: ValueError: no idea.*0.1"):
        online(settings("other", judge=judge, max_failed=0.1), QUIET)


@fast_on("mlx")
def test_an_objective_of_pairs_learns_from_prompts_with_both_labels(settings: Callable[..., OnlineConfig]) -> None:
    result = online(settings(objective="dpo", iterations=2, updates_per_batch=1, valid=None), QUIET)
    for i, line in enumerate(lines(result.folder)):
        rows = [row for row in samples(result.folder) if row["iteration"] == i]
        of_prompt = [[row for row in rows if row["answer"] == n] for n in range(5)]
        learned = []
        for some in of_prompt:
            chosen, rejected = ([row for row in some if row["label"] == label] for label in (True, False))
            count = min(len(chosen), len(rejected))
            learned += [*chosen[:count], *rejected[:count]]
        assert line["tokens"] == sum(len(row["completion_ids"]) for row in learned) > 0


@fast_on("mlx")
def test_what_grpo_asks_of_samples_comes_with_them(settings: Callable[..., OnlineConfig], tmp_path: Path) -> None:
    (tmp_path / "size.py").write_text("def judge(prompt, completion, row):\n    return len(completion)\n")
    made = settings(judge=f"{tmp_path}/size.py:judge", label="score > mean", objective="grpo", iterations=1, valid=None)
    learned: list[Example] = []
    original = module.OnPolicy._examples

    def kept(self: Any, *args: Any) -> list[Example]:
        learned[:] = original(self, *args)
        return learned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.OnPolicy, "_examples", kept)
        first, second = lines(online(made, QUIET).folder)
    rows = [row for row in samples(Path(made.output)) if row["label"] is not None]
    for example, row in zip(learned, rows, strict=True):
        beside = [other["score"] for other in rows if other["answer"] == row["answer"]]
        advantage = (row["score"] - np.mean(beside)) / (np.std(beside, ddof=1) + 1e-4)
        assert example.drawn == (tuple(row["log_probs"]), pytest.approx(advantage))  # type: ignore[comparison-overlap]
    assert any(example.drawn.advantage for example in learned if example.drawn)
    # At the first update the policy is that which drew the samples, and the reference.
    assert first["loss"] == pytest.approx(0.0, abs=1e-5) and first["kl"] < 1e-9 < second["kl"]


@fast_on("mlx")
def test_nothing_to_learn_from_ends_the_run(
    settings: Callable[..., OnlineConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BARREN", 3)
    made = settings(objective="dpo", judge="length(most=0)", valid=None)
    with pytest.raises(TrainingStopped, match=r"3 iterations in a row gave nothing to learn from.*score >= 0.5"):
        online(made, QUIET)
    assert len(samples(Path(made.output))) == 3 * 12


@fast_on("torch")
def test_labels_may_compare_the_samples_of_a_prompt(settings: Callable[..., OnlineConfig], tmp_path: Path) -> None:
    (tmp_path / "size.py").write_text("def judge(prompt, completion, row):\n    return len(completion)\n")
    made = settings(judge=f"{tmp_path}/size.py:judge", label="score in top 1", iterations=1, valid=None)
    rows = samples(online(made, QUIET).folder)
    for number in {row["answer"] for row in rows}:
        scores = {row["label"]: row["score"] for row in rows if row["answer"] == number}
        assert scores.get(True, math.inf) > scores.get(False, -math.inf)
    assert {row["label"] for row in rows} >= {True, False}


@fast_on("mlx")
def test_the_reference_of_all_weights_is_a_copy(settings: Callable[..., OnlineConfig]) -> None:
    made = settings(fine_tune_type="full", iterations=2, updates_per_batch=1, valid=None, save_every=1)
    result = online(made, QUIET)
    first, second = lines(result.folder)
    assert first["log_odds_shift/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert abs(second["log_odds_shift/chosen"]) > 1e-3  # the policy has moved, and the reference has not
    whole = samples(result.folder)
    online(replace(made, iterations=3, resume=True, resume_anyway=True), QUIET)
    assert samples(result.folder)[: len(whole)] == whole


@fast_on("torch")
def test_an_adapter_that_is_trained_on_is_where_the_reference_stays(settings: Callable[..., OnlineConfig]) -> None:
    common = {"valid": None, "iterations": 1, "lora": LoraConfig(rank=4, alpha=8)}
    first = online(settings("first", **common), QUIET)
    result = online(settings("second", adapter=str(first.trained), **common), QUIET)
    before, after = lines(result.folder)
    assert before["log_odds_shift/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert before["sampler_gap"] < 1e-4 < abs(after["log_odds_shift/chosen"])


@pytest.mark.parametrize("objective", ["grpo", slow("bnf")])
def test_both_backends_take_the_same_road(tiny_model: Path, prompts: Path, tmp_path: Path, objective: str) -> None:
    runs = {}
    for name in ("torch", "mlx"):
        pytest.importorskip({"torch": "peft", "mlx": "mlx_lm"}[name])
        made = OnlineConfig(
            str(tiny_model),
            DataConfig(str(prompts), max_length=64),
            output=str(tmp_path / name),
            judge=JUDGE,
            hardware=HardwareConfig(backend=name, device="cpu", dtype="float32"),
            lora=LoraConfig(rank=4, alpha=8),
            optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=1, epsilon=1e-5),
            iterations=3,
            updates_per_batch=2,
            prompts_per_iteration=3,
            sample_tokens=6,
            reference_policy="previous",
            objective=objective,
        )
        runs[name] = online(made, QUIET).folder
    drawn = {name: [(r["prompt_ids"], r["completion_ids"], r["label"]) for r in samples(f)] for name, f in runs.items()}
    assert drawn["torch"] == drawn["mlx"]
    for a, b in zip(lines(runs["torch"]), lines(runs["mlx"]), strict=True):
        for metric in ("loss", "grad_norm", "entropy", "log_odds_shift/chosen", "pass_at_1"):
            assert (metric in b) == (metric in a)
            if metric in a:
                assert b[metric] == pytest.approx(a[metric], rel=1e-3, abs=1e-4), metric


@fast_on("torch")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "judge is ''"),
        (["--judge", "maths"], "unknown judge 'maths': did you mean math?"),
        (["--judge", "math", "--label", "score >"], "score >"),
        (["--judge", "math", "--sample-tokens", "99"], "prompts.jsonl:1: a prompt of"),
        (["--judge", "math", "--samples-per-prompt", "0"], "samples_per_prompt is 0"),
        (["--judge", "math", "--data.label", "score > 1"], "data.label is 'score > 1'"),
        (["--judge", "math", "--data.columns", "{prompt: question}"], "question: no such column: found prompt, answer"),
        (["--judge", "math", "--valid", "[{path: a.jsonl}, {path: b.jsonl}]"], "one source of held-out prompts"),
        (["--judge", "math", "--epochs", "2"], "unknown setting 'epochs'"),
        (["--judge", "math", "--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said(
    settings: Callable[..., OnlineConfig], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    made = settings()
    given = ["--model", made.model, "--prompts", made.data.path, "--max-length", "64", "--output", made.output]
    assert cli.run(["online", *given, "--backend", made.hardware.backend, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@fast_on("torch")
def test_prompts_are_held_out(settings: Callable[..., OnlineConfig]) -> None:
    made = settings(iterations=1, valid=None, valid_fraction=0.4, eval_samples=2)
    result = online(made, QUIET)
    before, after = lines(result.folder, "eval")
    assert {row["answer"] for row in samples(result.folder)} < set(range(5))
    assert before["step"] == 0 and after["step"] == 2 and 0 <= before["pass_at_1"] <= before["pass_at_k"] <= 1


@pytest.mark.parametrize(
    ("backend_name", "policy"),
    [
        ("mlx", "previous"),
        slow("torch", "frozen"),
        slow("mlx", "frozen"),
        slow("torch", "previous"),
        slow("torch", "refreshed"),
        slow("mlx", "refreshed"),
    ],
)
def test_a_run_that_is_stopped_anywhere_ends_as_one_that_was_not(
    settings: Callable[..., OnlineConfig], monkeypatch: pytest.MonkeyPatch, policy: Any
) -> None:
    common = {"reference_policy": policy, "refresh_every": 1, "valid": None}
    whole = online(settings("whole", **common), QUIET)
    made = settings("stopped", **common)

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    # After the samples of an iteration are drawn, before they are written, and in the midst of its updates.
    for where in ("_labels", "_write"):
        with monkeypatch.context() as patch:
            patch.setattr(module.OnPolicy, where, killed)
            with pytest.raises(Killed):
                online(made, QUIET)
        made = replace(made, resume=True)
    for stop in (1, 3, 4):
        with monkeypatch.context() as patch:
            original = module.OnPolicy.metrics

            def metrics(self: Any, original: Any = original, stop: int = stop) -> Any:
                if self.policy_step == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                return original(self)

            patch.setattr(module.OnPolicy, "metrics", metrics)
            with pytest.raises(TrainingStopped, match=f"after step {stop};.*bnf online --config .* --resume"):
                online(made, QUIET)
        made = replace(made, resume=True)
    online(made, QUIET)
    same_run(Path(made.output), whole.folder)


def _online(made: OnlineConfig, quick: bool) -> None:
    if quick:
        commands.Judges = AtHand  # type: ignore[assignment, misc]
    online(made, QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 50])
def test_killed_at_random_moments(settings: Callable[..., OnlineConfig], kills: int) -> None:
    made = settings(iterations=8 if kills == 1 else 12, valid=None, reference_policy="previous")
    whole = online(replace(made, output=f"{made.output}-whole"), QUIET).folder
    rng, killed = random.Random(0), 0
    log, count = Path(made.output, "metrics.jsonl"), len(lines(whole))
    for attempt, moment in enumerate(sorted(rng.randrange(1, count) for _ in range(kills))):
        process = forked.start(_online, replace(made, resume=attempt > 0), kills == 1)
        while process.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") >= moment):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))  # of which sampling takes most
        process.kill()
        killed += forked.ended(process) == -signal.SIGKILL
    assert killed >= kills * 0.75
    online(replace(made, resume=True), QUIET)
    same_run(Path(made.output), whole)


def same_run(run: Path, expected: Path) -> None:
    cut = [[{k: v for k, v in line.items() if "second" not in k} for line in lines(f)] for f in (run, expected)]
    assert cut[0] == cut[1]
    assert samples(run) == samples(expected)
    assert_same_weights(run, expected)


def assert_same_weights(run: Path, expected: Path) -> None:
    from bnf_core.storage.checkpoints import Checkpoints

    ends = [Checkpoints(folder / "checkpoints", 2).newest()[0] for folder in (run, expected)]
    assert ends[0] is not None and ends[1] is not None and ends[0].step == ends[1].step
    assert ends[0].arrays.keys() == ends[1].arrays.keys() and ends[0].position == ends[1].position
    for name, value in ends[1].arrays.items():
        np.testing.assert_array_equal(ends[0].arrays[name], value, err_msg=name)
