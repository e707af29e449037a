"""The objectives by name, and the expressions that name them with their settings."""

import ast
import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from bnf_core.errors import UserError
from bnf_core.objectives.alphapo import AlphaPO
from bnf_core.objectives.apo import APOZeroUnpaired
from bnf_core.objectives.asft import ASFT
from bnf_core.objectives.base import Objective, Sum
from bnf_core.objectives.bco import BCO
from bnf_core.objectives.bnf import BNF
from bnf_core.objectives.cpo import CPO
from bnf_core.objectives.d2o import D2O
from bnf_core.objectives.dpo import DPO
from bnf_core.objectives.f_dpo import FDPO
from bnf_core.objectives.grpo import GRPO
from bnf_core.objectives.ipo import IPO
from bnf_core.objectives.kto import KTO
from bnf_core.objectives.nll import NLL
from bnf_core.objectives.npo import NPO
from bnf_core.objectives.orpo import ORPO
from bnf_core.objectives.simper import SimPER
from bnf_core.objectives.simpo import SimPO
from bnf_core.objectives.slic import SLiC
from bnf_core.objectives.unlikelihood import Unlikelihood

CLASSES: tuple[type[Objective], ...] = (
    BNF,
    NLL,
    Unlikelihood,
    KTO,
    APOZeroUnpaired,
    BCO,
    NPO,
    SimPER,
    ASFT,
    GRPO,
    DPO,
    FDPO,
    IPO,
    SLiC,
    ORPO,
    CPO,
    SimPO,
    AlphaPO,
    D2O,
)
OBJECTIVES: Mapping[str, type[Objective]] = {cls.name: cls for cls in CLASSES}


def parse(expression: str, settings: Mapping[str, Any] | None = None) -> Objective:
    """The objective that an expression names: `dpo`, `dpo(beta=0.3)`, or a weighted sum such as
    `bnf + 0.2*dpo(beta=0.3)`.

    Args:
        settings: by name, for every objective of the expression that has such a setting and is not given it there.
    Raises:
        UserError: an unknown objective or setting, a value that does not fit, or no such expression.
    """
    rest = dict(settings or {})
    used: set[str] = set()
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise _no_expression(expression) from error
    parts = [(weight, _one(node, expression, rest, used)) for weight, node in _terms(tree, expression)]
    if unused := sorted(rest.keys() - used):
        names = [f.name for _, part in parts for f in fields(part)]
        raise _unknown("setting", unused[0], names, " and ".join(part.name for _, part in parts))
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    return Sum(tuple(parts))


def _terms(node: ast.expr, expression: str) -> list[tuple[float, ast.expr]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _terms(node.left, expression) + _terms(node.right, expression)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        number, other = (node.left, node.right) if isinstance(node.left, ast.Constant) else (node.right, node.left)
        if not isinstance(number, ast.Constant) or not isinstance(number.value, int | float) or number.value < 0:
            raise _no_expression(expression)
        return [(float(number.value), other)]
    return [(1.0, node)]


def _one(node: ast.expr, expression: str, settings: Mapping[str, Any], used: set[str]) -> Objective:
    given: dict[str, Any] = {}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        name = node.func.id
        given = {str(word.arg): _value(word.value, expression) for word in node.keywords}
    elif isinstance(node, ast.Name):
        name = node.id
    else:
        raise _no_expression(expression)
    if name not in OBJECTIVES:
        raise _unknown("objective", name, list(OBJECTIVES))
    cls = OBJECTIVES[name]
    kinds = {f.name: get_type_hints(cls)[f.name] for f in fields(cls)}
    for setting in given:
        if setting not in kinds:
            raise _unknown("setting", setting, list(kinds), name)
    for setting, value in settings.items():
        if setting in kinds:
            used.add(setting)
            given.setdefault(setting, value)
    return cls(**{setting: _typed(value, kinds[setting], f"{name}: {setting}") for setting, value in given.items()})


def _typed(value: Any, kind: Any, where: str) -> Any:
    wrong = UserError(f"objective {where} is {value!r}: expected {getattr(kind, '__name__', 'a name')}")
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            raise wrong
        return value
    if kind is float:
        if isinstance(value, bool):
            raise wrong
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise wrong from error
    return str(value)


def _value(node: ast.expr, expression: str) -> Any:
    if isinstance(node, ast.Name):  # a bare word, as in divergence=js
        return node.id
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise _no_expression(expression) from error


def _unknown(what: str, name: str, known: list[str], of: str = "") -> UserError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}" if known else "it has none"
    return UserError(f"unknown {what} {name!r}{f' of objective {of}' if of else ''}: {expected}")


def _no_expression(expression: str) -> UserError:
    return UserError(
        f"objective {expression!r}: expected a name, as dpo, with settings, as dpo(beta=0.3), or a weighted sum, as "
        "bnf + 0.2*dpo"
    )
