"""`bnf objectives`: what training can minimise, what each objective wants and what it needs."""

from dataclasses import dataclass, fields

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from bnf_align.arguments import make_parser
from bnf_core.objectives import OBJECTIVES, Objective, parse

ROWS = {"row": "rows", "pair": "pairs", "prompt": "prompts with chosen and rejected rows"}
PASSES = {"mismatched": "a forward pass more, of mismatched rows", "running": "a forward pass more"}


@dataclass
class ObjectivesConfig:
    """What training can minimise: all objectives, or more of one."""

    name: str = ""
    """Say more of this one, or of each part of a weighted sum, such as "bnf + 0.2*dpo(beta=0.3)"."""


def needs(objective: type[Objective]) -> str:
    """Rows, pairs or whole prompts, a reference, a baseline's forward pass: as `pairs, reference`."""
    one_kind = objective.normaliser in ("chosen", "rejected")
    rows = f"{objective.normaliser} rows" if one_kind else ROWS[objective.unit]
    rows = "samples of the policy" if objective.on_policy else rows
    parts = [rows, "reference" if objective.needs_reference else "", PASSES.get(objective.baseline_from, "")]
    return ", ".join(filter(None, parts))


def settings_of(objective: type[Objective]) -> dict[str, str]:
    """What each setting means, by name."""
    helps = {action.dest: str(action.help) for action in make_parser(objective, "objective")._actions}
    return {f.name: helps[f.name] for f in fields(objective)}


def overview() -> Table:
    table = Table(box=None, padding=(0, 2, 1, 0), pad_edge=False)
    table.add_column("objective", no_wrap=True)
    for heading in ("needs", "what it wants", "from"):
        table.add_column(heading, overflow="fold")
    for name, objective in OBJECTIVES.items():
        called = Text(name, style="bold")
        for f in fields(objective):
            called.append(f"\n{f.name}={f.default}", style="not bold")
        table.add_row(called, needs(objective), objective.wants, objective.source)
    return table


def detail(objective: Objective, weight: float) -> Group:
    """One objective with its settings as they are, and what each means."""
    about = Table.grid(padding=(0, 2, 0, 0))
    for heading, text in (
        ("loss", objective.formula),
        ("wants", objective.wants),
        ("needs", needs(type(objective))),
        ("from", objective.source),
    ):
        about.add_row(heading, Text(text))
    settings = Table.grid(padding=(0, 2, 0, 0))
    meanings = settings_of(type(objective))
    for f in fields(objective):
        settings.add_row(Text(f.name, style="bold"), Text(f"default {f.default}"), Text(_one_line(meanings[f.name])))
    share = "" if weight == 1.0 else f"{weight:g} · "
    title, meaning = Text(f"{share}{objective}", style="bold"), Text(_one_line(objective.__doc__ or ""))
    return Group(title, "", meaning, "", about, "", settings, *[""] * bool(meanings))


def _one_line(text: str) -> str:
    return " ".join(text.split())


Config = ObjectivesConfig
POSITIONAL = ("--name",)


def run(config: ObjectivesConfig, console: Console) -> int:
    if config.name:
        for weight, part in parse(config.name).terms:
            console.print(detail(part, weight))
        return 0
    console.print(overview())
    console.print(Text("bnf train --objective NAME --objective.SETTING VALUE; bnf objectives NAME says more of one."))
    return 0
