"""BNFTrainer from Python, as users of TRL's trainers expect it."""

# ruff: noqa: E402  (imports follow the check that PyTorch is installed)

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import slow

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import datasets
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

import tiny
from bnf_align.commands.reference import reference
from bnf_align.commands.train import train
from bnf_core.config import DataConfig, HardwareConfig, LoraConfig, OptimizerConfig, ReferenceConfig, TrainConfig
from bnf_core.errors import UserError
from bnf_core.steps.batching import Rows
from bnf_torch.trainer import REFUSED, BNFConfig, BNFTrainer

QUIET = Console(quiet=True)


def chat(count: int = 12) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        good = i % 2 == 0
        answer = f"It is {i // 2 + 2}." if good else "No idea, sorry." * (1 + i % 3)
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"What is {i // 2} plus 2?"}],
                "completion": [{"role": "assistant", "content": answer}],
                "label": good,
            }
        )
    return rows


PLAIN = [{"prompt": f"{i} and 2", "completion": f" make {i + 2}.", "label": i % 3 > 0} for i in range(7)]
PAIRS = [{"prompt": f"{i} and 2", "chosen": f" make {i + 2}.", "rejected": " No idea, sorry."} for i in range(4)]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def settings(folder: Path, **overrides: Any) -> BNFConfig:
    common: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": 64,
        "seed": 0,
    }
    return BNFConfig(str(folder), **(common | overrides))


def losses(trainer: BNFTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: BNFTrainer) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in trainer.engine.trainable.items()}


# Data and models


@pytest.mark.parametrize("rows", [chat(), slow(PLAIN), PAIRS], ids=["chat", "plain", "pairs"])
@pytest.mark.parametrize("kind", ["list", slow("Dataset"), "IterableDataset", "file"])
def test_data_in_every_form_is_the_same_rows(tiny_model, tmp_path, rows, kind):
    feed: Any = rows
    extra: dict[str, Any] = {}
    if kind == "Dataset":
        feed = datasets.Dataset.from_list(rows)
    if kind == "IterableDataset":
        feed, extra = datasets.Dataset.from_list(rows).to_iterable_dataset(), {"max_steps": 2, "shuffle_buffer": 1}
    if kind == "file":
        feed = str(tmp_path / "rows.jsonl")
        Path(feed).write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer, same = (
        BNFTrainer(str(tiny_model), settings(tmp_path / name, **more), data, peft_config=PeftLoraConfig(**LORA))
        for name, more, data in (("out", extra, feed), ("same", {}, rows))
    )
    sequences = len(rows) * (2 if rows is PAIRS else 1)
    assert isinstance(same.rows, Rows) and len(same.rows.examples) == sequences
    if kind != "IterableDataset":  # which is read as it is trained on
        assert isinstance(trainer.rows, Rows)
        # But for where they stand, of which the number of a pair is made.
        one, other = (
            [dataclasses.replace(e, source="", pair=int(e.pair > 0)) for e in x.rows.examples] for x in (trainer, same)
        )
        assert one == other
    elif rows is PAIRS:
        trainer.train()
        assert trainer.state.global_step == 2 and np.isfinite(losses(trainer)).all()
    if rows is PLAIN and kind == "list":
        trainer.train()
        assert trainer.state.global_step == -(-sequences // 4)
        logged = trainer.state.log_history[0]
        assert {"loss", "grad_norm", "learning_rate", "rewards/chosen", "logps/rejected"} <= logged.keys()


def test_it_takes_the_steps_that_bnf_train_takes(tiny_model, feedback, tmp_path):
    """On the same data and settings; the last batch of each epoch is short. Rejects another order of rows, a dropped
    tail, a loss divided by another number, another adapter to begin with, clipping left out."""
    config = TrainConfig(
        str(tiny_model),
        DataConfig(str(feedback), max_length=64),
        output=str(tmp_path / "bnf"),
        hardware=HardwareConfig("torch", "cpu"),
        lora=LoraConfig(rank=4, alpha=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0),
        batch_size=5,
        micro_batch_size=5,
        epochs=2,
        seed=3,
    )
    folder = train(config, QUIET).folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = [line for line in lines if line["kind"] == "train"]

    args = settings(
        tmp_path / "hf", per_device_train_batch_size=5, gradient_accumulation_steps=1, num_train_epochs=2, seed=3
    )
    trainer = BNFTrainer(str(tiny_model), args, str(feedback), peft_config=PeftLoraConfig(**LORA))
    trainer.train()
    assert len(expected) == 6
    np.testing.assert_allclose(losses(trainer), [line["loss"] for line in expected], rtol=1e-4, atol=1e-5)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    np.testing.assert_allclose(norms, [line["grad_norm"] for line in expected], rtol=1e-4)
    assert max(norms) > 1  # there was something to clip
    trainer.save_model(str(tmp_path / "adapter"))
    assert len({path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}) == 1
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "adapter", folder / "adapter"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_kto_trains_all_weights_as_bnf_train_does(tiny_model, feedback, tmp_path):
    """The reference of mismatched rows, too, is computed before the first step: afterwards the engine refuses to."""
    config = TrainConfig(
        str(tiny_model),
        DataConfig(str(feedback), max_length=64),
        output=str(tmp_path / "bnf"),
        hardware=HardwareConfig("torch", "cpu"),
        fine_tune_type="full",
        objective="kto(beta=1)",
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0),
        batch_size=5,
        micro_batch_size=5,
        epochs=2,
        seed=3,
    )
    lines = [json.loads(line) for line in (train(config, QUIET).folder / "metrics.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in lines if line["kind"] == "train"]
    args = settings(
        tmp_path / "hf",
        per_device_train_batch_size=5,
        gradient_accumulation_steps=1,
        num_train_epochs=2,
        learning_rate=1e-3,
        seed=3,
        objective="kto(beta=1)",
    )
    trainer = BNFTrainer(str(tiny_model), args, str(feedback), eval_dataset=str(feedback))
    trainer.train()
    np.testing.assert_allclose(losses(trainer), expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    streamed = datasets.Dataset.from_list(chat()).to_iterable_dataset()
    args = settings(tmp_path / "streamed", objective="kto", max_steps=2)
    with pytest.raises(UserError, match="whose reference has to be computed before the first step"):
        BNFTrainer(str(tiny_model), args, streamed)


@pytest.mark.parametrize("kind", ["name", "model", "adapted"])
def test_a_model_by_name_or_as_it_is(tiny_model, tmp_path, kind):
    model: Any = str(tiny_model)
    peft: Any = PeftLoraConfig(**LORA)
    if kind != "name":
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if kind == "adapted":
        from peft import get_peft_model

        model, peft = get_peft_model(model, peft), None
    trainer = BNFTrainer(
        model,
        settings(tmp_path),
        chat(),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=peft,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "saved")
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, trainer.engine.model.eval()(ids).logits)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    assert not torch.allclose(loaded(ids).logits, untrained(ids).logits)


@pytest.mark.parametrize("kind", ["name", "model"])
def test_without_an_adapter_all_weights_are_trained_and_saved_as_a_model(tiny_model, tmp_path, kind):
    model: Any = str(tiny_model) if kind == "name" else AutoModelForCausalLM.from_pretrained(tiny_model)
    trainer = BNFTrainer(model, settings(tmp_path), chat(), processing_class=AutoTokenizer.from_pretrained(tiny_model))
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.arange(10)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(ids).logits, trainer.engine.base.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == tiny.TEMPLATE


# Around the steps


def test_callbacks_evaluation_and_tensorboard(tiny_model, tmp_path):
    class Count(TrainerCallback):
        steps = logs = evaluations = 0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps += 1

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            self.logs += 1

        def on_evaluate(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:  # type: ignore[override]
            self.evaluations += 1

    pytest.importorskip("tensorboard")
    count = Count()
    args = settings(tmp_path, eval_strategy="steps", eval_steps=2, report_to="tensorboard", num_train_epochs=2)
    trainer = BNFTrainer(str(tiny_model), args, chat(), chat(6), peft_config=PeftLoraConfig(**LORA), callbacks=[count])
    trainer.train()
    assert (count.steps, count.evaluations) == (6, 3) and count.logs >= 9
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    assert {"eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/chosen", "eval_runtime"} <= set(
        evaluations[0]
    )
    assert [entry["epoch"] for entry in evaluations] == [2 / 3, 4 / 3, 2.0]
    events = list(tmp_path.rglob("events.out.tfevents*"))
    assert events and b"eval/rewards/margins" in events[0].read_bytes()


def test_evaluate_does_not_depend_on_the_batches(tiny_model, tmp_path):
    """Rejects a mean of the batches' means: three rows in batches of two."""
    found = []
    for size, packing in ((1, False), (2, False), (3, True)):
        args = settings(tmp_path, per_device_eval_batch_size=size, packing=packing)
        trainer = BNFTrainer(str(tiny_model), args, eval_dataset={"a": chat(3), "b": PLAIN})
        found.append(trainer.evaluate())
        assert isinstance(trainer.evaluate(chat(3))["eval_loss"], float)
    assert {"eval_a_loss", "eval_b_rewards/chosen"} <= found[0].keys()
    names = [name for name in found[0] if "_per_second" not in name and "runtime" not in name]
    for other in found[1:]:
        np.testing.assert_allclose([other[n] for n in names], [found[0][n] for n in names], rtol=1e-5, atol=1e-5)


def test_the_schedule_is_transformers_own(tiny_model, tmp_path):
    args = settings(tmp_path, lr_scheduler_type="linear", warmup_steps=1, num_train_epochs=2)
    trainer = BNFTrainer(str(tiny_model), args, chat(), peft_config=PeftLoraConfig(**LORA))
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(rates, [0.0, 1e-2, 8e-3, 6e-3, 4e-3, 2e-3])


# Resuming


def no_pickles(folder: Path) -> bool:
    return not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize("kind", ["full", "streamed", slow("lora")])
def test_training_goes_on_from_a_checkpoint_to_the_bit(tiny_model, tmp_path, kind):
    """From the middle of the second epoch, with dropout. Rejects optimizer moments, schedule, random numbers, the
    place in the data or the reference left out."""
    peft = None if kind == "full" else PeftLoraConfig(**LORA, lora_dropout=0.2)
    extra: dict[str, Any] = {"max_steps": 6, "shuffle_buffer": 3} if kind == "streamed" else {"num_train_epochs": 2}

    def trainer(folder: str, **more: Any) -> BNFTrainer:
        rows: Any = chat(11)
        if kind == "streamed":
            rows = datasets.Dataset.from_list(rows).to_iterable_dataset()
        options: dict[str, Any] = {"lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 4}
        args = settings(tmp_path / folder, **(options | extra | more))
        return BNFTrainer(str(tiny_model), args, rows, chat(3), peft_config=peft)

    whole = trainer("whole")
    whole.train()
    assert whole.state.global_step == 6
    assert no_pickles(tmp_path / "whole") and (tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").exists()
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    again = trainer("again")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert losses(again) == losses(whole)
    assert [e["epoch"] for e in again.state.log_history] == [e["epoch"] for e in whole.state.log_history]
    for name, w in weights(whole).items():
        assert np.array_equal(w, weights(again)[name]), name


def test_a_checkpoint_that_does_not_fit_is_refused(tiny_model, tmp_path):
    def trainer(rows: Any, rank: int = 4) -> BNFTrainer:
        args = settings(tmp_path, save_strategy="steps", save_steps=1)
        return BNFTrainer(str(tiny_model), args, rows, peft_config=PeftLoraConfig(**(LORA | {"r": rank})))

    trainer(chat()).train()
    with pytest.raises(UserError, match="training rows"):
        trainer(chat(8)).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="rank 4 in the checkpoint and 2 here"):
        trainer(chat(), rank=2).train(resume_from_checkpoint=True)
    state = next((tmp_path / "checkpoint-3" / "state").rglob("state-*.safetensors"))
    state.write_bytes(state.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged"):
        trainer(chat()).train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "checkpoint-3" / "state")
    with pytest.raises(UserError, match="it has no state"):
        trainer(chat()).train(resume_from_checkpoint=True)


def test_the_best_model_is_loaded_at_the_end(tiny_model, tmp_path):
    args = settings(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=False,  # margins grow: by this measure the first steps are the best
        num_train_epochs=2,
    )
    trainer = BNFTrainer(str(tiny_model), args, chat(), chat(4), peft_config=PeftLoraConfig(**LORA))
    trainer.train()
    margin = "eval_rewards/margins"
    found = {e["step"]: e[margin] for e in trainer.state.log_history if margin in e}
    best = min(found, key=lambda step: found[step])
    assert best != max(found)  # or there would be nothing to load
    assert trainer.evaluate()[margin] == pytest.approx(found[best], rel=1e-5)


# The reference


def test_a_stored_reference_is_used_and_another_models_refused(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat()))
    stored = tmp_path / "reference"
    data = DataConfig(str(rows), max_length=64)
    reference(
        ReferenceConfig(str(tiny_model), data, output=str(stored), hardware=HardwareConfig("torch", "cpu")), QUIET
    )
    peft = PeftLoraConfig(**LORA)
    computed = BNFTrainer(str(tiny_model), settings(tmp_path / "a"), str(rows), peft_config=peft)
    computed.train()
    with_stored = BNFTrainer(
        str(tiny_model), settings(tmp_path / "b", reference=str(stored)), str(rows), peft_config=peft
    )
    with_stored.engine.reference_log_odds = None  # type: ignore[method-assign,assignment]  # must not be called
    with_stored.train()
    np.testing.assert_allclose(losses(with_stored), losses(computed), rtol=1e-4, atol=1e-5)
    assert not with_stored.reference.state()["keys"].size
    with pytest.raises(UserError, match=r"data\.max_length"):
        BNFTrainer(str(tiny_model), settings(tmp_path, reference=str(stored), max_length=32), str(rows))


# Mistakes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"fp16": True}, "fp16 is True"),
        ({"fsdp": "full_shard"}, "accelerate launch"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        settings(tmp_path, **setting)


def test_rules_columns_and_weights_are_those_of_the_command_line(tiny_model, tmp_path):
    rows = [{"question": "2 + 2 =", "completion": f" {i}", "score": i % 3, "weight": 1 + i % 2} for i in range(6)]
    given = {"columns": {"prompt": "question"}, "label": "score > mean"}
    trainer = BNFTrainer(str(tiny_model), settings(tmp_path, **given), rows)
    assert [(e.label, e.weight) for e in trainer.rows.examples] == [(i % 3 == 2, 1 + i % 2) for i in range(6)]
    with pytest.raises(UserError, match=r"d2o.*3 of 6 rows have a graded label or a weight"):
        BNFTrainer(str(tiny_model), settings(tmp_path, objective="d2o", **given), rows)
    with pytest.raises(UserError, match=r"data.label is 'score >'"):
        BNFTrainer(str(tiny_model), settings(tmp_path, label="score >"), rows)


# What transformers' own loop, schedules, logging and saving make of them holds here as well.
TAKEN = set(
    """output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps max_grad_norm bf16 tf32 activation_checkpointing gradient_checkpointing
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start
    save_only_model save_strategy save_steps save_total_limit push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu skip_memory_metrics
    remove_unused_columns do_train do_eval do_predict resume_from_checkpoint local_rank torch_compile""".split()
)


def test_every_setting_of_transformers_is_taken_or_refused() -> None:
    known = {setting.name for setting in dataclasses.fields(TrainingArguments)}
    assert known - set(REFUSED) == TAKEN


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_each_refused_setting_is_named(tmp_path: Path, name: str) -> None:
    default = next(setting.default for setting in dataclasses.fields(TrainingArguments) if setting.name == name)
    with pytest.raises(UserError, match=f"{name} is .*does not support"):
        settings(tmp_path, **{name: default is not True})
    settings(tmp_path, **({} if default is dataclasses.MISSING else {name: default}))


def test_bad_rows_are_named_or_skipped(tiny_model, tmp_path):
    rows = [*chat(5), {"prompt": "x", "completion": "y", "label": "perhaps"}]
    with pytest.raises(UserError, match=r"list\[train\]:6: label"):
        BNFTrainer(str(tiny_model), settings(tmp_path), rows)
    trainer = BNFTrainer(str(tiny_model), settings(tmp_path, skip_bad_rows=True), rows)
    assert len(trainer.rows.examples) == 5
    with pytest.raises(UserError, match="no rows"):
        BNFTrainer(str(tiny_model), settings(tmp_path), [])
    with pytest.raises(UserError, match="train_dataset"):
        BNFTrainer(str(tiny_model), settings(tmp_path)).train()
    with pytest.raises(UserError, match="eval_dataset"):
        BNFTrainer(str(tiny_model), settings(tmp_path)).evaluate()
