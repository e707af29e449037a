"""What `python -m benchmarks.loss` measures on MLX: losses beside each other, bare matrix products, and memory."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from bnf_mlx.linear import linear_bnf_loss
from bnf_mlx.losses import bnf_token_loss, token_log_odds
from bnf_mlx.memory import Job, MLXMeasures

Loss = Callable[[mx.array, mx.array], mx.array]  # of the states (N, D) and the head (V, D)


class Benchmark(MLXMeasures):
    """A device, and the losses to measure on it."""

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
