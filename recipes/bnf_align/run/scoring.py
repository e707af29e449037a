"""Scoring rows under a model beside its reference, and metrics as a table."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from bnf_align.run.progress import bar
from bnf_core.objectives import Objective
from bnf_core.objectives.bnf import BNF
from bnf_core.protocol import Engine
from bnf_core.steps import steps as plan
from bnf_core.steps.baseline import Baseline
from bnf_core.steps.batching import MicroBatching
from bnf_core.steps.metrics import Meter, Metrics
from bnf_core.steps.reference import Reference
from bnf_core.types import Example


def score_sets(
    engine: Engine,
    reference: Reference,
    sets: Mapping[str, Sequence[Example]],
    batching: MicroBatching,
    pad: int,
    console: Console,
    objective: Objective | None = None,
) -> Metrics:
    """Metrics of each set by itself, as `name/loss`; of one without a name as they are called."""
    found: Metrics = {}
    for name, examples in sets.items():
        metrics = score(engine, reference, examples, batching, pad, console, objective)
        found |= {f"{name}/{metric}" if name else metric: value for metric, value in metrics.items()}
    return found


def score(
    engine: Engine,
    reference: Reference,
    examples: Sequence[Example],
    batching: MicroBatching,
    pad: int,
    console: Console,
    objective: Objective | None = None,
) -> Metrics:
    """Metrics of all examples as one batch of an objective, BNF by default, scored by all processes together."""
    objective = objective or BNF()
    meter = Meter(objective)
    examples = list(examples)  # each is asked for more than once
    mine = plan.my_share(examples, batching, engine.processes, pad)
    batches, scores = [], []
    with bar("evaluate", len(mine), console) as progress:
        for batch in mine:
            batches += plan.with_reference([batch], reference, engine.processes)
            scores.append(engine.evaluate(*batches[-1]))
            progress.advance()
    baseline = Baseline(objective, engine, reference, batching, pad)(examples, batches, scores)
    for (batch, ref_log_odds), said in zip(batches, scores, strict=True):
        meter.add(batch, said, ref_log_odds, baseline)
    meter.gather(engine.processes)
    return meter.result()


def table(columns: dict[str, Metrics], title: str = "") -> Table:
    """Metrics side by side."""
    result = Table("metric", *columns, title=title)
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    for name in names:
        result.add_row(name, *(shown(metrics.get(name)) for metrics in columns.values()))
    return result


def shown(value: float | None) -> str:
    """A metric as text."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
