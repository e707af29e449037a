"""Saved adapters, LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353), in the two layouts that there are.

    W + scale · B A, and for DoRA each row of it brought to the length m         A (r, in), B (out, r), m (out,)

             PEFT: adapter_model.safetensors                          mlx-lm: adapters.safetensors
    A        base_model.model.<path>.lora_A.weight (r, in)            <path>.lora_a (in, r)
    B        base_model.model.<path>.lora_B.weight (out, r)           <path>.lora_b (r, out)
    m        base_model.model.<path>.lora_magnitude_vector (out,)     <path>.m (out,)
    scale    lora_alpha / r, with use_rslora lora_alpha / √r          lora_parameters.scale
    modules  target_modules: names, paths or their endings            keys: paths in a layer, in the last num_layers
                                                                      layers of the model; or whole paths

Both keep them in adapter_config.json (peft/tuners/lora/config.py; mlx_lm/tuner/utils.py, linear_to_lora_layers).
PEFT can hold far more than mlx-lm; what only one of them can hold is refused with the reason.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from bnf_core.config import FineTuneType, LoraConfig
from bnf_core.errors import UserError
from bnf_core.models.quantization import quantization_of
from bnf_core.storage.tensors import float_tensors, model_tensors, read_header
from bnf_core.types import Array

Layout = Literal["peft", "mlx"]
Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]  # (out, in) of a model's matrices, by path

CONFIG = "adapter_config.json"
WEIGHTS: Mapping[Layout, str] = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
NAMES: Mapping[Layout, re.Pattern[str]] = {
    "peft": re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?"),
    "mlx": re.compile(r"(.+)\.(lora_a|lora_b|m)"),
}
PARTS = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m", "lora_a": "a", "lora_b": "b", "m": "m"}
IN_LAYER = re.compile(r"(.*?\.|)(\d+)\.(.+)")

# What PEFT can do and mlx-lm cannot, by the key of the config that says so.
ONLY_PEFT = {
    "modules_to_save": "whole modules beside the low-rank matrices",
    "rank_pattern": "ranks that differ between modules",
    "alpha_pattern": "scales that differ between modules",
    "lora_bias": "biases on the low-rank path",
    "trainable_token_indices": "rows of the embedding",
    "layer_replication": "layers that are there twice",
    "target_parameters": "matrices on parameters that are no module's weight, such as fused experts",
    "alora_invocation_tokens": "an adapter that some tokens switch on",
    "use_qalora": "QA-LoRA, which pools its input",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "a router between adapters",
    "kasa_config": "KaSA's singular values",
    "monteclora_config": "MonteCLoRA's random weights",
}
# The others take something away from the model's own weights when they begin.
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

# What PEFT changes in the model itself, where switching the adapter off does not reach: by the key that says so,
# whether a value does, and what it means.
STAYS_ON: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "bias": (lambda value: value not in (None, "none"), "it trains the model's own biases"),
    "layer_replication": (bool, "it has layers of the model twice"),
    "init_lora_weights": (lambda value: value not in KEEPS_BASE, "it began by changing the model's own weights"),
}

# Which library reads an adapter, and how.
LOADING: Mapping[Layout | None, tuple[str, str]] = {
    "peft": (
        "peft",
        """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {here!r})""",
    ),
    "mlx": (
        "mlx",
        """from mlx_lm import load

model, tokenizer = load({base!r}, adapter_path={here!r})""",
    ),
}


@dataclass(frozen=True)
class LowRank:
    """Of one module, float32."""

    a: Array  # (r, in)
    b: Array  # (out, r)
    m: Array | None = None  # (out,), of DoRA


@dataclass(frozen=True)
class Adapter:
    layout: Layout  # which it was read from
    modules: Mapping[str, LowRank]  # by path
    scale: float
    dropout: float

    @property
    def rank(self) -> int:
        return len(next(iter(self.modules.values())).a)

    @property
    def dora(self) -> bool:
        return any(module.m is not None for module in self.modules.values())


def read_adapter(folder: Path, shapes: Shapes | None = None) -> Adapter:
    """A saved adapter of either layout; half precision is widened.

    Args:
        shapes: of the model that it is for, from `matrix_shapes`; the adapter is held against them.
    Raises:
        UserError: no adapter, damaged, tensors missing or unknown, another model's, or something that the other
            layout cannot hold.
    """
    config, layout = _config(folder)
    scale, dropout = (_peft_settings if layout == "peft" else _mlx_settings)(folder, config)
    adapter = Adapter(layout, _modules(folder, layout), scale, dropout)
    for path, module in adapter.modules.items():
        if (len(module.a), (module.m is None)) != (adapter.rank, not adapter.dora):
            raise UserError(
                f"{folder}: {path} has rank {len(module.a)}{'' if module.m is None else ' and a magnitude'}, unlike "
                "other modules: mlx-lm has one rank and kind for all"
            )
    stated = config.get("r") if layout == "peft" else config["lora_parameters"].get("rank")
    if stated != adapter.rank:
        raise UserError(f"{folder}: {CONFIG} says rank {stated}, and the matrices have rank {adapter.rank}")
    if shapes is not None:
        _require_fit(folder, adapter, shapes)
        wanted = _peft_targets(config, shapes) if layout == "peft" else _mlx_targets(config, shapes)
        if wanted is not None and (absent := sorted(wanted - adapter.modules.keys())):
            raise UserError(
                f"{folder}: {len(absent)} of {len(wanted)} modules that {CONFIG} names have no tensors, the first is "
                f"{absent[0]}"
            )
    return adapter


def adapter_layout(folder: Path) -> Layout:
    """Whose layout a folder is in.

    Raises:
        UserError: it is no adapter, or has no safetensors.
    """
    return _config(folder)[1]


def require_adapter(
    folder: Path, layout: Layout, kind: FineTuneType | None = None, lora: LoraConfig | None = None
) -> Config:
    """What a backend asks before it loads an adapter.

    Args:
        layout: of the backend.
        kind, lora: what the adapter must be for training to go on with the settings given; default: anything.
    Returns:
        Its adapter_config.json; of an older mlx-lm, as the present one would write it.
    Raises:
        UserError: it is no adapter, of the other layout, or not of that kind, rank or scale.
    """
    other: Layout = "mlx" if layout == "peft" else "peft"
    if (folder / WEIGHTS[other]).exists():
        holds, backend = ("a PEFT adapter", "torch") if other == "peft" else ("an MLX adapter", "mlx")
        raise UserError(f"{folder} holds {holds}: use --backend {backend}, or `bnf convert-adapter`")
    config, _ = _config(folder)
    if layout == "mlx":
        scale, _ = _mlx_settings(folder, config)
    if kind is None or lora is None:
        return config
    if layout == "mlx":
        was, rank = config.get("fine_tune_type", "lora"), config["lora_parameters"].get("rank")
    else:
        was, rank = "dora" if config.get("use_dora") else "lora", config.get("r")
        scale, _ = _peft_numbers(folder, config)
    if was != kind:
        raise UserError(f"{folder} was made with fine_tune_type {was}, and this run has {kind}: set it to {was}")
    if rank != lora.rank or not math.isclose(scale, lora.scale, rel_tol=1e-6):
        raise UserError(
            f"{folder} has rank {rank} and alpha {scale * rank:g}, and this run has lora.rank {lora.rank} and "
            f"lora.alpha {lora.alpha:g}: set both to the adapter's"
        )
    return config


def with_base(config: str, model: str) -> str:
    """adapter_config.json as text, with the model that it is for by another name; mlx-lm's need not name any."""
    settings = json.loads(config)
    key = "base_model_name_or_path" if "peft_type" in settings else "model"
    return json.dumps(settings | {key: model}, indent=2) + "\n"


def stays_on(config: Config) -> str | None:
    """What of a PEFT adapter stays in the model when it is switched off, by its config and in words; None: nothing."""
    for key, (does, meaning) in STAYS_ON.items():
        if does(config.get(key)):
            return f"{meaning} ({key}: {config[key]})"
    return None


def write_adapter(adapter: Adapter, folder: Path, layout: Layout, model: str, shapes: Shapes) -> None:
    """Write an adapter in one of the layouts, float32, into a folder that is there.

    Args:
        model: the name or path of the model that it is for.
        shapes: of that model.
    Raises:
        OSError: the disk is full, or writing is not allowed.
    """
    tensors: dict[str, Array] = {}
    for path, module in adapter.modules.items():
        if layout == "peft":
            prefix = f"base_model.model.{path}"
            tensors |= {f"{prefix}.lora_A.weight": module.a, f"{prefix}.lora_B.weight": module.b}
            if module.m is not None:
                tensors[f"{prefix}.lora_magnitude_vector"] = module.m
        else:
            tensors |= {f"{path}.lora_a": module.a.T, f"{path}.lora_b": module.b.T}
            if module.m is not None:
                tensors[f"{path}.m"] = module.m
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS[layout], metadata={"format": "pt" if layout == "peft" else "mlx"})
    config = (_peft_config if layout == "peft" else _mlx_config)(adapter, model, shapes)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def mlx_keys(adapted: Collection[str], linear: Iterable[str]) -> tuple[list[str], int]:
    """mlx-lm's `keys` and `num_layers` for exactly these modules: paths in a layer where that says it, else whole
    paths, which mlx-lm takes as well.

    Args:
        adapted: paths of the modules that have an adapter.
        linear: paths of all that could have one.
    """
    places = {path: IN_LAYER.fullmatch(path) for path in linear}
    count = 1 + max((int(place[2]) for place in places.values() if place), default=-1)
    of_adapted = {path: IN_LAYER.fullmatch(path) for path in adapted}
    first = min((int(place[2]) for place in of_adapted.values() if place), default=count)
    keys = {place[3] if place else path for path, place in of_adapted.items()}
    named = {p for p, place in places.items() if (int(place[2]) >= first and place[3] in keys if place else p in keys)}
    return (sorted(keys), count - first) if named == set(adapted) else (sorted(adapted), count)


def matrix_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """(out, in) of every matrix of a checkpoint, by its module's path; quantised ones as what they stand for. Only the
    files' headers are read.

    Raises:
        UserError: a quantisation that only MLX can read.
    """
    quantization = quantization_of(model)
    stored = {name: tensor.shape for name, tensor in model_tensors(model).items()}
    shapes = {name.removesuffix(".weight"): shape for name, shape in stored.items() if name.endswith(".weight")}
    for path in shapes:
        if quantization is not None and f"{path}.scales" in stored:
            groups = stored[f"{path}.scales"][-1]
            shapes[path] = (*shapes[path][:-1], groups * quantization.of(path)[0])
    return {path: shape for path, shape in shapes.items() if len(shape) == 2}


# Reading


def _config(folder: Path) -> tuple[Config, Layout]:
    """Raises UserError where a folder is no adapter of either layout."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not an adapter: it has no {CONFIG}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} holds no settings: expected a JSON object")
    layout: Layout = "peft" if "peft_type" in config else "mlx"
    if layout == "mlx" and not config.keys() & {"fine_tune_type", "lora_parameters", "num_layers"}:
        raise UserError(f"{folder / CONFIG} is neither PEFT's (peft_type) nor mlx-lm's (lora_parameters)")
    if not (folder / WEIGHTS[layout]).is_file():
        raise UserError(f"{folder} has no {WEIGHTS[layout]}; pickled weights are not loaded")
    return config if layout == "peft" else _present_mlx(folder, config), layout


def _present_mlx(folder: Path, config: Config) -> Config:
    """An mlx-lm config as mlx-lm writes it today. Up to 0.18 `num_layers` was `lora_layers` and DoRA `use_dora`, and
    without `keys` other modules were meant: then the tensors say which.

    Raises:
        UserError: the scale is not there, or may be either of two.
    """
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    if kind not in ("lora", "dora"):
        return config
    parameters, old = config.get("lora_parameters"), "lora_layers" in config
    if not isinstance(parameters, dict):
        raise UserError(f"{folder / CONFIG} has no lora_parameters: expected rank, scale, dropout and keys there")
    if absent := [key for key in ("rank", "scale") if key not in parameters]:
        hint = ". It has alpha, which mlx-lm multiplied by a scale" if "alpha" in parameters else ""
        raise UserError(
            f"{folder / CONFIG}: lora_parameters has no {' and no '.join(absent)}{hint}: add it (scale is what B A is "
            "multiplied by)"
        )
    if old and parameters.get("alpha", parameters["rank"]) != parameters["rank"]:
        raise UserError(
            f"{folder / CONFIG}: lora_parameters has scale {parameters['scale']} and alpha {parameters['alpha']}, and "
            "mlx-lm 0.9 multiplied B A by scale · alpha / rank, 0.14 by scale alone: set scale to the product that it "
            "was trained with, and leave alpha out"
        )
    keys, num_layers = parameters.get("keys"), config.get("num_layers", config.get("lora_layers"))
    if num_layers is None or (old and keys is None):
        names = read_header(folder / WEIGHTS["mlx"]).tensors
        keys, num_layers = sorted({match[1] for name in names if (match := NAMES["mlx"].fullmatch(name))}), -1
    parameters = {"dropout": 0.0} | parameters | ({} if keys is None else {"keys": keys})
    return config | {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters}


def _peft_settings(folder: Path, config: Config) -> tuple[float, float]:
    """Scale and dropout."""
    if config["peft_type"] != "LORA":
        raise UserError(f"{folder} is an adapter of PEFT's kind {config['peft_type']}: expected LORA")
    for key, reason in ONLY_PEFT.items():
        if config.get(key):
            raise UserError(f"{folder} has {reason} ({key}), which mlx-lm cannot hold")
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder} has trained biases (bias: {config['bias']}), which mlx-lm cannot hold")
    if (how := config.get("init_lora_weights")) not in KEEPS_BASE:
        raise UserError(
            f"{folder} began by changing the model's own weights (init_lora_weights: {how}): without PEFT it does not "
            "fit the model; save it as PEFT says (path_initial_model_for_weight_conversion), then convert that"
        )
    return _peft_numbers(folder, config)


def _peft_numbers(folder: Path, config: Config) -> tuple[float, float]:
    try:
        rank = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
        return config["lora_alpha"] / rank, float(config.get("lora_dropout") or 0.0)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: expected numbers for r, lora_alpha and lora_dropout: {error}") from error


def _mlx_settings(folder: Path, config: Config) -> tuple[float, float]:
    """Scale and dropout."""
    if (kind := config.get("fine_tune_type", "lora")) not in ("lora", "dora"):
        raise UserError(f"{folder} was made with fine_tune_type {kind}: expected lora or dora")
    try:
        settings = config["lora_parameters"]
        return float(settings["scale"]), float(settings.get("dropout") or 0.0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG}: expected lora_parameters with rank, scale and dropout") from error


def _modules(folder: Path, layout: Layout) -> dict[str, LowRank]:
    """Raises UserError where tensors are damaged, unknown or missing, or have shapes that do not go together."""
    file = folder / WEIGHTS[layout]
    found: dict[str, dict[str, Array]] = {}
    for name, tensor in sorted(float_tensors(file).items()):
        match = NAMES[layout].fullmatch(name)
        if match is None:
            raise UserError(f"{file}: {name} {_why_not(name)}")
        array = tensor.float32()
        part = PARTS[match[2]]
        if array.ndim != (1 if part == "m" else 2):
            raise UserError(f"{file}: {name} has shape {array.shape}: experts or convolutions, for linear layers only")
        found.setdefault(match[1], {})[part] = array.T if layout == "mlx" and part != "m" else array
    if not found:
        raise UserError(f"{file} holds no tensors")
    for path, parts in found.items():
        if absent := {"a", "b"} - parts.keys():
            raise UserError(f"{file}: lora_{absent.pop()} of {path} is missing")
        (rank, _), (out, rank_b) = parts["a"].shape, parts["b"].shape
        if rank != rank_b or ("m" in parts and parts["m"].shape != (out,)):
            shapes = ", ".join(f"{part} {array.shape}" for part, array in sorted(parts.items()))
            raise UserError(f"{file}: the shapes of {path} do not go together: {shapes}")
    return {path: LowRank(**parts) for path, parts in sorted(found.items())}


def _why_not(name: str) -> str:
    if "embed" in name:
        return "is an adapter of an embedding, which a tied head shares in mlx-lm and does not in PEFT"
    return "is no part of a LoRA or DoRA adapter of a linear layer"


def _require_fit(folder: Path, adapter: Adapter, shapes: Shapes) -> None:
    for path, module in adapter.modules.items():
        shape = len(module.b), module.a.shape[1]
        if path not in shapes:
            raise UserError(f"{folder} is not for this model: its checkpoint has no matrix {path}.weight")
        if shapes[path] != shape:
            reason = f"{path} is {shapes[path]} there, and the adapter is for {shape}"
            if "embed" in path and shapes[path] == shape[::-1]:
                raise UserError(f"{folder}: {path} {_why_not(path)}")
            raise UserError(f"{folder} is not for this model: {reason}")
        if path != "lm_head" and not path.startswith("model.layers."):
            raise UserError(
                f"{folder}: {path} may have another name in the other library: only model.layers.* and lm_head have "
                "the same in both"
            )


def _peft_targets(config: Config, shapes: Shapes) -> set[str] | None:
    """The modules that a PEFT config names; None where it does so by more than a list."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("exclude_modules") or config.get("layers_pattern"):
        return None
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    named = {path for path in shapes if any(path == t or path.endswith(f".{t}") for t in targets)}
    places = {path: IN_LAYER.fullmatch(path) for path in named}
    return {path for path, place in places.items() if layers is None or (place and int(place[2]) in layers)}


def _mlx_targets(config: Config, shapes: Shapes) -> set[str] | None:
    """The modules that an mlx-lm config names, by its rule; None where it takes all that there are."""
    keys, last = config["lora_parameters"].get("keys"), config.get("num_layers")
    if keys is None or not isinstance(last, int):
        return None
    places = {path: IN_LAYER.fullmatch(path) for path in shapes}
    count = 1 + max((int(place[2]) for place in places.values() if place), default=-1)
    first = count - last if last > 0 else 0  # mlx-lm takes the layers [-last:], and all where that is 0
    return {p for p, at in places.items() if p in keys or (at and int(at[2]) >= first and at[3] in keys)}


# Writing


def _peft_config(adapter: Adapter, model: str, shapes: Shapes) -> Config:
    names = {path.rpartition(".")[2] for path in adapter.modules}
    complete = {path for path in shapes if path.rpartition(".")[2] in names} == set(adapter.modules)
    alpha = adapter.scale * adapter.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(names if complete else adapter.modules),
        "use_dora": adapter.dora,
        "bias": "none",
    }


def _mlx_config(adapter: Adapter, model: str, shapes: Shapes) -> Config:
    keys, num_layers = mlx_keys(adapter.modules, shapes)
    return {
        "model": model,
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": keys},
    }
