"""Judges by name, with settings, and weighted sums of them: `math`, `regex(pattern="^A")`, `my_module:my_function`,
`math + 0.2*length(most=60)`."""

import ast
import difflib
import importlib
import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnf_align.judges import gym, llm, reward_model, simple
from bnf_align.judges.base import Judge, Row, as_score
from bnf_core.data.messages import Text
from bnf_core.errors import UserError

JUDGES: dict[str, Callable[..., Judge]] = {
    "math": simple.math,
    "number": simple.number,
    "regex": simple.regex,
    "json-schema": simple.json_schema,
    "contains": simple.contains,
    "equals": simple.equals,
    "length": simple.length,
    "reasoning-gym": gym.reasoning_gym,
    "reward-model": reward_model.reward_model,
    "llm": llm.llm,
}
ONCE = ("reward-model",)  # too large to be in every worker
TERM = re.compile(r"\s*(?:(?P<weight>[-+]?\d+(?:\.\d+)?)\s*\*\s*)?(?P<name>[\w./~-]+(?::\w[\w.]*)?)\s*")


@dataclass(frozen=True)
class Term:
    """One judge of a weighted sum."""

    weight: float
    name: str
    settings: dict[str, Any]


def parse_judge(expression: str) -> list[Term]:
    """
    Raises:
        UserError: an unknown judge or setting, or no such expression.
    """
    terms = parse_terms(expression)
    for term in terms:
        _check(term)
    return terms


def parse_terms(expression: str) -> list[Term]:
    """The same, whatever the names are of.

    Raises:
        UserError: no such expression.
    """
    terms, at = [], 0
    while True:
        match = TERM.match(expression, at)
        if match is None:
            raise _no_expression(expression)
        settings, at = _settings(expression, match.end())
        terms.append(Term(float(match["weight"] or 1.0), match["name"], settings))
        if at == len(expression):
            return terms
        if expression[at] != "+":
            raise _no_expression(expression)
        at += 1


def make_judge(terms: Sequence[Term]) -> Judge:
    """The judge that an expression is.

    Raises:
        UserError: one of its judges cannot be made.
    """
    judges = [(term, _make(term)) for term in terms]

    def judge(prompt: Text, completion: str, row: Row) -> float | None:
        scores = [as_score(one(prompt, completion, row), term.name) for term, one in judges]
        known = [term.weight * score for (term, _), score in zip(judges, scores, strict=True) if score is not None]
        return sum(known) if len(known) == len(scores) else None

    return judge


def _settings(expression: str, at: int) -> tuple[dict[str, Any], int]:
    """What stands in brackets from there on, and where it ends."""
    if not expression[at:].startswith("("):
        return {}, at
    for end in (i + 1 for i, c in enumerate(expression) if c == ")" and i > at):
        try:
            with warnings.catch_warnings(action="ignore"):  # of backslashes, which patterns are full of
                call = ast.parse(f"f{expression[at:end]}", mode="eval").body
        except SyntaxError:
            continue  # a bracket inside of a string
        if isinstance(call, ast.Call) and not call.args and all(word.arg for word in call.keywords):
            try:
                found = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
            except ValueError:
                break
            return found, end + len(expression[end:]) - len(expression[end:].lstrip())
        break
    raise _no_expression(expression)


def _check(term: Term) -> None:
    if ":" in term.name:
        return
    if term.name not in JUDGES:
        near = difflib.get_close_matches(term.name, JUDGES, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(JUDGES)}, or module:function"
        raise UserError(f"unknown judge {term.name!r}: {hint}")
    known = inspect.signature(JUDGES[term.name]).parameters
    for name in term.settings:
        if name not in known:
            raise UserError(f"judge {term.name} has no setting {name!r}: it has {', '.join(known) or 'none'}")
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in term.settings:
            raise UserError(f"judge {term.name} needs the setting {name}, as {term.name}({name}=...)")


def _make(term: Term) -> Judge:
    if ":" not in term.name:
        try:
            return JUDGES[term.name](**term.settings)
        except TypeError as error:
            raise UserError(f"judge {term.name}: {error}") from error
    where, _, name = term.name.partition(":")
    try:
        module = _from_file(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
        function: Any = module
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:  # a user's module may raise anything
        raise UserError(f"judge {term.name} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"judge {term.name} is no function")
    return (lambda *judged: function(*judged, **term.settings)) if term.settings else function


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _no_expression(expression: str) -> UserError:
    return UserError(
        f"judge {expression!r}: expected a name, as math, with settings, as number(tolerance=0.01), a function, as "
        "my_module:my_function or path/to/file.py:my_function, or a weighted sum, as math + 0.2*length(most=60)"
    )
