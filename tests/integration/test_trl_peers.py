"""TRL's own losses on the same tokens, where it has the objective."""

import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

trl = pytest.importorskip("trl")
torch = pytest.importorskip("torch")

import tiny  # noqa: E402
from bnf_core.objectives import Objective, Seen, batch_loss, parse, structure  # noqa: E402
from bnf_core.steps.batching import collate  # noqa: E402
from bnf_core.types import Batch, Drawn, Example  # noqa: E402
from bnf_torch.losses import token_log_odds  # noqa: E402
from bnf_torch.model import completion_logits  # noqa: E402
from bnf_torch.ops import OPS, tensors  # noqa: E402

RTOL = 1e-6


def rows() -> list[Example]:
    """Four pairs, lengths from one token to 23."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(5, 300, count))

    lengths = [(3, 5, 9), (6, 1, 23), (2, 12, 4), (4, 8, 8)]
    pairs = [(ids(p), ids(c), ids(r)) for p, c, r in lengths]
    return [
        Example(prompt, completion, label, group=i, pair=1 + i)
        for i, (prompt, chosen, rejected) in enumerate(pairs)
        for completion, label in ((chosen, True), (rejected, False))
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A policy and a reference that differ by about as much as training makes them."""
    from transformers import AutoModelForCausalLM

    folder = tiny.make_model(tmp_path_factory.mktemp("peer"), initializer_range=0.1)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return policy.eval(), reference.eval()


def log_odds(model: Any, batch: Batch) -> tuple[Any, Any]:
    positions, targets = (torch.from_numpy(x).long() for x in (batch.positions, batch.targets))
    logits = completion_logits(model, torch.from_numpy(batch.input_ids).long(), positions)
    return token_log_odds(logits, targets)


def ours(objective: Objective, models: tuple[Any, Any], baseline: float = 0.0) -> tuple[float, Any]:
    """Loss, and its gradient in the last layer's weights of the policy."""
    policy, reference = models
    batch = collate(rows(), 8)
    policy.zero_grad()
    o, entropy = log_odds(policy, batch)
    with torch.no_grad():
        r, _ = log_odds(reference, batch)
    where = tensors(structure(objective, batch, baseline), torch.device("cpu"))
    loss = batch_loss(objective, OPS, Seen(o, entropy, r, where))
    loss.backward()
    return loss.item(), policy.model.layers[-1].mlp.down_proj.weight.grad.clone()


def theirs(kind: str, models: tuple[Any, Any], **settings: Any) -> tuple[float, Any]:
    """TRL's DPO or KTO trainer's loss of the same rows, and the same gradient."""
    from datasets import Dataset

    policy, reference = models
    options: dict[str, Any] = {
        "max_length": None,
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 8 if kind == "kto" else 4,
        "disable_dropout": False,
        "gradient_checkpointing": False,
        "bf16": False,
    }
    base: Any
    if kind == "dpo":
        base, config = trl.DPOTrainer, trl.DPOConfig
        columns = [
            {"prompt_ids": a.prompt_ids, "chosen_ids": a.completion_ids, "rejected_ids": b.completion_ids}
            for a, b in zip(rows()[::2], rows()[1::2], strict=True)
        ]
    else:
        base, config = trl.KTOTrainer, trl.KTOConfig
        columns = [
            {"prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids, "label": row.label} for row in rows()
        ]

    class SameTokens(base):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tiny.make_tokenizer(Path(folder))
        trainer = SameTokens(
            model=policy,
            ref_model=reference,
            args=config(output_dir=folder, **options, **settings),
            train_dataset=Dataset.from_list(
                [{k: v if k == "label" else list(v) for k, v in row.items()} for row in columns]
            ),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        policy.zero_grad()
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(columns))])
        loss = trainer.compute_loss(policy, inputs)
        loss.backward()
        return loss.item(), policy.model.layers[-1].mlp.down_proj.weight.grad.clone()


@pytest.mark.parametrize(
    ("expression", "settings"),
    [
        ("dpo(beta=0.3)", {"beta": 0.3}),
        (
            "dpo(beta=0.3, label_smoothing=0.1, robust=True)",
            {"beta": 0.3, "label_smoothing": 0.1, "loss_type": "robust"},
        ),
        ("ipo", {"loss_type": "ipo", "beta": 0.1}),
        ("f_dpo(divergence=forward_kl)", {"f_divergence_type": "forward_kl", "beta": 0.1}),
        ("f_dpo(divergence=js)", {"f_divergence_type": "js_divergence", "beta": 0.1}),
        (
            "f_dpo(divergence=alpha, alpha=0.4)",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4, "beta": 0.1},
        ),
    ],
)
def test_pairs(models: tuple[Any, Any], expression: str, settings: dict[str, Any]) -> None:
    (loss, grad), (e_loss, e_grad) = ours(parse(expression), models), theirs("dpo", models, **settings)
    assert loss == pytest.approx(e_loss, rel=RTOL)
    assert (grad - e_grad).abs().max() <= 1e-5 * e_grad.abs().max()  # their log-probabilities are float32 sums


def test_single_rows(models: tuple[Any, Any]) -> None:
    settings = {"loss_type": "apo_zero_unpaired", "beta": 0.3}
    (loss, grad), (e_loss, e_grad) = (
        ours(parse("apo_zero_unpaired(beta=0.3)"), models),
        theirs("kto", models, **settings),
    )
    assert loss == pytest.approx(e_loss, rel=RTOL)
    assert (grad - e_grad).abs().max() <= 1e-5 * e_grad.abs().max()


@pytest.mark.parametrize("expression", ["cpo", "cpo(label_smoothing=0.2)", "simpo", "alphapo(alpha=0.25)", "orpo"])
def test_losses_without_a_reference(expression: str) -> None:
    """Their functions of the rows' log-likelihoods, given ours."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    objective: Any = parse(expression)
    batch = collate(rows(), 8)
    rng = np.random.default_rng(1)
    o = torch.tensor(rng.normal(1.0, 1.5, len(batch.targets)), dtype=torch.float32)
    log_p = -torch.nn.functional.softplus(-o.double())
    sums = torch.zeros(8, dtype=torch.float64).index_add_(0, torch.from_numpy(batch.sequence_ids).long(), log_p)
    lengths = torch.from_numpy(np.bincount(batch.sequence_ids))
    means = sums / lengths
    me = SimpleNamespace(
        beta=objective.beta,
        alpha=getattr(objective, "alpha", 0.0),
        simpo_gamma=getattr(objective, "gamma", 0.0),
        label_smoothing=getattr(objective, "label_smoothing", 0.0),
        loss_type="sigmoid" if objective.name == "cpo" else "simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )
    given = sums if objective.name == "cpo" else means
    if objective.name == "orpo":
        expected = (-means[::2] - ORPOTrainer.odds_ratio_loss(me, means[::2], means[1::2])[0]).mean()
    else:
        expected = CPOTrainer.cpo_loss(me, given[::2], given[1::2])[0].mean()
    if objective.name == "cpo":
        expected = expected - means[::2].mean()  # theirs is added by the trainer, as a mean over all tokens
    where = tensors(structure(objective, batch), torch.device("cpu"))
    loss = batch_loss(objective, OPS, Seen(o, 0 * o, 0 * o, where))
    assert loss.item() == pytest.approx(float(expected), rel=RTOL)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_samples_of_the_policy(beta: float) -> None:
    """Their loss of per-token log-probabilities, given ours."""
    objective: Any = parse(f"grpo(beta={beta}, epsilon=0.1, epsilon_high=0.15)")
    rng = np.random.default_rng(2)
    advantages = objective.advantages(rng.normal(size=8))
    lengths = [len(row.completion_ids) for row in rows()]
    old = [tuple(-rng.exponential(1.0, n).astype(np.float32)) for n in lengths]
    drawn = zip(rows(), old, advantages, strict=True)
    batch = collate([replace(row, drawn=Drawn(log_probs, float(a))) for row, log_probs, a in drawn], 8)
    log_p, log_r = (np.concatenate(old) + rng.normal(0, 0.2, sum(lengths)) for _ in range(2))
    o, r = (torch.tensor(x - np.log(-np.expm1(x)), dtype=torch.float32) for x in np.minimum([log_p, log_r], -1e-3))

    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def padded(x: Any) -> Any:
        return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, torch.as_tensor(x).double())

    leaf = o.clone().requires_grad_()
    me = MagicMock(
        beta=beta,
        epsilon_low=0.1,
        epsilon_high=0.15,
        loss_type="grpo",
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        model=SimpleNamespace(training=False),
    )
    me.accelerator.gather = lambda x: x
    me.accelerator.reduce = lambda x, reduction: x
    log_p_of = torch.nn.functional.logsigmoid
    me._get_per_token_logps_and_entropies.return_value = padded(log_p_of(leaf)), padded(0 * o), None
    inputs = {
        "prompt_ids": mask[:, :1].long(),
        "prompt_mask": mask[:, :1].long(),
        "completion_ids": mask.long(),
        "completion_mask": mask.long(),
        "advantages": torch.tensor(advantages),
        "old_per_token_logps": padded(np.concatenate(old)),
        "ref_per_token_logps": padded(log_p_of(r)),
    }
    expected = trl.GRPOTrainer._compute_loss(me, None, inputs)
    expected.backward()
    where = tensors(structure(objective, batch), torch.device("cpu"))
    ours = o.clone().requires_grad_()
    loss = batch_loss(objective, OPS, Seen(ours, 0 * o, r, where))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=RTOL)
    assert leaf.grad is not None and ours.grad is not None
    assert (ours.grad - leaf.grad).abs().max() <= RTOL * leaf.grad.abs().max()
