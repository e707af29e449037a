"""What a backend is: the one contract between the jobs, the conformance suite and a framework.

Every array that crosses this line is NumPy, so neither side needs to know the other's framework.
N counts completion tokens, V the vocabulary, D the hidden size, B rows, T positions.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bnf_core.config import AttentionMasks, FineTuneType, LoraConfig, OptimizerConfig
from bnf_core.errors import UserError
from bnf_core.models.adapters import Layout
from bnf_core.models.architecture import Architecture, Grid, Kept, Training
from bnf_core.models.layers import Layers
from bnf_core.objectives import Objective
from bnf_core.processes import ALONE, Processes
from bnf_core.sampling import Completion
from bnf_core.storage.shards import Shard
from bnf_core.types import Array, Batch, TokenScores


@dataclass(frozen=True)
class DenseResult:
    """token_log_odds and bnf_token_loss on dense logits, and the gradient of Σ weights · ℓ."""

    log_odds: Array  # (N,) float32
    other_entropy: Array  # (N,) float32
    token_loss: Array  # (N,) float32
    grad_logits: Array  # (N, V) float32, holding values of the input dtype


@dataclass(frozen=True)
class FusedResult:
    """linear_bnf_loss and its gradients."""

    loss: float
    log_odds: Array  # (N,) float32
    other_entropy: Array  # (N,) float32
    token_loss: Array  # (N,) float32
    grad_hidden: Array  # (N, D)
    grad_head: Array | None  # (V, D), None when the head is frozen


@dataclass(frozen=True)
class LogOddsResult:
    """linear_log_odds and its vector-Jacobian product."""

    log_odds: Array  # (N,) float32
    other_entropy: Array  # (N,) float32
    grad_hidden: Array  # (N, D)
    grad_head: Array | None  # (V, D), None when the head is frozen


@dataclass(frozen=True)
class BatchResult:
    """One optimizer step's loss, accumulated over its micro-batches."""

    loss: float  # Σ over all micro-batches: the mean over the global number of sequences
    sequence_loss: Array  # (sequences,) label · mean token loss, in the order of the micro-batches' rows
    grad_logits: list[Array]  # one (B, T, V) per micro-batch


class Losses(Protocol):
    """A backend's losses as the conformance suite sees them; conformance/SPEC.md has the clauses. Inputs come as
    float32 holding values that `dtype` can represent; the backend casts to `dtype` first. What a backend does not have
    it names in an optional attribute `lacks`: of "dense", "fused", "train_head", "batch", "cross_entropy",
    "log_odds" and "objective"."""

    dtypes: Sequence[str]  # of "float32", "bfloat16", "float16"

    def dense(self, logits: Array, targets: Array, ref_log_odds: Array, weights: Array, *, dtype: str) -> DenseResult:
        """logits (N, V), the rest (N,); gradient of Σ weights · ℓ in the logits."""
        ...

    def fused(
        self,
        hidden: Array,
        head_weight: Array,
        targets: Array,
        ref_log_odds: Array,
        coefficients: Array,
        *,
        dtype: str,
        train_head: bool,
        chunk_tokens: int | None = None,
    ) -> FusedResult:
        """hidden (N, D), head_weight (V, D), the rest (N,); loss is Σ coefficients · ℓ."""
        ...

    def batch(self, micro_batches: Sequence[tuple[Array, Batch, Array]], *, dtype: str) -> BatchResult:
        """Each micro-batch is logits (B, T, V), its Batch and its tokens' ref_log_odds (N,)."""
        ...

    def log_odds(
        self,
        hidden: Array,
        head_weight: Array,
        targets: Array,
        cotangent: Array,
        *,
        dtype: str,
        train_head: bool,
        chunk_tokens: int | None = None,
    ) -> LogOddsResult:
        """hidden (N, D), head_weight (V, D), the rest (N,); gradients of Σ cotangent · log_odds."""
        ...

    def objective(
        self,
        objective: Objective,
        log_odds: Array,
        other_entropy: Array,
        ref_log_odds: Array,
        batch: Batch,
        baseline: float,
    ) -> tuple[float, Array]:
        """The loss of a batch, its tokens' numbers (N,) given, and its gradient (N,) in the log-odds."""
        ...

    def cross_entropy(self, logits: Array, targets: Array, *, dtype: str) -> tuple[Array, Array]:
        """The framework's own cross-entropy: loss (N,) and the gradient of its sum, (N, V). The yardstick."""
        ...


class Engine(Protocol):
    """A loaded model that can be trained, alone or as one of the `processes` of a run; then all of them must call
    every method, in the same order. Only `step` may draw random numbers, for dropout: samples bring their own noise."""

    processes: Processes
    dtype: str  # of the weights that are not trained, or of all: float32, bfloat16 or float16

    @property
    def shares_prompts(self) -> bool:
        """Whether it can be given batches in which sequences share prompts: `Batch.shared`."""
        ...

    def reference_log_odds(self, batch: Batch) -> Array:
        """(N,) float32 log-odds under the weights that training starts from: with the adapter off, or, where all
        weights are trained, before the first step; after `refresh_reference`, under those of that moment.

        Raises:
            RuntimeError: all weights are trained, a step has been taken, and there are no others to go back to.
        """
        ...

    def refresh_reference(self) -> None:
        """From here on the reference is the policy as it now is: a copy of what is trained, which becomes part of
        `state`."""
        ...

    def evaluate(self, batch: Batch, ref_log_odds: Array) -> TokenScores:
        """What the policy says of each token, without gradients, as NumPy float32 (N,)."""
        ...

    def step(
        self,
        batches: Sequence[tuple[Batch, Array]],
        learning_rate: float,
        max_grad_norm: float | None,
        baseline: float = 0.0,
    ) -> tuple[list[TokenScores], float]:
        """Take one optimizer step: the gradient of the objective over all micro-batches and processes, clipped, then
        AdamW. A step whose loss or gradient is not finite is not taken.

        Args:
            batches: this process's micro-batches, each with its ref_log_odds (N,).
            learning_rate: of this step.
            max_grad_norm: clip the gradient to this norm; None: do not.
            baseline: what the objective's rewards are compared with, from `bnf_core.steps.baseline`.
        Returns:
            the policy's scores of each micro-batch's tokens as NumPy float32 (N,), and the global norm of the gradient
            before clipping: not finite where the step was not taken.
        Raises:
            RuntimeError: the engine was loaded without anything to train and an optimizer.
            MemoryError: the device's memory is full; so do `evaluate` and `sample`.
        """
        ...

    def state(self) -> Mapping[str, Array | Shard]:
        """All that training has changed, by name: `weights/…`, the optimizer's moments and step counts, the
        reference's weights where it was refreshed, and the state of the generators that dropout draws from; what this
        process is to save. An array may be copied only when it is asked for."""
        ...

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Go back to a state, given whole; the same steps then give the same bits.

        Raises:
            UserError: the weights are of other names or shapes than this engine's.
        """
        ...

    def sample(self, rows: Sequence[Completion]) -> None:
        """Draw completions, all at a time, until each is done; a prompt is computed once for all of its completions.
        Processes may have different rows, and as many calls each.

        Raises:
            UserError: a prompt, or what may follow it, that the model has no positions or tokens for.
        """
        ...

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """Greedy completions of token prompts, without the stop token."""
        ...

    def adapter_off(self) -> AbstractContextManager[None]:
        """Within it `sample`, `generate` and `evaluate` are of the model without its adapter, where it has one."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was trained, atomically, in the ecosystem's own layout: an adapter, or a whole model."""
        ...


class Inspector(Protocol):
    """A model on the CPU, opened up for `bnf check-model`. Its modules go by
    `bnf_core.models.model_config.module_path`, the same on every backend."""

    def linear_layers(self) -> set[str]:
        """Paths of what an adapter can be put on by name."""
        ...

    def trace(self, input_ids: Array) -> dict[str, tuple[Array, Array]]:
        """First input and output of every module that is called for input_ids (B, T) int32, by path, in the order in
        which they finish; the model itself is the path ""."""
        ...

    def observe(self, batch: Batch, lora: LoraConfig, seed: int) -> tuple[Array, Array, float, dict[str, Array]]:
        """One training step's numbers with an adapter whose A and B are both drawn by `bnf_core.models.lora`.

        Returns:
            The log-odds without and with the adapter, (N,) each, the BNF loss, and the gradients by path: of
            `….lora_a` (r, in), of `….lora_b` (out, r).
        """
        ...


class Measures(Protocol):
    """What a device has and what it does: memory and the speed of matrix products, for `bnf plan` and benchmarks."""

    device: Any
    memory: str  # what its figures count, in words
    over_products: float  # seconds of a training step beside those of its bare matrix products, as benchmarks found

    def facts(self) -> dict[str, str]:
        """What a figure depends on, by name: `device`, `dtype`, versions."""
        ...

    def grid(self, batch: Batch) -> Grid:
        """The sizes of a micro-batch as this backend computes it."""
        ...

    def layers(self, model: Path, training: Training) -> Layers:
        """What the layers of a checkpoint keep in memory, which the formulae do not know: measured, of its
        configuration alone.

        Raises:
            UserError: the backend cannot make such a model, or not measure it.
        """
        ...

    def kept(self, model: Architecture | Layers, training: Training, grid: Grid) -> Kept:
        """What a training step of such a micro-batch keeps in memory, by formulae or by what was measured."""
        ...

    def products(self, shapes: Sequence[tuple[int, int, int]], *, train_weights: bool) -> Callable[[], None]:
        """The matrix products that linear layers cannot do without, forward and backward and nothing else.

        Args:
            shapes: (tokens, inputs, outputs) of each layer.
            train_weights: the gradient of the weights as well: three products a layer instead of two.
        """
        ...

    def extra_memory(self, job: Callable[[], None]) -> float:
        """Peak bytes of a job beyond what was held before; NaN where that cannot be told."""
        ...

    def peak_memory(self) -> float:
        """Of this process so far, bytes."""
        ...

    def free_memory(self) -> float:
        """Bytes that a run could still take; NaN where that cannot be told."""
        ...

    def runtime_memory(self) -> float:
        """Bytes that this process holds by now, as `memory` counts them."""
        ...

    def wait(self) -> None:
        """Until everything that was started is done."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Found through the entry-point group `bnf.backends`; constructed without arguments.

    A backend derives from this class and gives `name`, `losses`, `devices` and `describe`. The rest is for training and
    for looking inside of models; as it stands here, it says that the backend has losses alone.

    Making one, `name`, `requires`, `adapter_layout`, `preference` and `prepare` need nothing but the core: no framework
    is loaded before it is known to be there, and `prepare` has run."""

    name: str
    requires: Sequence[str] = ()  # packages without which it cannot run, as they are imported
    adapter_layout: Layout | None = None  # of the adapters that it saves, loads and fuses; None: it has none
    follows_config: bool = False  # its models are transformers' own, which compute what config.json says

    def preference(self) -> int:
        """On this machine, beside other backends: `--backend auto` is the installed one with the highest. 0: it is
        used only where it is asked for by name."""
        return 0

    def prepare(self) -> None:
        """Called once by a command, before the framework is loaded. It may start the process again."""
        return

    def fused_loss(self) -> Callable[..., Any]:
        """The loss fused with the head, on arrays of the framework."""
        raise self._losses_alone()

    def losses(self, device: str = "auto") -> Losses: ...

    def devices(self) -> list[str]:
        """What `--device` accepts here, best first."""
        ...

    def processes(self) -> Processes:
        """Those that this run was launched on."""
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
        objective: Objective | None = None,
        gradient_checkpointing: bool = False,
        router_aux_loss: float = 0.0,
        attention_masks: AttentionMasks = "auto",
        compile: bool = False,
        deterministic: bool = False,
        seed: int = 0,
    ) -> Engine:
        """Load a checkpoint folder, with `adapter` a saved adapter on it.

        With `fine_tune_type` it is there to be trained: `lora` or `dora` add a fresh adapter (or train the saved
        one on), `full` trains all weights. Whatever is trained is float32. The objective is BNF by default.
        `attention_masks` and `compile` are as `HardwareConfig` says.
        With `router_aux_loss` above 0, the load-balancing loss of a mixture-of-experts model's routers over the global
        batch is added with this coefficient.
        With `deterministic` each micro-batch's gradient is added by itself, in the order of the step's micro-batches,
        whichever process has computed it.

        Raises:
            UserError: no such model, no weights, unknown device, an adapter for another model, or something this
                backend cannot do, such as bits that are kept on a GPU.
        """
        raise self._losses_alone()

    def tracing(self, path: Path) -> AbstractContextManager[None]:
        """What is computed within it is recorded, into a file of this path and an ending of the backend's.

        Raises:
            UserError: this backend cannot, or not here; when it is called.
        """
        raise UserError(f"the {self.name} backend records no traces: leave out profile")

    def describe(self) -> dict[str, str]:
        """Versions, devices and measured facts for `bnf doctor`, plain text by name."""
        ...

    def notes(self, model: Path) -> list[str]:
        """What to know of this checkpoint on this backend, in words; nothing for a family known to be right."""
        return []

    def inspector(self, model: Path, dtype: str = "float32") -> Inspector:
        """Open a checkpoint folder for comparison, its weights in that dtype.

        Raises:
            UserError: the model cannot be loaded.
        """
        raise self._losses_alone()

    def measures(self, device: str = "auto", dtype: str = "auto", own_dtype: str | None = None) -> Measures:
        """Of a device in a precision, as `--device` and `--dtype` name them.

        Args:
            own_dtype: the checkpoint's, where `auto` may mean that.
        """
        raise self._losses_alone()

    def fuse(self, model: Path, adapter: Path, output: Path, *, dtype: str, dequantize: bool) -> None:
        """Write a model and an adapter of this backend's layout as one model into the folder `output`, which is there.

        Args:
            dtype: of the weights written, or of the scales of quantised ones.
            dequantize: write plain weights of a quantised model.
        Raises:
            UserError: the model cannot be loaded, or the adapter does not fit it.
        """
        raise self._losses_alone()

    def _losses_alone(self) -> UserError:
        return UserError(f"the {self.name} backend has losses alone: it trains nothing and opens no models")
