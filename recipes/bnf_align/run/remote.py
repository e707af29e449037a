"""Sampling on other machines, through the OpenAI completions protocol: vLLM, SGLang or mlx_lm.server.

They have more in it than OpenAI has, and need it here: the tokens that were drawn, not only their text, and the adapter
as it now is, which they read from a folder that this run writes and their machine sees.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bnf_align.judges.llm import post
from bnf_core.config import ServerKind
from bnf_core.errors import TrainingStopped, UserError
from bnf_core.models.adapters import Layout
from bnf_core.protocol import Engine
from bnf_core.sampling import Completion
from bnf_core.storage.files import agreed

LAYOUTS: dict[ServerKind, Layout] = {"vllm": "peft", "sglang": "peft", "mlx-lm": "mlx"}
# Where adapters are loaded, beside the protocol's own address; mlx_lm.server reads what a request names.
ADAPTERS: dict[ServerKind, str] = {"vllm": "{url}/{what}", "sglang": "{root}/{what}"}
KEPT = 2  # adapters in the folder; a server may still read the one before
TAKES = "token_id:"  # how vLLM writes a token where text is expected


class RemoteSampler:
    """Draws completions by asking a server.

    Args:
        url: up to, not including, /completions.
        kind: what answers there.
        model: the folder of the model, which the server's machine sees by the same name.
        folder: for adapters, which it sees as well.
        requests: how many at a time.
    """

    def __init__(
        self,
        url: str,
        kind: ServerKind,
        *,
        model: Path,
        folder: Path,
        requests: int,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.url, self.kind, self.model, self.folder = url.rstrip("/"), kind, model.resolve(), folder
        self.requests, self.tokenizer = requests, tokenizer
        self._adapter: Path | None = None
        self._step = -1

    def refresh(self, engine: Engine, step: int) -> None:
        """Have the server sample from the policy as it now is. All processes call it, and the first one saves."""
        if step == self._step:
            return
        # A name that no adapter had before, not even one of a run that this one resumes: servers keep what they read.
        token = engine.processes.gather_bytes(secrets.token_hex(4).encode())[0].decode()
        before, self._step = self._adapter, step
        self._adapter = (self.folder / f"adapter-{step:06d}-{token}").resolve()
        engine.save(self._adapter)
        with agreed(engine.processes):
            if engine.processes.rank == 0:
                if self.kind in ADAPTERS:
                    self._serve("load_lora_adapter", lora_name=self._adapter.name, lora_path=str(self._adapter))
                    if before is not None:
                        self._serve("unload_lora_adapter", lora_name=before.name)
                for old in sorted(self.folder.glob("adapter-*"), key=os.path.getmtime)[:-KEPT]:
                    shutil.rmtree(old, ignore_errors=True)

    def sample(self, rows: Sequence[Completion]) -> None:
        """As an engine's.

        Raises:
            TrainingStopped: the server cannot be reached, refuses, or does not answer with tokens.
        """
        with ThreadPoolExecutor(self.requests) as pool:
            for row, answer in zip(rows, pool.map(self._complete, rows), strict=True):
                row.fill(*answer)

    def _complete(self, row: Completion) -> tuple[list[int], list[float], bool]:
        assert self._adapter is not None
        of_kind: dict[ServerKind, Callable[[], dict[str, Any]]] = {
            "vllm": lambda: {
                "model": self._adapter.name if self._adapter else None,
                "prompt": list(row.prompt_ids),
                "logprobs": 0,
                "return_tokens_as_token_ids": True,
                "add_special_tokens": False,
            },
            "sglang": lambda: {
                "model": self.model.name,
                "lora_path": self._adapter.name if self._adapter else None,
                "prompt": list(row.prompt_ids),
                "logprobs": 0,
                "return_token_ids": True,
                "top_k": row.sampling.top_k or -1,
            },
            "mlx-lm": lambda: {
                "model": str(self.model),
                "adapters": str(self._adapter),
                "prompt": self.tokenizer.decode(list(row.prompt_ids)),
                "logprobs": True,
            },
        }
        sampling = row.sampling
        body = {
            "max_tokens": row.max_tokens,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "top_k": sampling.top_k,
            "min_p": float(sampling.min_p),
            "repetition_penalty": float(sampling.repetition_penalty),
            "stop": sampling.stop,
            "seed": row.key % 2**31,
            **of_kind[self.kind](),
        }
        answer = self._ask(f"{self.url}/completions", body)
        asked = answer["usage"]["prompt_tokens"]
        if asked != len(row.prompt_ids):
            raise TrainingStopped(
                f"{self.url} takes a prompt of {len(row.prompt_ids)} tokens for one of {asked}: it serves another "
                "model, or adds special tokens of its own to text"
            )
        choice = answer["choices"][0]
        ids, log_probs = _tokens(choice, self.url)
        return ids, log_probs, choice["finish_reason"] == "length"

    def _serve(self, what: str, **body: str) -> None:
        """Have the server load or unload an adapter."""
        self._ask(ADAPTERS[self.kind].format(url=self.url, root=self.url.removesuffix("/v1"), what=what), body)

    def _ask(self, url: str, body: dict[str, Any]) -> Any:
        try:
            return post(url, body)
        except OSError as error:
            raise TrainingStopped(f"the sampler cannot go on: {error}") from error


def _tokens(choice: dict[str, Any], url: str) -> tuple[list[int], list[float]]:
    """The tokens of a completion and their log-probabilities, in the server's form."""
    found = choice.get("logprobs") or {}
    if choice.get("token_ids"):
        return choice["token_ids"], found["token_logprobs"]
    if found.get("content"):
        return [token["id"] for token in found["content"]], [token["logprob"] for token in found["content"]]
    tokens = found.get("tokens") or []
    if not tokens or not all(token.startswith(TAKES) for token in tokens):
        raise TrainingStopped(f"{url} does not say which tokens it drew: expected vLLM, SGLang or mlx_lm.server")
    return [int(token.removeprefix(TAKES)) for token in tokens], found["token_logprobs"]


def require_layout(kind: ServerKind, layout: Layout | None) -> None:
    """
    Raises:
        UserError: the server reads adapters of another layout than the run writes.
    """
    if layout != LAYOUTS[kind]:
        raise UserError(
            f"sampler_kind is {kind}, which reads adapters in the layout of {LAYOUTS[kind]}, and this backend writes "
            f"{layout or 'none'}: train on the other backend, or sample here"
        )
