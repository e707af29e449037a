"""`python -m bnf_mlx.benchmark`: the fused loss beside the matrix products it needs and plain cross-entropy.

All are run in turn in one process and compared by the ratio of medians, because machines are noisy. On Linux,
preload OpenBLAS (`bnf doctor` says how), or the products alone take a minute.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn

from bnf_mlx.linear import linear_bnf_loss
from bnf_mlx.model import resolve_device


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bnf_mlx.benchmark", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help="N, completion tokens")
    parser.add_argument("--hidden", type=int, default=576, help="D")
    parser.add_argument("--vocab", type=int, default=49152, help="V")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    device = resolve_device(options.device)
    print(f"mlx {version('mlx')}, {device}, {options.dtype}")
    print(f"D={options.hidden} V={options.vocab}, frozen head, forward and backward\n")
    print(f"{'':<24}{'N':>6}{'median s':>10}{'min s':>8}{'x matmuls':>11}{'extra MiB':>11}")
    with mx.stream(device):
        for n in options.tokens:
            measure(n, options.hidden, options.vocab, options.repeats, getattr(mx, options.dtype))


def measure(n: int, d: int, vocab: int, repeats: int, dtype: mx.Dtype) -> None:
    mx.random.seed(0)
    hidden = mx.random.normal((n, d)).astype(dtype)
    head = (mx.random.normal((vocab, d)) / d**0.5).astype(dtype)
    targets = mx.random.randint(0, vocab, (n,))
    reference = mx.random.normal((n,)) - 10
    coefficients = mx.random.normal((n,)) / n
    mx.eval(hidden, head, targets, reference, coefficients)

    def matmuls() -> mx.array:
        return (hidden @ head.T) @ head

    def fused() -> mx.array:
        return mx.grad(lambda h: linear_bnf_loss(h, head, targets, reference, coefficients)[0])(hidden)

    def cross_entropy() -> mx.array:
        def loss(h: mx.array) -> mx.array:
            return nn.losses.cross_entropy((h @ head.T).astype(mx.float32), targets, reduction="mean")

        return mx.grad(loss)(hidden)

    jobs = {"two bare matmuls": matmuls, "linear_bnf_loss": fused, "unfused cross-entropy": cross_entropy}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    memory = {name: extra_mebibytes(job) for name, job in jobs.items()}  # also the warm-up
    for _ in range(repeats):
        for name, job in jobs.items():
            started = time.perf_counter()
            mx.eval(job())
            times[name].append(time.perf_counter() - started)
    floor = statistics.median(times["two bare matmuls"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{name:<24}{n:>6}{middle:>10.3f}{min(taken):>8.3f}{middle / floor:>11.2f}{memory[name]:>11.0f}")


def extra_mebibytes(job: Callable[[], mx.array]) -> float:
    """Peak of MLX's own memory beyond what was held before."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(job())
    return (mx.get_peak_memory() - before) / 2**20


if __name__ == "__main__":
    main()
