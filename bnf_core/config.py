"""Every setting of a run, typed, with its default and its meaning in one place.

The CLI makes its flags and `--help` from these classes; a YAML file holds the same keys.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from bnf_core.data.labels import LabelRule
from bnf_core.errors import UserError
from bnf_core.models.lora import UNADAPTED
from bnf_core.objectives import Objective, parse

Schedule = Literal["constant", "linear", "cosine"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Template = Literal["auto", "chat", "plain"]
FineTuneType = Literal["lora", "dora", "full"]
ServerKind = Literal["vllm", "sglang", "mlx-lm"]
AttentionMasks = Literal["auto", "blocks", "dense"]
ReferencePolicy = Literal["frozen", "refreshed", "previous"]


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685); the update is alpha / rank · B A."""

    rank: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """Scale of the update before it is divided by the rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input, 0 to 1."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers to adapt, such as q_proj; `all-linear` is every one in the decoder layers."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", self.rank, "an integer of at least 1")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number from 0 up to, not including, 1")
        for name in UNADAPTED & set(self.targets):
            _require(
                False, "lora.targets", name, "layers that use an adapter; transformers reads this one's weight past it"
            )
        _require(len(self.targets) > 0, "lora.targets", self.targets, "at least one layer name, or all-linear")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) and its learning-rate schedule."""

    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warmup: to zero by cosine or linearly, or not at all."""
    warmup_steps: int = 5
    """Optimizer steps of linear warmup."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the bias-corrected second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; null for no clipping."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "a number above 0")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "an integer of at least 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name}", value, "a number from 0 up to, not including, 1")
        _require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "a number above 0")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "a number of at least 0")
        if self.max_grad_norm is not None:
            _require(self.max_grad_norm > 0, "optimizer.max_grad_norm", self.max_grad_norm, "a number above 0, or null")


@dataclass
class HardwareConfig:
    """What computes."""

    backend: str = "auto"
    """`torch`, `mlx`, an installed third-party backend, or `auto`: MLX on Apple silicon, else PyTorch."""
    device: str = "auto"
    """`auto`, or what the backend calls it: cpu, cuda, mps, gpu."""
    dtype: DType = "auto"
    """Of the frozen weights and activations; what is trained and the losses are float32."""
    load_in_4bit: bool = False
    """Quantise the frozen weights to 4 bits while loading (bitsandbytes NF4; CUDA only)."""
    attention_masks: AttentionMasks = "auto"
    """Of packed and shared-prompt rows in training on PyTorch: `blocks` of 128 tokens (FlexAttention), or `dense`, of
    every two tokens; `auto`: blocks on CUDA where the model's code takes them, each sequence by itself on a CPU."""
    compile: bool = False
    """In training on PyTorch: compile the decoder layers (torch.compile), for some minutes at first, to be faster after
    that; results are the same but for round-off."""


@dataclass
class SourceConfig:
    """One of several sources of feedback. What it does not say is as `data` says."""

    path: str
    """A file, a folder or a Hub data set, as `data.path`."""
    name: str | None = None
    """What it is called in metrics and messages; default: the last part of its path."""
    weight: float | None = None
    """Its share of the rows of an epoch, beside the other sources' weights; default: all its rows, once an epoch."""
    rows: int | None = None
    """Instead: how many of its rows an epoch has."""
    split: str | None = None
    """As `data.split`."""
    subset: str | None = None
    """As `data.subset`."""
    revision: str | None = None
    """As `data.revision`."""
    columns: dict[str, str] | None = None
    """As `data.columns`."""
    label: str | None = None
    """As `data.label`."""
    template: Template | None = None
    """As `data.template`."""
    chat_template: str | None = None
    """As `data.chat_template`."""
    template_kwargs: dict[str, Any] | None = None
    """As `data.template_kwargs`."""

    def __post_init__(self) -> None:
        _require(self.path != "", "path", "", "a file, a folder or a Hub data set")
        named = self.name is None or bool(re.fullmatch(r"[\w.@ -]+", self.name))
        _require(named, "name", self.name, "letters, digits and .-_@, since it begins the names of metrics")
        share = self.weight is None or 0 <= self.weight < math.inf
        _require(share, "weight", self.weight, "a number of at least 0")
        _require(self.rows is None or self.rows >= 1, "rows", self.rows, "an integer of at least 1")
        _require(self.weight is None or self.rows is None, "rows", self.rows, "either rows or a weight")

    @property
    def called(self) -> str:
        """Its name, or the last part of its path."""
        own = Path(self.path).name
        return self.name or re.sub(r"[^\w.@ -]", "_", Path(own).stem if Path(own).suffix in FILES else own)


class Where(NamedTuple):
    """Where feedback is."""

    path: str  # a file, a folder or a Hub data set
    subset: str | None = None  # of a Hub data set
    revision: str | None = None

    def __str__(self) -> str:
        subset = f"/{self.subset}" if self.subset else ""
        return f"{self.path}{subset}{f'@{self.revision}' if self.revision else ''}"


FILES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass
class DataConfig:
    """Feedback and how it becomes tokens."""

    path: list[Any] | str
    """A .jsonl, .json, .csv or .parquet file, a folder with train and valid files, or a Hub data set; or a list of
    several sources, [{path: a.jsonl, weight: 2}, {path: owner/name, subset: math, weight: 1}]."""
    split: str | None = None
    """Which split of a folder or Hub data set to train on, such as train_prefs; default: train."""
    subset: str | None = None
    """Which subset (configuration) of a Hub data set; default: its only one, or its default."""
    revision: str | None = None
    """Which commit, branch or tag of a Hub data set; default: the newest of its main branch."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our columns by their names in the data, such as {prompt: question, completion: answer, label: correct}; default:
    the shape of rows is recognised."""
    label: str | None = None
    """A rule that makes labels of another column, such as "score >= 4", "rank <= 1", "score > mean" (of the prompt's
    completions) or "score in top 1"; or the name of a column of labels that are 0 and 1 or text."""
    template: Template = "auto"
    """`auto`: the chat template for messages, plain strings as they are; `chat`: the chat template for both;
    `plain`: never."""
    chat_template: str | None = None
    """A chat template to use instead of the model's: its file or text, or the name of one of several that the model
    has."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template is given besides the messages, such as {enable_thinking: false}; a row's own
    `chat_template_kwargs` come over it."""
    date: str | None = None
    """The day, as 2025-12-31, that chat templates which write today's date are told; default: the day the run began,
    that of `reference`, or that of the run which trained `adapter`."""
    max_length: int = 1024
    """Longest row in tokens; a longer prompt is cut from the left."""
    skip_bad_rows: bool = False
    """Count and list bad rows instead of stopping at the first."""
    streaming: bool = False
    """Read training rows as they are needed, for data larger than memory; set `max_steps` as well."""
    shuffle_buffer: int = 10_000
    """With `streaming`: shuffle among so many rows at a time."""
    cache: bool = True
    """Keep tokens on this machine's disk, for the other processes of the run and for later runs; `bnf data cache` lists
    and removes them."""

    def __post_init__(self) -> None:
        if self.label is not None:
            LabelRule.parse(self.label)
        _require(self.shuffle_buffer >= 1, "data.shuffle_buffer", self.shuffle_buffer, "an integer of at least 1")
        _require(self.max_length >= 2, "data.max_length", self.max_length, "an integer of at least 2")
        if not isinstance(self.path, str):
            self.path = _sources("data", self.path, self.streaming)
        _require(self.date is None or _is_day(self.date), "data.date", self.date, "a day as 2025-12-31")

    def each(self) -> dict[str, "DataConfig"]:
        """These settings for each source, by its name: what a source says comes over what all have. A single one has no
        name."""
        if isinstance(self.path, str):
            return {"": self}
        own = [field.name for field in fields(SourceConfig) if field.name not in ("name", "weight", "rows")]
        each = {}
        for source in self.path:
            said = {name: value for name in own if (value := getattr(source, name)) is not None}
            each[source.called] = replace(self, **said)
        return each

    def called(self, split: str) -> str:
        """What the data call train, valid or test."""
        return self.split if split == "train" and self.split else split

    @property
    def where(self) -> "Where":
        """Of a single source.

        Raises:
            UserError: there are several.
        """
        if not isinstance(self.path, str):
            raise UserError(f"data is a list of {len(self.path)} sources: expected one, all that this command takes")
        return Where(self.path, self.subset, self.revision)


@dataclass
class SamplingConfig:
    """How the tokens of a completion are chosen."""

    temperature: float = 0.0
    """0: always the likeliest token; 1: as likely as the model says; between: likely ones more often."""
    top_p: float = 1.0
    """Choose among the fewest tokens that have this share of the probability (nucleus sampling, arXiv 1904.09751)."""
    top_k: int = 0
    """Choose among so many of the likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Choose among tokens at least so likely beside the likeliest one (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens of the prompt and the completion by this (arXiv 1909.05858); 1: do not."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion, and are not part of it."""

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, "temperature", self.temperature, "a number of at least 0")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a share above 0, up to 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "an integer of at least 0")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "a share from 0 to 1")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "a number above 0")
        _require(all(self.stop), "stop", self.stop, "strings of at least one character")


@dataclass
class TrainConfig:
    """One training run."""

    command: ClassVar[str] = "train"  # of `bnf`, which takes these settings

    model: str
    """A checkpoint folder or a Hub model."""
    data: DataConfig
    valid: list[Any] | str | None = None
    """Held-out feedback, in any form that `data.path` takes; several are evaluated one by one, each under its name.
    Default: the data folders' own valid files."""
    valid_fraction: float = 0.0
    """Without held-out data: hold out this share of the prompts."""
    output: str = "runs/bnf"
    """Folder of the run: adapter, checkpoints, metrics.jsonl, config.yaml, run.png."""
    overwrite: bool = False
    """Replace a run that is already in the output folder."""
    resume: bool = False
    """Go on with the run in the output folder from its newest whole checkpoint."""
    resume_anyway: bool = False
    """With `resume`: resume although the data, the model or settings have changed."""
    objective: dict[str, Any] | str = field(default_factory=lambda: {"name": "bnf"})
    """What is minimised, by `name` and with its settings (`--objective dpo --objective.beta 0.3`), or a weighted sum
    (`--objective "bnf + 0.2*dpo"`); `bnf objectives` lists them."""
    router_aux_loss: float = 0.0
    """Add the load-balancing loss of a mixture-of-experts model's routers (arXiv 2101.03961), over the whole step, with
    this coefficient, such as the router_aux_loss_coef of its config.json. PyTorch only; no objective defines it."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    fine_tune_type: FineTuneType = "lora"
    """What is trained: low-rank adapters, the same with weight decomposition (DoRA, arXiv 2402.09353), or all
    weights."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    adapter: str | None = None
    """A saved adapter of this `lora.rank` and `lora.alpha` to train on, instead of a fresh one; the reference is still
    the model without it."""
    reference: str | None = None
    """A folder made by `bnf reference`; default: the reference is computed as rows are met."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 1
    """Passes over the data."""
    balance_labels: bool = False
    """Weigh rows so that all chosen ones together count as much as all rejected ones: over the training rows, in `bnf
    online` over the samples of an iteration. Of this project, not of the paper (docs/data.md)."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    micro_batch_size: int = 8
    """Sequences on each device at a time. This and the next five change memory and speed, not the result."""
    auto_batch: bool = False
    """Choose `micro_batch_size`: as many as fit into the memory that is free, by the formulae of `bnf plan`."""
    packing: bool = False
    """Fill the rows of a micro-batch with several sequences each, up to `data.max_length` tokens."""
    group_by_length: bool = True
    """Put sequences of similar length into one micro-batch."""
    share_prompts: bool = True
    """Compute a prompt once for all its completions in a micro-batch, where the model's code can do it."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again."""
    deterministic: bool = False
    """On the CPU: the same bits however a run is arranged, and on any number of processes. Each row, or pair, is
    computed alone; micro_batch_size, auto_batch, packing, group_by_length and share_prompts are set aside. A step takes
    1.7 times as long (docs/invariance.md)."""
    eval_every: int | None = None
    """Evaluate held-out data every so many steps; default: before the first and after the last."""
    save_every: int | None = 100
    """Save a checkpoint and what is trained every so many steps; both are always saved at the end and when
    interrupted."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep, the newest."""
    sample_every: int | None = None
    """Complete some held-out prompts every so many steps, into samples.jsonl and samples.md of the run folder."""
    sample_count: int = 4
    """How many prompts to complete."""
    sample_tokens: int = 128
    """Longest sample."""
    sample: SamplingConfig = field(default_factory=SamplingConfig)
    report_to: list[str] = field(default_factory=list)
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio."""
    profile: bool = False
    """Record the third to the fifth step of the run: trace.json in its folder, for ui.perfetto.dev (PyTorch), or
    trace.gputrace for Xcode (MLX on Metal)."""
    push_to_hub: str | None = None
    """At the end push what was trained to this repository of the Hub, OWNER/NAME, as `bnf push` does."""
    hub_private_repo: bool = False
    """Where it is made: for you and your organisation alone."""
    seed: int = 0
    """Of the order of rows and the adapter's initial weights; the same run on every backend."""

    def __post_init__(self) -> None:
        _require(0 <= self.valid_fraction < 1, "valid_fraction", self.valid_fraction, "a share from 0 up to 1")
        for name in ("epochs", "batch_size", "micro_batch_size", "keep_checkpoints", "sample_count", "sample_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        for name in ("max_steps", "eval_every", "save_every", "sample_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "an integer of at least 1, or null")
        _require(self.seed >= 0, "seed", self.seed, "an integer of at least 0")
        share = self.router_aux_loss
        _require(0 <= share < math.inf, "router_aux_loss", share, "a number of at least 0")
        _require(not (self.resume and self.overwrite), "overwrite", True, "false with resume, which keeps the run")
        _require(
            not self.data.streaming or self.max_steps is not None, "max_steps", None, "a number with data.streaming"
        )
        _require(self.resume or not self.resume_anyway, "resume_anyway", True, "resume as well")
        if self.deterministic:
            _require(not self.hardware.compile, "hardware.compile", True, "false with deterministic")
            _require(self.lora.dropout == 0, "lora.dropout", self.lora.dropout, "0 with deterministic")
            self.micro_batch_size = 1
            self.auto_batch = self.packing = self.group_by_length = self.share_prompts = False
        objective = self.make_objective()
        if self.balance_labels:
            require_balance(objective, counted=not self.data.streaming)
        if self.reference is not None and not objective.needs_reference:
            raise UserError(f"objective {objective.name} needs no reference, and reference is given: leave it out")

        if self.valid is not None and not isinstance(self.valid, str):
            self.valid = _sources("valid", self.valid)
            for i, source in enumerate(self.valid):
                for name in ("weight", "rows"):
                    _require(getattr(source, name) is None, f"valid[{i}].{name}", getattr(source, name), "none")

    def make_objective(self) -> Objective:
        """
        Raises:
            UserError: an unknown objective or setting, or a value that does not fit.
        """
        if isinstance(self.objective, str):
            return parse(self.objective)
        settings = dict(self.objective)
        return parse(str(settings.pop("name", "bnf")), settings)

    def as_dict(self) -> dict[str, Any]:
        """As in YAML; of sources what they say."""
        settings = asdict(self)
        for of, name in ((settings["data"], "path"), (settings, "valid")):
            if isinstance(of[name], list):
                of[name] = [{k: v for k, v in source.items() if v is not None} for source in of[name]]
        return settings

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted name, as on the command line."""
        return dict(flat(self.as_dict()))


@dataclass
class OnlineConfig(TrainConfig):
    """Train on the model's own samples: complete prompts, judge the completions, learn from them, and again. `data` are
    the prompts, `valid` or `valid_fraction` held-out ones."""

    command: ClassVar[str] = "online"

    judge: str = ""
    """What says how good a completion is: math, number, regex, json-schema, contains, equals, length, reasoning-gym,
    reward-model, llm or module:function, with settings, as number(tolerance=0.01), or a weighted sum of them."""
    label: str = "score >= 0.5"
    """Which completions are chosen, by the judge's `score`: beside a number, beside the `mean` of the prompt's, or
    `score in top 1` of them; the others are rejected."""
    iterations: int = 100
    """How often to sample."""
    prompts_per_iteration: int = 8
    """Prompts of an iteration, in a seeded order of all that there are."""
    samples_per_prompt: int = 4
    """Completions of each."""
    updates_per_batch: int = 1
    """Optimizer steps on the samples of an iteration; at 1 none is ever stale."""
    reference_policy: ReferencePolicy = "frozen"
    """`frozen`: the reference is the policy as it was at the start; `refreshed`: as it was some iterations ago;
    `previous`: as it was in the iteration before."""
    refresh_every: int = 10
    """With reference_policy refreshed: every so many iterations."""
    sample: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=1.0))
    sample_tokens: int = 256
    """Longest completion."""
    sample_batch_size: int = 32
    """Completions drawn on each device at a time: memory and speed, not the result."""
    sampler: str | None = None
    """Sample on other machines: the address of a server that speaks the OpenAI completions protocol, up to, not
    including, /completions, such as http://localhost:8000/v1; default: this run samples itself."""
    sampler_kind: ServerKind = "vllm"
    """What answers there: vllm, sglang or mlx-lm."""
    judge_workers: int = 2
    """Processes that judge, for each process of the run."""
    judge_seconds: float = 10.0
    """Longest judgement; a completion that takes longer has none."""
    max_failed: float = 0.2
    """Stop where the judge fails on a larger share of the completions of an iteration."""
    eval_samples: int = 1
    """Completions of each held-out prompt: 1 is greedy, more are sampled."""
    save_every: int | None = 10

    epochs: int = field(default=1, init=False)
    max_steps: int | None = field(default=None, init=False)
    batch_size: int = field(default=1, init=False)
    auto_batch: bool = field(default=False, init=False)
    reference: str | None = field(default=None, init=False)
    sample_every: int | None = field(default=None, init=False)
    sample_count: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        names = ("iterations", "prompts_per_iteration", "samples_per_prompt", "updates_per_batch", "refresh_every")
        for name in (*names, "sample_batch_size", "judge_workers", "eval_samples"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        _require(bool(self.judge), "judge", self.judge, "a judge, such as math or my_module:my_function")
        _require(self.judge_seconds > 0, "judge_seconds", self.judge_seconds, "a number above 0")
        _require(0 <= self.max_failed <= 1, "max_failed", self.max_failed, "a share from 0 to 1")
        remote = self.sampler is not None and self.fine_tune_type != "lora"
        _require(not remote, "fine_tune_type", self.fine_tune_type, "lora, which is what a server can reload")
        _require(isinstance(self.data.path, str), "data", self.data.path, "one source of prompts")
        _require(isinstance(self.valid, str | None), "valid", self.valid, "one source of held-out prompts")
        _require(not self.data.streaming, "data.streaming", True, "false: prompts are read whole")
        _require(isinstance(self.data.path, str), "data.path", self.data.path, "one source of prompts")
        _require(isinstance(self.valid, str | None), "valid", self.valid, "one source of held-out prompts")
        _require(not self.data.skip_bad_rows, "data.skip_bad_rows", True, "false: a prompt is not passed over")
        _require(self.data.label is None, "data.label", self.data.label, "nothing: `label` makes labels of scores")
        others = sorted(self.data.columns.keys() - {"prompt"})
        _require(not others, "data.columns", self.data.columns, "the column of prompts alone")
        self.batch_size = self.prompts_per_iteration * self.samples_per_prompt
        self.max_steps = self.iterations * self.updates_per_batch
        super().__post_init__()

    def as_dict(self) -> dict[str, Any]:
        given = {f.name for f in fields(self) if f.init}
        return {name: value for name, value in super().as_dict().items() if name in given}


@dataclass
class EvaluateConfig:
    """Score labelled completions under a model, with or without an adapter."""

    model: str
    """A checkpoint folder or a Hub model."""
    data: DataConfig
    adapter: str | None = None
    """An adapter folder; its base model with the adapter off is the reference."""
    split: str = "valid"
    """Which file of a data folder: train, valid or test."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    micro_batch_size: int = 8
    """Sequences on the device at a time."""
    report: str | None = None
    """Write the metrics to this JSON file."""

    def __post_init__(self) -> None:
        _require(self.micro_batch_size >= 1, "micro_batch_size", self.micro_batch_size, "an integer of at least 1")


@dataclass
class DataCheckConfig:
    """Check every row of feedback: bad rows, labels, lengths, what would be cut, repeats and contradictions."""

    data: DataConfig
    model: str | None = None
    """A checkpoint folder or a Hub model, whose tokenizer counts tokens; default: lengths in characters."""
    split: str = "all"
    """Which file of a data folder: train, valid, test, or all that there are."""
    report: str | None = None
    """Write everything found to this JSON file."""
    picture: str | None = None
    """Draw the lengths in this .png or .svg file."""

    def __post_init__(self) -> None:
        _require(self.split in ("train", "valid", "test", "all"), "split", self.split, "train, valid, test or all")
        ending = (self.picture or ".png").lower()[-4:]
        _require(ending in (".png", ".svg"), "picture", self.picture, "a name that ends in .png or .svg")


@dataclass
class DataCacheConfig:
    """List the tokens that are kept on this machine, or remove them."""

    remove: bool = False
    """Remove them. A run that uses them goes on; one that starts later makes them again."""
    unused_days: int = 0
    """Only those that no run has used for so many days."""

    def __post_init__(self) -> None:
        _require(self.unused_days >= 0, "unused_days", self.unused_days, "an integer of at least 0")


@dataclass
class GenerateConfig:
    """Complete a prompt, or many from a file; greedily, unless `temperature` is above 0."""

    model: str
    """A checkpoint folder or a Hub model."""
    prompt: str | None = None
    """What the user says."""
    prompts: str | None = None
    """Instead of one prompt, a file of them: .txt with one a line, or what `data.path` of `bnf train` takes, with a
    column prompt."""
    split: str = "valid"
    """Which file of a folder of prompts: train, valid or test."""
    output: str | None = None
    """Write completions to this .jsonl file; default: the terminal."""
    adapter: str | None = None
    """An adapter folder."""
    template: Template = "chat"
    """`chat`: the prompt is a user's message; `plain`: the text is continued as it is."""
    chat_template: str | None = None
    """As `data.chat_template` of `bnf train`."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """As `data.template_kwargs` of `bnf train`."""
    samples: int = 1
    """Completions of each prompt."""
    sample: SamplingConfig = field(default_factory=SamplingConfig)
    max_tokens: int = 256
    """Longest completion."""
    batch_size: int = 16
    """Completions at a time: memory and speed, not the result."""
    seed: int = 0
    """Of the samples."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "samples", "batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        _require((self.prompt is None) != (self.prompts is None), "prompt", self.prompt, "either prompt or prompts")
        _require(self.seed >= 0, "seed", self.seed, "an integer of at least 0")
        _require(self.split in ("train", "valid", "test"), "split", self.split, "train, valid or test")
        ending = (self.output or ".jsonl").lower()
        _require(ending.endswith(".jsonl"), "output", self.output, "a name that ends in .jsonl")


@dataclass
class ReferenceConfig:
    """Compute the reference of every row once, into a folder that any number of runs then read."""

    model: str
    """A checkpoint folder or a Hub model."""
    data: DataConfig
    split: str = "all"
    """Which file of a data folder: train, valid, test, or all that there are."""
    output: str = "reference"
    """The folder to write, for `bnf train --reference`. Rows that it holds already are not computed again."""
    overwrite: bool = False
    """Begin anew where the folder holds the reference of another model, tokenizer or precision."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    micro_batch_size: int = 8
    """Sequences on the device at a time."""
    shard_rows: int = 1024
    """Rows in a file. A kill loses the work on one file."""

    def __post_init__(self) -> None:
        _require(self.split in ("train", "valid", "test", "all"), "split", self.split, "train, valid, test or all")
        for name in ("micro_batch_size", "shard_rows"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings one by one, `lora.rank` for rank in lora."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _sources(setting: str, given: Sequence[Any], streaming: bool = False) -> list[SourceConfig]:
    """A list of sources, each a SourceConfig, its settings by name, or its path alone."""
    _require(len(given) > 0, setting, [], "at least one source")
    sources = [_source(f"{setting}[{i}]", source) for i, source in enumerate(given)]
    names = [source.called for source in sources]
    for i, name in enumerate(names):
        at = f"{setting}[{i}]"
        _require(name not in names[:i], f"{at}.name", name, "another name: two sources are called so")
    weights = [source.weight for source in sources]
    if any(weight is not None for weight in weights):
        for i, weight in enumerate(weights):
            _require(weight is not None, f"{setting}[{i}].weight", None, "a number: give all sources weights, or none")
        _require(any(weights), f"{setting}[0].weight", weights[0], "a number above 0 of one source at least")
    if streaming:
        fixed = next((i for i, weight in enumerate(weights) if weight is None), None)
        expected = "a number: nobody knows how many rows a stream has, so each source of several needs a weight"
        _require(fixed is None or len(sources) == 1, f"{setting}[{fixed}].weight", None, expected)
    return sources


def _source(setting: str, given: Any) -> SourceConfig:
    if isinstance(given, SourceConfig):
        return given
    given = {"path": given} if isinstance(given, str) else given
    _require(isinstance(given, Mapping), setting, given, "a path, or settings by name, such as {path: a.jsonl}")
    hints = get_type_hints(SourceConfig)
    for name, value in given.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(hints)}"
            raise ValueError(f"unknown setting {setting}.{name}: {hint}")
        _require(_fits(value, hints[name]), f"{setting}.{name}", value, _in_words(hints[name]))
    _require("path" in given, f"{setting}.path", None, "a file, a folder or a Hub data set")
    try:
        return SourceConfig(**given)
    except ValueError as error:
        raise ValueError(f"{setting}.{error}") from error


def _fits(value: object, hint: Any) -> bool:
    """Whether a value of YAML is of a type: plain ones, a choice of words, names with values, and any of these."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind is Literal:
        return value in parts
    if kind is dict:
        return isinstance(value, dict) and all(
            _fits(x, part) for pair in value.items() for x, part in zip(pair, parts, strict=True)
        )
    if parts:
        return any(_fits(value, part) for part in parts)
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _in_words(hint: Any) -> str:
    kind = get_origin(hint) or hint
    if kind is Literal:
        return ", ".join(get_args(hint))
    words = {str: "text", int: "an integer", float: "a number", dict: "names with values", NoneType: "null"}
    return words[kind] if kind in words else " or ".join(map(_in_words, get_args(hint)))


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def require_balance(objective: Objective, *, counted: bool) -> None:
    """
    Args:
        counted: whether it is known how many rows there are of each label.
    Raises:
        UserError: `balance_labels` cannot be had.
    """
    if objective.unit != "row" or not objective.takes_weights:
        raise UserError(f"balance_labels is true, but {objective.name} does not weigh single rows: leave it out")
    if not counted:
        raise UserError("balance_labels is true, but nobody has counted the rows of streamed data: leave it out")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}: expected {expected}")
