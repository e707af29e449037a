"""transformers' Trainer around an engine: the loop under `bnf train`."""

import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from bnf_core.protocol import Done, Step, TokenStats
from bnf_torch.engine import TorchEngine


class EngineTrainer(Trainer):
    """transformers' training loop, in which an engine computes. What its dataloader gives is a whole optimizer step,
    so the loop's own gradient accumulation is 1."""

    engine: TorchEngine
    stats: list[TokenStats]  # of this process's micro-batches of the last step
    norm: float  # of the last step's gradient, before clipping

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return self.engine.to_train  # the engine has wrapped it already

    def _move_model_to_device(self, *args: Any, **kwargs: Any) -> None:
        """It is where the engine put it."""

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> tuple[list[Any], None]:
        step = next(epoch_iterator, None)
        if step is None:
            self.control.should_training_stop = True
        return [] if step is None else [step], None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss, self.stats, self.norm = self.engine.accumulate(inputs, self.args.max_grad_norm or None)
        return torch.tensor(loss, device=self.args.device)

    def _clip_grad_norm(self, model: nn.Module) -> float:
        return self.norm  # of gradients that the engine has clipped

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        return self.norm

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # not counted


def fit(engine: TorchEngine, steps: Iterator[Step], done: Done, max_grad_norm: float | None) -> None:
    """Take steps until there are no more, each at its own learning rate, and call `done` after each."""
    assert engine.optimizer is not None
    cuda = [engine.device] if engine.device.type == "cuda" else []
    # The trainer makes a folder and seeds the generators: neither is wanted here.
    with tempfile.TemporaryDirectory() as folder:
        with torch.random.fork_rng(cuda):
            trainer = _StepTrainer(engine, steps, done, max_grad_norm, folder)
        trainer.train()


class _StepTrainer(EngineTrainer):
    def __init__(
        self, engine: TorchEngine, steps: Iterator[Step], done: Done, max_grad_norm: float | None, folder: str
    ):
        assert engine.optimizer is not None
        self.engine, self.steps = engine, steps
        args = TrainingArguments(
            folder,
            use_cpu=engine.device.type == "cpu",
            max_steps=sys.maxsize,  # as many as there are
            max_grad_norm=max_grad_norm or 0.0,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        callbacks: list[TrainerCallback] = [_Done(self, done)]
        super().__init__(engine.model, args, callbacks=callbacks, optimizers=(engine.optimizer.torch, None))
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> Any:
        return self.steps

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        assert self.engine.optimizer is not None
        self.step = inputs
        self.engine.optimizer.set_learning_rate(inputs.learning_rate)
        return super().training_step(model, inputs)


class _Done(TrainerCallback):
    def __init__(self, trainer: _StepTrainer, done: Done):
        self.trainer, self.done = trainer, done

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.done(self.trainer.step, self.trainer.stats, self.trainer.norm)
