"""One process of several runs: what test_torch_distributed.py launches with torchrun, and calls for runs alone."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bnf_align import cli
from bnf_core.config import LoraConfig, OptimizerConfig
from bnf_core.steps import loop
from bnf_core.steps import steps as plan
from bnf_core.steps.batching import MicroBatching, Rows, micro_batches
from bnf_core.steps.metrics import Meter
from bnf_core.steps.reference import ReferenceCache
from bnf_core.storage.checkpoints import Checkpoints
from bnf_core.types import Example
from bnf_torch.backend import TorchBackend

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant")
STEPS, BATCH = 6, 5  # of 13 rows: the last batch of an epoch has three, so that one of two processes has fewer


def rows() -> list[Example]:
    draw = np.random.default_rng(0)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.integers(1, 300, draw.integers(1, most)).tolist())

    return [Example(ids(9), ids(12), bool(i % 3), group=i // 2) for i in range(13)]


def train(model: Path, case: dict[str, Any], output: Path) -> None:
    """Leaves in `output`: steps.json (on the first process), a checkpoint, and what was trained."""
    known = ("gradient_checkpointing", "dtype", "router_aux_loss", "load_in_4bit", "compile")
    options = {name: case[name] for name in known if name in case}
    engine = TorchBackend().load(
        model, device="cpu", fine_tune_type=case["type"], lora=LoraConfig(rank=4), optimizer=OPTIMIZER, **options
    )
    processes = engine.processes
    batching = MicroBatching(2, 64 if case.get("packing") else None, multiple_of=processes.count)
    reference = ReferenceCache(engine.reference_log_odds)
    data = Rows(rows(), 0)
    batches = micro_batches(data.examples, batching)
    plan.with_reference(batches[processes.share(batches)], reference, processes)
    start, position = 0, None
    checkpoints = Checkpoints(output / "checkpoints", 10)
    if "resume" in case:
        found, refused = Checkpoints(Path(case["resume"]), 10).newest(processes)
        assert found and not refused, refused
        engine.load_state(found.arrays)
        start, position = found.step, found.position
    log: list[dict[str, float]] = []

    def done(step: plan.Step, stats: list[Any], norm: float) -> None:
        meter = Meter()
        for (batch, ref_log_odds), measured in zip(step.batches, stats, strict=True):
            meter.add(batch, measured, ref_log_odds)
        meter.gather(processes)
        log.append({"norm": norm, **{k: v for k, v in meter.result().items() if v is not None}})
        checkpoints.save(step.number + 1, engine.state(), {}, step.position, processes=processes)

    taken = plan.steps(
        data,
        batch_size=BATCH,
        num_steps=case.get("steps", STEPS),
        optimizer=OPTIMIZER,
        batching=batching,
        reference=reference,
        processes=processes,
        start=start,
        position=position,
    )
    loop.train(engine, taken, done, 1.0)
    engine.save(output / "trained")
    if processes.rank == 0:
        (output / "steps.json").write_text(json.dumps(log))


if __name__ == "__main__":
    model, folder, cases, words = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:]
    for name, case in cases.items():
        train(model, case, folder / name)
    sys.exit(cli.run(words))
