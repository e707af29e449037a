"""What an MLX device has and does: memory, and the speed of matrix products."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from bnf_core.models.architecture import Grid
from bnf_core.types import Batch
from bnf_mlx.model import DTYPES, resolve_device, resolve_dtype
from bnf_mlx.pages import pages

Job = Callable[[], None]  # does its work and waits until it is done


class MLXMeasures:
    """
    Args:
        device, dtype: as `--device` and `--dtype` name them.
        own_dtype: the checkpoint's, which `auto` means on the GPU.
    """

    over_products = 2.6  # on a CPU (docs/performance.md)

    def __init__(self, device: str = "auto", dtype: str = "auto", own_dtype: str | None = None):
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device) or DTYPES[own_dtype or "float32"]
        self.memory = "allocated by MLX"

    def facts(self) -> dict[str, str]:
        """What a figure depends on, by name."""
        return {
            "device": str(mx.device_info(self.device).get("device_name", self.device)),
            "dtype": str(self.dtype).removeprefix("mlx.core."),
            "mlx": version("mlx"),
            "mlx-lm": version("mlx-lm"),
        }

    def grid(self, batch: Batch) -> Grid:
        if not batch.shared:
            return Grid.of(batch)
        cut = pages(batch)
        rows, width = cut.input_ids.shape
        return Grid(rows, width, len(batch.targets), cut.table.shape[1])

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
