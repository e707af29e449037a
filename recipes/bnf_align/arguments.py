"""From typed settings to a command line: jsonargparse, with short flags and errors that name the right key.

`--learning-rate 1e-4` is `--optimizer.learning_rate 1e-4`: a setting may be named by its last part, with dashes
or underscores, as long as only one setting ends so; `--sample-top-p` is `--sample.top_p`. A list may be given as `a,b`.
"""

import difflib
import re
from argparse import ArgumentError
from collections.abc import Sequence
from typing import TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

from bnf_core.errors import UserError

T = TypeVar("T")
LISTS = (list[str], list[int])

set_parsing_settings(docstring_parse_attribute_docstrings=True)

# Flags that mean a setting of another name.
ALIASES = {"data": "data.path", "prompts": "data.path", "r": "lora.rank", "lr": "optimizer.learning_rate"}
# Settings with a name and more, of which the name alone may be given.
NAMED = ("objective",)


def make_parser(settings: type, command: str) -> ArgumentParser:
    """A parser of one command: every field of the dataclass `settings`, `--config FILE` and `--print-config`."""
    parser = ArgumentParser(prog=command, description=(settings.__doc__ or "").strip(), exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below; flags win")
    parser.add_class_arguments(settings, as_group=False)
    return parser


def parse(settings: type[T], command: str, argv: Sequence[str], positional: Sequence[str] = ()) -> T:
    """The settings given by flags and YAML.

    Args:
        positional: flags that may be left out where the words before the first flag are their values, in this order.
    Raises:
        UserError: an unknown or missing setting, or a value that does not fit.
        SystemExit: after --help and --print-config.
    """
    parser = make_parser(settings, command)
    keys = [action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")]
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    if 0 < first_flag <= len(positional):
        named = [part for name, word in zip(positional, argv[:first_flag], strict=False) for part in (name, word)]
        argv = [*named, *argv[first_flag:]]
    try:
        namespace = parser.parse_args(_spell_out(argv, keys, parser))
        return settings(**{k: v for k, v in parser.instantiate(namespace).items() if k != "config"})
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explain(str(error), keys, command)) from error


def _spell_out(argv: Sequence[str], keys: Sequence[str], parser: ArgumentParser) -> list[str]:
    """--learning-rate → --optimizer.learning_rate; a bare flag of a boolean setting gets its `true`; a,b → [a,b]
    where a list is wanted."""
    types = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    result: list[str] = []
    name = ""
    for i, word in enumerate(argv):
        match = re.fullmatch(r"--([A-Za-z][\w.-]*)(=.*)?", word, re.DOTALL)
        if match is None:
            result.append(_bracketed(word) if types.get(name) in LISTS else word)
            continue
        name, value = match[1].replace("-", "_"), match[2] or ""
        name = ALIASES.get(name, name) if ALIASES.get(name) in keys else name
        name = f"{name}.name" if name in NAMED and name in keys else name
        if name not in keys:
            endings = [key for key in keys if key.endswith("." + name) or key.replace(".", "_") == name]
            name = endings[0] if len(endings) == 1 else name
        if value and types.get(name) in LISTS:
            value = "=" + _bracketed(value[1:])
        result.append(f"--{name}{value}")
        if types.get(name) is bool and not value and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            result.append("true")
    return result


def _bracketed(value: str) -> str:
    return value if value.startswith("[") else f"[{value}]"


def _explain(message: str, keys: Sequence[str], command: str) -> str:
    """argparse's message as one that names the setting and what to do."""
    pattern = r"(?:Group '(\w+)' does not accept o|O)ption '([^']+)'|unrecognized arguments: --([\w.-]+)"
    if unknown := re.search(pattern, message):
        group, name = unknown[1], (unknown[2] or unknown[3]).rpartition(".")[2].replace("-", "_")
        candidates = {key.rpartition(".")[2]: key for key in keys if not group or key.startswith(f"{group}.")}
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
        hint = f"did you mean {candidates[near[0]]}?" if near else f"expected one of {', '.join(candidates.values())}"
        return f"unknown setting {name!r}: {hint}"
    if "required" in message:
        names = [name.strip().removesuffix(".path") for name in message.rpartition("required:")[2].split(",")]
        return f"missing {', '.join('--' + name for name in names)} (`{command} --help` explains every setting)"
    message = re.sub(r'Parser key "([^"]+)":\s*', r"\1: ", message)
    return re.sub(r"Expected an? (?:<class '(\w+)'>|([^.]+))\. Got value: ", r"expected \1\2, got ", message)
