"""A judge that is another model behind an OpenAI-compatible endpoint, asked by a rubric."""

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from bnf_align.judges.base import Judge, Row
from bnf_core.data.messages import Text
from bnf_core.errors import UserError
from bnf_core.storage.files import replace_file

RUBRIC = "How well does the answer do what the user asks? 0: not at all; 10: there is nothing to improve."
ASK = "{rubric}\n\n# User\n{prompt}\n\n# Answer\n{completion}\n\nEnd with a line `SCORE: ` and a number."
SCORE = re.compile(r"SCORE:\W*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
RETRIES, BUSY = 4, (429, 500, 502, 503, 504)


def llm(
    url: str,
    model: str = "default",
    rubric: str = RUBRIC,
    cache: str | None = None,
    max_tokens: int = 512,
    key: str = "OPENAI_API_KEY",
) -> Judge:
    """The number that another model gives.

    Args:
        url: up to, not including, /chat/completions, such as http://localhost:8000/v1.
        model: as the endpoint calls it.
        rubric: what to judge by; its text, or a file.
        cache: a folder for answers; what has been asked once is not asked again.
        max_tokens: of an answer.
        key: the environment variable that holds the key, where there is one.
    """
    if re.fullmatch(r"\S+\.(txt|md)", rubric):
        try:
            rubric = Path(rubric).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"judge llm: rubric {rubric} cannot be read: {error.strerror}") from error

    def judge(prompt: Text, completion: str, row: Row) -> float:
        shown = prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        question = ASK.format(rubric=rubric, prompt=shown, completion=completion)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0,
            "max_tokens": max_tokens,
        }
        found = SCORE.findall(_remembered(body, url, cache, key))
        if not found:
            raise ValueError("the answer of the judging model has no line `SCORE: ` and a number")
        return float(found[-1])

    return judge


def _remembered(body: dict[str, Any], url: str, cache: str | None, key: str) -> str:
    """The answer, from the cache where it is there."""
    if cache is None:
        return post(f"{url}/chat/completions", body, key)["choices"][0]["message"]["content"] or ""
    name = hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()
    path = Path(cache).expanduser() / f"{name}.json"
    if path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["answer"])
    answer = _remembered(body, url, None, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({"asked": body, "answer": answer}, ensure_ascii=False))
    return answer


def post(url: str, body: dict[str, Any], key: str = "OPENAI_API_KEY", timeout: float = 600.0) -> Any:
    """What an endpoint answers to JSON, in JSON or else as text; asked again, after a while, where it is busy.

    Raises:
        OSError: it cannot be reached, or refuses; the message says why.
    """
    headers = {"Content-Type": "application/json"}
    if os.environ.get(key):
        headers["Authorization"] = f"Bearer {os.environ[key]}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for attempt in range(RETRIES):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                text = response.read().decode(errors="replace")
            try:
                return json.loads(text)
            except ValueError:
                return text
        except urllib.error.HTTPError as error:
            if error.code not in BUSY or attempt == RETRIES - 1:
                raise OSError(f"{url} answers {error.code}: {error.read(300).decode(errors='replace')}") from error
        except urllib.error.URLError as error:
            if attempt == RETRIES - 1:
                raise OSError(f"{url} cannot be reached: {error.reason}") from error
        time.sleep(2.0**attempt / 4)
    raise AssertionError
