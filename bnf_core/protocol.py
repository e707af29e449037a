"""What a backend is: the one contract between the jobs, the conformance suite and a framework.

Every array that crosses this line is NumPy, so neither side needs to know the other's framework.
N counts completion tokens, V the vocabulary, D the hidden size, B rows, T positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from numpy.typing import NDArray

from bnf_core.batching import Batch
from bnf_core.config import LoraConfig, OptimizerConfig

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
    """A backend's losses as the conformance suite sees them. Inputs come as float32 holding values that
    `dtype` can represent; the backend casts to `dtype` first."""

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


class Engine(Protocol):
    """A loaded model that can be trained. It holds gradients between `accumulate` and `update`. Only `accumulate`
    may draw random numbers, for dropout."""

    def reference_log_odds(self, batch: Batch) -> Array:
        """(N,) float32 log-odds under the same weights with the adapter off."""
        ...

    def evaluate(self, batch: Batch, ref_log_odds: Array) -> TokenStats:
        """Token statistics of the policy without gradients, as NumPy float32 (N,)."""
        ...

    def accumulate(self, batch: Batch, ref_log_odds: Array) -> TokenStats:
        """Forward and backward; adds the gradient of Σ coefficients · ℓ to what is held."""
        ...

    def update(self, learning_rate: float, max_grad_norm: float | None) -> float:
        """Clip, take one AdamW step and clear the gradients. Returns the norm before clipping; where that
        is not finite nothing is changed but the gradients, which are cleared."""
        ...

    def state(self) -> dict[str, Array]:
        """All that training has changed, by name: `weights/…`, the optimizer's moments and step counts, and the
        state of the generators that dropout draws from. Gradients that are held are no part of it."""
        ...

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Go back to a state; the same calls then give the same bits.

        Raises:
            UserError: the weights are of other names or shapes than this engine's.
        """
        ...

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """Greedy completions of token prompts, without the stop token."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in the ecosystem's own layout, atomically."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Found through the entry-point group `bnf.backends`; constructed without arguments."""

    name: str

    def losses(self, device: str = "auto") -> Losses: ...

    def devices(self) -> list[str]:
        """What `--device` accepts here, best first."""
        ...

    def load(
        self,
        model: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        lora: LoraConfig | None = None,
        adapter: Path | None = None,
        optimizer: OptimizerConfig | None = None,
        seed: int = 0,
    ) -> Engine:
        """Load a checkpoint folder; with `lora` add a fresh adapter to train, with `adapter` a saved one.

        Raises:
            UserError: no such model, no weights, unknown device, an adapter for another model.
        """
        ...

    def describe(self) -> dict[str, str]:
        """Versions, devices and measured facts for `bnf doctor`, plain text by name."""
        ...
