"""How much memory training takes, from a model's configuration alone: formulae, no measurement.

What each layer keeps for its backward pass is the backend's own affair: `Measures.kept`, in its memory.py.
tests/integration/test_plan_run.py holds the sums against measured runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bnf_core.config import FineTuneType, LoraConfig
from bnf_core.errors import UserError
from bnf_core.models.lora import unadapted
from bnf_core.models.quantization import bits_per_weight
from bnf_core.types import Batch

MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # families whose every layer may be one of experts
# Families of other layers, recurrent ones among them, in any order; what these keep a backend measures.
HYBRIDS = ("falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "mamba2", "nemotron_h", "qwen3_5_text", "qwen3_next")
NORMED_HEADS = ("gemma3_text", "olmo2", "olmo3", "olmoe", "qwen3", "qwen3_moe")  # norms of queries and keys


class UnknownLayers(UserError):
    """The formulae do not know a model's layers, and a backend can measure them."""


@dataclass(frozen=True)
class Experts:
    """Of every layer of a mixture-of-experts model."""

    count: int  # E
    chosen: int  # k, for each token
    inner: int  # F of each


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder-only transformer with attention and a gated MLP: llama, qwen, mistral, smollm, …; or, in
    the place of the MLP, with a mixture of experts."""

    layers: int
    hidden: int  # D
    inner: int  # F, of the MLP; of a mixture's the shared expert, 0 where there is none
    heads: int  # of queries
    kv_heads: int
    head_dim: int
    vocab: int  # V
    tied: bool  # the head's weights are the embeddings'
    dtype: str = "float32"  # that the checkpoint is in
    bits: float | None = None  # a weight, scales included, where mlx-lm quantised the checkpoint
    normed_heads: bool = False
    experts: Experts | None = None

    @classmethod
    def of(cls, folder: Path) -> "Architecture":
        """Of the config.json in a folder.

        Raises:
            UserError: it is missing, or of another kind of model.
        """
        return cls.from_config(_config(folder), str(folder / "config.json"))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "config") -> "Architecture":
        """
        Raises:
            UnknownLayers: one of HYBRIDS.
            UserError: a size is missing, the layers are recurrent, of a family of mixtures of experts that is not known
                here, not all alike, or quantised as MLX cannot.
        """
        bits = bits_per_weight(config, name)
        config = config.get("text_config", config)
        needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        absent = [key for key in needed if not isinstance(config.get(key), int)]
        family = config.get("model_type")
        if family in HYBRIDS:
            raise UnknownLayers(f"{name} is of {family}, whose layers are not all attention with a gated MLP")
        mixture = family in MIXTURES
        other = [key for key in config if key.startswith(("ssm", "mamba", "conv_"))]
        other += [key for key in config if "expert" in key and not mixture]
        other += [key for key in ("mlp_only_layers",) if mixture and config.get(key)]
        other += [key for key in ("decoder_sparse_step",) if mixture and config.get(key, 1) != 1]
        if absent or other:
            why = f"lacks {', '.join(absent)}" if absent else f"has {', '.join(other[:3])}"
            raise UserError(
                f"{name} {why}: the formulae of memory are of dense transformers with attention and a gated MLP, and "
                f"of mixtures of experts in every layer ({', '.join(MIXTURES)}). Measured are {', '.join(HYBRIDS)}"
            )
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            inner=config.get("shared_expert_intermediate_size", 0) if mixture else config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            dtype=_dtype(config),
            bits=bits,
            normed_heads=family in NORMED_HEADS,
            experts=_experts(config, name) if mixture else None,
        )

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one decoder layer that every token goes through."""
        d, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
        if not self.inner:
            return attention
        return attention | {"gate_proj": (d, self.inner), "up_proj": (d, self.inner), "down_proj": (self.inner, d)}

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all decoder layers, without experts and routers."""
        return self.layers * sum(i * o for i, o in self.linear.values())

    @property
    def expert_parameters(self) -> int:
        """Of all experts and routers, and of what decides how much a shared expert says."""
        if self.experts is None:
            return 0
        one = 3 * self.hidden * self.experts.inner + self.hidden  # an expert, and its row of the router
        return self.layers * (self.experts.count * one + (self.hidden if self.inner else 0))

    @property
    def parameters(self) -> int:
        """All weights; biases, which some families have, are too few to count."""
        norms = (2 * self.layers + 1) * self.hidden
        return (
            self.linear_parameters + self.expert_parameters + norms + self.vocab * self.hidden * (1 if self.tied else 2)
        )

    def adapted(self, targets: list[str]) -> dict[str, tuple[int, int]]:
        """The linear layers with an adapter: the targets, or with `all-linear` every one that may have one."""
        never = unadapted("", self.experts is not None)
        everywhere = targets == ["all-linear"]
        return {n: shape for n, shape in self.linear.items() if n not in never and (everywhere or n in targets)}

    def adapter_parameters(self, lora: LoraConfig, *, dora: bool = False) -> int:
        """Of all layers; DoRA has a magnitude for each output."""
        return self.layers * sum(lora.rank * (i + o) + dora * o for i, o in self.adapted(lora.targets).values())

    def trained_parameters(self, training: "Training") -> int:
        if training.kind == "full":
            return self.parameters
        return self.adapter_parameters(training.lora, dora=training.kind == "dora")

    def layer_products(self, tokens: int) -> list[tuple[int, int, int]]:
        """(tokens, inputs, outputs) of the matrix products of one decoder layer."""
        products = [(tokens, i, o) for i, o in self.linear.values()]
        if self.experts is not None:
            d, f, chosen = self.hidden, self.experts.inner, tokens * self.experts.chosen
            products += [(tokens, d, self.experts.count), (chosen, d, f), (chosen, d, f), (chosen, f, d)]
        return products

    def products(self, tokens: int, completion_tokens: int) -> list[tuple[int, int, int]]:
        """Of all layers in a step, and of the head on completion tokens alone."""
        return self.layer_products(tokens) * self.layers + [(completion_tokens, self.hidden, self.vocab)]


def dtype_of(folder: Path) -> str:
    """That a checkpoint is in.

    Raises:
        UserError: it has no config.json.
    """
    config = _config(folder)
    return _dtype(config.get("text_config", config))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return config


def _dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _experts(config: Mapping[str, Any], name: str) -> Experts:
    sizes = [
        config.get("num_experts", config.get("num_local_experts")),
        config.get("num_experts_per_tok"),
        config.get("moe_intermediate_size", config["intermediate_size"]),
    ]
    if not all(isinstance(size, int) for size in sizes):
        raise UserError(f"{name}: expected num_experts and num_experts_per_tok as integers")
    return Experts(*sizes)


@dataclass(frozen=True)
class Grid:
    """The micro-batch that takes most."""

    rows: int  # B
    width: int  # T, padding included
    completion_tokens: int  # N
    seen: int = 1  # rows whose keys and values a row is given, itself included, where a batch is cut into pages
    masked: bool = False  # whether a row holds more than one sequence, so that attention needs a mask

    @classmethod
    def of(cls, batch: Batch) -> "Grid":
        rows, width = batch.input_ids.shape
        return cls(rows, width, len(batch.targets), masked=batch.packed or batch.shared)

    @property
    def tokens(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class Training:
    """What is trained, and how."""

    dtype: str  # that the model computes in: float32, bfloat16 or float16
    kind: FineTuneType
    lora: LoraConfig  # of no account where all weights are trained
    load_in_4bit: bool = False  # with bitsandbytes
    gradient_checkpointing: bool = False

    @property
    def half(self) -> bool:
        return self.dtype != "float32"

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return 2 if self.half else 4


@dataclass(frozen=True)
class Kept:
    """What a backend keeps of a model and a step, in bytes."""

    weights: float  # of the model, without what is trained on top of them
    activations: float  # of all layers, for the backward pass
    backward: float  # beside that at the peak of the layers' backward pass
    loss: float  # of all completion tokens
    fragments: float = 0.0  # held by the allocator and of no use
    masks: float = 0.0  # of attention, for all layers


@dataclass(frozen=True)
class KeptByLayer:
    """What a backend keeps of one of several layers, all alike, in bytes."""

    layer: float  # a token, for the backward pass
    layer_input: float  # a token: what gradient checkpointing keeps of that
    transient: float  # a token, beside that during the backward pass
    matrices: float  # the same, of any number of tokens

    def of_all(self, model: Architecture, training: Training, grid: Grid) -> tuple[float, float]:
        """The activations of all layers, and what their backward pass takes beside them."""
        backward = self.transient * grid.tokens + self.matrices
        if training.gradient_checkpointing:
            return self.layer_input * model.layers * grid.tokens, backward + self.layer * grid.tokens
        return self.layer * model.layers * grid.tokens, backward


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by what holds them."""

    runtime: float  # the process with its libraries, before a model is loaded
    weights: float
    trained: float  # what is trained on top of the weights, gradients and both moments
    activations: float  # kept for the backward pass
    working: float  # the loss, or one layer's backward pass, whichever takes more
    fragments: float
    masks: float = 0.0  # of attention, in rows that hold more than one sequence

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


class Trained(Protocol):
    """A model of which it is known how much of it is trained."""

    def trained_parameters(self, training: Training) -> int: ...


def memory(model: Trained, training: Training, kept: Kept, runtime: float = 0.0) -> Memory:
    """Of a training step, on a backend that keeps so much of it."""
    copies = 3 if training.kind == "full" else 4  # of the gradients and both moments, and of an adapter itself
    trained = copies * 4 * model.trained_parameters(training)
    working = max(kept.loss, kept.backward)
    return Memory(runtime, kept.weights, trained, kept.activations, working, kept.fragments, kept.masks)


def adapter_inputs(model: Architecture, training: Training, mask: int = 1) -> float:
    """Bytes a token of what the adapted layers of a layer read, as far as they keep it; attention keeps its own.

    Args:
        mask: bytes of each number of a dropout mask.
    """
    chosen = model.adapted(training.lora.targets)
    if training.lora.dropout:  # each drops others
        return (training.size + mask) * sum(i for i, _ in chosen.values())
    attention = bool({"q_proj", "k_proj", "v_proj"} & chosen.keys())
    mlp = bool({"gate_proj", "up_proj"} & chosen.keys())
    d, f = model.hidden, model.inner
    return training.size * (attention * d + mlp * d + ("down_proj" in chosen) * f)


def adapter_products(model: Architecture, training: Training, *, squares: int = 0) -> tuple[float, float]:
    """Of the adapters of a layer: bytes a token of the low-rank products and, with DoRA, of what their magnitudes
    scale; and bytes of the matrices as large as a weight that DoRA's magnitudes are those of.

    Args:
        squares: of these, how many are (inputs, inputs).
    """
    if training.kind == "full":
        return 0.0, 0.0
    shapes = model.adapted(training.lora.targets).values()
    products = 4.0 * training.lora.rank * len(shapes)
    if training.kind != "dora":
        return products, 0.0
    products += (training.size + 4) * sum(o for _, o in shapes)
    return products, max((4.0 * (3 * i * o + squares * i * i) for i, o in shapes), default=0.0)
