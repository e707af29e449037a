"""The fenced blocks of the README and the documentation: what each is, and whether its commands are real.

A block is run (`tests/integration/test_pages.py`), in the order of its page and in a folder of that page, unless a
comment above it says why not: `<!-- not run: needs a cluster -->`. Run or not, its commands are read by the parsers of
the programs that they call. A title, as in ```python title="my_judges.py", makes it a file of that folder.
`python tests/pages.py` lists what is not run, and why.
"""

import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from bnf_align.arguments import make_parser, parse
from bnf_align.commands import COMMANDS

ROOT = Path(__file__).parents[1]
BESIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "conformance/SPEC.md")
PAGES = [*(ROOT / name for name in BESIDE), *sorted((ROOT / "docs").glob("*.md"))]
REASONS = (
    "needs the network",
    "needs a GPU",
    "needs a cluster",
    "takes minutes",
    "takes hours",
    "has a test of its own",
)
# Programs that no test starts, and why; what they are told is checked all the same.
NEVER = {"pip": "changes the environment under test", "make": "runs these tests, or takes minutes"}
# Programs of others, whose flags nobody but they can read.
OTHERS = ("sudo", "vllm", "wandb", "tensorboard", "trackio", "sha256sum", "ollama", "git", "pytest", "pre-commit")
OTHER_MODULES = ("sglang",)  # of `python -m`, not installed here
RUN, DATA, SHOWN = ("bash", "python"), ("yaml", "json", "jsonl", "toml"), ("console", "text", "math", "markdown")
_FENCE = re.compile(
    r'(?:<!-- not run: ([^>]*?) -->\n)?^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    title: str | None
    why_not: str | None
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in RUN and self.why_not is None and self.title is None


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        why_not, language, title, code = match.groups()
        line = text.count("\n", 0, match.start(4))  # of the fence, counted from 1
        yield Block(str(path.relative_to(ROOT)), line, language, title, why_not, code)


BLOCKS = [block for path in PAGES for block in blocks(path)]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command, without variables before it and comments after it."""
    code = block.code
    if block.language == "console":
        code = "".join(f"{line[2:]}\n" for line in code.splitlines() if line.startswith("$ "))
    for line in code.replace("\\\n", " ").replace("$(which python)", "python").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def check(words: list[str]) -> None:
    """Raises what the program's own parser raises, or ValueError where there is no such thing."""
    program, *rest = words
    if program in ("torchrun", "accelerate", "mlx.launch", "srun"):
        at = next((i for i, word in enumerate(rest) if word == "bnf_align"), None)
        if at is None:
            raise ValueError(f"{program} without bnf_align")
        _check_launcher(program, rest[: at + 1])
        _check_bnf(rest[at + 1 :])
    elif program == "bnf":
        _check_bnf(rest)
    elif program == "python":
        _check_python(rest)
    elif program == "make":
        _check_make(rest)
    elif program == "pip":
        _check_extras(rest)
    elif program not in OTHERS:
        raise ValueError(f"{program}: no such program is known; add it to OTHERS of tests/pages.py if it is right")


def check_data(block: Block) -> None:
    """YAML is settings of `bnf train`, JSON is JSON, line by line; both may be files of a page."""
    if block.language == "yaml":
        found = yaml.safe_load(block.code)
        _parse("train", [*(f"--{key}={json.dumps(value)}" for key, value in found.items()), "…"])
    elif block.language == "toml":
        tomllib.loads(block.code)
    else:
        for line in block.code.splitlines():
            json.loads(line)


def _check_bnf(words: list[str]) -> None:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if rest and f"{name}-{rest[0]}" in COMMANDS:
        name, rest = f"{name}-{rest[0]}", rest[1:]
    if name in ("-h", "--help"):
        return
    if name not in COMMANDS:
        raise ValueError(f"bnf {name}: no such command")
    if "--help" not in rest:
        _parse(name, rest)


def _parse(name: str, words: list[str]) -> None:
    module = importlib.import_module(f"bnf_align.commands.{name.replace('-', '_')}")
    _parse_as(module.Config, f"bnf {name}", words, getattr(module, "POSITIONAL", ()))


def _parse_as(settings: type, command: str, words: list[str], positional: tuple[str, ...] = ()) -> None:
    """With `…`, or a file of settings that is not here, standing for the settings that must be given."""
    words = [word for word in words if word != "--print-config"]
    elsewhere = [word for word in words if word in ("…", "...")]
    if "--config" in words:
        at = words.index("--config")
        if not (ROOT / words[at + 1]).exists():
            elsewhere += words[at : at + 2]
        else:
            words[at + 1] = str(ROOT / words[at + 1])
    words = [word for word in words if word not in elsewhere]
    if elsewhere:
        given = " ".join(words).replace("-", "_")
        for action in make_parser(settings, command)._actions:
            if action.required and f"__{action.dest.split('.')[0]}" not in given:
                words += [f"--{action.dest}", "somewhere"]
    parse(settings, command, words, positional)


def _check_python(words: list[str]) -> None:
    if words[0] != "-m":
        if not (ROOT / words[0]).exists():
            raise ValueError(f"python {words[0]}: no such file")
        return
    module, rest = words[1], words[2:]
    if module == "bnf_align":
        _check_bnf(rest)
    elif module.startswith("benchmarks."):
        found = vars(importlib.import_module(module))
        (settings,) = (v for k, v in found.items() if k.startswith("Bench") and k.endswith("Config"))
        _parse_as(settings, f"python -m {module}", rest)
    elif not module.startswith(OTHER_MODULES) and importlib.util.find_spec(module) is None:
        raise ValueError(f"python -m {module}: no such module")


def _check_launcher(program: str, words: list[str]) -> None:
    """torch's and accelerate's own parsers; a variable may be a number."""
    words = [re.sub(r"\$\w+", "0", word) for word in words]
    if program == "srun":
        words = words[words.index("torchrun") + 1 :]
    if program in ("torchrun", "srun"):
        from torch.distributed.run import parse_args

        parse_args(words)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        found = launch_command_parser().parse_args(words[1:])
        if found.config_file and not (ROOT / found.config_file).exists():
            raise ValueError(f"{found.config_file}: no such file")


def _check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        known = rf"^{name} \?=" if is_variable else rf"^{name}:"
        if not re.search(known, makefile, re.MULTILINE):
            raise ValueError(f"make {word}: the Makefile has no {name}")


def _check_extras(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        if match := re.fullmatch(r"(?:\.|bnf-align)\[([\w,]+)\]", word):
            absent = set(match[1].split(",")) - set(project["optional-dependencies"])
            if absent:
                raise ValueError(f"pip install {word}: no extra {', '.join(absent)}")


def not_run() -> Counter[str]:
    """How many blocks of commands or code are not run, by reason."""
    return Counter(block.why_not for block in BLOCKS if block.language in RUN and block.why_not)


if __name__ == "__main__":
    for block in BLOCKS:
        if block.language in RUN and block.why_not:
            print(f"{block}: {block.why_not}")
    for program, reason in NEVER.items():
        print(f"{program} {reason}")
    print(f"{sum(block.runs for block in BLOCKS)} blocks are run, {dict(not_run())} are not")
