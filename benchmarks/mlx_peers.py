"""Other trainers on MLX, for `python -m benchmarks.step`: mlx-lm's LoRA fine-tuning, and DPO and KTO as mlx-lm-lora,
mlx-tune and unsloth_zoo have them.

Each takes the very tokens that `bnf train` would, and its own loop, batches and optimizer. Gradient checkpointing is
off.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx import optimizers
from mlx_lm.tuner.callbacks import TrainingCallback

from bnf_core.config import LoraConfig
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.steps.batching import pairs
from bnf_core.types import Example
from bnf_mlx import adapter
from bnf_mlx.model import load_model, resolve_device, resolve_dtype

Train = Callable[[Callable[[], None]], None]  # trains, and calls what it is given after every step

SFT, DPO = "mlx-lm LoRA SFT", "mlx-lm-lora DPO"
TUNE_DPO, TUNE_KTO = "mlx-tune DPO, reference precomputed", "mlx-tune KTO, without reference and baseline"
UNSLOTH_DPO, UNSLOTH_KTO = "unsloth_zoo DPO, reference precomputed", "unsloth_zoo KTO, reference precomputed"


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

    def tune(kind: str) -> Callable[[Callable[[], None], Path], None]:
        def train(after_step: Callable[[], None], folder: Path) -> None:
            from mlx_tune import rl_trainers

            # It saves after every step, which it tells nobody of else.
            rl_trainers._save_adapters_and_config = lambda holder, path: holder.after_step()
            options: dict[str, Any] = {"max_steps": steps, "logging_steps": 1, "save_steps": 1}
            options["output_dir"] = str(folder)
            held = SimpleNamespace(model=adapter.add_adapter(loaded(), lora, 0), after_step=after_step)
            tokens = SimpleNamespace(encode=list, pad_token_id=0)  # what it would encode are tokens already
            columns: list[dict[str, Any]]
            if kind == TUNE_DPO:
                columns = [
                    {"prompt": a.prompt_ids, "chosen": a.completion_ids, "rejected": b.completion_ids}
                    for a, b in pairs(rows)
                ]
                args = rl_trainers.DPOConfig(per_device_train_batch_size=len(rows) // 2, **options)
                rl_trainers.DPOTrainer(held, columns, tokenizer=tokens, args=args).train()
            else:
                columns = [
                    {"prompt": row.prompt_ids, "completion": row.completion_ids, "label": row.label} for row in rows
                ]
                args = rl_trainers.KTOConfig(per_device_train_batch_size=len(rows), **options)
                rl_trainers.KTOTrainer(held, columns, tokenizer=tokens, args=args).train()

        return train

    def unsloth(kind: str) -> Callable[[Callable[[], None], Path], None]:
        def train(after_step: Callable[[], None], folder: Path) -> None:
            os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")  # or it asks for unsloth, off Apple silicon
            from unsloth_zoo.mlx import trainer as unsloth_trainer

            tokenizer = load_tokenizer(model)

            def text(ids: Sequence[int]) -> str:
                found = str(tokenizer.decode(list(ids)))
                if tokenizer(found, add_special_tokens=False)["input_ids"] != list(ids):
                    raise ValueError("its trainers take text, and these tokens are no text's")
                return found

            options: dict[str, Any] = {
                "max_steps": steps,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": False,
                "warmup_steps": 0,
                "append_eos": False,
                "max_seq_length": 2048,
                "disable_memory_limits": True,
                "precompute_ref_log_probs": True,
                "output_dir": str(folder),
            }
            columns: list[dict[str, Any]]
            policy = adapter.add_adapter(loaded(), lora, 0)
            if kind == UNSLOTH_DPO:
                columns = [
                    {
                        "prompt": text(a.prompt_ids),
                        "chosen": text(a.completion_ids),
                        "rejected": text(b.completion_ids),
                    }
                    for a, b in pairs(rows)
                ]
                args = unsloth_trainer.MLXDPOConfig(per_device_train_batch_size=len(rows) // 2, **options)
                made = unsloth_trainer.MLXDPOTrainer(policy, tokenizer, columns, args=args)
            else:
                columns = [
                    {"prompt": text(row.prompt_ids), "completion": text(row.completion_ids), "label": row.label}
                    for row in rows
                ]
                args = unsloth_trainer.MLXKTOConfig(per_device_train_batch_size=len(rows), **options)
                made = unsloth_trainer.MLXKTOTrainer(policy, tokenizer, columns, args=args)
            made.add_step_callback(lambda *_, **__: after_step())
            made.train()

        return train

    def placed(train: Callable[[Callable[[], None], Path], None]) -> Train:
        def run(after_step: Callable[[], None]) -> None:
            with tempfile.TemporaryDirectory() as folder, mx.stream(where):
                train(after_step, Path(folder))

        return run

    found: dict[str, Train | str] = {SFT: placed(sft)}
    packages: dict[str, tuple[str, dict[str, Callable[[Callable[[], None], Path], None]]]] = {
        "mlx_lm_lora": ("'bnf-align[bench]'", {DPO: dpo}),
        # What these ask for does not fit together with what stands here, though they run beside it.
        "mlx_tune": ("--no-deps mlx-tune mlx-embeddings mlx-vlm", {kind: tune(kind) for kind in (TUNE_DPO, TUNE_KTO)}),
        "unsloth_zoo": ("--no-deps unsloth_zoo", {kind: unsloth(kind) for kind in (UNSLOTH_DPO, UNSLOTH_KTO)}),
    }
    for package, (wanted, contenders) in packages.items():
        absent = importlib.util.find_spec(package) is None
        for name, train in contenders.items():
            found[name] = f"not installed: pip install {wanted}" if absent else placed(train)
    return found


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
