"""`bnf evaluate`: score labelled completions under a model, beside its own reference."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bnf_core import plan, registry
from bnf_core.batching import Cut, Example
from bnf_core.config import EvaluateConfig
from bnf_core.metrics import Meter, Metrics
from bnf_core.model_folder import resolve_model
from bnf_core.protocol import Engine
from bnf_core.reference import ReferenceCache
from bnf_core.tokenization import load_tokenizer, pad_id
from bnf_recipes.feedback import load_split
from bnf_recipes.progress import bar


def evaluate(config: EvaluateConfig, console: Console) -> Metrics:
    """Metrics of one file: log-odds shift against the adapter-off reference, preference accuracy and the rest of
    `bnf_core.metrics.Meter`.

    Raises:
        UserError: a missing model, adapter or file, or a bad row.
    """
    folder = resolve_model(config.model)
    tokenizer = load_tokenizer(folder)
    examples = load_split(config.data.path, config.split, config.data, tokenizer, console)
    engine = registry.get(config.hardware.backend).load(
        folder,
        device=config.hardware.device,
        dtype=config.hardware.dtype,
        adapter=Path(config.adapter) if config.adapter else None,
    )
    reference = ReferenceCache(engine.reference_log_odds)
    cut = Cut(config.micro_batch_size, share_prompts=engine.shares_prompts)
    metrics = score(engine, reference, examples, cut, pad_id(tokenizer), console)
    if config.report:
        Path(config.report).write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def score(
    engine: Engine, reference: ReferenceCache, examples: Sequence[Example], cut: Cut, pad: int, console: Console
) -> Metrics:
    """Metrics of all examples, scored by all processes together."""
    meter = Meter()
    mine = plan.my_share(examples, cut, engine.processes, pad)
    with bar("evaluate", len(mine), console) as progress:
        for batch in mine:
            [(_, ref_log_odds)] = plan.with_reference([batch], reference, engine.processes)
            meter.add(batch, engine.evaluate(batch, ref_log_odds), ref_log_odds)
            progress.advance()
    meter.gather(engine.processes)
    return meter.result()


def table(columns: dict[str, Metrics], title: str = "") -> Table:
    """Metrics side by side."""
    result = Table("metric", *columns, title=title)
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    for name in names:
        result.add_row(name, *(_cell(metrics.get(name)) for metrics in columns.values()))
    return result


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
