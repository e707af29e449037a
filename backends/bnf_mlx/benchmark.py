"""What `bnf bench` measures on MLX: losses beside each other, bare matrix products, and memory."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from bnf_mlx.linear import linear_bnf_loss
from bnf_mlx.losses import bnf_token_loss, token_log_odds
from bnf_mlx.model import resolve_device, resolve_dtype

Job = Callable[[], None]  # does its work and waits until it is done
Loss = Callable[[mx.array, mx.array], mx.array]  # of the states (N, D) and the head (V, D)


class Benchmark:
    """
    Args:
        device, dtype: as `--device` and `--dtype` name them.
    """

    def __init__(self, device: str = "auto", dtype: str = "auto"):
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device) or mx.float32
        self.memory = "allocated by MLX"

    def facts(self) -> dict[str, str]:
        """What a figure depends on, by name."""
        return {
            "device": str(mx.device_info(self.device).get("device_name", self.device)),
            "dtype": str(self.dtype).removeprefix("mlx.core."),
            "mlx": version("mlx"),
            "mlx-lm": version("mlx-lm"),
        }

    def losses(self, n: int, d: int, vocab: int, *, train_head: bool) -> dict[str, Job | str]:
        """Forward and backward of each loss over the same N states."""
        with mx.stream(self.device):
            mx.random.seed(0)
            hidden = mx.random.normal((n, d)).astype(self.dtype)
            head = (mx.random.normal((vocab, d)) / d**0.5).astype(self.dtype)
            targets = mx.random.randint(0, vocab, (n,))
            reference = mx.random.normal((n,)) - 10
            coefficients = mx.random.normal((n,)) / n
            mx.eval(hidden, head, targets, reference, coefficients)

        def fused(h: mx.array, w: mx.array) -> mx.array:
            return linear_bnf_loss(h, w, targets, reference, coefficients, train_head=train_head)[0]

        def unfused(h: mx.array, w: mx.array) -> mx.array:
            return (coefficients * bnf_token_loss(*token_log_odds(h @ w.T, targets), reference)).sum()

        def literal(h: mx.array, w: mx.array) -> mx.array:
            losses = dense_form((h @ w.T).astype(mx.float32), targets, mx.sigmoid(reference))
            return (coefficients * losses).sum()

        def cross_entropy(h: mx.array, w: mx.array) -> mx.array:
            return nn.losses.cross_entropy((h @ w.T).astype(mx.float32), targets, reduction="mean")

        losses: dict[str, Loss] = {
            "linear_bnf_loss": fused,
            "unfused BNF": unfused,
            "BNF, the author's dense form": literal,
            "unfused cross-entropy": cross_entropy,
        }

        def job(loss: Loss) -> Job:
            def run() -> None:
                with mx.stream(self.device):
                    mx.eval(mx.value_and_grad(loss, argnums=(0, 1) if train_head else 0)(hidden, head))

            return run

        return {name: job(loss) for name, loss in losses.items()}

    def products(self, shapes: Sequence[tuple[int, int, int]], *, train_weights: bool) -> Job:
        """The matrix products that linear layers cannot do without, forward and backward and nothing else.

        Args:
            shapes: (tokens, inputs, outputs) of each layer.
            train_weights: the gradient of the weights as well: three products a layer instead of two.
        """
        with mx.stream(self.device):
            made = [[mx.random.normal(shape).astype(self.dtype) for shape in ((n, i), (o, i))] for n, i, o in shapes]
            mx.eval(made)

        def run() -> None:
            with mx.stream(self.device):
                for x, w in made:
                    y = x @ w.T
                    mx.eval([y @ w, y.T @ x] if train_weights else y @ w)

        return run

    def wait(self) -> None:
        """Until everything that was started is done."""
        mx.synchronize()

    def extra_memory(self, job: Job) -> float:
        """Peak bytes of a job beyond what was held before, as MLX counts them."""
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        job()
        return float(mx.get_peak_memory() - before)

    def peak_memory(self) -> float:
        """Of this process so far, bytes."""
        return float(mx.get_peak_memory())

    def free_memory(self) -> float:
        """Bytes that a run could still take; NaN where that cannot be told."""
        if limit := mx.device_info(self.device).get("max_recommended_working_set_size"):
            return float(limit) - mx.get_active_memory()
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            return float(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
        except OSError:
            return float("nan")

    def runtime_memory(self) -> float:
        """Bytes that this process holds by now, as `memory` counts them."""
        return float(mx.get_active_memory())


def dense_form(logits: mx.array, targets: mx.array, reference: mx.array, epsilon: float = 1e-6) -> mx.array:
    """The loss as its author computes it: the target distribution over all V tokens, with an epsilon against 0 / 0.

    Args:
        logits: (N, V).
        targets: (N,) int.
        reference: (N,) probabilities of the targets under the reference.
    Returns:
        (N,) losses.
    """
    log_p = logits - mx.logsumexp(logits, axis=1, keepdims=True)
    p, index = mx.stop_gradient(mx.exp(log_p)), targets[:, None]
    observed = mx.take_along_axis(p, index, axis=1)
    t = mx.minimum(observed / (reference[:, None] + epsilon), 1.0)
    target = mx.put_along_axis(p * (1 - t) / (1 - observed + epsilon), index, t, axis=1)
    return -(target * log_p).sum(axis=1)
