"""`bnf evaluate`: score labelled completions under a model, beside its own reference."""

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bnf_align.run.feedback import load_sets, with_date
from bnf_align.run.results import result_file
from bnf_align.run.run_folder import recorded_setting
from bnf_align.run.scoring import score_sets, table
from bnf_core import registry
from bnf_core.config import EvaluateConfig
from bnf_core.data.tokenization import load_tokenizer, pad_id
from bnf_core.models.model_folder import resolve_model
from bnf_core.steps.batching import MicroBatching
from bnf_core.steps.metrics import Metrics
from bnf_core.steps.reference import ReferenceCache
from bnf_core.storage.files import replace_file


def evaluate(config: EvaluateConfig, console: Console) -> Metrics:
    """Metrics of one file: log-odds shift against the adapter-off reference, preference accuracy and the rest of
    `bnf_core.steps.metrics.Meter`.

    Raises:
        UserError: a missing model, adapter or file, a bad row, or a report that cannot be written.
    """
    report = None if config.report is None else result_file(config.report, "report")
    folder = resolve_model(config.model)
    tokenizer = load_tokenizer(folder)
    trained_in = Path(config.adapter or folder).resolve().parent  # a run's adapter, or its model
    config = replace(config, data=with_date(config.data, tokenizer, recorded_setting(trained_in, "data.date")))
    sets = load_sets(config.data, config.split, tokenizer, console)
    engine = registry.get(config.hardware.backend).load(
        folder,
        device=config.hardware.device,
        dtype=config.hardware.dtype,
        adapter=Path(config.adapter) if config.adapter else None,
    )
    reference = ReferenceCache(engine.reference_log_odds)
    batching = MicroBatching(config.micro_batch_size, share_prompts=engine.shares_prompts)
    metrics = score_sets(engine, reference, sets, batching, pad_id(tokenizer), console)
    if report is not None:
        replace_file(report, json.dumps(metrics, indent=2) + "\n")
    return metrics


Config = EvaluateConfig
POSITIONAL = ("--data",)


def run(config: EvaluateConfig, console: Console) -> int:
    console.print(table({"value": evaluate(config, console)}))
    return 0
