"""`bnf check-model`: the same checkpoint in two backends, compared token by token and module by module.

Compared are the log-odds of every completion token, the BNF loss and the gradient of every LoRA module, in float32 and
from the same adapter. In bfloat16 and float16, where every operation rounds, each backend is compared with float32
instead, and neither may be further from it than the other by more than a bit. Where they differ, the first module that
parts is looked for: whose input still agrees and whose output does not. Then the config is changed, one known cause
after the other, until one backend gives what the other does.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from bnf_align.run.feedback import load_split
from bnf_align.run.results import result_file
from bnf_core import registry
from bnf_core.config import DataConfig, LoraConfig
from bnf_core.data.tokenization import load_tokenizer
from bnf_core.errors import UserError
from bnf_core.models.model_config import full_config, transformers_config
from bnf_core.models.model_folder import resolve_model
from bnf_core.steps.batching import collate
from bnf_core.storage.files import replace_file
from bnf_core.types import Array, Batch, Example

# Largest relative errors. Float32 in another order of summation gives log-odds 3e-7 on tiny models, 3e-6 on 30 layers;
# the smallest mistake known, another GELU, 2e-5 to 6e-5. Gradients lose more digits: 1e-6, and 8e-4 on 30 layers.
LOG_ODDS_TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4, 2e-3
BIT = 2.0  # in a dtype that rounds: as many times the other backend's distance from float32
QUIET = 1e-3  # gradients below this part of the largest are measured against that part: they are rounding
INPUT, OUTPUT = 0, 1
# A module parts where its output is off by this much, and by so many times what its input was.
PARTS, JUMP = 3e-5, 30

ROWS, MAX_LENGTH = 8, 512  # of --data: enough to tell
RANDOM_LENGTHS = (64, 41, 24, 9)
RANK, ALPHA = 4, 0.04  # a small update: the policy stays near the reference, as in training
SEED = 0
HEADS = frozenset(("lm_head", "embed_out"))

Observed = tuple[Array, Array, float, dict[str, Array]]  # as Inspector.observe gives them
Trace = dict[str, tuple[Array, Array]]  # a module's input and output, by path, in the order in which they finished


@dataclass
class CheckModelConfig:
    """Compare one checkpoint between two backends: log-odds, loss and gradients; find the module that parts."""

    model: str
    """A folder with config.json and model*.safetensors, or a Hub id; may be given without its flag."""
    backends: list[str] = field(default_factory=lambda: registry.ranked()[:2])
    """The two to compare; by default the best two for this machine."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """float32 compares the backends with each other, the others how far rounding takes each from float32."""
    data: str | None = None
    """Compare on the first rows of this feedback instead of random tokens."""
    report: str | None = None
    """Write every result to this JSON file."""


@dataclass(frozen=True)
class Comparison:
    quantity: str
    error: float  # the largest, relative
    allowed: float
    at: str = ""

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed  # NaN does not


@dataclass(frozen=True)
class Divergence:
    """Where the backends part."""

    where: str  # a module's path, the model's output, or what goes into the first layer
    error: float  # relative
    cause: str


@dataclass
class Result:
    model: str
    backends: list[str]
    tokens: int
    longest_row: int
    dtype: str
    comparisons: list[Comparison]
    gradients: dict[str, float]  # relative error by module
    divergence: Divergence | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def agree(self) -> bool:
        return all(comparison.agrees for comparison in self.comparisons)


def check_model(
    model: str, backends: list[str], dtype: str, data: str | None, report: str | None, console: Console
) -> int:
    """Compare, print and write the report.

    Returns:
        The exit code: 0 where the backends agree, 1 where they differ.
    Raises:
        UserError: no such model, a backend that is missing or cannot load it, bad rows, or a report that cannot be
            written.
    """
    written = None if report is None else result_file(report, "report")
    folder = resolve_model(model)
    result = compare(folder, backends, rows(folder, data, console), dtype)
    console.print(table(result))
    for line in verdict(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if written is not None:
        replace_file(written, json.dumps(asdict(result) | {"agree": result.agree}, indent=2) + "\n")
        console.print(f"report  {report}", highlight=False)
    return 0 if result.agree else 1


def compare(folder: Path, backends: list[str], batch: Batch, dtype: str = "float32") -> Result:
    """Both backends on one batch.

    Raises:
        UserError: a backend that is missing or cannot load the model.
    """
    inspectors = [registry.get(name).inspector for name in backends]
    if len(set(backends)) != 2:
        known = ",".join(registry.ranked()[:2])
        raise UserError(f"--backends {','.join(backends)}: expected two different ones, such as {known}")
    # One model in memory at a time.
    targets = shared_targets(*(inspect(folder).linear_layers() for inspect in inspectors))
    lora = LoraConfig(rank=RANK, alpha=ALPHA, targets=targets)
    first, second = (inspect(folder, dtype).observe(batch, lora, SEED) for inspect in inspectors)
    if dtype == "float32":
        comparisons = with_each_other(first, second)
    else:
        exact = inspectors[_follower(backends)](folder).observe(batch, lora, SEED)
        comparisons = with_float32(backends, first, second, exact)
    result = Result(
        model=str(folder),
        backends=backends,
        tokens=len(batch.targets),
        longest_row=int(batch.lengths.max()),
        dtype=dtype,
        comparisons=comparisons,
        gradients=gradient_errors(first[3], second[3]),
        notes=[note for name in backends for note in registry.get(name).notes(folder)],
    )
    if not result.agree:
        result.divergence = diagnose(folder, backends, batch.input_ids)
    return result


def with_each_other(first: Observed, second: Observed) -> list[Comparison]:
    """Of two backends in float32."""
    (ref, odds, loss, grads), (ref2, odds2, loss2, grads2) = first, second
    gradients = gradient_errors(grads, grads2)
    worst = max(gradients, key=lambda module: gradients[module])
    return [
        Comparison("log-odds, reference", relative_error(ref, ref2), LOG_ODDS_TOLERANCE, _token(ref, ref2)),
        Comparison("log-odds, policy", relative_error(odds, odds2), LOG_ODDS_TOLERANCE, _token(odds, odds2)),
        Comparison("BNF loss", abs(loss - loss2) / max(abs(loss), 1.0), LOSS_TOLERANCE),
        Comparison(f"gradients of {len(gradients)} LoRA modules", gradients[worst], GRADIENT_TOLERANCE, worst),
    ]


def with_float32(backends: list[str], first: Observed, second: Observed, exact: Observed) -> list[Comparison]:
    """Of two backends in a dtype that rounds: how far each is from float32, as root mean squares, beside the other; of
    gradients the mean over the modules, for in single ones it is chance which of two gets the luckier rounding. The
    loss follows from the log-odds."""
    comparisons = []
    for name, other, ours, theirs in (
        (backends[0], backends[1], first, second),
        (backends[1], backends[0], second, first),
    ):
        for quantity, a, b, e in (
            ("log-odds, reference", ours[0], theirs[0], exact[0]),
            ("log-odds, policy", ours[1], theirs[1], exact[1]),
        ):
            error, allowed = distance(a, e), distance(b, e)
            comparisons.append(
                Comparison(f"{quantity}: {name} from float32", error, BIT * allowed, f"{other} {allowed:.1e}")
            )
        own, others = ([distance(x[3][path], g) for path, g in exact[3].items()] for x in (ours, theirs))
        error, allowed = (float(np.mean(distances)) for distances in (own, others))
        quantity = f"gradients of {len(own) // 2} LoRA modules: {name} from float32"
        comparisons.append(Comparison(quantity, error, BIT * allowed, f"{other} {allowed:.1e}"))
    return comparisons


def _follower(backends: list[str]) -> int:
    """Which of the two does what the config says; the first where neither does."""
    return next((i for i, name in enumerate(backends) if registry.get(name).follows_config), 0)


def rows(folder: Path, data: str | None, console: Console) -> Batch:
    """The first rows of a file of feedback, or random tokens, good and bad in turn.

    Raises:
        UserError: a missing file or a bad row.
    """
    if data is not None:
        settings = DataConfig(path=data, max_length=MAX_LENGTH)
        examples = load_split(settings, "train", load_tokenizer(folder), console)[:ROWS]
        return collate(examples, len(examples))
    config = full_config(folder)
    vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
    rng = np.random.Generator(np.random.PCG64(SEED))
    ids = [tuple(int(i) for i in rng.integers(vocabulary, size=length)) for length in RANDOM_LENGTHS]
    examples = [Example(row[: len(row) // 2], row[len(row) // 2 :], i % 2 == 0) for i, row in enumerate(ids)]
    return collate(examples, len(examples))


def shared_targets(a: set[str], b: set[str]) -> list[str]:
    """Names of linear layers that both backends have in exactly the same decoder layers; `all-linear` where these and
    the head are all there are.

    Raises:
        UserError: there is none.
    """
    a, b = a - HEADS, b - HEADS
    if a and a == b and all(path.startswith("layers.") for path in a):
        return ["all-linear"]
    names = {path.rpartition(".")[2] for path in a if path.startswith("layers.")}
    shared = sorted(name for name in names if _called(name, a) == _called(name, b))
    if not shared:
        raise UserError("the backends have no linear layer of the same name in common: nothing to put an adapter on")
    return shared


def _called(name: str, paths: set[str]) -> set[str]:
    return {path for path in paths if path.rpartition(".")[2] == name}


def relative_error(a: Array, b: Array) -> float:
    """Largest difference over the largest value; 0 where both are all zero, NaN where either is."""
    top = float(np.abs(a).max(initial=0.0))
    return float(np.abs(a - b).max(initial=0.0)) / top if top else float(np.abs(b).max(initial=0.0))


def distance(a: Array, exact: Array) -> float:
    """Root mean square of the difference over that of the exact values; 0 where both are all zero."""
    top = float(np.sqrt(np.mean(np.square(exact, dtype=np.float64))))
    return float(np.sqrt(np.mean(np.square(a - exact, dtype=np.float64)))) / top if top else float(np.abs(a).max())


def gradient_errors(a: Mapping[str, Array], b: Mapping[str, Array]) -> dict[str, float]:
    """The larger relative error of A's and B's gradient, by module."""
    largest = max(float(np.abs(g).max()) for g in a.values())
    errors: dict[str, float] = {}
    for name in sorted(a.keys() & b.keys()):
        module = name.rpartition(".")[0]
        top = max(float(np.abs(a[name]).max()), QUIET * largest)
        errors[module] = max(errors.get(module, 0.0), float(np.abs(a[name] - b[name]).max()) / top)
    return errors


# Where they differ: the first module that parts, and why


@dataclass(frozen=True)
class Cause:
    """A known mistake: one backend computes as if a config key held another value."""

    name: str
    keys: tuple[str, ...]
    values: tuple[Any, ...]  # what it is taken for, by default or by an older convention


NO_WINDOW = 1 << 20
# By the kind of module that parts: the causes that can be tried, and what else it may be.
CAUSES: Mapping[str, tuple[tuple[Cause, ...], str]] = {
    "attention": (
        (
            Cause("RoPE base", ("rope_theta",), (1e4, 1e5, 5e5, 1e6)),
            Cause("RoPE scaling", ("rope_type",), ("default",)),
            Cause("partial rotary factor", ("partial_rotary_factor",), (1.0, 0.5, 0.25)),
            Cause("sliding window", ("sliding_window",), (NO_WINDOW,)),
            Cause("attention soft-cap", ("attn_logit_softcapping",), (None,)),
        ),
        "the attention mask, its scale, or another layout of the rotated dimensions",
    ),
    "mlp": (
        (
            Cause(
                "activation",
                ("hidden_act", "hidden_activation", "activation_function"),
                ("silu", "gelu", "gelu_python", "gelu_pytorch_tanh", "relu"),
            ),
        ),
        "how experts are chosen and weighted, or the order of a gate's halves",
    ),
    "norm": (
        (
            Cause(
                "norm epsilon",
                ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
                (1e-5, 1e-6, 1e-8, 1e-12),
            ),
        ),
        "the norm's offset (weight or 1 + weight), or an epsilon that is in no config",
    ),
    "head": (
        (
            Cause("logit soft-cap", ("final_logit_softcapping",), (None, 30.0)),
            Cause("tied head", ("tie_word_embeddings",), (True, False)),
            Cause("logit scale", ("logits_scaling", "logit_scale"), (1.0,)),
        ),
        "a bias or scale of the head",
    ),
    "embedding": (
        (Cause("embedding scale", ("embedding_multiplier", "scale_emb"), (1.0,)),),
        "the embedding's scale or its dtype",
    ),
    "weights": ((), "its weights: dtype, quantisation, or a tensor that one backend does not read"),
}
KINDS = {  # by the last part of the module's path
    "head": r"|model|lm_head|embed_out|output",
    "embedding": r".*(embed|wte|wpe).*",
    "norm": r".*norm.*|ln_.*",
    "attention": r".*(attn|attention).*",
    "mlp": r".*(mlp|ffn|feed_forward|moe|experts|mixer|mamba).*",
    "weights": r".*(proj|linear|dense|conv|fc|gate).*",
}


def diagnose(folder: Path, backends: list[str], input_ids: Array) -> Divergence | None:
    """The first module that parts, and its likely cause; None where every module's output agrees."""
    a, b = (registry.get(name).inspector(folder).trace(input_ids) for name in backends)
    found = first_to_part(a, b)
    if found is None:
        return None
    module, side = found
    error = relative_error(a[module][side], b[module][side])
    # The config is changed for a backend that does what the config says.
    other = 1 - _follower(backends)
    target = (a, b)[other][module][side]
    where = module or "the model's output"
    if side == INPUT:
        where, kind = f"what goes into {where}", "embedding"
    else:
        last = module.rpartition(".")[2]
        kind = next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, last)), "")
    kinds = [kind] if kind else list(CAUSES)
    for name, keys, said, value in _experiments(folder, kinds):
        with tempfile.TemporaryDirectory() as scratch:
            copy = _changed_copy(folder, Path(scratch), keys, value)
            try:
                changed = registry.get(backends[1 - other]).inspector(copy).trace(input_ids).get(module)
            except Exception:  # a config that no longer fits, in whatever way the framework says so: not this one
                continue
        if changed is not None and relative_error(changed[side], target) <= PARTS:
            meant = "none" if value in (None, NO_WINDOW) else value
            return Divergence(
                where, error, f"{name}: the config says {said}, and {backends[other]} computes as if it were {meant}"
            )
    tried = [cause.name for kind in kinds for cause in CAUSES[kind][0]]
    rest = "; ".join(CAUSES[kind][1] for kind in kinds)
    return Divergence(where, error, f"none of the usual ones ({', '.join(tried)}); perhaps {rest}" if tried else rest)


def first_to_part(a: Trace, b: Trace) -> tuple[str, int] | None:
    """The first module that parts, and which side of it: within the first layer that parts, the innermost whose input
    agrees and whose output does not; the input of the first layer, where that differs already; else a module after
    the layers. Modules that only one backend has are passed over."""
    errors = {
        path: (relative_error(a[path][INPUT], b[path][INPUT]), relative_error(a[path][OUTPUT], b[path][OUTPUT]))
        for path in a
        if path in b and all(x.shape == y.shape for x, y in zip(a[path], b[path], strict=True))
    }
    parts = {
        path: before <= PARTS and not after <= max(PARTS, JUMP * before) for path, (before, after) in errors.items()
    }
    paths = list(errors)
    layers = [path for path in paths if re.fullmatch(r"layers\.\d+", path)]
    # One backend may scale an embedding within its module and the other after it: what counts is what comes out.
    if layers and not errors[layers[0]][INPUT] <= PARTS:
        return layers[0], INPUT
    for layer in layers:
        if parts[layer]:
            return next((path for path in paths if path.startswith(f"{layer}.") and parts[path]), layer), OUTPUT
    after = paths[paths.index(layers[-1]) + 1 :] if layers else paths
    return next(((path, OUTPUT) for path in after if parts[path]), None)


def _experiments(folder: Path, kinds: list[str]) -> Iterator[tuple[str, tuple[str, ...], Any, Any]]:
    """(cause, keys, what the config says, what to try instead) wherever the two differ."""
    config = transformers_config(folder)
    for kind in kinds:
        for cause in CAUSES[kind][0]:
            said = list(_values(config, cause.keys))
            for value in dict.fromkeys([*(x for x in said if not isinstance(x, list)), *cause.values]):
                if any(x != value for x in said):
                    yield cause.name, cause.keys, next(x for x in said if x != value), value


def _changed_copy(folder: Path, scratch: Path, keys: tuple[str, ...], value: Any) -> Path:
    """A folder of the same files with another config."""
    for path in folder.iterdir():
        (scratch / path.name).symlink_to(path.resolve())
    (scratch / "config.json").unlink()
    config = _with(transformers_config(folder), keys, value)
    (scratch / "config.json").write_text(json.dumps(config, default=str))
    return scratch


def _values(config: Any, keys: tuple[str, ...]) -> Iterator[Any]:
    if isinstance(config, dict):
        for key, value in config.items():
            if key in keys:
                yield value
            else:
                yield from _values(value, keys)


def _with(config: Any, keys: tuple[str, ...], value: Any) -> Any:
    if isinstance(config, dict):
        return {k: value if k in keys and v is not None else _with(v, keys, value) for k, v in config.items()}
    return config


def _token(a: Array, b: Array) -> str:
    worst = int(np.abs(a - b).argmax())
    return f"token {worst + 1} of {len(a)}"


# Telling


def table(result: Result) -> Table:
    made = Table(
        "quantity", "relative error", "allowed", "where", "", title=f"{' and '.join(result.backends)} in {result.dtype}"
    )
    for c in result.comparisons:
        verdict = "[green]agrees[/green]" if c.agrees else "[red]differs[/red]"
        made.add_row(c.quantity, f"{c.error:.1e}", f"{c.allowed:.0e}", c.at, verdict)
    return made


def verdict(result: Result) -> list[str]:
    """Plain words, a line each."""
    pair = " and ".join(result.backends)
    seen = f"on {result.tokens} tokens in rows of up to {result.longest_row}"
    if result.dtype != "float32":
        seen += f": in {result.dtype} " + ("neither is" if result.agree else "one is")
        seen += f" more than {BIT:g} times as far from float32 as the other"
    notes = [f"note: {note}" for note in result.notes]
    if result.agree:
        return [f"{pair} agree {seen}.", *notes]
    if result.divergence is None:
        worst = max(result.gradients, key=lambda module: result.gradients[module])
        return [
            f"{pair} differ {seen}, though without an adapter no module parts in float32.",
            f"Look at the gradients: the worst are those of {worst}.",
            *notes,
        ]
    return [
        f"{pair} differ {seen}.",
        f"The first to part is {result.divergence.where}, by {result.divergence.error:.1e}; all before it agrees.",
        f"Likely cause: {result.divergence.cause}.",
        *notes,
    ]


Config = CheckModelConfig
POSITIONAL = ("--model",)


def backends(config: CheckModelConfig) -> list[str]:
    return config.backends


def run(config: CheckModelConfig, console: Console) -> int:
    return check_model(config.model, config.backends, config.dtype, config.data, config.report, console)
