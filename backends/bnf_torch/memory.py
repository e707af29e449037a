"""What a PyTorch device has and does: memory, and the speed of matrix products.

What a step keeps was read off with saved-tensor hooks, in float32 and bfloat16 and over models of different sizes.
"""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

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
from bnf_torch.attention import BLOCK
from bnf_torch.model import resolve_device, resolve_dtype

Job = Callable[[], None]  # does its work and waits until it is done
CPU_CHUNK, CUDA_CHUNK = 48 * 2**20, 2**30  # of logits, as in linear.py


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

    def kept(self, model: Architecture | Layers, training: Training, grid: Grid) -> Kept:
        if isinstance(model, Layers):
            return self._kept_by(model, training, grid)
        d, f, size = model.hidden, model.inner, training.size
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        full = training.kind == "full"
        inputs: float = size * ((5 if training.half else 2) * d + f)  # autocast narrows the inputs of each layer anew
        if not full:
            inputs = adapter_inputs(model, training, mask=size if self.device.type == "cpu" else 1)
        products, matrices = adapter_products(model, training, squares=1)  # PEFT multiplies A and B by an identity
        # The residual stream before attention and MLP, in float32, and where the norms are trained what they make of
        # it; queries, keys, values, attention; gate, its activation and up.
        stream = 4 * (4 if full else 2) * d
        layer = stream + size * (3 * f + 2 * q + 2 * kv) + 4 * (model.heads + 2) + inputs + products
        if model.normed_heads:  # in float32
            layer += 4 * (2 if full else 1) * (q + kv)
        transient: float = 2 * size * f
        if model.experts is not None:
            routed, backward = _routed(model, training)
            layer, transient = layer + routed, transient + backward
        by_layer = KeptByLayer(layer, size * d, transient, matrices)
        return Kept(
            _weights(model, training),
            *by_layer.of_all(model, training, grid),
            self._loss(model, training, grid),
            self._fragments(model, training, grid, layer),
            self._masks(grid),
        )

    def layers(self, model: Path, training: Training) -> Layers:
        from bnf_torch.layers import measured

        return measured(model, training, self.device)

    def _kept_by(self, model: Layers, training: Training, grid: Grid) -> Kept:
        weights = _weights(model, training)
        if training.kind == "full" and training.half:  # the copies of the layers' are counted with what they keep
            weights -= 2 * model.linear_parameters
        fragments = 0.0
        if part := self._lost(training):  # of eight families' layers 0.6 to 1.0 of that, trained whole 1.2 to 1.8
            part *= 1.5 if training.kind == "full" else 0.8
            fragments = part * model.scattered(grid.rows, grid.width)
        return Kept(weights, *model.step(grid), self._loss(model, training, grid), fragments, self._masks(grid))

    def _loss(self, model: Architecture | Layers, training: Training, grid: Grid) -> float:
        logits = _chunked(grid.completion_tokens * model.vocab * 4, CUDA_CHUNK if self.cuda else CPU_CHUNK)
        return logits + grid.completion_tokens * model.hidden * training.size

    def _masks(self, grid: Grid) -> float:
        """On a CPU a byte for every two tokens; on CUDA the tables of blocks that `attention` makes, of keys and of
        queries."""
        if not grid.masked:
            return 0.0
        if self.cuda:
            return 2 * 4 * grid.rows * (-(-grid.width // BLOCK)) ** 2
        return float(grid.rows * grid.width**2)  # attention takes it segment by segment

    def _fragments(self, model: Architecture, training: Training, grid: Grid, layer: float) -> float:
        """Bytes that glibc's allocator keeps: it does not give an aligned block that was freed to the next of the same
        size. Beside LoRA's activations lie holes of about their size, to which DoRA and dropout add few. With
        MALLOC_MMAP_THRESHOLD_=1048576 in the environment there are none, and a step takes half as long again."""
        part = self._lost(training)
        if not part:
            return 0.0
        plain = replace(training, kind="lora", lora=replace(training.lora, dropout=0.0))
        if training.kind != "full" and not training.gradient_checkpointing and training != plain:
            return self.kept(model, plain, grid).fragments
        return part * model.layers * layer * grid.tokens

    def _lost(self, training: Training) -> float:
        """How much of what LoRA's layers keep is lost to holes besides: measured to within 0.2."""
        glibc = platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ
        if self.device.type != "cpu" or not glibc:
            return 0.0
        return 0.3 if training.kind == "full" else 1.2 if training.half else 1.0

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


def _weights(model: Architecture | Layers, training: Training) -> float:
    """Bytes of the model. Weights that are trained are float32, and computed with a copy in half precision."""
    if training.kind == "full":
        return model.parameters * (6 if training.half else 4)
    if training.load_in_4bit:  # NF4 in blocks of 64 with scales of 8 bits, and these in blocks of 256
        rest = model.parameters - model.linear_parameters
        return rest * training.size + model.linear_parameters * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    return model.parameters * training.size


def _routed(model: Architecture, training: Training) -> tuple[float, float]:
    """Bytes a token of what a layer's experts keep, and beside that in their backward pass. Of each that is chosen:
    gate and up, which are one tensor, the activation and the output; and where experts are trained their inputs and
    that of the product that makes the output. These are in float32: autocast passes grouped products by."""
    experts, d = model.experts, model.hidden
    assert experts is not None
    full = training.kind == "full"
    size = 4 if full else training.size
    indices, shared = 40, 2 * training.size * d if model.inner else 0
    kept = size * ((4 if full else 3) * experts.inner + (2 if full else 1) * d) + indices
    return experts.chosen * kept + 4 * experts.count + shared, experts.chosen * size * (2 * experts.inner + 2 * d)


def _chunked(bytes_: float, most: float) -> float:
    """One of as many equal chunks as it takes for none to be larger."""
    return bytes_ / max(1, -(-bytes_ // most))
