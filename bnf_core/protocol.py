"""What a backend is: the one contract between the jobs, the conformance suite and a framework.

Every array that crosses this line is NumPy, so neither side needs to know the other's framework.
N counts completion tokens, V the vocabulary, D the hidden size, B rows, T positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from numpy.typing import NDArray

from bnf_core.batching import Batch, Example, Position
from bnf_core.config import FineTuneType, LoraConfig, OptimizerConfig
from bnf_core.pieces import Piece
from bnf_core.processes import Processes

Array = NDArray[Any]


class TokenStats(NamedTuple):
    """What is known of each completion token, detached, float32, (N,); arrays of whichever framework made it."""

    log_odds: Any
    other_entropy: Any
    token_loss: Any


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
class BatchResult:
    """One optimizer step's loss, accumulated over its micro-batches."""

    loss: float  # Σ over all micro-batches: the mean over the global number of sequences
    sequence_loss: Array  # (sequences,) label · mean token loss, in the order of the micro-batches' rows
    grad_logits: list[Array]  # one (B, T, V) per micro-batch


class Losses(Protocol):
    """A backend's losses as the conformance suite sees them; conformance/SPEC.md has the clauses. Inputs come as
    float32 holding values that `dtype` can represent; the backend casts to `dtype` first. What a backend does not have
    it names in an optional attribute `lacks`: of "dense", "fused", "train_head", "batch" and "cross_entropy"."""

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

    def cross_entropy(self, logits: Array, targets: Array, *, dtype: str) -> tuple[Array, Array]:
        """The framework's own cross-entropy: loss (N,) and the gradient of its sum, (N, V). The yardstick."""
        ...


@dataclass(frozen=True)
class Step:
    """All that one optimizer step needs, as this process sees it."""

    number: int  # from 0
    learning_rate: float
    batches: list[tuple[Batch, Array]]  # this process's micro-batches, each with its ref_log_odds (N,)
    examples: list[Example]  # of the global batch
    position: Position  # where the data go on after this step


# Called after every step, by every process: the step, the token statistics of its micro-batches, the global norm of
# the gradient before clipping. Where the norm is not finite the step was not taken.
Done = Callable[[Step, list[TokenStats], float], None]


class Engine(Protocol):
    """A loaded model that can be trained, alone or as one of the `processes` of a run; then all of them must call
    every method, in the same order. Only `fit` may draw random numbers, for dropout."""

    processes: Processes
    dtype: str  # of the weights that are not trained, or of all: float32, bfloat16 or float16

    @property
    def shares_prompts(self) -> bool:
        """Whether it can be given batches in which sequences share prompts: `Batch.shared`."""
        ...

    def reference_log_odds(self, batch: Batch) -> Array:
        """(N,) float32 log-odds under the weights that training starts from: with the adapter off, or, where all
        weights are trained, before the first step.

        Raises:
            RuntimeError: all weights are trained, and a step has been taken.
        """
        ...

    def evaluate(self, batch: Batch, ref_log_odds: Array) -> TokenStats:
        """Token statistics of the policy without gradients, as NumPy float32 (N,)."""
        ...

    def fit(self, steps: Iterator[Step], done: Done, max_grad_norm: float | None) -> None:
        """Take optimizer steps: the gradient of Σ coefficients · ℓ over all micro-batches and processes, clipped,
        then AdamW. A step whose loss or gradient is not finite is not taken. Whatever `done` or `steps` raises ends
        the training, and the model is as the last step left it."""
        ...

    def state(self) -> dict[str, Array | Piece]:
        """All that training has changed, by name: `weights/…`, the optimizer's moments and step counts, and the
        state of the generators that dropout draws from; what this process is to save."""
        ...

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Go back to a state, given whole; the same steps then give the same bits.

        Raises:
            UserError: the weights are of other names or shapes than this engine's.
        """
        ...

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """Greedy completions of token prompts, without the stop token."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was trained, atomically, in the ecosystem's own layout: an adapter, or a whole model."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Found through the entry-point group `bnf.backends`; constructed without arguments."""

    name: str

    def losses(self, device: str = "auto") -> Losses: ...

    def devices(self) -> list[str]:
        """What `--device` accepts here, best first."""
        ...

    def processes(self) -> Processes:
        """Those that this run was launched on."""
        ...

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
        """Load a checkpoint folder, with `adapter` a saved adapter on it.

        With `fine_tune_type` it is there to be trained: `lora` or `dora` add a fresh adapter (or train the saved
        one on), `full` trains all weights. Whatever is trained is float32.

        Raises:
            UserError: no such model, no weights, unknown device, an adapter for another model, or something this
                backend cannot do.
        """
        ...

    def describe(self) -> dict[str, str]:
        """Versions, devices and measured facts for `bnf doctor`, plain text by name."""
        ...
