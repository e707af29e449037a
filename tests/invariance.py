"""One run in many arrangements: the command line, what to compare, a judge, and the classical bugs to try it on.

Micro-batches, packing, shared prompts, the order within a step, checkpointed activations and the number of processes
change memory and speed. `complaints` says whether two runs are one trajectory up to float32 round-off.
"""

import itertools
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file

import forked
from bnf_core.steps import batching
from bnf_core.steps import steps as plan
from bnf_core.types import Array, Batch, Example
from conftest import BACKENDS

# A constant, large learning rate: the weights must move, or nothing is shown. AdamW divides by √v + epsilon; with the
# usual 1e-8 the round-off of a gradient that ought to be zero becomes a whole step, and no scale of the gradient shows
# in what it does, so that a mean taken for a sum would pass. With 1e-2 the step follows the gradient. The clip lies in
# the midst of the norms, so that both kinds of step are taken.
TRAINING = "--batch-size 8 --epochs 2 --optimizer.learning_rate 2e-2 --schedule constant --warmup-steps 0".split()
TRAINING += "--epsilon 1e-2 --max-grad-norm 1.6 --rank 4 --alpha 8 --device cpu --dtype float32".split()
UNSHARED = "--share-prompts false"
BASE = f"--micro-batch-size 8 {UNSHARED}"  # what others are compared with: a step in one go, padded, prompt by prompt


def write_rows(path: Path, shift: int = 0) -> Path:
    """21 rows, so that of every epoch's batches of eight the last has five, which two processes cannot share evenly.
    Lengths differ tenfold, and weights threefold; some completions are one token. Another `shift` makes other rows."""
    completions = ["4", "It is 4.", "No idea, sorry. "]
    rows = []
    for i in range(21):
        prompt = "What is " + " plus ".join(str(j + shift) for j in range(1 + 5 * i % 11)) + "?"
        completion = completions[i % 3] * (1 if i % 3 == 0 else 1 + i % 7)
        rows.append({"prompt": prompt, "completion": completion, "label": i % 2 == 0, "weight": (1, 0.5, 1.5)[i % 3]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(path: Path) -> Path:
    """11 pairs, so that of every epoch's batches of eight rows the last has three pairs, which two processes cannot
    share evenly; two pairs have one prompt, and lengths differ."""
    completions = ["4", "It is 4.", "No idea, sorry. "]
    rows = []
    for i in range(11):
        prompt = "What is " + " plus ".join(map(str, range(1 + 5 * (i // 2) % 7))) + "?"
        chosen, rejected = (completions[(i + j) % 3] * (1 + (i + 2 * j) % 4) for j in range(2))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_turns(path: Path) -> Path:
    """21 rows of several turns, of which some are not trained: a tool's between two of the assistant's, and turns that
    are switched off, first and last ones too. Three rows have one prompt, but for the last."""
    turns = ["4", "It is 4.", "No idea, sorry. "]
    rows = []
    for i in range(21):
        completion: list[dict[str, Any]] = []
        for j in range(1 + i % 3):
            answer = {"role": "assistant", "content": turns[(i + j) % 3] * (1 + (i + 2 * j) % 4)}
            completion += [
                answer | ({} if (i + j) % 4 else {"train": False}),
                {"role": "tool", "content": "2" * (i % 5)},
            ]
        completion = completion[:-1]
        if not any(turn["role"] == "assistant" and turn.get("train", True) for turn in completion):
            completion[0].pop("train")
        prompt = [{"role": "user", "content": "What is " + " plus ".join(map(str, range(1 + i // 3))) + "?"}]
        rows.append({"prompt": prompt, "completion": completion, "label": i % 2 == 0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# What is compared


@dataclass(frozen=True)
class Trajectory:
    loss: Array  # (steps,) float64
    grad_norm: Array  # (steps,) float64
    tokens: Array  # (steps,) completion tokens
    weights: dict[str, Array]  # what was trained, at the end

    @classmethod
    def read(cls, run: Path) -> "Trajectory":
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["kind"] == "train"]
        weights = {
            name: value.astype(np.float64)
            for folder in ("adapter", "model")
            for file in sorted((run / folder).glob("*.safetensors"))
            for name, value in load_file(file).items()
        }
        loss, grad_norm, tokens = (np.array([line[key] for line in lines]) for key in ("loss", "grad_norm", "tokens"))
        return cls(loss, grad_norm, tokens, weights)

    @property
    def flat(self) -> Array:
        return np.concatenate([self.weights[name].ravel() for name in sorted(self.weights)])


# Round-off. A float32 operation is off by up to eps/2 of its result, and errors of independent signs grow as the root
# of their number: so one unit is eps · scale · √steps, where the scale is the largest loss or norm, and for weights the
# farthest that one of them moves. Within a step sums of many terms cancel, which costs some more: how much was measured
# by permuting the rows of each step, and in every arrangement of test_invariance.py (figures: docs/invariance.md). The
# worst were 6.7, 31 and 105 units; about four times that is allowed.
# The mean residual of all weights has a standard error of 0.05 units: so it spreads over the permutations, and so would
# 3 units, the usual rms of a residual, over √4096. Ten times that is allowed.
ALLOWED = {"loss": 25.0, "grad_norm": 120.0, "weights": 400.0, "mean": 0.5, "lead": 0.5}


def residuals(base: Trajectory, other: Trajectory, start: Trajectory) -> dict[str, float]:
    """In units of round-off: the largest differences, and the signed mean difference of the weights, as numbers
    (`mean`) and as progress on the way from where both runs started (`lead`).

    Args:
        base, other: the runs, of the same steps and weights.
        start: one that has the weights that both began with.
    """
    unit = float(np.finfo(np.float32).eps) * np.sqrt(len(base.loss))
    way, difference = base.flat - start.flat, other.flat - base.flat
    farthest = np.abs(way).max()
    return {
        "loss": np.abs(other.loss - base.loss).max() / np.abs(base.loss).max() / unit,
        "grad_norm": np.abs(other.grad_norm - base.grad_norm).max() / base.grad_norm.max() / unit,
        "weights": np.abs(difference).max() / farthest / unit,
        "mean": difference.mean() / farthest / unit,
        "lead": (difference * np.sign(way)).mean() / farthest / unit,
    }


def complaints(base: Trajectory, other: Trajectory, start: Trajectory) -> list[str]:
    """What keeps two runs from being one trajectory; none if they are. Largest differences find what goes wrong in one
    place, means what goes a little wrong everywhere."""
    if base.weights.keys() != other.weights.keys() or len(base.loss) != len(other.loss):
        return ["not the same steps or the same weights"]
    found = []
    if base.tokens.tolist() != other.tokens.tolist():
        found.append(f"tokens of each step: {base.tokens.tolist()}, not {other.tokens.tolist()}")
    for name, value in residuals(base, other, start).items():
        if not abs(value) <= ALLOWED[name]:
            found.append(f"{name}: off by {value:.3g} units of round-off, allowed {ALLOWED[name]:g}")
    return found


# The classical bugs, in code that both backends run or in the one line where each sums over processes

Bug = Callable[[], AbstractContextManager[Any]]


def _share(wrong: Callable[[list[Batch]], list[Batch]]) -> Bug:
    """Change the micro-batches that a process gets of each step."""
    right = plan.my_share
    return lambda: mock.patch.object(plan, "my_share", lambda *args: wrong(right(*args)))


def _weighted(batch: Batch, factor: float) -> Batch:
    counts: Any = [count / factor for count in batch.counts]
    return replace(batch, coefficients=batch.coefficients * np.float32(factor), counts=type(batch.counts)(*counts))


def _rows(batches: Sequence[Batch]) -> int:
    return sum(len(batch.labels) for batch in batches)


def _mean_of_means(batches: list[Batch]) -> list[Batch]:
    """Each micro-batch is a mean of its own, and a step the mean of them."""
    return [_weighted(b, _rows(batches) / (max(_rows([b]), 1) * len(batches))) for b in batches]


@contextmanager
def per_rank_mean() -> Iterator[None]:
    """Each process takes the mean over its own rows, and DDP the mean of those."""
    right = plan.my_share

    def wrong(examples: Any, cut: Any, processes: Any, *rest: Any) -> list[Batch]:
        mine = right(examples, cut, processes, *rest)
        return [_weighted(b, len(examples) / (max(_rows(mine), 1) * processes.count)) for b in mine]

    with mock.patch.object(plan, "my_share", wrong):
        yield


@contextmanager
def averaged_gradients() -> Iterator[None]:
    """Gradients are averaged over processes, of a loss that was already divided by the global count."""
    if os.environ.get("MLX_HOSTFILE"):
        import bnf_mlx.engine as engine

        summed = engine.sum_over
        averaged = lambda us, arrays: {name: g / us.count for name, g in summed(us, arrays).items()}  # noqa: E731
        with mock.patch.object(engine, "sum_over", averaged):
            yield
    else:
        from bnf_torch.scored import ScoredModel

        forward = ScoredModel.forward

        def halved(self: Any, **inputs: Any) -> Any:
            loss, stats = forward(self, **inputs)
            return loss / int(os.environ["WORLD_SIZE"]), stats

        with mock.patch.object(ScoredModel, "forward", halved):
            yield


@contextmanager
def dropped_tail() -> Iterator[None]:
    """An epoch's last batch is dropped where it is short."""
    right = batching.Rows.batches

    def whole_only(self: Any, batch_size: int, *rest: Any) -> Any:
        return (step for step in right(self, batch_size, *rest) if len(step[0]) == batch_size)

    with mock.patch.object(batching.Rows, "batches", whole_only):
        yield


def _padded_left(batch: Batch) -> Batch:
    """Padding stands before a row's tokens, which see it."""
    height, width = batch.input_ids.shape
    alone = not (batch.packed or batch.shared) and len(batch.labels)
    shift = width - batch.lengths if alone else np.zeros(height, np.int32)
    ids = np.stack([np.roll(row, by) for row, by in zip(batch.input_ids, shift, strict=True)])
    return replace(batch, input_ids=ids, positions=batch.positions + shift[batch.positions // width])


def _one_completion(batch: Batch) -> Batch:
    """The completions of a shared prompt are taken for one."""
    first = np.minimum(batch.segment_ids, batch.prefix_ids + 1)
    return replace(batch, segment_ids=np.where(batch.prefix_ids == batch.segment_ids, batch.segment_ids, first))


@contextmanager
def turns_trained() -> Iterator[None]:
    """Turns that are not to be trained are, and count."""
    with mock.patch.object(Example, "trained_positions", property(lambda row: np.arange(len(row.completion_ids)))):
        yield


@contextmanager
def padding_trained() -> Iterator[None]:
    """The mask is one too long: the token of padding after a row's last is trained as well."""
    right = plan.with_reference

    def longer(batch: Batch, ref_log_odds: Array) -> tuple[Batch, Array]:
        width = batch.input_ids.shape[1]
        alone = not (batch.packed or batch.shared)
        rows = np.flatnonzero(batch.lengths < width) if alone else np.zeros(0, int)
        last = rows * width + batch.lengths[rows] - 1
        weights = [batch.coefficients[batch.sequence_ids == row][0] for row in rows]
        more = {
            "positions": last,
            "targets": batch.input_ids.ravel()[last + 1],
            "sequence_ids": rows,
            "coefficients": np.array(weights),
        }
        old = {name: getattr(batch, name) for name in more}
        changed: Any = {name: np.append(old[name], value).astype(old[name].dtype) for name, value in more.items()}
        return replace(batch, **changed), np.append(ref_log_odds, np.zeros(len(rows), np.float32))

    with mock.patch.object(plan, "with_reference", lambda *args: [longer(*pair) for pair in right(*args)]):
        yield


@contextmanager
def pairs_parted() -> Iterator[None]:
    """A pair's rows may lie in different micro-batches, each of which knows nothing of the other."""
    right = plan.micro_batching_of
    with mock.patch.object(plan, "micro_batching_of", lambda *args: replace(right(*args), unit="row")):
        yield


@contextmanager
def permuted() -> Iterator[None]:
    """No bug: the rows of each step in another order."""
    right = batching.Rows.batches

    def reversed_rows(self: Any, *args: Any) -> Any:
        return ((examples[::-1], position) for examples, position in right(self, *args))

    with mock.patch.object(batching.Rows, "batches", reversed_rows):
        yield


BUGS: dict[str, Bug] = {
    "mean of means": _share(_mean_of_means),
    "per-rank mean": per_rank_mean,
    "averaged gradients": averaged_gradients,
    "dropped tail": dropped_tail,
    "dropped micro-batch": _share(lambda batches: batches[:-1] if len(batches) > 1 else batches),
    "padding seen": _share(lambda batches: [_padded_left(b) for b in batches]),
    "padding trained": padding_trained,
    "turns trained": turns_trained,
    "completions see each other": _share(lambda batches: [_one_completion(b) for b in batches]),
    "packed rows see each other": _share(lambda batches: [replace(b, packed=False) for b in batches]),
    "pairs parted": pairs_parted,
}


# What happens to runs. The last process is hit while it prepares the fourth of the six steps.


def _hit(number: signal.Signals) -> Bug:
    @contextmanager
    def hit() -> Iterator[None]:
        right = plan.steps

        def wrapped(*args: Any, processes: Any, **settings: Any) -> Iterator[Any]:
            steps = right(*args, processes=processes, **settings)
            yield from itertools.islice(steps, 3)
            if processes.rank == processes.count - 1:
                os.kill(os.getpid(), number)
            yield from steps

        with mock.patch.object(plan, "steps", wrapped):
            yield

    return hit


PATCHES: dict[str, Bug] = {"": nullcontext, "permuted": permuted, **BUGS}
PATCHES |= {"ended": _hit(signal.SIGTERM), "killed": _hit(signal.SIGKILL)}


# Runs


class Runs:
    """Runs of the command line in this process, each done once, all of one model and the same rows.

    Args:
        objective: other than BNF, as flags; then the rows are pairs.
        rows: what writes them; default: single turns.
    """

    def __init__(self, model: Path, folder: Path, objective: str = "", rows: Callable[[Path], Path] | None = None):
        self.model, self.folder, self.objective = model, folder, objective
        self.rows = (rows or (write_pairs if objective else write_rows))(folder / "rows.jsonl")
        self._count = itertools.count()
        self._known: dict[tuple[str, ...], Trajectory] = {}

    def words(self, backend: str, kind: str, flags: str) -> tuple[list[str], Path]:
        """A command line, and the run folder it names."""
        output = self.folder / f"run{next(self._count)}"
        words = ["train", "--model", str(self.model), "--data", str(self.rows), "--output", str(output), *TRAINING]
        words += self.objective.split()
        return [*words, "--backend", backend, "--fine-tune-type", kind, *flags.split()], output

    def train(self, backend: str, kind: str, flags: str = BASE, patch: str = "") -> Trajectory:
        key = (backend, kind, flags, patch)
        if key not in self._known:
            words, output = self.words(backend, kind, flags)
            assert command(words, patch) == 0
            self._known[key] = Trajectory.read(output)
        return self._known[key]

    def start(self, backend: str, kind: str) -> Trajectory:
        """The weights before the first step: those of a step too small to be seen."""
        return self.train(backend, kind, f"{BASE} --max-steps 1 --optimizer.learning_rate 1e-30")

    def complaints(self, backend: str, kind: str, other: Trajectory) -> list[str]:
        """Of a run as compared with the base arrangement."""
        return complaints(self.train(backend, kind), other, self.start(backend, kind))


def command(words: Sequence[str], patch: str = "") -> int:
    """Exit code of a command in this process, which it would otherwise replace where OpenBLAS is to be preloaded."""
    from bnf_align import cli

    with (
        PATCHES[patch](),
        mock.patch.dict(os.environ, LD_PRELOAD=os.environ.get("LD_PRELOAD", "")),
    ):
        return cli.run(words)


# Several processes

# How those of a backend share the work, and the environment that says so.
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "ddp": ("torch", {}),
    "fsdp": ("torch", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
    "mlx": ("mlx", {}),
}


def ways(*fast: str) -> list[Any]:
    """The parameters of a test on several processes: each way whose backend is installed. Where some are named, the
    others are slow."""
    marks = {str(param.values[0]): list(param.marks) for param in BACKENDS}
    return [
        pytest.param(way, marks=[*marks[backend], *([pytest.mark.slow] if fast and way not in fast else [])])
        for way, (backend, _) in WAYS.items()
    ]


def launch(way: str, jobs: Sequence[tuple[str, list[str]]], folders: Sequence[Path]) -> list[tuple[int, str]]:
    """Commands, each with a patch, one after another on as many processes as there are folders to run them in, told of
    each other as torchrun and mlx.launch do it. Once the last process has ended, the others have a minute.

    Returns:
        exit code, standard output and error of each process.
    """
    backend, environment = WAYS[way]
    count = len(folders)
    ports = free_ports(count)
    processes: list[BaseProcess] = []
    with tempfile.TemporaryDirectory() as name:
        hosts, outputs = Path(name, "hosts.json"), [Path(name, f"output{rank}") for rank in range(count)]
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        for rank, folder in enumerate(folders):
            if backend == "mlx":
                own = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
            else:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
            own |= environment
            processes.append(forked.start(commands, jobs, environment=own, folder=folder, output=outputs[rank]))
        try:
            for process, timeout in zip(reversed(processes), [400, *[60] * (count - 1)], strict=True):
                process.join(timeout)
                assert process.exitcode is not None, "\n".join(output.read_text() for output in outputs)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [(forked.ended(process), output.read_text()) for process, output in zip(processes, outputs, strict=True)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def commands(jobs: Sequence[tuple[str, list[str]]]) -> int:
    """Commands in this process, one after another, each with a patch; the largest exit code."""
    codes = []
    for name, words in jobs:
        codes.append(command(words, name))
        print(f"\nEXIT CODE {codes[-1]}", file=sys.stderr, flush=True)
    return max(codes)
