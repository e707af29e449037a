"""The optimizer steps of a run: which rows, in which micro-batches, on which process, at which learning rate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bnf_core.config import OptimizerConfig, TrainConfig
from bnf_core.processes import Processes
from bnf_core.protocol import Engine
from bnf_core.steps.ahead import ahead
from bnf_core.steps.baseline import Baseline
from bnf_core.steps.batching import MicroBatching, micro_batches
from bnf_core.steps.reference import Reference, with_reference
from bnf_core.steps.schedule import learning_rate
from bnf_core.types import Array, Batch, Example, Position


@dataclass(frozen=True)
class Step:
    """All that one optimizer step needs, as this process sees it."""

    number: int  # from 0
    learning_rate: float
    batches: list[tuple[Batch, Array]]  # this process's micro-batches, each with its ref_log_odds (N,)
    examples: list[Example]  # of the global batch
    position: Position  # where the data resume after this step
    baseline: float = 0.0  # what the objective's rewards are compared with


class Data(Protocol):
    """Where the rows of a run come from: `batching.Rows`, `streaming.FeedbackStream` or `streaming.MixedStream`."""

    @property
    def ahead(self) -> bool:
        """Whether the rows of a step can be read while the one before is taken: not where the policy draws them."""
        ...

    def batches(
        self, batch_size: int, position: Position | None = None
    ) -> Iterator[tuple[list[Example], Position]]: ...

    def drawn(self, batch_size: int, position: Position) -> dict[str, int]:
        """How many rows each of several sources has given up to a position."""
        ...


def micro_batching_of(config: TrainConfig, engine: Engine | None = None) -> MicroBatching:
    """How a run of this model cuts its batches; without one, on one process by a model that can share prompts.

    Raises:
        UserError: no such objective.
    """
    return MicroBatching(
        config.micro_batch_size,
        config.data.max_length if config.packing else None,
        config.group_by_length,
        multiple_of=engine.processes.shares if engine else 1,
        share_prompts=config.share_prompts and (engine is None or engine.shares_prompts),
        unit=config.make_objective().unit,
    )


def steps(
    data: Data,
    *,
    batch_size: int,
    num_steps: int,
    optimizer: OptimizerConfig,
    batching: MicroBatching,
    reference: Reference,
    processes: Processes,
    baseline: Baseline | None = None,
    pad_id: int = 0,
    start: int = 0,
    position: Position | None = None,
) -> Iterator[Step]:
    """Steps start..num_steps as this process sees them; every process must draw them all, in step. The rows of the next
    one are read, cut and packed while a step is taken, if they may be; what needs the model, such as the reference, is
    not."""

    def cut() -> Iterator[tuple[int, list[Example], Position, list[Batch]]]:
        batches = data.batches(batch_size, position)
        for number in range(start, num_steps):
            examples, after = next(batches)
            yield number, examples, after, my_share(examples, batching, processes, pad_id)

    for number, examples, after, share in ahead(cut()) if data.ahead else cut():
        mine = with_reference(share, reference, processes)
        yield Step(
            number=number,
            learning_rate=learning_rate(number, num_steps, optimizer),
            batches=mine,
            examples=examples,
            position=after,
            baseline=baseline(examples, mine) if baseline else 0.0,
        )


def my_share(
    examples: Sequence[Example], batching: MicroBatching, processes: Processes, pad_id: int = 0
) -> list[Batch]:
    """This process's micro-batches of a global batch: as many as any other process has."""
    batches = micro_batches(examples, batching, pad_id)
    return batches[processes.share(batches)]
