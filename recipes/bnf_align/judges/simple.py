"""Judges that need no model: by the answer that the prompt's row holds, or by the completion alone."""

import json
import re
from pathlib import Path
from typing import Any

from bnf_align.judges.base import Judge, Row, answer_of
from bnf_core.data.messages import Text
from bnf_core.errors import UserError

NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?|[-−]?\.\d+")


def math(answer: str = "answer") -> Judge:
    """Whether the completion's last expression equals that of the row's answer, by math-verify: LaTeX, fractions, sets
    and numbers."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError("judge math needs the package math-verify: pip install 'bnf-align[judges]'") from error

    def judge(prompt: Text, completion: str, row: Row) -> bool:
        # Without its own time limits, which are signals: the worker has one.
        expected = parse(str(answer_of(row, answer)), parsing_timeout=None)
        found = parse(completion, parsing_timeout=None)
        return bool(verify(expected, found, timeout_seconds=None))

    return judge


def number(answer: str = "answer", tolerance: float = 0.0) -> Judge:
    """Whether the last number of the completion is that of the row's answer, up to the tolerance."""

    def judge(prompt: Text, completion: str, row: Row) -> bool:
        expected = last_number(str(answer_of(row, answer)))
        if expected is None:
            raise ValueError(f"the row's {answer} holds no number: {row[answer]!r}")
        found = last_number(completion)
        return found is not None and abs(found - expected) <= tolerance

    return judge


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None


def regex(pattern: str, whole: bool = False) -> Judge:
    """Whether a regular expression is found in the completion, or is all of it."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"judge regex: pattern {pattern!r} is no regular expression: {error}") from error
    find = compiled.fullmatch if whole else compiled.search
    return lambda prompt, completion, row: find(completion.strip() if whole else completion) is not None


def json_schema(schema: Any = None, column: str = "schema") -> Judge:
    """Whether the completion is JSON that a schema allows: a file, the schema itself, or the row's column."""
    try:
        import jsonschema
    except ImportError as error:
        raise UserError("judge json-schema needs the package jsonschema: pip install 'bnf-align[judges]'") from error
    if isinstance(schema, str):
        try:
            schema = json.loads(Path(schema).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"judge json-schema: {schema} cannot be read: {error}") from error

    def judge(prompt: Text, completion: str, row: Row) -> bool:
        expected = answer_of(row, column) if schema is None else schema
        expected = json.loads(expected) if isinstance(expected, str) else expected
        try:
            jsonschema.validate(json.loads(_unfenced(completion)), expected)
        except (ValueError, jsonschema.ValidationError):
            return False
        return True

    return judge


def _unfenced(text: str) -> str:
    """Without the fence of a block of code around it."""
    match = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", text, re.DOTALL)
    return match[1] if match else text


def contains(answer: str = "answer", text: str | None = None, case: bool = False) -> Judge:
    """Whether the row's answer, or a text, stands in the completion."""
    return lambda prompt, completion, row: _expected(row, answer, text, case) in _folded(completion, case)


def equals(answer: str = "answer", text: str | None = None, case: bool = False) -> Judge:
    """Whether the completion is the row's answer, or a text, but for space around it."""
    return lambda prompt, completion, row: _expected(row, answer, text, case) == _folded(completion, case)


def _expected(row: Row, column: str, text: str | None, case: bool) -> str:
    return _folded(str(answer_of(row, column)) if text is None else text, case)


def _folded(text: str, case: bool) -> str:
    return text.strip() if case else text.strip().casefold()


def length(most: int | None = None, least: int = 1, unit: str = "words") -> Judge:
    """Whether the completion has that many words or characters."""
    if unit not in ("words", "characters"):
        raise UserError(f"judge length: unit is {unit!r}: expected words or characters")

    def judge(prompt: Text, completion: str, row: Row) -> bool:
        size = len(completion.split()) if unit == "words" else len(completion)
        return least <= size and (most is None or size <= most)

    return judge
