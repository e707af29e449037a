"""`python -m benchmarks.loss`: the fused loss beside the unfused one, cross-entropy and the bare products."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console

from benchmarks.command import main
from benchmarks.figures import FLOOR, Case, MeasureConfig, Measurement, bars, page, table
from benchmarks.interleaved import Work, apart, repeated
from benchmarks.step import benchmark
from bnf_core.config import HardwareConfig

OURS = "linear_bnf_loss"
ENOUGH = 0.1  # seconds of a piece of work: a clock and a scheduler are not to matter


@dataclass
class BenchLossConfig:
    """Time the loss, forward and backward, and measure its memory, beside other losses on the same states."""

    tokens: list[int] = field(default_factory=lambda: [1024, 4096])
    """How many completion tokens, one case each."""
    hidden: int = 576
    """Size of a hidden state."""
    vocab: int = 49152
    """Size of the vocabulary."""
    head: Literal["both", "frozen", "trained"] = "both"
    """Whether the gradient of the head's weights is computed as well."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens is {self.tokens}: expected numbers of at least 1")
        if self.hidden < 1 or self.vocab < 2:
            raise ValueError(f"hidden is {self.hidden}, vocab {self.vocab}: expected at least 1 and 2")


def bench_loss(config: BenchLossConfig, console: Console) -> Measurement:
    """Measure, print, and write figures, page and picture.

    Raises:
        UserError: the file of figures holds those of something else.
    """
    measures = benchmark(config.hardware)
    facts = measures.facts() | {"hidden": str(config.hidden), "vocab": str(config.vocab)}
    name = f"loss-{config.hardware.backend}"
    measurement = Measurement(config.measure, name, facts, console)
    whole = True
    for trained in (False, True):
        for n in config.tokens:
            if config.head == ("frozen" if trained else "trained"):
                continue
            title = f"{n:,} tokens, head {'trained' if trained else 'frozen'}"
            whole = measurement.run(case(title, config, n, trained)) and whole
    for title, figures in measurement.cases.items():
        console.print(table(title, figures))
    command = f"python -m benchmarks.loss --backend {config.hardware.backend} --device {config.hardware.device}"
    measurement.finish(
        whole,
        bars(measurement.cases, measures.memory),
        page(measurement.facts, measurement.cases, command, f"beyond what was held before, {measures.memory}"),
    )
    return measurement


def case(title: str, config: BenchLossConfig, n: int, train_head: bool, times: int | None = None) -> Case:
    """The losses over N states, and the products; so many times each, or as often as a clock can tell."""
    jobs = _jobs(config, n, train_head)
    if times is None:
        ours = jobs[OURS]
        assert not isinstance(ours, str)
        ours()
        started = time.perf_counter()
        ours()
        times = max(1, round(ENOUGH / (time.perf_counter() - started)))

    contenders: dict[str, Work | str] = {
        name: job if isinstance(job, str) else repeated(job, times) for name, job in jobs.items()
    }
    return Case(title, contenders, lambda name: apart(name, extra_memory, config, n, train_head, name), OURS, times)


def extra_memory(config: BenchLossConfig, n: int, train_head: bool, name: str) -> float:
    """Peak bytes of a loss, or of the products, beyond what was held before."""
    warm_up, job = (_jobs(config, tokens, train_head)[name] for tokens in (min(n, 16), n))
    assert not isinstance(warm_up, str) and not isinstance(job, str)
    warm_up()  # what is made once, such as compiled kernels, does not count
    return float(benchmark(config.hardware).extra_memory(job))


def _jobs(config: BenchLossConfig, n: int, train_head: bool) -> dict[str, Callable[[], None] | str]:
    measures, shape = benchmark(config.hardware), (n, config.hidden, config.vocab)
    products = measures.products([shape], train_weights=train_head)
    return {FLOOR: products} | measures.losses(*shape, train_head=train_head)


if __name__ == "__main__":
    main("loss", BenchLossConfig, bench_loss)
