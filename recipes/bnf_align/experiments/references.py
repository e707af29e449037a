"""Other references than the model that training starts from."""

import shutil
from pathlib import Path

from rich.console import Console

from bnf_align.experiments import didactic
from bnf_align.experiments.rows import Mix, training_rows
from bnf_align.experiments.scales import Scale
from bnf_align.experiments.subjects import WordProblems
from bnf_core.config import OptimizerConfig
from bnf_core.errors import UserError
from bnf_core.objectives import parse
from bnf_core.protocol import Backend
from bnf_core.steps import loop, steps
from bnf_core.steps.batching import MicroBatching, Rows
from bnf_core.steps.reference import NoReference
from bnf_core.storage.files import replacing

TEMPERATURES = {"cold": 0.5, "hot": 2.0}


def reference_model(kind: str, model: Path, scale: Scale, backend: Backend, console: Console) -> Path:
    """The checkpoint of a reference, made where it is not there yet.

    Args:
        kind: `smaller`: of a quarter of the width; `cold`, `hot`: the model at another temperature; `stale`: the model
            before its pre-training was done; `trained`: the model fine-tuned on right answers.
        model: what training starts from.
    Raises:
        UserError: the scale has no such reference.
    """
    if scale.model is not didactic.didactic:
        raise UserError(f"reference {kind!r}: expected the didactic scale, whose references are made here")
    if kind == "smaller":
        return didactic.didactic(model.parent.parent, backend, console, didactic.SMALLER)
    if kind == "stale":
        return model.with_name(didactic.STALE)
    folder = model.with_name(kind)
    if not folder.exists():
        if kind in TEMPERATURES:
            with replacing(folder) as partial:
                _temper(model, TEMPERATURES[kind], partial)
        else:
            _fine_tune(model, scale, backend, folder)
    return folder


def _temper(model: Path, temperature: float, folder: Path) -> None:
    """The logits are those of the model divided by the temperature: so is the weight of the norm before the head."""
    from safetensors.numpy import load_file, save_file

    for path in model.iterdir():
        if path.is_file() and path.suffix == ".json":
            shutil.copy(path, folder)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] / temperature
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _fine_tune(model: Path, scale: Scale, backend: Backend, folder: Path) -> None:
    """A run of `nll` on the right answers of rows that no seed of an experiment has."""
    objective, count = parse("nll"), scale.steps * scale.batch_size
    optimizer = OptimizerConfig(learning_rate=scale.learning_rates[len(scale.learning_rates) // 2])
    engine = backend.load(
        model, device="cpu", dtype="float32", fine_tune_type="full", optimizer=optimizer, objective=objective
    )
    rows = [row for row in training_rows(model, scale, WordProblems(), 2 * count, -1, Mix()) if row.label]
    schedule = steps.steps(
        Rows(rows, seed=0),
        batch_size=scale.batch_size,
        num_steps=scale.steps,
        optimizer=optimizer,
        batching=MicroBatching(scale.batch_size),
        reference=NoReference(),
        processes=engine.processes,
    )
    loop.train(engine, schedule, lambda step, scores, norm: None, optimizer.max_grad_norm)
    engine.save(folder)
