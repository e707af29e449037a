"""What `bnf bench` measures on PyTorch: losses beside each other, bare matrix products, and memory."""

import importlib.util
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bnf_torch.linear import linear_bnf_loss
from bnf_torch.losses import bnf_token_loss, token_log_odds
from bnf_torch.model import resolve_device, resolve_dtype

Job = Callable[[], None]  # does its work and waits until it is done
Loss = Callable[[Tensor, Tensor], Tensor]  # of the states (N, D) and the head (V, D)


class Benchmark:
    """
    Args:
        device, dtype: as `--device` and `--dtype` name them.
    """

    def __init__(self, device: str = "auto", dtype: str = "auto"):
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.cuda = self.device.type == "cuda"
        self.memory = "allocated on the GPU" if self.cuda else "resident"

    def facts(self) -> dict[str, str]:
        """What a figure depends on, by name."""
        device = torch.cuda.get_device_name(self.device) if self.cuda else f"{torch.get_num_threads()} threads"
        return {
            "device": f"{self.device.type} ({device})",
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "peft": version("peft"),
        }

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
        }

        def job(loss: Loss) -> Job:
            def run() -> None:
                hidden.grad = head.grad = None
                loss(hidden, head).backward()
                self.wait()

            return run

        return {name: loss if isinstance(loss, str) else job(loss) for name, loss in losses.items()}

    def products(self, shapes: Sequence[tuple[int, int, int]], *, train_weights: bool) -> Job:
        """The matrix products that linear layers cannot do without, forward and backward and nothing else.

        Args:
            shapes: (tokens, inputs, outputs) of each layer.
            train_weights: the gradient of the weights as well: three products a layer instead of two.
        """
        made = [
            [torch.randn(*shape, device=self.device).to(self.dtype) for shape in ((n, i), (o, i))] for n, i, o in shapes
        ]

        @torch.no_grad()
        def run() -> None:
            for x, w in made:
                y = x @ w.T
                y @ w
                if train_weights:
                    y.T @ x
            self.wait()

        return run

    def extra_memory(self, job: Job) -> float:
        """Peak bytes of a job beyond what was held before; NaN where that cannot be told. On a CPU it is resident
        memory, as Linux counts it."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            job()
            return float(torch.cuda.max_memory_allocated(self.device) - before)
        try:
            before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            job()
            return float(_status("VmHWM") - before)
        except OSError:  # not Linux
            job()
            return float("nan")

    def peak_memory(self) -> float:
        """Of this process so far, bytes."""
        if self.cuda:
            return float(torch.cuda.max_memory_allocated(self.device))
        try:
            return float(_status("VmHWM"))
        except OSError:  # macOS: in bytes, and not inherited from the process before
            import resource

            return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    def free_memory(self) -> float:
        """Bytes that a run could still take; NaN where that cannot be told."""
        if self.cuda:
            return float(torch.cuda.mem_get_info(self.device)[0])
        if self.device.type == "mps":
            return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
        try:
            return float(_status("MemAvailable", "/proc/meminfo"))
        except OSError:
            return float("nan")

    def runtime_memory(self) -> float:
        """Bytes that this process holds by now, as `memory` counts them."""
        if self.cuda:
            return float(torch.cuda.memory_allocated(self.device))
        from bnf_torch import engine, trainer  # noqa: F401  # which a run imports

        try:
            return float(_status("VmRSS"))
        except OSError:
            return self.peak_memory()

    def wait(self) -> None:
        """Until everything that was started is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

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


def _status(name: str, path: str = "/proc/self/status") -> int:
    """A line of Linux's account of this process, or of the machine, in bytes."""
    lines = Path(path).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
