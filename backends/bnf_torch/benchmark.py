"""`python -m bnf_torch.benchmark`: the fused loss beside the matrix products it needs and plain cross-entropy.

All are run in turn in one process and compared by the ratio of medians, because machines are noisy.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from bnf_torch.linear import linear_bnf_loss


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bnf_torch.benchmark", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help="N, completion tokens")
    parser.add_argument("--hidden", type=int, default=576, help="D")
    parser.add_argument("--vocab", type=int, default=49152, help="V")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {options.dtype}")
    print(f"D={options.hidden} V={options.vocab}, frozen head, forward and backward\n")
    print(f"{'':<24}{'N':>6}{'median s':>10}{'min s':>8}{'x matmuls':>11}{'extra MiB':>11}")
    for n in options.tokens:
        measure(n, options.hidden, options.vocab, options.repeats, options.device, getattr(torch, options.dtype))


def measure(n: int, d: int, vocab: int, repeats: int, device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
    hidden = torch.randn(n, d, **options).requires_grad_()
    head = torch.randn(vocab, d, **options) / d**0.5
    targets = torch.randint(vocab, (n,), device=device, generator=generator)
    reference = torch.randn(n, device=device, generator=generator) - 10
    coefficients = torch.randn(n, device=device, generator=generator) / n

    def matmuls() -> None:
        with torch.no_grad():
            (hidden @ head.T) @ head

    def fused() -> None:
        linear_bnf_loss(hidden, head, targets, reference, coefficients)[0].backward()

    def cross_entropy() -> None:
        F.cross_entropy((hidden @ head.T).float(), targets).backward()

    jobs = {"two bare matmuls": matmuls, "linear_bnf_loss": fused, "unfused cross-entropy": cross_entropy}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    memory = {name: extra_mebibytes(job, device) for name, job in jobs.items()}  # also the warm-up
    for _ in range(repeats):
        for name, job in jobs.items():
            hidden.grad = None
            started = time.perf_counter()
            job()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    floor = statistics.median(times["two bare matmuls"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{name:<24}{n:>6}{middle:>10.3f}{min(taken):>8.3f}{middle / floor:>11.2f}{memory[name]:>11.0f}")


def extra_mebibytes(job: Callable[[], None], device: str) -> float:
    """Peak memory of the job beyond what was held before; on the CPU resident memory, as Linux counts it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        job()
        return (_status("VmHWM") - before) / 1024
    except OSError:  # not Linux
        job()
        return float("nan")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
