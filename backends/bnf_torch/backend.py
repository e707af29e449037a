"""The PyTorch backend as the entry point `bnf.backends` gives it: bnf_core.protocol.Backend."""

from pathlib import Path

import torch

from bnf_core.config import FineTuneType, LoraConfig, OptimizerConfig
from bnf_core.processes import ALONE, Processes
from bnf_core.protocol import Engine, Losses
from bnf_torch import adapter as adapters
from bnf_torch.model import devices, load_model, resolve_device, resolve_dtype


class TorchBackend:
    name = "torch"

    def losses(self, device: str = "auto") -> Losses:
        from bnf_torch.numpy_losses import TorchLosses

        return TorchLosses(resolve_device(device))

    def devices(self) -> list[str]:
        return devices()

    def processes(self) -> Processes:
        return ALONE

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
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> Engine:
        from bnf_torch.engine import TorchEngine

        torch.manual_seed(seed)  # dropout, where there is any
        where = resolve_device(device)
        loaded = load_model(model, where, resolve_dtype(dtype, where))
        if adapter is not None:
            return TorchEngine(adapters.load_adapter(loaded, adapter), optimizer)
        if fine_tune_type == "lora" and lora is not None:
            return TorchEngine(adapters.add_lora(loaded, lora, seed), optimizer)
        return TorchEngine(loaded, optimizer)

    def describe(self) -> dict[str, str]:
        import peft
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
