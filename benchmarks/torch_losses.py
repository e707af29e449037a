"""What `python -m benchmarks.loss` measures on PyTorch: losses beside each other, bare matrix products, and memory."""

import importlib.util
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn import functional as F

from bnf_torch.linear import linear_bnf_loss
from bnf_torch.losses import bnf_token_loss, token_log_odds
from bnf_torch.memory import Job, TorchMeasures

TRL_CHUNK = 32768  # tokens of the vocabulary, as its trainers have it
Loss = Callable[[Tensor, Tensor], Tensor]  # of the states (N, D) and the head (V, D)


class Benchmark(TorchMeasures):
    """A device, and the losses to measure on it."""

    def losses(self, n: int, d: int, vocab: int, *, train_head: bool) -> dict[str, Job | str]:
        """Forward and backward of each loss over the same N states; of a peer that cannot run, why."""
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, device=self.device, generator=generator).to(dtype)

        hidden = normal(n, d, dtype=self.dtype).requires_grad_()
        head = (normal(vocab, d) / d**0.5).to(self.dtype).requires_grad_(train_head)
        targets = torch.randint(vocab, (n,), device=self.device, generator=generator)
        reference, coefficients = normal(n) - 10, normal(n) / n

        def fused(h: Tensor, w: Tensor) -> Tensor:
            return linear_bnf_loss(h, w, targets, reference, coefficients)[0]

        def unfused(h: Tensor, w: Tensor) -> Tensor:
            return coefficients @ bnf_token_loss(*token_log_odds(h @ w.T, targets), reference)

        def literal(h: Tensor, w: Tensor) -> Tensor:
            return coefficients @ dense_form((h @ w.T).float(), targets, torch.sigmoid(reference))

        def cross_entropy(h: Tensor, w: Tensor) -> Tensor:
            return F.cross_entropy((h @ w.T).float(), targets)

        losses: dict[str, Loss | str] = {
            "linear_bnf_loss": fused,
            "unfused BNF": unfused,
            "BNF, the author's dense form": literal,
            "unfused cross-entropy": cross_entropy,
            "Liger-Kernel fused cross-entropy": self._liger(targets),
            "cut-cross-entropy": self._cut_cross_entropy(targets, filter_eps="auto"),
            "cut-cross-entropy, exact": self._cut_cross_entropy(targets, filter_eps=None),
            "TRL's chunked cross-entropy": self._trl(targets),
        }

        def job(loss: Loss) -> Job:
            def run() -> None:
                hidden.grad = head.grad = None
                loss(hidden, head).backward()
                self.wait()

            return run

        return {name: loss if isinstance(loss, str) else job(loss) for name, loss in losses.items()}

    def _liger(self, targets: Tensor) -> Loss | str:
        if importlib.util.find_spec("liger_kernel") is None:
            return "not installed: pip install 'bnf-align[bench]'"
        if not self.cuda:
            return "runs on GPUs only"
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return lambda h, w: loss(w, h, targets)

    def _cut_cross_entropy(self, targets: Tensor, filter_eps: str | None) -> Loss | str:
        """By default it leaves out the gradients of blocks of logits that are all but zero."""
        if importlib.util.find_spec("cut_cross_entropy") is None:
            return "not installed: pip install 'bnf-align[bench]'"
        if not self.cuda:
            return "runs on GPUs only"
        from cut_cross_entropy import linear_cross_entropy

        return lambda h, w: linear_cross_entropy(h, w, targets, filter_eps=filter_eps)

    def _trl(self, targets: Tensor) -> Loss | str:
        """What TRL's trainers compute log-probabilities with."""
        if importlib.util.find_spec("trl") is None:
            return "not installed: pip install 'bnf-align[bench]'"
        try:
            from trl.kernels import ChunkedLogProbFunction
        except ImportError:
            return f"trl {version('trl')} has no chunked log-probabilities"
        rest = None, targets, 1.0, TRL_CHUNK, None, 1.0, ("log_probs",)
        return lambda h, w: -ChunkedLogProbFunction.apply(h, w, *rest)[0].mean()


def dense_form(logits: Tensor, targets: Tensor, reference: Tensor, epsilon: float = 1e-6) -> Tensor:
    """The loss as its author computes it: the target distribution over all V tokens, with an epsilon against 0 / 0.

    Args:
        logits: (N, V).
        targets: (N,) int64.
        reference: (N,) probabilities of the targets under the reference.
    Returns:
        (N,) losses.
    """
    log_p = F.log_softmax(logits, 1)
    with torch.no_grad():
        p, index = log_p.exp(), targets.unsqueeze(1)
        observed = p.gather(1, index)
        t = (observed / (reference.unsqueeze(1) + epsilon)).clamp(max=1.0)
        target = (p * (1 - t) / (1 - observed + epsilon)).scatter(1, index, t)
    return -(target * log_p).sum(1)
