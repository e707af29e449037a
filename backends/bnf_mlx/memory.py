"""What an MLX device has and does: memory, and the speed of matrix products.

What a step keeps was read off MLX's peak counter, in float32 and bfloat16 and over models of different sizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from bnf_core.models.architecture import (
    Architecture,
    Grid,
    Kept,
    KeptByLayer,
    Training,
    adapter_inputs,
    adapter_products,
)
from bnf_core.models.layers import Layers
from bnf_core.types import Batch
from bnf_mlx.model import DTYPES, resolve_device, resolve_dtype
from bnf_mlx.pages import pages

Job = Callable[[], None]  # does its work and waits until it is done
AHEAD = 4  # layers, as far as MLX was seen to begin before it is done with the first
CHUNK = 128 * 2**20  # of logits, as in linear.py


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

    def kept(self, model: Architecture | Layers, training: Training, grid: Grid) -> Kept:
        training, full = _widest(training), training.kind == "full"
        if isinstance(model, Layers):
            return Kept(_weights(model, training), *model.step(grid), _loss(model, grid))
        d, f, size = model.hidden, model.inner, training.size
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        inputs = size * (2 * d + f) if full else adapter_inputs(model, training)
        products, matrices = adapter_products(model, training)
        # Besides what PyTorch keeps, one more of F, the attention scores, in float32 unless there are masks, and
        # copies of what other pages hold.
        scores, copies = 4 * model.heads * grid.width, 0
        if grid.seen > 1:
            scores, copies = size * model.heads * grid.width * grid.seen, 2 * size * kv * grid.seen
        block = size * (4 * f + 2 * d + 2 * q + 2 * kv) + scores + copies
        if model.experts is not None:  # of each expert that is chosen: its sorted input, what is between, its output
            experts = model.experts
            block += experts.chosen * size * (4 * experts.inner + 3 * d) + 4 * experts.count
        # Low-rank products, their sums and gradients are wider than half precision.
        outputs = sum(o for _, o in model.adapted(training.lora.targets).values())
        widened = 10 * outputs if training.half else 0
        if training.half and self.device == mx.Device(mx.cpu):  # float32 copies of what is multiplied
            matrices += 4 * model.linear_parameters * min(1.0, AHEAD / model.layers)
        by_layer = KeptByLayer(
            block + inputs + products, 4 * size * d, 1.5 * (block + size * (2 * d + f)) + widened, matrices
        )
        return Kept(_weights(model, training), *by_layer.of_all(model, training, grid), _loss(model, grid))

    def layers(self, model: Path, training: Training) -> Layers:
        from bnf_mlx.layers import measured

        return measured(model, _widest(training), self.device)

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


def _widest(training: Training) -> Training:
    """All weights are trained in float32, whatever is asked for."""
    return replace(training, dtype="float32") if training.kind == "full" else training


def _weights(model: Architecture | Layers, training: Training) -> float:
    """Bytes of the model. Quantised weights stay packed, and the head is widened once, for the loss."""
    bits = model.bits if isinstance(model, Architecture) else None
    if bits is None or training.kind == "full":
        return model.parameters * training.size
    return model.parameters * bits / 8 + model.vocab * model.hidden * training.size


def _loss(model: Architecture | Layers, grid: Grid) -> float:
    """MLX runs ahead, and frees late what is small."""
    return min(10.0 * grid.completion_tokens * model.vocab * 4, CHUNK)
