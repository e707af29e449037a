"""The MLX backend as the entry point `bnf.backends` gives it: bnf_core.protocol.Backend."""

import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bnf_core.config import AttentionMasks, FineTuneType, LoraConfig, OptimizerConfig
from bnf_core.devices import require_cpu
from bnf_core.errors import UserError
from bnf_core.models.adapters import Layout
from bnf_core.objectives import Objective
from bnf_core.processes import Processes
from bnf_core.protocol import Backend, Engine, Inspector, Losses, Measures

SLOW_GFLOPS = 10  # the reference BLAS does 1 to 2 on any processor, an optimised one tens a core


class MLXBackend(Backend):
    name = "mlx"
    requires = ("mlx", "mlx_lm")
    adapter_layout: Layout = "mlx"

    def preference(self) -> int:
        apple_silicon = platform.system() == "Darwin" and platform.machine() == "arm64"
        return 3 if apple_silicon else 1

    def prepare(self) -> None:
        from bnf_mlx.blas import preload_openblas

        preload_openblas()

    def fused_loss(self) -> Callable[..., Any]:
        from bnf_mlx.linear import linear_bnf_loss

        return linear_bnf_loss

    def losses(self, device: str = "auto") -> Losses:
        from bnf_mlx.model import resolve_device
        from bnf_mlx.numpy_losses import MLXLosses

        return MLXLosses(resolve_device(device))

    def devices(self) -> list[str]:
        from bnf_mlx.model import devices

        return devices()

    def processes(self) -> Processes:
        from bnf_mlx.processes import processes

        return processes()

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
        objective: Objective | None = None,
        gradient_checkpointing: bool = False,
        router_aux_loss: float = 0.0,
        attention_masks: AttentionMasks = "auto",
        compile: bool = False,
        deterministic: bool = False,
        seed: int = 0,
    ) -> Engine:
        import mlx.core as mx

        from bnf_mlx import adapter as adapters
        from bnf_mlx.engine import MLXEngine
        from bnf_mlx.model import Checkpoint, load_model, resolve_device, resolve_dtype, unfreeze
        from bnf_mlx.processes import processes

        if load_in_4bit:
            raise UserError(
                "load_in_4bit is of the torch backend: on mlx, quantise the model once, with "
                f"`python -m mlx_lm convert --hf-path {model} -q --mlx-path NEW_FOLDER`, and name the new folder"
            )
        if attention_masks != "auto":
            raise UserError(
                f"hardware.attention_masks is {attention_masks}, a setting of the torch backend: on mlx a batch is "
                "computed in pages, without such masks. Leave it out"
            )
        if compile:
            raise UserError(
                "hardware.compile is true, a setting of the torch backend: mlx compiles what gains by it anyway. Leave "
                "it out"
            )
        if router_aux_loss:
            raise UserError(
                f"router_aux_loss is {router_aux_loss:g}, and the mlx backend has no loss of routers, whose logits "
                "mlx-lm does not give: set it to 0, or use --backend torch"
            )
        if fine_tune_type == "full" and adapter is not None:
            raise UserError(
                f"fine_tune_type full trains all weights of a model, and {adapter} is an adapter: make one model of "
                f"both with `python -m mlx_lm fuse --model {model} --adapter-path {adapter}`, and name that"
            )
        members = processes()
        mx.random.seed(seed + (members.rank << 32))  # dropout, where there is any: each process drops its own
        where = resolve_device(device)
        if deterministic:
            require_cpu("cpu" if where == mx.Device(mx.cpu) else "gpu")
        frozen_dtype = resolve_dtype(dtype, where)
        loaded = load_model(model, where, mx.float32 if fine_tune_type == "full" else frozen_dtype)
        whole = None
        with mx.stream(where):
            if fine_tune_type == "full":
                unfreeze(loaded)
                whole = Checkpoint(model, loaded)
            elif adapter is not None:
                adapters.load_adapter(loaded, adapter, fine_tune_type, lora)
            elif fine_tune_type is not None:
                adapters.add_adapter(loaded, lora or LoraConfig(), seed, fine_tune_type)
        return MLXEngine(
            loaded,
            where,
            optimizer,
            objective=objective,
            whole=whole,
            gradient_checkpointing=gradient_checkpointing,
            deterministic=deterministic,
            processes=members,
        )

    def notes(self, model: Path) -> list[str]:
        from bnf_mlx.families import notes

        return notes(model)

    def inspector(self, model: Path, dtype: str = "float32") -> Inspector:
        from bnf_mlx.inspection import MLXInspector

        return MLXInspector(model, dtype)

    def measures(self, device: str = "auto", dtype: str = "auto", own_dtype: str | None = None) -> Measures:
        from bnf_mlx.memory import MLXMeasures

        return MLXMeasures(device, dtype, own_dtype)

    def tracing(self, path: Path) -> AbstractContextManager[None]:
        from bnf_mlx.tracing import tracing

        return tracing(path.with_suffix(".gputrace"))

    def fuse(self, model: Path, adapter: Path, output: Path, *, dtype: str, dequantize: bool) -> None:
        from bnf_mlx.adapter import fuse

        fuse(model, adapter, output, dtype, dequantize)

    def describe(self) -> dict[str, str]:
        import mlx.core as mx

        facts = {"mlx": version("mlx"), "mlx-lm": version("mlx-lm"), "devices": ", ".join(self.devices())}
        if mx.is_available(mx.gpu):
            facts["gpu"] = str(mx.device_info(mx.gpu).get("device_name", "unknown"))
        if platform.system() == "Linux":
            speed = _cpu_gflops()
            facts["cpu matrix product"] = f"{speed:.1f} GFLOP/s"
            if speed < SLOW_GFLOPS:
                facts["cpu matrix product"] += (
                    " is slow: install OpenBLAS (Debian, Ubuntu: sudo apt install libopenblas0-pthread), "
                    "which `bnf` then preloads by itself, unless LD_PRELOAD is set"
                )
        return facts


def _cpu_gflops(size: int = 512) -> float:
    import mlx.core as mx

    with mx.stream(mx.cpu):
        a = mx.ones((size, size))
        mx.eval(a @ a)
        start = time.perf_counter()
        mx.eval(a @ a)
        return 2 * size**3 / (time.perf_counter() - start) / 1e9
