"""The model card of a run: what was trained, on what, how, and what came of it.

It is for others: of paths that begin at a root or a home folder it has the last part only.
"""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from bnf_align.run.scoring import shown
from bnf_core import registry
from bnf_core.config import FILES, OnlineConfig, TrainConfig
from bnf_core.models.adapters import LOADING
from bnf_core.models.model_folder import HUB_ID
from bnf_core.steps.metrics import Metrics
from bnf_core.storage.checkpoints import Facts

KINDS = {"lora": "A LoRA adapter", "dora": "A DoRA adapter", "full": "All weights"}
HERE = "path/to/this/folder"  # in a card that is not on the Hub yet
HEADER = "---\n"
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
        "base_model_relation": "finetune" if full else "adapter",
    }
    if not local:
        header["base_model"] = base
    if data := [of.where.path for of in config.data.each().values() if _on_the_hub(of.where.path)]:
        header["datasets"] = data
    name = _folder_name(base) if local else base
    kind = KINDS[config.fine_tune_type] + (f" of rank {config.lora.rank}" if not full else "")
    sections = [
        f"{HEADER}{yaml.safe_dump(header, sort_keys=False)}{HEADER}".rstrip(),
        f"# {Path(config.output).name}",
        f"{kind} of {name}, aligned by bnf-align with the objective `{objective}`.",
        f"```python\n{loading.format(base=_placeholder(base) if local else base, here=HERE)}\n```" if loading else "",
        f"## Data\n\n{_data(config, facts)}",
        f"## Results\n\n{_results(before, after)}",
        f"## How it was trained\n\n{_settings(config)}",
        f"Made with {_versions(backend.requires)}.",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def for_the_hub(text: str, repo: str, model: str, base: str | None) -> str:
    """The card of a run as it stands in a repository, whose name it then has to load it by.

    Args:
        text: that `card` made.
        model: as the run names its base model.
        base: what that is called on the Hub; None: nothing.
    """
    text = text.replace(HERE, repo)
    if base is None:
        return text
    _, header, rest = text.split(HEADER, 2)
    header = yaml.safe_dump(yaml.safe_load(header) | {"base_model": base}, sort_keys=False)
    rest = rest.replace(_placeholder(model), base).replace(
        f" of {_folder_name(model)}, aligned", f" of {base}, aligned"
    )
    return f"{HEADER}{header}{HEADER}{rest}"


def _placeholder(model: str) -> str:
    return f"path/to/{_folder_name(model)}"


def _folder_name(model: str) -> str:
    return Path(model).resolve().name


def _on_the_hub(path: str) -> bool:
    return bool(HUB_ID.fullmatch(path)) and "/" in path and not Path(path).exists() and Path(path).suffix not in FILES


def _named(value: Any) -> Any:
    """A setting as others may see it."""
    if isinstance(value, list):
        return [_named(one) for one in value]
    if isinstance(value, dict):
        return {name: _named(one) for name, one in value.items()}
    is_path = isinstance(value, str) and "\n" not in value and Path(value).expanduser().is_absolute()
    return Path(value).name if is_path else value


def _data(config: TrainConfig, facts: Facts) -> str:
    if isinstance(config, OnlineConfig):
        return (
            f"- prompts: `{_named(config.data.path)}`, {facts['training rows']}\n"
            f"- the model's own completions of them, judged by `{config.judge}`; chosen: `{config.label}`"
        )
    where = ", ".join(f"`{_named(str(of.where))}`" for of in config.data.each().values())
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
    changed = {
        name: _named(value) for name, value in changed.items() if name not in ("push_to_hub", "hub_private_repo")
    }
    lines = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True).rstrip()
    return (
        f"```bash\nbnf {config.command} --config run.yaml\n```\n\nwith these settings in run.yaml, the others at their "
        f"defaults:\n\n```yaml\n{lines}\n```"
    )


def _versions(packages: Sequence[str]) -> str:
    found = []
    for package in ("bnf-align", *packages):
        try:
            found.append(f"{package.replace('_', '-')} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([*found, f"Python {platform.python_version()}"])
