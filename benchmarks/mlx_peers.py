"""Other trainers on MLX, for `python -m benchmarks.step`: mlx-lm's LoRA fine-tuning and mlx-lm-lora's DPO.

Each takes the very tokens that `bnf train` would, and its own loop, batches and optimizer.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx import optimizers
from mlx_lm.tuner.callbacks import TrainingCallback

from bnf_core.config import LoraConfig
from bnf_core.steps.batching import pairs
from bnf_core.types import Example
from bnf_mlx import adapter
from bnf_mlx.model import load_model, resolve_device, resolve_dtype

Train = Callable[[Callable[[], None]], None]  # trains, and calls what it is given after every step

SFT, DPO = "mlx-lm LoRA SFT", "mlx-lm-lora DPO"


def peers(
    model: Path, rows: Sequence[Example], *, device: str, dtype: str, lora: LoraConfig, steps: int
) -> dict[str, Train | str]:
    """By name; of one that is missing, how to install it.

    Args:
        rows: of one optimizer step, the same in every step; a good and a bad one of each prompt.
        steps: how many will be taken.
    """
    where = resolve_device(device)

    def loaded() -> nn.Module:
        return load_model(model, where, resolve_dtype(dtype, where))

    def sft(after_step: Callable[[], None], folder: Path) -> None:
        from mlx_lm.tuner.trainer import TrainingArgs, train

        train(
            adapter.add_adapter(loaded(), lora, 0),
            optimizers.AdamW(1e-5),
            [(list(row.prompt_ids + row.completion_ids), len(row.prompt_ids)) for row in rows],
            args=TrainingArgs(**_arguments(rows, steps, folder)),
            training_callback=_AfterStep(after_step),
        )

    def dpo(after_step: Callable[[], None], folder: Path) -> None:
        from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo

        _let_mlx_lm_lora_run_without_metal()
        arguments = _arguments(rows, steps, folder) | {"batch_size": len(rows) // 2}  # pairs
        train_dpo(
            adapter.add_adapter(loaded(), lora, 0),
            loaded(),  # it keeps the reference as a second model
            optimizers.AdamW(1e-5),
            [_pair(good, bad) for good, bad in pairs(rows)],
            args=DPOTrainingArgs(**arguments),
            training_callback=_AfterStep(after_step),
        )

    def placed(train: Callable[[Callable[[], None], Path], None]) -> Train:
        def run(after_step: Callable[[], None]) -> None:
            with tempfile.TemporaryDirectory() as folder, mx.stream(where):
                train(after_step, Path(folder))

        return run

    if importlib.util.find_spec("mlx_lm_lora") is None:
        return {SFT: placed(sft), DPO: "not installed: pip install 'bnf-align[bench]'"}
    return {SFT: placed(sft), DPO: placed(dpo)}


def _pair(good: Example, bad: Example) -> dict[str, Any]:
    """As mlx-lm-lora's data set has it."""
    return {
        "chosen": list(good.prompt_ids + good.completion_ids),
        "rejected": list(good.prompt_ids + bad.completion_ids),
        "chosen_prompt_length": len(good.prompt_ids),
        "rejected_prompt_length": len(good.prompt_ids),
    }


def _arguments(rows: Sequence[Example], steps: int, folder: Path) -> dict[str, Any]:
    """No evaluation, no saving on the way, a report after every step."""
    return {
        "batch_size": len(rows),
        "iters": steps,
        "steps_per_report": 1,
        "steps_per_eval": steps + 1,
        "steps_per_save": steps + 1,
        "max_seq_length": 1 + 32 * -(-max(map(len, rows)) // 32),  # mlx-lm pads to it
        "adapter_file": str(folder / "adapters.safetensors"),
    }


def _let_mlx_lm_lora_run_without_metal() -> None:
    """It asks for a figure that MLX gives for Metal devices alone, and sets a limit that other devices do not have."""
    if "max_recommended_working_set_size" not in mx.device_info():
        device_info = mx.device_info
        mx.device_info = lambda *args: device_info(*args) | {"max_recommended_working_set_size": 0}


class _AfterStep(TrainingCallback):
    def __init__(self, after_step: Callable[[], None]):
        self.after_step = after_step

    def on_train_loss_report(self, report: dict[str, Any]) -> None:
        self.after_step()

    def on_val_loss_report(self, report: dict[str, Any]) -> None:
        pass
