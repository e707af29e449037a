"""What the documentation site has beside the pages in this folder: tables made from the code, so that they cannot
differ from it, and links that lead somewhere on the site."""

import dataclasses
import posixpath
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from bnf_align.arguments import make_parser
from bnf_align.commands import COMMANDS
from bnf_align.commands.objectives import needs, settings_of
from bnf_core.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
# Pages of the repository that are pages of the site as well.
BESIDE = {"conformance/SPEC.md": "spec.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
BESIDE |= {"CHANGELOG.md": "changelog.md", "README.md": "index.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every page of evidence is in the navigation, after the one that sums them up."""
    (evidence,) = (section["Evidence"] for section in config.nav or [] if "Evidence" in section)
    pages = sorted(path.name for path in (ROOT / "docs" / "evidence").glob("*.md") if path.name != "index.md")
    evidence[1:1] = [f"evidence/{name}" for name in pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in BESIDE.items():
        if page != "index.md" and (ROOT / name).exists():
            files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for name in COMMANDS:
        files.append(File.generated(config, f"commands/{name}.md", content=command(name)))
    files.append(File.generated(config, "commands/index.md", content=commands()))
    files.append(File.generated(config, "objective_settings.md", content=objectives()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulae as MathML, which needs no script; links out of the folder to the page that holds the same, or none, for
    the site has no source files."""
    markdown = formulae(markdown)
    beside_docs = page.file.src_uri in BESIDE.values()
    folder = posixpath.dirname(page.file.src_uri)

    def there(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = re.sub(r"^(\.\./)+", "", target).removeprefix("docs/" if beside_docs else "")
        if path in BESIDE:
            path, anchor = BESIDE[path], "" if path == "README.md" else anchor
        for candidate in (posixpath.normpath(posixpath.join(folder, target)), path):
            if (file := files.get_file_from_path(candidate)) is not None:
                name = _heading(file) if text.endswith(".md") else text
                return f"[{name}]({posixpath.relpath(candidate, folder or '.')}{anchor})"
        return text

    return re.sub(r"\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)", there, markdown)


def _heading(file: File) -> str:
    return file.content_string.partition("\n")[0].removeprefix("# ")


def formulae(markdown: str) -> str:
    """GitHub's blocks of `math` and `$…$`, but not what looks like one in code."""

    def shown(match: re.Match[str]) -> str:
        block, inline = match[1], match[2]
        if block is not None:
            block = block.strip().replace("{aligned}", "{align*}")  # the one that latex2mathml knows
            return f'<div class="formula">{convert(block, display="block")}</div>\n'
        return match[0] if inline is None else f"<span>{convert(inline)}</span>"  # a line may begin with it

    return re.sub(
        r"^```math\n(.*?)^```$|^```.*?^```$|`[^`\n]+`|\$([^$`\n]+)\$", shown, markdown, flags=re.DOTALL | re.MULTILINE
    )


def commands() -> str:
    rows = "".join(f"| [`bnf {spoken(name)}`]({name}.md) | {text} |\n" for name, text in COMMANDS.items())
    return (
        "# Commands\n\nEvery setting is a flag and a key of a YAML file (`--config FILE`; flags win). A setting may be "
        "named by its last part, with dashes or underscores, where only one ends so: `--lr 1e-4`, `--learning-rate "
        "1e-4` and `--optimizer.learning_rate 1e-4` are the same. A list may be given as `a,b`. `--print-config` shows "
        "what all settings come to. Exit codes: 0 done, 1 failed, 2 bad usage or input.\n\n"
        f"| command | |\n|---|---|\n{rows}"
    )


def spoken(name: str) -> str:
    return name.replace("data-", "data ")


def command(name: str) -> str:
    module = import_module(f"bnf_align.commands.{name.replace('-', '_')}")
    words = [f"[{flag.removeprefix('--').upper()}]" for flag in getattr(module, "POSITIONAL", ())]
    rows = [_row(*setting) for setting in _settings(make_parser(module.Config, f"bnf {name}"))]
    usage = " ".join(["bnf", spoken(name), *words, *(["[settings]"] if rows else [])])
    about = " ".join((module.Config.__doc__ or "").split())
    table = "\n".join(["| setting | meaning |\n|---|---|", *rows]) if rows else "It has no settings."
    return f"# bnf {spoken(name)}\n\n{about}\n\n```text\n{usage}\n```\n\n{table}\n"


def _settings(parser: ArgumentParser) -> Iterator[tuple[str, str]]:
    """Name, type and default in one cell, which a phone has room for; the meaning in the other."""
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        if kind is None or action.dest in ("help", "config", "print_config"):  # a group is a file of settings as well
            continue
        default = "none" if action.default is None else f"`{_shown(action.default)}`"
        about = f"{_type(kind)}, {'required' if action.required else f'default {default}'}"
        yield f"`{action.dest}`<br><small>{about}</small>", str(action.help or "")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(kind: Any) -> str:
    name = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    name = name.replace("typing.", "").replace("NoneType", "null").replace("None", "null")
    if found := re.search(r"Literal\[([^\]]+)\]", name):
        name = name.replace(found[0], " | ".join(word.strip().strip("'") for word in found[1].split(",")))
    return " or ".join(f"`{part}`" for part in name.split(" | ") if part != "null")  # the default is `none` then


def _row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def objectives() -> str:
    """Every objective with what it needs and its settings, as `bnf objectives` says it."""
    parts = ["# Settings of objectives\n"]
    for name, objective in OBJECTIVES.items():
        parts.append(f"## {name}\n\n{objective.wants[0].upper() + objective.wants[1:]}.\n")
        parts.append(f"`{objective.formula}`\n\nNeeds: {needs(objective)}. From: {objective.source}.\n")
        if meanings := settings_of(objective):
            defaults = {f.name: f.default for f in dataclasses.fields(objective)}
            parts.append("| setting | default | meaning |\n|---|---|---|")
            parts += [_row(f"`{key}`", f"`{defaults[key]}`", meaning) for key, meaning in meanings.items()]
            parts.append("")
    return "\n".join(parts) + "\n"
