"""The model card of a run: what was trained, on what, how, and what came of it."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from bnf_align.run.scoring import shown
from bnf_core import registry
from bnf_core.config import OnlineConfig, TrainConfig
from bnf_core.models.adapters import LOADING
from bnf_core.steps.metrics import Metrics
from bnf_core.storage.checkpoints import Facts

KINDS = {"lora": "A LoRA adapter", "dora": "A DoRA adapter", "full": "All weights"}
WHOLE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({here!r})"""


def card(config: TrainConfig, facts: Facts, before: Metrics | None, after: Metrics | None) -> str:
    """README.md of what a run has trained, in Markdown with the Hub's own header.

    Args:
        facts: of the run, with digests of its rows.
        before, after: held-out metrics; None: nothing was held out.
    """
    base, full = config.model, config.fine_tune_type == "full"
    backend = registry.get(config.hardware.backend)
    library, loading = LOADING.get(backend.adapter_layout, ("", "")) if not full else ("transformers", WHOLE)
    objective = config.make_objective()
    local = Path(base).is_dir()
    header = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["bnf-align", config.fine_tune_type],
    } | ({} if local else {"base_model": base})
    name = Path(base).resolve().name if local else base
    kind = KINDS[config.fine_tune_type] + (f" of rank {config.lora.rank}" if not full else "")
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {Path(config.output).name}",
        f"{kind} of {name}, aligned by bnf-align with the objective `{objective}`.",
        f"```python\n{loading.format(base=f'path/to/{name}' if local else base, here='path/to/this/folder')}\n```"
        if loading
        else "",
        f"## Data\n\n{_data(config, facts)}",
        f"## Results\n\n{_results(before, after)}",
        f"## How it was trained\n\n{_settings(config)}",
        f"Made with {_versions(backend.requires)}.",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _data(config: TrainConfig, facts: Facts) -> str:
    if isinstance(config, OnlineConfig):
        return (
            f"- prompts: `{config.data.path}`, {facts['training rows']}\n"
            f"- the model's own completions of them, judged by `{config.judge}`; chosen: `{config.label}`"
        )
    where = ", ".join(f"`{of.where}`" for of in config.data.each().values())
    lines = [f"- training rows: {where}, {facts['training rows']} of their tokens and labels"]
    if facts["held-out rows"]:
        lines.append(f"- held-out rows: {facts['held-out rows']}")
    return "\n".join(lines)


def _results(before: Metrics | None, after: Metrics | None) -> str:
    if not after:
        return "No rows were held out, so nothing was measured."
    names = dict.fromkeys([*(before or {}), *after])
    rows = (f"| `{name}` | {shown((before or {}).get(name))} | {shown(after.get(name))} |" for name in names)
    return "\n".join(["On held-out rows:\n\n| metric | before | after |\n|---|---|---|", *rows])


def _settings(config: TrainConfig) -> str:
    default = TrainConfig(config.model, type(config.data)(config.data.path)).flat()
    changed = {name: value for name, value in config.flat().items() if value != default.get(name) and name != "output"}
    lines = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True).rstrip()
    return f"`bnf {config.command}` with these settings, the others at their defaults:\n\n```yaml\n{lines}\n```"


def _versions(packages: Sequence[str]) -> str:
    found = []
    for package in ("bnf-align", *packages):
        try:
            found.append(f"{package.replace('_', '-')} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
