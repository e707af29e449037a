"""What a PyTorch device has and does: memory, and the speed of matrix products."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from bnf_core.models.architecture import Grid
from bnf_core.types import Batch
from bnf_torch.model import resolve_device, resolve_dtype

Job = Callable[[], None]  # does its work and waits until it is done


class TorchMeasures:
    """
    Args:
        device, dtype: as `--device` and `--dtype` name them.
    """

    over_products = 1.4  # on a CPU (docs/performance.md)

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

    def grid(self, batch: Batch) -> Grid:
        return Grid.of(batch)

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
        from bnf_torch import engine  # noqa: F401  # which a run imports

        try:
            return float(_status("VmRSS"))
        except OSError:
            return self.peak_memory()

    def wait(self) -> None:
        """Until everything that was started is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


def _status(name: str, path: str = "/proc/self/status") -> int:
    """A line of Linux's account of this process, or of the machine, in bytes."""
    lines = Path(path).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
