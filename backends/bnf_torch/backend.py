"""The PyTorch backend as the entry point `bnf.backends` gives it: bnf_core.protocol.Backend."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnf_core.config import AttentionMasks, FineTuneType, LoraConfig, OptimizerConfig
from bnf_core.devices import require_cpu
from bnf_core.errors import UserError
from bnf_core.models.adapters import Layout
from bnf_core.models.model_config import family_of, full_config, rotation_note
from bnf_core.objectives import Objective
from bnf_core.processes import Processes
from bnf_core.protocol import Backend, Engine, Inspector, Losses, Measures

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class TorchBackend(Backend):
    name = "torch"
    requires = ("torch", "transformers", "peft")
    adapter_layout: Layout = "peft"
    follows_config = True

    def preference(self) -> int:
        return 2

    def fused_loss(self) -> Callable[..., Any]:
        from bnf_torch.linear import linear_bnf_loss

        return linear_bnf_loss

    def losses(self, device: str = "auto") -> Losses:
        from bnf_torch.model import resolve_device
        from bnf_torch.numpy_losses import TorchLosses

        return TorchLosses(resolve_device(device))

    def devices(self) -> list[str]:
        from bnf_torch.model import devices

        return devices()

    def processes(self) -> Processes:
        from bnf_torch.processes import processes

        return processes()

    def load(
        self,
        model: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        load_in_4bit: bool = False,
        adapter: Path | None = None,
        fine_tune_type: FineTuneType | None = None,
        lora: LoraConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        objective: Objective | None = None,
        gradient_checkpointing: bool = False,
        router_aux_loss: float = 0.0,
        attention_masks: AttentionMasks = "auto",
        compile: bool = False,
        deterministic: bool = False,
        seed: int = 0,
    ) -> Engine:
        import torch
        from peft import PeftModel

        from bnf_torch import adapter as adapters
        from bnf_torch.engine import TorchEngine
        from bnf_torch.model import load_model, resolve_device, resolve_dtype
        from bnf_torch.processes import TorchProcesses, local_rank

        group = self.processes()
        torch.manual_seed(seed + group.rank // group.together)  # dropout, where there is any
        where = resolve_device(device)
        if group.count > 1 and where.type == "cuda":
            where = torch.device("cuda", local_rank())
        computed_in = resolve_dtype(dtype, where)
        shards = group if isinstance(group, TorchProcesses) and group.sharded else None
        full = fine_tune_type == "full"
        if deterministic:
            require_cpu(where.type)
            if shards:
                raise UserError(
                    "deterministic is true, and FSDP2 sums gradients in an order of its own: use DDP, or one process"
                )
            torch.set_num_threads(1)  # how many there are decides how products and sums are cut
        _check(fine_tune_type, adapter, load_in_4bit, shards is not None, group.together, computed_in)
        weights_in = torch.float32 if full else computed_in
        unfilled = None
        if shards and not load_in_4bit:
            from bnf_torch.sharding import Unfilled

            unfilled = Unfilled(model, where, weights_in, shards)
        loaded = unfilled.model if unfilled else load_model(model, where, weights_in, load_in_4bit=load_in_4bit)
        trained: PreTrainedModel | PeftModel = loaded.requires_grad_(full)
        if adapter is not None:
            trained = adapters.load_adapter(loaded, adapter, fine_tune_type, lora)
        elif not full and fine_tune_type is not None and lora is not None:
            trained = adapters.add_lora(loaded, lora, seed, dora=fine_tune_type == "dora")

        def fill() -> None:
            assert unfilled is not None
            unfilled.fill()
            if isinstance(trained, PeftModel):
                adapters.fill(trained, where, adapter or seed)

        return TorchEngine(
            trained,
            optimizer,
            objective=objective,
            processes=group,
            device=where,
            dtype=computed_in,
            source=model,
            gradient_checkpointing=gradient_checkpointing,
            router_aux_loss=router_aux_loss,
            attention_masks=attention_masks,
            compile=compile,
            deterministic=deterministic,
            fill=fill if unfilled else None,
        )

    def notes(self, model: Path) -> list[str]:
        return [f"{family_of(model)} on PyTorch: {note}" for note in rotation_note(full_config(model))]

    def inspector(self, model: Path, dtype: str = "float32") -> Inspector:
        from bnf_torch.inspection import TorchInspector

        return TorchInspector(model, dtype)

    def measures(self, device: str = "auto", dtype: str = "auto", own_dtype: str | None = None) -> Measures:
        from bnf_torch.memory import TorchMeasures

        return TorchMeasures(device, dtype)

    def tracing(self, path: Path) -> AbstractContextManager[None]:
        from bnf_torch.tracing import tracing

        return tracing(path.with_suffix(".json"))

    def fuse(self, model: Path, adapter: Path, output: Path, *, dtype: str, dequantize: bool) -> None:
        from bnf_torch.adapter import fuse

        fuse(model, adapter, output, dtype)

    def describe(self) -> dict[str, str]:
        import peft
        import torch
        import transformers

        facts = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "cpu threads": str(torch.get_num_threads()),
        }
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            facts[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        return facts


def _check(
    fine_tune_type: FineTuneType | None,
    adapter: Path | None,
    load_in_4bit: bool,
    sharded: bool,
    together: int,
    dtype: "torch.dtype",
) -> None:
    """Raises UserError where settings do not go together."""
    import torch

    if fine_tune_type == "full" and load_in_4bit:
        raise UserError("4-bit weights cannot be trained: use fine_tune_type lora, or leave out hardware.load_in_4bit")
    if fine_tune_type == "full" and adapter is not None:
        raise UserError(f"full fine-tuning starts from a model, and {adapter} is an adapter: merge it into one first")
    if fine_tune_type == "full" and dtype == torch.float16:
        raise UserError("full fine-tuning in float16 would need loss scaling: use --dtype bfloat16 or float32")
    if load_in_4bit and together > 1:
        raise UserError("tp_size: layers of 4-bit weights are not split: use dp_shard_size (FSDP2) instead")
    if load_in_4bit and sharded and fine_tune_type == "dora":
        raise UserError("4-bit weights in shards go with fine_tune_type lora: use it, or DDP")
