"""One of several processes among which a model lies in shards: what test_shards.py forks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torch_worker
from bnf_core.config import FineTuneType, LoraConfig, OptimizerConfig
from bnf_core.errors import UserError
from bnf_core.steps.batching import collate
from bnf_core.types import Batch
from bnf_torch import adapter, saving
from bnf_torch.backend import TorchBackend
from bnf_torch.engine import TorchEngine
from bnf_torch.model import DTYPES, load_model
from bnf_torch.processes import TorchProcesses, processes, whole

CPU = torch.device("cpu")
LORA = LoraConfig(rank=2)  # on four processes some have no row of A
Case = tuple[str, FineTuneType, str, int]  # a model's folder, what is trained, the dtype, replicas


def batch() -> Batch:
    return collate(torch_worker.rows()[:4], 4)


def require_same_as_whole(model: Path, kind: FineTuneType, dtype: str, folder: Path) -> None:
    """A model in shards is the model that one process loads, to the bit: weights, buffers, adapter, what it computes,
    and what is saved of it."""
    sharded = TorchBackend().load(
        model, device="cpu", dtype=dtype, fine_tune_type=kind, lora=LORA, optimizer=OptimizerConfig()
    )  # fmt: skip
    base = load_model(model, CPU, torch.float32 if kind == "full" else DTYPES[dtype])
    trained = base if kind == "full" else adapter.add_lora(base, LORA, 0, dora=kind == "dora")
    alone = TorchEngine(trained.requires_grad_(True) if kind == "full" else trained, dtype=DTYPES[dtype])
    assert isinstance(sharded, TorchEngine)
    sharded._reshard()
    count = sharded.processes.count // processes().replicas  # type: ignore[attr-defined]
    expected = dict(alone.model.named_parameters())
    found = dict(sharded.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, p in found.items():
        rows = len(p.to_local())  # type: ignore[attr-defined]
        assert rows <= -(-p.shape[0] // count), f"{name}: {rows} of {p.shape[0]} rows on one of {count} processes"
        assert p.dtype == expected[name].dtype and p.requires_grad == expected[name].requires_grad, name
        assert torch.equal(whole(p.detach()), expected[name]), name
    buffers = dict(sharded.model.named_buffers())
    for name, buffer in alone.model.named_buffers():
        assert torch.equal(buffers[name], buffer) and buffers[name].dtype == buffer.dtype, name
    assert sharded.scored.head == alone.scored.head
    if dtype == "float32":
        scores = [e.evaluate(batch(), np.zeros(len(batch().targets), np.float32)) for e in (sharded, alone)]
        np.testing.assert_array_equal(scores[0].log_odds, scores[1].log_odds)
    require_same_saved(sharded, alone, folder)
    if kind != "full":
        require_same_loaded(sharded, model, kind, dtype, folder)


def require_same_saved(sharded: TorchEngine, alone: TorchEngine, folder: Path) -> None:
    saving.LARGEST_FILE = 30_000  # bytes, so that there are several files
    sharded.save(folder / "sharded")
    sharded.processes.barrier()
    if not sharded.full:
        return
    assert len(list((folder / "sharded").glob("model-*.safetensors"))) > 2
    again = load_model(folder / "sharded", CPU, torch.float32)
    for name, p in again.named_parameters():
        saved = dict(alone.base.named_parameters())[name].to(getattr(torch, alone.dtype)).float()
        assert torch.equal(p, saved), name


def require_same_loaded(trained: TorchEngine, model: Path, kind: FineTuneType, dtype: str, folder: Path) -> None:
    """An adapter that has moved is, once it is saved and loaded in shards, the same to the bit. Rejects one that is
    drawn afresh, and rows that are dealt otherwise."""
    with torch.no_grad():
        for name, p in trained.trainable.items():
            p.add_(len(name) / 64)
    trained.save(folder / "moved")
    trained.processes.barrier()
    again = TorchBackend().load(
        model, device="cpu", dtype=dtype, fine_tune_type=kind, lora=LORA, optimizer=OptimizerConfig(),
        adapter=folder / "moved",
    )  # fmt: skip
    assert isinstance(again, TorchEngine) and again.trainable.keys() == trained.trainable.keys()
    for name, p in again.trainable.items():
        assert torch.equal(whole(p.detach()), whole(trained.trainable[name].detach())), name


def loading(cases: Sequence[Case], folder: Path) -> None:
    group = processes()
    assert isinstance(group, TorchProcesses)
    for number, (model, kind, dtype, group.replicas) in enumerate(cases):
        print(model, kind, dtype, group.replicas, flush=True)
        require_same_as_whole(Path(model), kind, dtype, folder / str(number))


def training(model: Path, cases: dict[str, dict[str, Any]], replicas: int | None, folder: Path) -> None:
    group = processes()
    assert isinstance(group, TorchProcesses)
    group.replicas = replicas or group.replicas
    for name, case in cases.items():
        torch_worker.train(model, case, folder / name)


def training_traced(model: Path, case: dict[str, Any], folder: Path) -> None:
    """As `training`, with layers that are traced and then run as they are, which takes no C++ compiler."""
    from bnf_torch import compiling

    compiling.COMPILER = "eager"
    torch_worker.train(model, case | {"compile": True}, folder)


def training_in_4bit(model: Path, case: dict[str, Any], folder: Path) -> None:
    """As `training`, of weights that bitsandbytes quantises on the CPU."""
    from bnf_torch import model as loading

    loading.IN_4BIT = ("cpu",)
    torch_worker.train(model, case | {"load_in_4bit": True}, folder)


def refusals(experts: str, unseen: str, folder: Path) -> None:
    """What each process says of checkpoints that cannot be loaded: of six experts, and one that only the first sees."""
    group = processes()
    assert isinstance(group, TorchProcesses)
    said = []
    for model in (experts, unseen if group.rank == 0 else f"{unseen}-elsewhere"):
        try:
            TorchBackend().load(Path(model), device="cpu", fine_tune_type="full", optimizer=OptimizerConfig())
        except UserError as error:
            said.append(str(error))
    (folder / f"said-{group.rank}.json").write_text(json.dumps(said))


def splitting(model: Path, case: dict[str, Any], refused: dict[str, tuple[str, FineTuneType]], folder: Path) -> None:
    """Take a few steps; and what each process says of models, and kinds of adapter, that cannot be split."""
    torch_worker.train(model, case, folder)
    said = {}
    for name, (other, kind) in refused.items():
        try:
            TorchBackend().load(Path(other), device="cpu", fine_tune_type=kind, lora=LORA, optimizer=OptimizerConfig())
        except UserError as error:
            said[name] = str(error)
    (folder / f"said-{processes().rank}.json").write_text(json.dumps(said))


def memory(model: Path, folder: Path) -> None:
    """Load a model to train all its weights, save it as a checkpoint and as a model, and go back to the checkpoint."""
    from bnf_core.storage.checkpoints import Checkpoints

    before = status("VmHWM")
    engine = TorchBackend().load(
        model, device="cpu", dtype="float32", fine_tune_type="full", optimizer=OptimizerConfig()
    )
    peaks = {"before": before, "loaded": status("VmHWM")}
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    checkpoints.save(1, engine.state(), {}, processes=engine.processes)
    engine.save(folder / "model")
    peaks["saved"] = status("VmHWM")
    found, _ = checkpoints.newest(engine.processes)
    assert found is not None
    engine.load_state(found.arrays)
    peaks["resumed"] = status("VmHWM")
    (folder / f"peaks-{engine.processes.rank}.json").write_text(json.dumps(peaks))


def status(name: str) -> int:
    """Bytes, as Linux counts this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def trainer(model: Path, folder: Path) -> None:
    """Two steps of BNFTrainer, of all weights and of an adapter; leaves their losses. It may not load a whole model."""
    from peft import LoraConfig as PeftLoraConfig

    from bnf_torch import trainer as module

    def whole_model(*_: Any, **__: Any) -> Any:
        raise AssertionError("a process reads the whole model")

    losses = {}
    alone = processes().count == 1
    kept, module.load_model = module.load_model, module.load_model if alone else whole_model
    try:
        for name, peft_config in (("full", None), ("lora", PeftLoraConfig(r=4, target_modules="all-linear"))):
            args = module.BNFConfig(
                str(folder / name), use_cpu=True, per_device_train_batch_size=4 // processes().count, max_steps=2,
                learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
                disable_tqdm=True, max_length=64,
            )  # fmt: skip
            rows = [
                {"prompt": f"{i} plus 2?", "completion": f"It is {i + i % 2}.", "label": bool(i % 2)} for i in range(8)
            ]
            made = module.BNFTrainer(str(model), args, rows, peft_config=peft_config)
            made.train()
            losses[name] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    finally:
        module.load_model = kept
    if processes().rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
