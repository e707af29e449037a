"""The conformance vectors: inputs, and what the float64 oracle expects of them, as files anyone can read.

`python -m bnf_conformance.vectors` rebuilds the committed files. `manifest.json` says what every array means;
the arrays lie in one safetensors file per level, under `<case>/<array>`.

Inputs are float32 arrays holding values that each dtype of the case can represent, so that a backend's cast
loses nothing. They are integers, drawn from the raw bits of PCG64, times powers of two: the same bytes on
every machine and with every NumPy.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import load_file, save

from bnf_core import oracle
from bnf_core.errors import UserError
from bnf_core.steps.batching import collate
from bnf_core.storage.tensors import DTYPES
from bnf_core.types import Batch, Example

Array = NDArray[Any]

VERSION = 4
# Of the stored files, by version. A changed vector is a new version with a new line here; old lines stay.
DIGESTS = {
    1: "sha256:9e24e4ee6ee35a431a2de750f572ac868a900351dd256e992bd1747ad1a9debb",
    2: "sha256:e5aafd7b037c0447ad8d322329602ea00d6207d034c067b22891586aad8311aa",
    3: "sha256:474f6dca25fdcbf0c9b40d60363df4f7c59958b9ef7581eee51a023e16f4a8a0",
    4: "sha256:cfa054e7324f238bb670f53b4cfc62fd4b3d0283e126bdc6a93d698b8e3a6ebb",
}
FOLDER = Path(__file__).parent / "vectors"
FLOAT32 = ("float32",)
ALL = ("float32", "bfloat16", "float16")

DESCRIPTIONS = {
    "L0": {
        "logits": "input (N, V) float32; -inf bans a token",
        "targets": "input (N,) int32, the observed tokens",
        "ref_log_odds": "input (N,) float32, the reference's log-odds of the observed tokens; ±inf means r = 1 or 0",
        "weights": "input (N,) float32, factors of the tokens' losses",
        "log_odds": "expected (N,) float64, log p − log(1 − p)",
        "other_entropy": "expected (N,) float64, entropy in nats of the other tokens renormalised among themselves",
        "token_loss": "expected (N,) float64, ℓ = −Σ_v t(v) log π(v)",
        "grad_logits": "expected (N, V) float64, gradient of Σ weights · ℓ: weights (π − t)",
    },
    "L1": {
        "prompt_lengths": "input (S,) int32, S sequences",
        "completion_lengths": "input (S,) int32, the end-of-turn token included",
        "token_ids": "input int32, each sequence's prompt and completion, one sequence after the other",
        "labels": "input (S,) int32, +1 preferred, −1 dispreferred",
        "weights": "input (S,) float32, how much each sequence counts: the size of a graded label; absent: 1",
        "trained": "input int32, 1 or 0 of each completion token, sequence after sequence; absent: all are trained",
        "ref_log_odds": "input (N,) float32 of all trained tokens, one sequence after the other",
        "micro_batch_sizes": "input (M,) int32: the sequences, in order, are cut into micro-batches of so many",
        "logits_<m>": "input (rows, T, V) float32 of micro-batch m, one sequence to a row, or as the field bins says: "
        "bins[m] lists the sequences of each row, one after the other; rows are padded on the right to the longest; "
        "the logits at position i predict the token at i + 1",
        "loss": "expected () float64, mean of weight · sequence_loss over all S sequences",
        "sequence_loss": "expected (S,) float64, label · mean of ℓ over the completion's trained tokens",
        "grad_logits_<m>": "expected (rows, T, V) float64, gradient of loss; 0 where nothing is scored",
    },
    "L2": {
        "hidden": "input (N, D) float32, the states that predict the targets",
        "head_weight": "input (V, D) float32; logits = hidden @ head_weight.T",
        "targets": "input (N,) int32",
        "ref_log_odds": "input (N,) float32",
        "coefficients": "input (N,) float32, factors of the tokens' losses",
        "loss": "expected () float64, Σ coefficients · ℓ",
        "log_odds": "expected (N,) float64",
        "other_entropy": "expected (N,) float64",
        "token_loss": "expected (N,) float64, ℓ",
        "grad_hidden": "expected (N, D) float64, gradient of loss",
        "grad_head": "expected (V, D) float64, gradient of loss",
    },
}


@dataclass(frozen=True)
class Case:
    """Named inputs and expected values; `arrays` follows `DESCRIPTIONS[level]`."""

    name: str
    level: str
    description: str
    dtypes: tuple[str, ...]  # those that can represent every input
    arrays: Mapping[str, Array]
    fields: Mapping[str, Any] = field(default_factory=dict)  # what is no array, such as the chunk sizes to try

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]


class Draw:
    """Exactly reproducible draws, named after the case so that a new case changes no other."""

    def __init__(self, name: str):
        self._bits = np.random.PCG64(zlib.crc32(name.encode()))

    def below(self, limit: int, *shape: int) -> Array:
        """Integers in [0, limit), int64."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        return (raw >> np.uint64(1)).astype(np.int64).reshape(shape) % limit

    def values(self, limit: float, *shape: int, bits: int) -> Array:
        """Float32 in ±limit, a power of two; 8 bits fit every dtype, 24 float32 alone."""
        half = 2 ** (bits - 1)
        return ((self.below(2 * half + 1, *shape) - half) * (limit / half)).astype(np.float32)


def rounded(x: ArrayLike, dtype: str) -> Array:
    """The nearest values of a dtype, ties to even, as float64; what overflows is infinite."""
    with np.errstate(over="ignore"):
        if dtype == "float16":
            return np.asarray(x, np.float64).astype(np.float16).astype(np.float64)
        single = np.asarray(x, np.float64).astype(np.float32)
        return single.astype(DTYPES[dtype]).astype(np.float64)


# L0: tokens ---------------------------------------------------------------------------------------------------


def token_case(
    name: str,
    description: str,
    dtypes: tuple[str, ...],
    logits: ArrayLike,
    targets: ArrayLike,
    ref_log_odds: ArrayLike,
    weights: ArrayLike | None = None,
) -> Case:
    """A case of single tokens with its expected values; by default weights of both signs, between 1/2 and 1."""
    draw = Draw(name + " weights")
    n = np.size(targets)
    if weights is None:
        weights = (64 + draw.below(64, n)) / 128 * (1 - 2 * draw.below(2, n))
    inputs = {
        "logits": np.asarray(logits, np.float32),
        "targets": np.asarray(targets, np.int32),
        "ref_log_odds": np.asarray(ref_log_odds, np.float32),
        "weights": np.asarray(weights, np.float32),
    }
    loss, grad = oracle.token_loss(inputs["logits"], inputs["targets"], inputs["ref_log_odds"])
    expected = {
        "log_odds": oracle.log_odds(inputs["logits"], inputs["targets"]),
        "other_entropy": oracle.other_entropy(inputs["logits"], inputs["targets"]),
        "token_loss": loss,
        "grad_logits": grad * inputs["weights"][:, None].astype(np.float64),
    }
    return Case(name, "L0", description, dtypes, inputs | expected)


def _shape_case(n: int, vocab: int, dtypes: tuple[str, ...]) -> Case:
    name = f"n{n}_v{vocab}" + ("_float32" if dtypes == FLOAT32 else "")
    draw, bits = Draw(name), 24 if dtypes == FLOAT32 else 8
    logits = draw.values(8.0, n, vocab, bits=bits)
    targets = draw.below(vocab, n)
    targets[1::2] = logits[1::2].argmax(1)  # half of them tokens the policy likes, or a large V had none
    return token_case(
        name, f"{n} tokens of a vocabulary of {vocab}", dtypes, logits, targets, draw.values(8.0, n, bits=bits)
    )


def _token_cases() -> Iterator[Case]:
    for n, vocab in [(1, 2), (33, 2), (3, 3), (7, 17), (1, 1000), (33, 1000), (1, 32_000), (2, 151_936)]:
        yield _shape_case(n, vocab, ALL)
    for n, vocab in [(1, 3), (3, 2), (7, 17), (33, 257)]:
        yield _shape_case(n, vocab, FLOAT32)

    draw = Draw("tie")
    logits, targets = draw.values(8.0, 33, 17, bits=8), draw.below(17, 33)
    policy = oracle.log_odds(logits, targets)
    yield token_case("tie", "p = r to the last digit of float32", ALL, logits, targets, policy)
    logits, targets = draw.values(64.0, 33, 2, bits=8), draw.below(2, 33)
    rows = np.arange(33)
    exact = logits[rows, targets] - logits[rows, 1 - targets]
    yield token_case("tie_exact", "p = r exactly: two tokens, log-odds without rounding", ALL, logits, targets, exact)

    # 87.3 and 103.3 are where float32's exp turns subnormal and then 0.
    sizes = np.asarray([5, 20, 50, 86, 89, 104, 200], np.float32)
    odds = np.concatenate([-sizes[::-1], [0.0], sizes])
    policy, reference = (grid.ravel() for grid in np.meshgrid(odds, odds, indexing="ij"))
    logits = Draw("saturation").values(1.0, len(policy), 5, bits=8)
    targets = Draw("saturation targets").below(5, len(policy))
    logits[np.arange(len(policy)), targets] = policy
    yield token_case(
        "saturation",
        "hopeless and certain tokens: log-odds of ±5 to ±200 of policy and reference, in all pairs",
        ALL,
        logits,
        targets,
        reference,
    )

    inf = float("inf")
    yield token_case(
        "banned",
        "tokens of no probability: some others, all others (p = 1), the observed one (p = 0), with r from 0 to 1",
        ALL,
        [[1, -inf, 2, 0]] * 4 + [[3, -inf, -inf, -inf]] * 5 + [[-inf, 0.5, -1, 2]] * 5 + [[-inf, 7, -inf, -inf]] * 2,
        [0] * 16,
        [0.5, -2, inf, -inf, -3, 3, 40, inf, -inf, -3, 3, 40, inf, -inf, 0.5, -inf],
    )
    yield token_case(
        "banned_v2",
        "two tokens, one of them of no probability",
        ALL,
        [[-inf, 1], [-inf, 1], [1, -inf], [1, -inf]],
        [0, 1, 0, 1],
        [0.5, 0.5, -inf, -inf],
    )
    draw = Draw("reference_limits")
    logits, targets = draw.values(8.0, 14, 7, bits=8), draw.below(7, 14)
    yield token_case("reference_limits", "r = 0 and r = 1", ALL, logits, targets, [inf, -inf] * 7)

    draw = Draw("huge")
    logits = np.float32(9984) * (1 - 2 * draw.below(2, 33, 9)).astype(np.float32)
    logits[:, ::4] += 64 * draw.below(3, 33, 3).astype(np.float32)  # the next values that bfloat16 knows
    yield token_case("huge", "logits of ±1e4", ALL, logits, draw.below(9, 33), draw.values(8.0, 33, bits=8))
    draw = Draw("huge_float32")
    logits = np.float32(10_000) + draw.values(4.0, 33, 17, bits=12)  # multiples of 2^-9, near 1e4
    logits[16:] -= np.float32(20_000)
    targets, noise = draw.below(17, 33), draw.values(2.0, 33, bits=24)
    yield token_case(
        "huge_float32",
        "logits of ±1e4 a few units apart, the reference near: all rounding of a careless log-sum shows",
        FLOAT32,
        logits,
        targets,
        oracle.log_odds(logits, targets).astype(np.float32) + noise,
    )


def hopeless_to_saturated(tokens: int = 4000, vocab: int = 97) -> Case:
    """Float32 tokens with log-odds from −60 to +60, the reference near, far and tied in turn.

    Too many to store: built where it is checked, so it may round differently from machine to machine.
    """
    draw = Draw("hopeless to saturated")
    logits, targets = draw.values(4.0, tokens, vocab, bits=24), draw.below(vocab, tokens)
    rows = np.arange(tokens)
    # z_y ← z_y + (wanted − present log-odds)
    logits[rows, targets] += draw.values(64.0, tokens, bits=24) * 60 / 64 - oracle.log_odds(logits, targets)
    policy = oracle.log_odds(logits, targets)
    near = policy + draw.values(2.0, tokens, bits=24)
    far = draw.values(64.0, tokens, bits=24)
    reference = np.choose(rows % 3, [near, far, policy])
    description = f"{tokens} tokens with log-odds from −60 to +60"
    return token_case(f"{tokens} tokens", description, FLOAT32, logits, targets, reference)


# L1: batches --------------------------------------------------------------------------------------------------


def micro_batches(case: Case) -> list[tuple[Array, Batch, Array]]:
    """An L1 case as `Losses.batch` takes it: (logits (B, T, V), batch, ref_log_odds (N,)) per micro-batch."""
    prompts, completions = case["prompt_lengths"], case["completion_lengths"]
    ends, last = np.cumsum(prompts + completions), np.cumsum(completions)
    weights = case.arrays.get("weights", np.ones(len(ends), np.float32))
    examples = []
    for s, label in enumerate(case["labels"]):
        ids = tuple(case["token_ids"][ends[s] - prompts[s] - completions[s] : ends[s]].tolist())
        mask = case["trained"][last[s] - completions[s] : last[s]] > 0 if "trained" in case.arrays else None
        trained = None if mask is None or mask.all() else tuple(mask.tolist())
        prompt, completion = ids[: prompts[s]], ids[prompts[s] :]
        examples.append(Example(prompt, completion, bool(label > 0), trained=trained, weight=float(weights[s])))
    result = []
    first = token = 0
    for m, size in enumerate(case["micro_batch_sizes"]):
        bins = case.fields["bins"][m] if "bins" in case.fields else None
        local = None if bins is None else [[s - first for s in row] for row in bins]
        batch = collate(examples[first : first + size], len(examples), bins=local)
        count = len(batch.targets)
        result.append((case[f"logits_{m}"], batch, case["ref_log_odds"][token : token + count]))
        first, token = first + int(size), token + count
    return result


def batch_case(
    name: str,
    description: str,
    dtypes: tuple[str, ...],
    lengths: Sequence[tuple[int, int]],  # (prompt, completion) of each sequence
    labels: Sequence[int],
    micro_batch_sizes: Sequence[int],
    vocab: int,
    bins: Sequence[Sequence[Sequence[int]]] | None = None,  # the sequences of each row of each micro-batch
    trained: Sequence[str] | None = None,  # of each sequence, + for a trained token of the completion, - for another
    weights: Sequence[float] | None = None,  # of each sequence
) -> Case:
    """A case of sequences with its expected values; all else is drawn by `name`."""
    draw, bits = Draw(name), 24 if dtypes == FLOAT32 else 8
    prompts, completions = np.asarray(lengths, np.int32).T
    masks = trained or ["+" * count for count in completions]
    counts = np.array([mask.count("+") for mask in masks])
    arrays: dict[str, Array] = {
        "prompt_lengths": prompts,
        "completion_lengths": completions,
        "token_ids": draw.below(vocab, int((prompts + completions).sum())).astype(np.int32),
        "labels": np.asarray(labels, np.int32),
        "ref_log_odds": draw.values(8.0, int(counts.sum()), bits=bits),
        "micro_batch_sizes": np.asarray(micro_batch_sizes, np.int32),
    }
    if trained is not None:
        arrays["trained"] = np.asarray([mark == "+" for mark in "".join(trained)], np.int32)
    if weights is not None:
        arrays["weights"] = np.asarray(weights, np.float32)
    weight = np.asarray([1.0] * len(labels) if weights is None else arrays["weights"], np.float64)
    ends = np.cumsum(micro_batch_sizes)
    layout = bins or [[[s] for s in range(end - size, end)] for end, size in zip(ends, micro_batch_sizes, strict=True)]
    # The expected values walk sequence by sequence and token by token, sharing nothing with `collate`.
    sequence_loss = np.zeros(len(labels))
    end = np.cumsum(prompts + completions)
    seen = np.cumsum(counts) - counts
    for m, rows in enumerate(layout):
        width = max(sum(int(prompts[s] + completions[s]) for s in row) for row in rows)
        logits = draw.values(4.0, len(rows), width, vocab, bits=bits)  # padding and prompts have logits too
        grad = np.zeros(logits.shape)
        for b, row in enumerate(rows):
            start = 0
            for s in row:
                ids = arrays["token_ids"][end[s] - prompts[s] - completions[s] : end[s]]
                scored = [k for k in range(completions[s]) if masks[s][k] == "+"]
                for reference, k in zip(arrays["ref_log_odds"][seen[s] :], scored, strict=False):
                    at = prompts[s] + k
                    loss, slope = oracle.token_loss(logits[b, start + at - 1][None], [ids[at]], [reference])
                    sequence_loss[s] += labels[s] * loss[0] / counts[s]
                    grad[b, start + at - 1] = slope[0] * weight[s] * labels[s] / (counts[s] * len(labels))
                start += len(ids)
        arrays |= {f"logits_{m}": logits, f"grad_logits_{m}": grad}
    arrays |= {"sequence_loss": sequence_loss, "loss": np.asarray((weight * sequence_loss).mean())}
    return Case(name, "L1", description, dtypes, arrays, {} if bins is None else {"bins": bins})


def _batch_cases() -> Iterator[Case]:
    uneven = [(3, 4), (1, 1), (5, 7), (2, 12), (4, 2), (6, 5), (1, 3)]
    mixed = [1, -1, -1, 1, -1, -1, 1]
    for suffix, dtypes in (("", ALL), ("_float32", FLOAT32)):
        yield batch_case(
            "mixed" + suffix, "both labels, uneven micro-batches, padded rows", dtypes, uneven, mixed, [3, 1, 3], 11
        )
    yield batch_case("all_good", "preferred rows only", ALL, uneven[:5], [1] * 5, [1, 4], 11)
    yield batch_case("all_bad", "dispreferred rows only", ALL, uneven[:5], [-1] * 5, [4, 1], 11)
    yield batch_case("one_row", "one sequence of one completion token, V = 2", ALL, [(1, 1)], [-1], [1], 2)
    yield batch_case("one_micro_batch", "a batch in one piece", ALL, uneven, mixed, [7], 33)
    graded = [0.6, 0.25, 1.0, 2.0, 0.05, 0.0, 1.0]
    yield batch_case("graded", "graded labels and weights", ALL, uneven, mixed, [3, 1, 3], 11, weights=graded)
    packed = [[[0, 1, 2], [3]], [[4, 5], [6]]]
    yield batch_case("packed", "several sequences in a row", ALL, uneven, mixed, [4, 3], 11, packed)
    # Turns of a tool between the assistant's, a first and a last turn that are not trained, and a row of one turn.
    turns = ["++-+", "+", "--+++--", "++++-----+++", "-+", "+----", "+++"]
    yield batch_case("masked", "turns that are not trained", ALL, uneven, mixed, [3, 1, 3], 11, trained=turns)
    yield batch_case("masked_packed", "the same in packed rows", ALL, uneven, mixed, [4, 3], 11, packed, trained=turns)


# L2: hidden states and head -----------------------------------------------------------------------------------


def _drawn_head_case(
    name: str, description: str, dtypes: tuple[str, ...], n: int, vocab: int, dim: int, hidden: float, head: float
) -> Case:
    """Hidden states (N, D) in ±hidden and a head (V, D) in ±head."""
    draw, bits = Draw(name), 24 if dtypes == FLOAT32 else 8
    inputs = {
        "hidden": draw.values(hidden, n, dim, bits=bits),
        "head_weight": draw.values(head, vocab, dim, bits=bits),
        "targets": draw.below(vocab, n).astype(np.int32),
    }
    logits = inputs["hidden"].astype(np.float64) @ inputs["head_weight"].astype(np.float64).T
    inputs["targets"][1::2] = logits[1::2].argmax(1)
    policy = oracle.log_odds(logits, inputs["targets"])
    inputs["ref_log_odds"] = np.round(policy).astype(np.float32) + draw.values(4.0, n, bits=bits)
    # Coefficients as a batch has them: both signs, about 1/N.
    inputs["coefficients"] = ((64 + draw.below(64, n)) / (128 * n) * (1 - 2 * draw.below(2, n))).astype(np.float32)
    chunks = sorted({1, 7, n // 2 + 1})  # the last leaves a chunk of another size, or is one too large
    return head_case(name, description, dtypes, inputs, [None, *chunks])


def head_case(
    name: str, description: str, dtypes: tuple[str, ...], inputs: dict[str, Array], chunk_tokens: Sequence[int | None]
) -> Case:
    """A case of hidden states and a head with its expected values."""
    logits = inputs["hidden"].astype(np.float64) @ inputs["head_weight"].astype(np.float64).T
    loss, grad = oracle.token_loss(logits, inputs["targets"], inputs["ref_log_odds"])
    coefficients = inputs["coefficients"].astype(np.float64)
    grad *= coefficients[:, None]
    expected = {
        "loss": np.asarray(coefficients @ loss),
        "log_odds": oracle.log_odds(logits, inputs["targets"]),
        "other_entropy": oracle.other_entropy(logits, inputs["targets"]),
        "token_loss": loss,
        "grad_hidden": grad @ inputs["head_weight"].astype(np.float64),
        "grad_head": grad.T @ inputs["hidden"].astype(np.float64),
    }
    return Case(name, "L2", description, dtypes, inputs | expected, {"chunk_tokens": list(chunk_tokens)})


def _head_cases() -> Iterator[Case]:
    for suffix, dtypes in (("", ALL), ("_float32", FLOAT32)):
        yield _drawn_head_case("head_v257" + suffix, "logits of about ±5", dtypes, 33, 257, 24, 1.0, 2.0)
        yield _drawn_head_case("head_v3001" + suffix, "a larger vocabulary", dtypes, 17, 3001, 8, 1.0, 4.0)
    yield _drawn_head_case("head_wide", "many hidden dimensions", ALL, 7, 61, 512, 1.0, 0.25)
    yield _drawn_head_case("head_saturated", "logits of about ±100", ALL, 33, 129, 16, 8.0, 8.0)
    yield _drawn_head_case("head_one", "one token, V = 2", ALL, 1, 2, 5, 1.0, 1.0)


# Files --------------------------------------------------------------------------------------------------------


def build() -> list[Case]:
    """Every stored case, computed anew."""
    return [*_token_cases(), *_batch_cases(), *_head_cases()]


def write(folder: Path = FOLDER) -> None:
    """Write the manifest and one safetensors file per level into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = build()
    manifest = {
        "name": "bnf-conformance-vectors",
        "version": VERSION,
        "about": "Inputs are float32 or int32, expected values float64; array <name> of case <case> is stored as "
        "<case>/<name> in <level>.safetensors. A case applies to the dtypes it lists: cast the inputs first.",
        "arrays": DESCRIPTIONS,
        "cases": [
            {
                "name": case.name,
                "level": case.level,
                "file": f"{case.level}.safetensors",
                "description": case.description,
                "dtypes": list(case.dtypes),
                **case.fields,
                "arrays": {
                    name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in case.arrays.items()
                },
            }
            for case in cases
        ],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for level in DESCRIPTIONS:
        tensors = {
            f"{case.name}/{name}": np.array(array, order="C")
            for case in cases
            if case.level == level
            for name, array in case.arrays.items()
        }
        (folder / f"{level}.safetensors").write_bytes(save(tensors))


def digest(folder: Path = FOLDER) -> str:
    """SHA-256 of all files of vectors, names included."""
    whole = hashlib.sha256()
    for name in ("manifest.json", *(f"{level}.safetensors" for level in DESCRIPTIONS)):
        content = (folder / name).read_bytes()
        whole.update(f"{name} {len(content)}\n".encode() + content)
    return f"sha256:{whole.hexdigest()}"


def load(folder: Path = FOLDER) -> list[Case]:
    """The stored cases, their arrays read-only.

    Raises:
        UserError: the files are of another version, or not those that this version has.
    """
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    if manifest["version"] != VERSION:
        raise UserError(f"{folder}: vectors of version {manifest['version']}, this suite reads version {VERSION}")
    if digest(folder) != DIGESTS[VERSION]:
        raise UserError(
            f"{folder}: the files are not those of version {VERSION}: reinstall bnf-align, or, if they were changed "
            "on purpose, raise VERSION and record the new digest in bnf_conformance/vectors.py"
        )
    tensors = {level: load_file(folder / f"{level}.safetensors") for level in DESCRIPTIONS}
    for arrays in tensors.values():
        for array in arrays.values():
            array.flags.writeable = False
    known = {"name", "level", "file", "description", "dtypes", "arrays"}
    return [
        Case(
            name=entry["name"],
            level=entry["level"],
            description=entry["description"],
            dtypes=tuple(entry["dtypes"]),
            arrays={name: tensors[entry["level"]][f"{entry['name']}/{name}"] for name in entry["arrays"]},
            fields={key: value for key, value in entry.items() if key not in known},
        )
        for entry in manifest["cases"]
    ]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    write(target)
    print(f"version {VERSION}: {digest(target)}")
