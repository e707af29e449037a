"""BNFTrainer: transformers' Trainer around an engine."""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from bnf_core.config import DataConfig, HardwareConfig, OptimizerConfig, Template, require_balance
from bnf_core.data.feedback import FeedbackTokenizer, Tally
from bnf_core.data.sources import load_feedback
from bnf_core.data.streaming import FeedbackStream
from bnf_core.data.tokenization import Tokenized, load_tokenizer, pad_id
from bnf_core.errors import UserError
from bnf_core.models.model_folder import resolve_model
from bnf_core.objectives import Objective, parse
from bnf_core.processes import Processes
from bnf_core.steps import steps as plan
from bnf_core.steps.baseline import Baseline
from bnf_core.steps.batching import MicroBatching, Rows, require_learnable, require_units
from bnf_core.steps.metrics import Meter
from bnf_core.steps.mismatched import unknown_before, with_mismatched
from bnf_core.steps.reference import NoReference, Reference, ReferenceCache
from bnf_core.steps.steps import Step
from bnf_core.storage.checkpoints import Checkpoint, Checkpoints, Facts
from bnf_core.storage.digests import rows_digest
from bnf_core.storage.files import agreed, let_others_read
from bnf_core.storage.reference_folder import StoredReference, fingerprint, open_reference
from bnf_core.storage.shards import BASELINE, REFERENCE, joined, put_under, under
from bnf_core.types import Batch, Example, Position
from bnf_torch import adapter
from bnf_torch.engine import TorchEngine
from bnf_torch.model import load_model, resolve_dtype
from bnf_torch.optimizer import Optimizer
from bnf_torch.processes import TorchProcesses, processes
from bnf_torch.sharding import Unfilled

logger = logging.getLogger(__name__)

Feed = str | Iterable[Mapping[str, Any]]  # rows of feedback, or the name of a file, folder or Hub data set

STATE = "state"  # the folder in a checkpoint that training goes on from

# Settings of TrainingArguments that would have no effect, or one that BNF does not allow; at their defaults they are
# accepted. With some, what to do instead.
REFUSED: Mapping[str, str] = {
    "fp16": "use bf16",
    "fp16_full_eval": "evaluation is computed as training is",
    "bf16_full_eval": "evaluation is computed as training is: use bf16",
    "fsdp": "shard with `accelerate launch`, as docs/cluster.md says",
    "fsdp_config": "shard with `accelerate launch`, as docs/cluster.md says",
    "deepspeed": "shard with `accelerate launch`, as docs/cluster.md says",
    "train_sampling_strategy": "rows are shuffled, and `group_by_length` puts similar lengths together",
    "ignore_data_skip": "a run resumes at its place in the data",
    "neftune_noise_alpha": "the reference would be noisy as well",
    "include_num_input_tokens_seen": "the metric `tokens` counts them",
    "dataloader_drop_last": "no row is dropped",
    "average_tokens_across_devices": "a loss is the mean over all devices",
} | dict.fromkeys(
    (
        *("accelerator_config", "activation_checkpointing_kwargs", "auto_find_batch_size", "batch_eval_metrics"),
        *("dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers"),
        *("dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
        *("ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters"),
        *("ddp_static_graph", "ddp_timeout", "debug", "enable_jit_checkpoint", "eval_accumulation_steps"),
        *("eval_do_concat_batches", "eval_use_gather_object", "gradient_checkpointing_kwargs", "include_for_metrics"),
        *("label_names", "label_smoothing_factor", "length_column_name", "liger_kernel_config", "optim_target_modules"),
        *("parallelism_config", "prediction_loss_only", "save_on_each_node", "torch_compile_backend"),
        *("torch_compile_mode", "torch_empty_cache_steps", "use_cache", "use_liger_kernel"),
    ),
    "",
)


@dataclass
class BNFConfig(TrainingArguments):
    """transformers' TrainingArguments, and how feedback becomes batches.

    An optimizer step takes per_device_train_batch_size × gradient_accumulation_steps × processes sequences, and its
    loss is their mean; per_device_train_batch_size is how many are on a device at a time.

    Raises:
        UserError: a setting of TrainingArguments that would have no effect.
    """

    max_length: int = 1024
    """Longest row in tokens; a longer prompt is cut from the left."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our columns by their names in the data, such as {"completion": "answer"}; default: the shape of rows is
    recognised."""
    label: str | None = None
    """A rule that makes labels of another column, such as "score >= 4"; see docs/data.md."""
    template: Template = "auto"
    """`auto`: the chat template for messages, plain strings as they are; `chat`: for both; `plain`: never."""
    chat_template: str | None = None
    """A chat template to use instead of the model's: its file or text, or the name of one of several that it has."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template is given besides the messages, such as {"enable_thinking": False}."""
    date: str | None = None
    """The day, as 2025-12-31, that chat templates which write today's date are told; default: today. Give it where a
    run may be resumed on another day, or has a stored reference."""
    packing: bool = False
    """Fill the rows of a micro-batch with several sequences each, up to `max_length` tokens."""
    group_by_length: bool = True
    """Put sequences of similar length into one micro-batch."""
    share_prompts: bool = True
    """Compute a prompt once for all its completions in a micro-batch, where the model's code can do it."""
    balance_labels: bool = False
    """Weigh rows so that all chosen ones together count as much as all rejected ones. Of this project, not of the paper
    (docs/data.md)."""
    skip_bad_rows: bool = False
    """Report bad rows instead of stopping at the first."""
    shuffle_buffer: int = 10_000
    """Rows to shuffle among at a time, of data without a length."""
    reference: str | None = None
    """A folder made by `bnf reference`; default: the reference is computed as rows are met."""
    objective: str = "bnf"
    """What is minimised, such as `dpo(beta=0.1)`; `bnf objectives` lists them."""
    router_aux_loss: float = 0.0
    """Coefficient of the load-balancing loss of a mixture-of-experts model's routers, over the whole step; 0: none."""

    def __post_init__(self) -> None:
        defaults = {setting.name: setting.default for setting in fields(TrainingArguments)}
        for name, hint in REFUSED.items():
            value, default = getattr(self, name, None), defaults.get(name)
            if value != default and (value or default is True):
                instead = f": {hint}" if hint else ""
                raise UserError(f"{name} is {value!r}, which BNFTrainer does not support{instead}")
        processes()  # joined on our terms, before accelerate would on its own
        compiles, self.torch_compile = self.torch_compile, False  # which would also switch TF32 on
        super().__post_init__()
        self.torch_compile = compiles

    @property
    def data(self) -> DataConfig:
        """How rows become tokens."""
        return DataConfig(
            path="",
            columns=self.columns,
            label=self.label,
            template=self.template,
            chat_template=self.chat_template,
            template_kwargs=self.template_kwargs,
            date=self.date,
            max_length=self.max_length,
            skip_bad_rows=self.skip_bad_rows,
        )


class BNFTrainer(Trainer):
    """Aligns a causal language model with the BNF loss; used as TRL's trainers are.

    transformers' loop, in which the engine of `bnf train` computes. What its dataloader gives is a whole optimizer
    step, so the loop's own gradient accumulation is 1.

    Args:
        model: a folder or Hub id, or a model; with an adapter on it, or `peft_config`, that alone is trained, and
            with neither all weights are. What is trained becomes float32.
        args: settings.
        train_dataset: rows as in docs/data.md: a list, a `datasets.Dataset` or `IterableDataset`, or the name of a
            file, folder or Hub data set. What has no length is streamed.
        eval_dataset: held-out rows, or several sets of them by name.
        processing_class: the tokenizer; default: the model's own.
        callbacks, optimizers: as for transformers' Trainer.
        peft_config: the adapter to add.
    Raises:
        UserError: a bad row, model or setting.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: BNFConfig | None = None,
        train_dataset: Feed | None = None,
        eval_dataset: Feed | Mapping[str, Feed] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        args = copy.copy(args or BNFConfig())
        group = processes()
        self.batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * group.count
        args.gradient_accumulation_steps = 1  # of the loop, which takes a whole step at a time
        args.ignore_data_skip = True  # the place in the data is in the checkpoints
        self.objective: Objective = parse(args.objective)
        if args.reference is not None and not self.objective.needs_reference:
            raise UserError(f"objective {self.objective.name} needs no reference, and reference is given: leave it out")
        folder = resolve_model(model) if isinstance(model, str) else Path(str(model.name_or_path))
        tokenizer = processing_class or load_tokenizer(folder)
        self.tokens = _Tokens(tokenizer, args, self.objective)
        self.rows = None if train_dataset is None else self.tokens.training_rows(train_dataset)
        self.held_out: list[tuple[Feed, list[Example]]] = []  # what has been tokenised
        self.resumed: tuple[str, Checkpoint] | None = None
        torch.manual_seed(args.seed + group.rank)
        self.engine = _engine(model, folder, args, peft_config, group, self.objective)
        self.batching = MicroBatching(
            args.per_device_train_batch_size,
            args.max_length if args.packing else None,
            args.group_by_length,
            multiple_of=group.count,
            share_prompts=args.share_prompts and self.engine.shares_prompts,
            unit=self.objective.unit,
        )
        stored = _stored_reference(args, folder, tokenizer, self.engine)
        streamed = isinstance(self.rows, FeedbackStream)
        self.reference: Reference = NoReference()
        if self.objective.needs_reference:
            if self.engine.full and streamed and self.objective.baseline_from == "mismatched":
                raise UserError(unknown_before(self.objective.name))
            if self.engine.full and streamed and stored is None:
                raise UserError("training all weights on streamed rows needs `reference`: make it with `bnf reference`")
            self.reference = ReferenceCache(self.engine.reference_log_odds, stored)
        self.baseline = Baseline(self.objective, self.engine, self.reference, self.batching, self.tokens.pad)
        self.meter = Meter(self.objective)
        self.position: Position | None = None
        super().__init__(
            self.engine.model,
            args,
            train_dataset=cast(Any, train_dataset),
            eval_dataset=cast(Any, eval_dataset),
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), _Epoch(self)],
            optimizers=optimizers,
        )
        torch.manual_seed(args.seed + group.rank)  # each process has dropout of its own

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.engine.full and not resume_from_checkpoint and isinstance(self.rows, Rows):
            # While the weights are the reference's still.
            for rows in (self.rows.examples, *map(self._held_out_rows, self._held_out_sets())):
                self._with_reference(with_mismatched(rows, self.objective))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        if self.rows is None:
            raise UserError("there is nothing to train on: give BNFTrainer a train_dataset")
        return _Steps(self)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self.batch_size

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer()
        self.engine.optimizer = Optimizer(self.engine.trainable, getattr(optimizer, "optimizer", optimizer))
        return optimizer

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return self.engine.to_train  # the engine has wrapped it already

    def _move_model_to_device(self, *args: Any, **kwargs: Any) -> None:
        """It is where the engine put it."""

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> tuple[list[Any], None]:
        step = next(epoch_iterator, None)
        return [] if step is None else [step], None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss, scores, self.norm = self.engine.accumulate(
            inputs.batches, self.args.max_grad_norm or None, inputs.baseline
        )
        for (batch, ref_log_odds), measured in zip(inputs.batches, scores, strict=True):
            self.meter.add(batch, measured, ref_log_odds, inputs.baseline)
        self.position = inputs.position
        return torch.tensor(loss, device=self.args.device)

    def _clip_grad_norm(self, model: nn.Module) -> float:
        return self.norm  # of gradients that the engine has clipped

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return self.norm

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # not counted

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With what the meter saw since the last time, where it is the loss of training that is logged."""
        if "loss" in logs:
            logs = logs | {k: v for k, v in _gathered(self.meter, self.engine.processes).items() if k != "loss"}
            self.meter = Meter(self.objective)
        super().log(logs, *args, **kwargs)

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """This process's batches of held-out rows, with their reference log-odds."""
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str) and isinstance(self.eval_dataset, Mapping) and data in self.eval_dataset:
            data = self.eval_dataset[data]
        if data is None:
            raise UserError("there is nothing to evaluate: give an eval_dataset")
        self.evaluated_rows = self._held_out_rows(data)
        return self._with_reference(self.evaluated_rows)

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Metrics by the names of `bnf_core.steps.metrics.Meter`, over all rows and processes; no predictions."""
        meter = Meter(self.objective)
        scores = [self.engine.evaluate(batch, ref_log_odds) for batch, ref_log_odds in dataloader]
        baseline = Baseline(self.objective, self.engine, self.reference, self.batching, self.tokens.pad)
        against = baseline(self.evaluated_rows, dataloader, scores)
        for (batch, ref_log_odds), said in zip(dataloader, scores, strict=True):
            meter.add(batch, said, ref_log_odds, against)
        rows = sum(self.engine.processes.sum(torch.tensor([len(batch.labels) for batch, _ in dataloader]).numpy()))
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in _gathered(meter, self.engine.processes).items()}
        return EvalLoopOutput(predictions=cast(Any, None), label_ids=None, metrics=metrics, num_samples=int(rows))

    def _held_out_sets(self) -> list[Feed]:
        data: Any = self.eval_dataset
        return [] if data is None else list(data.values()) if isinstance(data, Mapping) else [data]

    def _held_out_rows(self, data: Feed) -> list[Example]:
        known = next((rows for feed, rows in self.held_out if feed is data), None)
        if known is None:
            known = self.tokens.examples(data, "valid")
            self.held_out.append((data, known))
        return known

    def _with_reference(self, examples: Iterable[Example]) -> list[tuple[Batch, Any]]:
        group = self.engine.processes
        batching = replace(self.batching, micro_batch_size=self.args.per_device_eval_batch_size, group_by_length=True)
        return plan.with_reference(
            plan.my_share(list(examples), batching, group, self.tokens.pad), self.reference, group
        )

    # Checkpoints: safetensors and JSON

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder, group = Path(output_dir or str(self.args.output_dir)), self.engine.processes
        with agreed(group):
            if group.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
        self.engine.write(folder)
        if group.rank == 0:
            let_others_read(folder)
            self.tokens.tokenizer.save_pretrained(folder)
            (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        group = self.engine.processes
        arrays = self.engine.state()
        if group.rank == 0:
            known = put_under(REFERENCE, self.reference.state()) | put_under(BASELINE, self.baseline.state())
            arrays = joined(arrays, known)
        assert self.lr_scheduler is not None
        facts = self._facts() | {"scheduler": self.lr_scheduler.state_dict()}
        folder = Checkpoints(Path(output_dir) / STATE, keep=1)
        folder.save(self.state.global_step, arrays, facts, self.position, processes=group)

    def _save_rng_state(self, output_dir: str) -> None:
        """It is part of the engine's state."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """What holds of the run is checked; its weights are loaded with the optimizer's state."""
        there = {"objective": "bnf"} | self._found(resume_from_checkpoint).facts
        now = self._facts()
        changed = [f"{name} (then {there.get(name)}, now {now[name]})" for name in now if there.get(name) != now[name]]
        if changed:
            raise UserError(f"{resume_from_checkpoint} is of another run: {'; '.join(changed)}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        found = self._found(checkpoint)
        self.engine.load_state(found.arrays)
        if self.objective.needs_reference:
            self.reference.load_state(under(REFERENCE, found.arrays))
        self.baseline.load_state(under(BASELINE, found.arrays))
        self.position = found.position
        self.lr_scheduler.load_state_dict(found.facts["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:  # once more, for the loop may have drawn since
            self.engine.load_random_state(self._found(checkpoint).arrays)

    def _load_best_model(self) -> None:
        self.engine.load_weights(self._found(str(self.state.best_model_checkpoint)).arrays)

    def _found(self, checkpoint: str) -> Checkpoint:
        if self.resumed and self.resumed[0] == checkpoint:  # and verified
            return self.resumed[1]
        found, refused = Checkpoints(Path(checkpoint) / STATE, keep=1).newest(self.engine.processes)
        if found is None:
            reason = "; ".join(refused) or f"it has no {STATE} (save_only_model, or another trainer's)"
            raise UserError(f"training cannot resume from {checkpoint}: {reason}")
        self.resumed = checkpoint, found
        return found

    def _facts(self) -> Facts:
        """What must stay the same for a run to go on."""
        rows = rows_digest(self.rows.examples) if isinstance(self.rows, Rows) else "streamed"
        return {
            "training rows": rows,
            "sequences per step": self.batch_size,
            "seed": self.args.seed,
            "objective": str(self.objective),
        }


class _Steps:
    """The steps of one epoch after another, as the loop asks for them."""

    def __init__(self, trainer: BNFTrainer):
        self.trainer = trainer
        self._steps: Iterator[Step] | None = None

    def __len__(self) -> int:
        if not isinstance(self.trainer.rows, Rows):
            raise TypeError("streamed rows have no number")
        return self.trainer.rows.steps_per_epoch(self.trainer.batch_size)

    def __iter__(self) -> Iterator[Step]:
        trainer = self.trainer
        assert trainer.rows is not None
        if self._steps is None:  # by now a checkpoint, if there is one, is loaded
            self._steps = plan.steps(
                trainer.rows,
                batch_size=trainer.batch_size,
                num_steps=trainer.state.max_steps,
                optimizer=OptimizerConfig(),  # for a learning rate that nobody reads: transformers has schedules
                batching=trainer.batching,
                reference=trainer.reference,
                baseline=trainer.baseline,
                processes=trainer.engine.processes,
                pad_id=trainer.tokens.pad,
                start=trainer.state.global_step,
                position=trainer.position,
            )
        per_epoch = len(self) if isinstance(trainer.rows, Rows) else None
        for step in self._steps:
            yield step
            if per_epoch and (step.number + 1) % per_epoch == 0:
                return


class _Epoch(TrainerCallback):
    """After a resume the loop counts the steps of the epoch from there: corrected."""

    def __init__(self, trainer: BNFTrainer):
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        rows = self.trainer.rows
        steps = rows.steps_per_epoch(self.trainer.batch_size) if isinstance(rows, Rows) else state.max_steps
        state.epoch = state.global_step / steps


class _Tokens:
    """Rows of feedback as tokens; what is skipped or cut is logged."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: BNFConfig, objective: Objective):
        self.tokenizer, self.args, self.objective = tokenizer, args, objective
        self.pad = pad_id(tokenizer)
        self.feedback = FeedbackTokenizer.of(tokenizer, args.data)

    def training_rows(self, data: Feed) -> plan.Data:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        counted = isinstance(data, str) or hasattr(data, "__len__")
        if args.balance_labels:
            require_balance(self.objective, counted=counted)
        if counted:
            mismatched = self.objective.baseline_from == "mismatched"
            return Rows(
                self.examples(data, "train"),
                seed,
                self.objective.unit,
                mismatched=mismatched,
                balance=args.balance_labels,
            )
        report, unit = partial(self._report, whole=False), self.objective.unit
        return self.feedback.stream(
            data, "train", shuffle_buffer=args.shuffle_buffer, seed=seed, unit=unit, report=report
        )

    def examples(self, data: Feed, split: str) -> list[Example]:
        loaded = load_feedback(data, split, self.args.skip_bad_rows, self.feedback.reading)
        for message in loaded.skipped:
            logger.warning("skipped: %s", message)
        for note in Tally(self.args.max_length, neither=loaded.neither).notes():
            logger.warning("%s", note)
        if loaded.unused:
            logger.warning("columns that are not used: %s", ", ".join(sorted(loaded.unused)))
        tokens = self.feedback(loaded.rows)
        self._report(tokens)
        require_units(tokens.examples, self.objective.unit)
        return tokens.examples

    def _report(self, tokens: Tokenized, whole: bool = True) -> None:
        require_learnable(tokens.examples, self.objective)
        for message in tokens.skipped:
            logger.warning("skipped: %s", message)
        for note in self.feedback.tally(tokens).notes(whole):
            logger.warning("%s", note)


def _engine(
    model: str | PreTrainedModel | PeftModel,
    folder: Path,
    args: BNFConfig,
    peft_config: PeftConfig | None,
    group: Processes,
    objective: Objective,
) -> TorchEngine:
    """The model with what is to be trained, float32, on this process's device or spread over all of them."""
    named = isinstance(model, str)
    if group.together > 1:
        raise UserError(
            "tp_size: BNFTrainer does not split layers; `bnf train` does. Use dp_shard_size (FSDP2) instead"
        )
    sharded = isinstance(group, TorchProcesses) and group.sharded
    where = torch.device("cpu") if sharded else args.device
    unfilled = None
    if isinstance(model, str):
        dtype = resolve_dtype("bfloat16" if args.bf16 else "auto", args.device)
        weights_in = torch.float32 if peft_config is None else dtype
        if sharded and _can_wait(peft_config):
            unfilled = Unfilled(folder, args.device, weights_in, cast(TorchProcesses, group))
        base = unfilled.model if unfilled else load_model(folder, where, weights_in)
        base.requires_grad_(peft_config is None)
        model = base
    else:
        dtype = torch.bfloat16 if args.bf16 else model.dtype
        if not getattr(model, "is_quantized", False):
            cast(nn.Module, model).to(where)
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise UserError("the model has an adapter already: leave out peft_config to train it on")
        model.eval()
        model.requires_grad_(False)
        model = adapter.add_adapter(model, peft_config, args.seed)
    elif isinstance(model, PeftModel):
        adapter.require_removable(model.eval())
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()

    def fill() -> None:
        assert unfilled is not None
        unfilled.fill()
        if isinstance(model, PeftModel):
            adapter.fill(model, args.device, args.seed)

    checkpointing = bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)
    return TorchEngine(
        model,
        objective=objective,
        processes=group,
        device=args.device,
        dtype=dtype,
        source=folder if named else None,
        gradient_checkpointing=checkpointing,
        router_aux_loss=args.router_aux_loss,
        compile=args.torch_compile,
        fill=fill if unfilled else None,
    )


def _can_wait(config: PeftConfig | None) -> bool:
    """Whether a model may be sharded before it has weights: with an adapter that need not be tried on them."""
    settings = {} if config is None else config.to_dict()
    return config is None or (not adapter.not_plain(settings) and settings.get("init_lora_weights") is True)


def _stored_reference(
    args: BNFConfig, folder: Path, tokenizer: PreTrainedTokenizerBase, engine: TorchEngine
) -> StoredReference | None:
    if args.reference is None:
        return None
    if not (folder / "config.json").is_file():
        raise UserError("reference is given, and can be checked only against a model that is given by its folder")
    hardware = HardwareConfig(load_in_4bit=bool(getattr(engine.base, "is_loaded_in_4bit", False)))
    return open_reference(args.reference, fingerprint(folder, tokenizer, args.data, hardware, engine.dtype))


def _gathered(meter: Meter, group: Processes) -> dict[str, float]:
    """Of all processes, without what there was nothing to average for."""
    meter.gather(group)
    return {name: value for name, value in meter.result().items() if value is not None}
