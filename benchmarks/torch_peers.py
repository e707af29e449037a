"""Other trainers on PyTorch, for `benchmarks.step`: TRL's SFT, DPO and KTO, in the settings that make them fastest.

Each takes the very tokens that `bnf train` would: TRL's own tokenisation is left out. Their gradient checkpointing,
on by default, is off, as it is in `bnf train`: it would make each step slower by a fourth.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from bnf_core.config import LoraConfig
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.steps.batching import pairs
from bnf_core.types import Example
from bnf_torch.model import resolve_device, resolve_dtype

Train = Callable[[Callable[[], None]], None]  # trains, and calls what it is given after every step

SFT, DPO, KTO, APO = "TRL SFT", "TRL DPO", "TRL KTO", "TRL KTO, apo_zero_unpaired"
STORED = ", reference precomputed"


def peers(
    model: Path, rows: Sequence[Example], *, device: str, dtype: str, lora: LoraConfig, steps: int
) -> dict[str, Train | str]:
    """By name; of one that is missing, how to install it.

    Args:
        rows: of one optimizer step, the same in every step; a good and a bad one of each prompt.
        steps: how many will be taken.
    """
    kinds = [SFT, DPO, DPO + STORED, KTO, KTO + STORED, APO + STORED]
    if importlib.util.find_spec("trl") is None:
        return dict.fromkeys(kinds, "not installed: pip install 'bnf-align[bench]'")

    def train(kind: str) -> Train:
        def run(after_step: Callable[[], None]) -> None:
            with tempfile.TemporaryDirectory() as folder:
                _trainer(kind, model, rows, device, dtype, lora, steps, folder, after_step).train()

        return run

    return {kind: train(kind) for kind in kinds}


def _trainer(
    kind: str,
    model: Path,
    rows: Sequence[Example],
    device: str,
    dtype: str,
    lora: LoraConfig,
    steps: int,
    folder: str,
    after_step: Callable[[], None],
) -> Any:
    import trl
    from datasets import Dataset

    where = resolve_device(device)
    precision = resolve_dtype(dtype, where)
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": len(rows),
        "gradient_checkpointing": False,
        "max_length": None,
        "use_cpu": where.type == "cpu",
        "bf16": precision == torch.bfloat16,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    columns: list[dict[str, Any]]
    base: Any
    config: Any
    if kind == SFT:
        base, config = trl.SFTTrainer, trl.SFTConfig(**options)
        columns = [
            {
                "input_ids": row.prompt_ids + row.completion_ids,
                "labels": (-100,) * len(row.prompt_ids) + row.completion_ids,
            }
            for row in rows
        ]
    elif kind.startswith(DPO):
        options["per_device_train_batch_size"] = len(rows) // 2  # pairs
        options["precompute_ref_log_probs"] = kind.endswith(STORED)
        base, config = trl.DPOTrainer, trl.DPOConfig(**options)
        columns = [
            {"prompt_ids": a.prompt_ids, "chosen_ids": a.completion_ids, "rejected_ids": b.completion_ids}
            for a, b in pairs(rows)
        ]
    else:
        loss = "apo_zero_unpaired" if kind.startswith(APO) else "kto"
        options |= {"precompute_ref_log_probs": kind.endswith(STORED), "loss_type": loss}
        base, config = trl.KTOTrainer, trl.KTOConfig(**options)
        columns = [
            {"prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids, "label": row.label}
            | ({"KL_completion_ids": before.completion_ids} if loss == "kto" else {})
            for before, row in zip([*rows[-1:], *rows], rows, strict=False)
        ]

    class SameTokens(base):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # it holds tokens already

    return SameTokens(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=precision),
        args=config,
        train_dataset=Dataset.from_list(columns),
        processing_class=load_tokenizer(model),
        peft_config=PeftLoraConfig(
            r=lora.rank, lora_alpha=int(lora.alpha), target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[_AfterStep(after_step)],
    )


class _AfterStep(TrainerCallback):
    def __init__(self, after_step: Callable[[], None]):
        self.after_step = after_step

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.after_step()
