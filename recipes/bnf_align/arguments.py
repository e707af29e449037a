"""From typed settings to a command line: jsonargparse, with short flags and errors that name the right key.

`--learning-rate 1e-4` is `--optimizer.learning_rate 1e-4`: a setting may be named by its last part, with dashes
or underscores, as long as only one setting ends so; `--sample-top-p` is `--sample.top_p`. A list may be given as `a,b`.
"""

import difflib
import json
import re
from argparse import ArgumentError
from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from bnf_core.errors import UserError

T = TypeVar("T")
LISTS = (list[str], list[int])

set_parsing_settings(docstring_parse_attribute_docstrings=True)


_load_yaml = get_loader("yaml")


def _load(text: str) -> Any:
    """YAML, in which `data` may also be its path alone, or a list of sources."""
    found = _load_yaml(text)
    if isinstance(found, dict) and isinstance(found.get("data"), str | list):
        found["data"] = {"path": found["data"]}
    return found


set_loader("yaml", _load, (yaml.YAMLError,))

# Flags that mean a setting of another name.
ALIASES = {"data": "data.path", "prompts": "data.path", "r": "lora.rank", "lr": "optimizer.learning_rate"}
# Settings with a name and more, of which the name alone may be given.
NAMED = ("objective",)
# What jsonargparse adds, the last of them when a parser is used.
NO_SETTINGS = ("help", "config", "print_config", "print_shtab")
# Settings whose value is anybody's text: it may begin with a dash, and a tilde in it is no home folder.
TEXTS = ("prompt", "judge", "system")


def make_parser(settings: type, command: str) -> ArgumentParser:
    """A parser of one command: every field of the dataclass `settings`, `--config FILE` and `--print-config`."""
    return _parser(settings, command)


@cache  # the source of every settings class is read for its help
def _parser(settings: type, command: str) -> ArgumentParser:
    parser = ArgumentParser(prog=command, description=(settings.__doc__ or "").strip(), exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below; flags win")
    parser.add_class_arguments(settings, as_group=False)
    return parser


def parse(settings: type[T], command: str, argv: Sequence[str], positional: Sequence[str] = ()) -> T:
    """The settings given by flags and YAML.

    Args:
        positional: flags that may be left out where a word stands alone, in this order.
    Raises:
        UserError: an unknown or missing setting, or a value that does not fit.
        SystemExit: after --help and --print-config.
    """
    parser = make_parser(settings, command)
    keys = [action.dest for action in parser._actions if action.dest not in NO_SETTINGS]
    try:
        namespace = parser.parse_args(_spell_out(argv, keys, parser, positional))
        for name in keys:
            if name not in TEXTS:
                namespace[name] = _with_home(namespace.get(name))
        found = deepcopy(parser.instantiate(namespace))  # whose defaults are the parser's own
        return settings(**{k: v for k, v in found.items() if k not in NO_SETTINGS})
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explain(str(error), keys, command)) from error


def _spell_out(
    argv: Sequence[str], keys: Sequence[str], parser: ArgumentParser, positional: Sequence[str]
) -> list[str]:
    """--learning-rate 1e-4 → --optimizer.learning_rate=1e-4; a bare flag of a boolean setting gets its `true`; a,b →
    [a,b] where a list is wanted; a word that belongs to no flag is the value of the next positional one.

    Raises:
        ValueError: there are more such words than positional flags, or a flag is given as well.
    """
    types = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    found: list[str] = []
    loose: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        match = _FLAG.fullmatch(word)
        if match is None:
            (found if word.startswith("-") else loose).append(word)
            continue
        name, value = _full_name(match[1].replace("-", "_"), keys), match[2] and match[2][1:]
        if value is None and types.get(name) is bool:
            value = words.popleft() if words and words[0] in ("true", "false") else "true"
        elif value is None and words and name not in ("help", "print_config"):
            value = words.popleft() if name in TEXTS or not _FLAG.fullmatch(words[0]) else None
        found.append(f"--{name}" if value is None else f"--{name}={_bracketed(value, types.get(name))}")
    names = [_full_name(name.removeprefix("--").replace("-", "_"), keys) for name in positional]
    if names and len(loose) >= len(names) and types.get(names[-1]) in LISTS:  # which takes all the others
        loose[len(names) - 1 :] = [json.dumps(loose[len(names) - 1 :])]
    if len(loose) > len(names):
        raise ValueError(f"unexpected {loose[len(names)]!r}: expected a setting, such as --{keys[0]} VALUE")
    for name, word in zip(names, loose, strict=False):
        if any(flag.startswith(f"--{name}=") for flag in found):
            raise ValueError(f"{name} is given twice: {word!r} stands alone and --{name} is there as well")
        found.append(f"--{name}={word}")
    return found


_FLAG = re.compile(r"--([A-Za-z][\w.-]*)(=.*)?", re.DOTALL)


def _full_name(name: str, keys: Sequence[str]) -> str:
    """A setting by its whole dotted name, of which only the last part, or an alias, may be given."""
    name = ALIASES.get(name, name) if ALIASES.get(name) in keys else name
    name = f"{name}.name" if name in NAMED and name in keys else name
    endings = [key for key in keys if key.endswith("." + name) or key.replace(".", "_") == name]
    return endings[0] if name not in keys and len(endings) == 1 else name


def _with_home(value: Any) -> Any:
    """~/runs → /home/me/runs, in lists and mappings as well."""
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value.startswith("~") else value
    if isinstance(value, list):
        return [_with_home(one) for one in value]
    return {name: _with_home(one) for name, one in value.items()} if isinstance(value, dict) else value


def _bracketed(value: str, kind: object) -> str:
    return f"[{value}]" if kind in LISTS and not value.startswith("[") else value


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
