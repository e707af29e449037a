"""Samples drawn by a server: mlx_lm.server itself, which reads the adapter anew after every step."""

import json
import shutil
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from test_online import JUDGE, at_hand, lines, prompts, samples  # noqa: F401  (fixtures)
from test_train import QUIET

import forked
from bnf_align.commands.online import online
from bnf_align.run.remote import RemoteSampler
from bnf_core.config import DataConfig, HardwareConfig, LoraConfig, OnlineConfig, OptimizerConfig, SamplingConfig
from bnf_core.errors import TrainingStopped, UserError
from bnf_core.processes import ALONE
from bnf_core.sampling import Completion
from invariance import free_ports

pytestmark = pytest.mark.usefixtures("at_hand")


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that mlx-lm itself reads right: it looks for RoPE's base where transformers no longer writes it."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("served") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}))
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("mlx_lm")
    (port,) = free_ports(1)
    log = tmp_path_factory.mktemp("server") / "log"
    process = forked.start(serve, ["--model", str(model), "--port", str(port)], output=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.is_alive() and time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.join()


def serve(words: list[str]) -> None:
    from mlx_lm import server

    sys.argv = ["mlx_lm.server", *words]
    server.main()


def settings(model: Path, prompts: Path, output: Path, url: str, **overrides: Any) -> OnlineConfig:  # noqa: F811
    common: dict[str, Any] = {
        "judge": JUDGE,
        "sampler": url,
        "sampler_kind": "mlx-lm",
        "hardware": HardwareConfig(backend="mlx", device="cpu", dtype="float32"),
        "lora": LoraConfig(rank=4, alpha=8),
        "optimizer": OptimizerConfig(learning_rate=2e-2, warmup_steps=0, epsilon=1e-5),
        "iterations": 2,
        "prompts_per_iteration": 2,
        "sample_tokens": 6,
    }
    data = DataConfig(str(prompts), max_length=64)
    return OnlineConfig(str(model), data, output=str(output), **(common | overrides))


def test_a_server_samples_from_the_policy_as_it_is(
    server: str,
    model: Path,
    prompts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = online(settings(model, prompts, tmp_path / "run", server), QUIET).folder
    rows, train = samples(run), lines(run)
    assert len(rows) == 16 and len({tuple(row["completion_ids"]) for row in rows}) > 8
    for i, line in enumerate(train):
        drawn = [row for row in rows if row["iteration"] == i]
        for label, name in ((True, "logps/chosen"), (False, "logps/rejected")):
            sums = [np.sum(row["log_probs"]) for row in drawn if row["label"] == label]
            # The server's log-probabilities are those of the policy that is about to be trained.
            assert (not sums and line[name] is None) or line[name] == pytest.approx(np.mean(sums), abs=1e-3)
        assert line["sampler_gap"] < 1e-4
    assert abs(train[1]["log_odds_shift/chosen"]) > 1e-2  # which has moved by then
    assert sorted(path.name[:14] for path in (run / "sampler").iterdir()) == ["adapter-000000", "adapter-000001"]


class StandIn(BaseHTTPRequestHandler):
    """Answers as vLLM or SGLang does, to what they take alone: always token 5, then 6."""

    asked: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if self.path.endswith("lora_adapter"):
            text = "Success: LoRA adapter added successfully."
        else:
            ids, log_probs = [5, 6], [-1.5, -0.25]
            choice: dict[str, Any] = {"finish_reason": "length", "logprobs": {"token_logprobs": log_probs}}
            if "return_token_ids" in body:
                choice["token_ids"] = ids
            else:
                choice["logprobs"]["tokens"] = [f"token_id:{i}" for i in ids]
            text = json.dumps({"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"])}})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        return


@pytest.mark.parametrize(("kind", "root"), [("vllm", "/v1"), ("sglang", "")])
def test_servers_are_asked_in_their_own_words(tmp_path: Path, kind: Any, root: str) -> None:
    class Saves:
        processes = ALONE

        def save(self, folder: Path) -> None:
            folder.mkdir(parents=True)

    StandIn.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{served.server_port}/v1"
        tokenizer: Any = None
        sampler = RemoteSampler(url, kind, model=tmp_path / "m", folder=tmp_path / "a", requests=2, tokenizer=tokenizer)
        row = Completion([1, 2, 3], SamplingConfig(temperature=1.0), max_tokens=2)
        for step in range(2):
            sampler.refresh(Saves(), step)
        sampler.sample([row])
        served.shutdown()
    assert (row.ids, row.log_probs, row.cut) == ([5, 6], [-1.5, -0.25], True)
    first, second, unload, asked = StandIn.asked
    paths = [f"{root}/{what}_lora_adapter" for what in ("load", "load", "unload")]
    assert [path for path, _ in StandIn.asked[:3]] == paths
    assert unload[1]["lora_name"] == first[1]["lora_name"] == Path(first[1]["lora_path"]).name
    path, body = asked
    assert path == "/v1/completions" and body["prompt"] == [1, 2, 3] and body["logprobs"] == 0
    assert second[1]["lora_name"] in (body["model"], body.get("lora_path"))
    assert body["top_k"] == (0 if kind == "vllm" else -1)  # all tokens


def test_what_no_server_can_do_is_said(tiny_model: Path, prompts: Path, tmp_path: Path) -> None:  # noqa: F811
    (port,) = free_ports(1)
    with pytest.raises(UserError, match="reads adapters in the layout of peft, and this backend writes mlx"):
        online(settings(tiny_model, prompts, tmp_path / "a", "http://x/v1", sampler_kind="vllm"), QUIET)
    with pytest.raises(TrainingStopped, match="cannot be reached"):
        online(settings(tiny_model, prompts, tmp_path / "b", f"http://127.0.0.1:{port}/v1"), QUIET)
    with pytest.raises(ValueError, match="fine_tune_type is 'full': expected lora"):
        settings(tiny_model, prompts, tmp_path / "c", "http://x/v1", fine_tune_type="full")


def test_what_was_drawn_elsewhere_ends_where_it_would_here() -> None:
    row = Completion([1], max_tokens=3, stop_ids=[7])
    row.fill([4, 7, 5], [-1.0, -2.0, -3.0], cut=True)
    assert (row.ids, row.log_probs, row.content, row.cut, row.done) == ([4, 7], [-1.0, -2.0], [4], False, True)
