"""How much memory training takes, from a model's configuration alone: formulae, no measurement.

What each layer keeps for its backward pass was read off the backends with PyTorch's saved-tensor hooks and MLX's peak
counter, in float32 and bfloat16 and over models of different sizes. tests/test_plan_run.py holds the sums against
measured runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bnf_core.config import FineTuneType, LoraConfig
from bnf_core.errors import UserError
from bnf_core.models.quantization import bits_per_weight
from bnf_core.types import Batch


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder-only transformer with attention and a gated MLP: llama, qwen, mistral, smollm, …"""

    layers: int
    hidden: int  # D
    inner: int  # F, of the MLP
    heads: int  # of queries
    kv_heads: int
    head_dim: int
    vocab: int  # V
    tied: bool  # the head's weights are the embeddings'
    dtype: str = "float32"  # that the checkpoint is in
    bits: float | None = None  # a weight, scales included, where mlx-lm quantised the checkpoint

    @classmethod
    def of(cls, folder: Path) -> "Architecture":
        """Of the config.json in a folder.

        Raises:
            UserError: it is missing, or of another kind of model.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        return cls.from_config(config, str(path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "config") -> "Architecture":
        """
        Raises:
            UserError: a size is missing, the layers are mixtures of experts or recurrent, or quantised as MLX cannot.
        """
        bits = bits_per_weight(config, name)
        config = config.get("text_config", config)
        needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        absent = [key for key in needed if not isinstance(config.get(key), int)]
        other = [key for key in config if "expert" in key or key.startswith(("ssm", "mamba", "conv_"))]
        if absent or other:
            why = f"lacks {', '.join(absent)}" if absent else f"has {', '.join(other[:3])}"
            raise UserError(
                f"{name} {why}: the formulae of memory are of dense transformers with attention and a gated MLP"
            )
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            inner=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            bits=bits,
        )

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one decoder layer."""
        d, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (d, q),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (q, d),
            "gate_proj": (d, self.inner),
            "up_proj": (d, self.inner),
            "down_proj": (self.inner, d),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all decoder layers."""
        return self.layers * sum(i * o for i, o in self.linear.values())

    @property
    def parameters(self) -> int:
        """All weights; biases, which some families have, are too few to count."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.linear_parameters + norms + self.vocab * self.hidden * (1 if self.tied else 2)

    def adapted(self, targets: list[str]) -> dict[str, tuple[int, int]]:
        """The linear layers with an adapter: the targets, or with `all-linear` every one."""
        return {name: shape for name, shape in self.linear.items() if targets == ["all-linear"] or name in targets}

    def adapter_parameters(self, lora: LoraConfig, *, dora: bool = False) -> int:
        """Of all layers; DoRA has a magnitude for each output."""
        return self.layers * sum(lora.rank * (i + o) + dora * o for i, o in self.adapted(lora.targets).values())

    def products(self, tokens: int, completion_tokens: int) -> list[tuple[int, int, int]]:
        """(tokens, inputs, outputs) of every linear layer in a step, the head on completion tokens alone."""
        layer = [(tokens, i, o) for i, o in self.linear.values()]
        return layer * self.layers + [(completion_tokens, self.hidden, self.vocab)]


@dataclass(frozen=True)
class Grid:
    """The micro-batch that takes most."""

    rows: int  # B
    width: int  # T, padding included
    completion_tokens: int  # N
    seen: int = 1  # rows whose keys and values a row is given, itself included: the pages of shared prompts on MLX

    @classmethod
    def of(cls, batch: Batch) -> "Grid":
        rows, width = batch.input_ids.shape
        return cls(rows, width, len(batch.targets))

    @property
    def tokens(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class Training:
    """What is trained, and where."""

    backend: str  # torch or mlx
    device: str  # cpu, cuda, mps or gpu
    dtype: str  # float32, bfloat16 or float16
    kind: FineTuneType
    lora: LoraConfig  # of no account where all weights are trained
    load_in_4bit: bool = False  # with bitsandbytes
    gradient_checkpointing: bool = False
    fragmented: bool = False  # whether glibc allocates

    @property
    def half(self) -> bool:
        """MLX trains all weights in float32 whatever it is asked for."""
        return self.dtype != "float32" and not (self.backend == "mlx" and self.kind == "full")

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return 2 if self.half else 4


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by what holds them."""

    runtime: float  # the process with its libraries, before a model is loaded
    weights: float
    trained: float  # what is trained on top of the weights, gradients and both moments
    activations: float  # kept for the backward pass
    working: float  # the loss, or one layer's backward pass, whichever takes more
    fragments: float  # held by the allocator and of no use

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(model: Architecture, training: Training, grid: Grid, runtime: float = 0.0) -> Memory:
    """Of a training step, whose micro-batches are at most of this grid."""
    kept = _Kept.of(model, training, grid)
    if training.kind == "full":  # trained weights are float32; PyTorch computes with a copy in half precision
        weights: float = model.parameters * (6 if training.half and training.backend == "torch" else 4)
        trained = 3 * 4 * model.parameters
    else:
        weights = _frozen(model, training)
        trained = 4 * 4 * model.adapter_parameters(training.lora, dora=training.kind == "dora")
    layer = kept.layer * grid.tokens
    activations = (kept.layer_input if training.gradient_checkpointing else kept.layer) * model.layers * grid.tokens
    backward = kept.transient * grid.tokens + kept.matrices + (layer if training.gradient_checkpointing else 0)
    working = max(kept.loss, backward)
    return Memory(runtime, weights, trained, activations, working, _holes(model, training, grid))


def _frozen(model: Architecture, training: Training) -> float:
    """Bytes of weights that are not trained."""
    if model.bits is not None and training.backend == "mlx":  # and the head is widened once, for the loss
        return model.parameters * model.bits / 8 + model.vocab * model.hidden * training.size
    if training.load_in_4bit:  # NF4 in blocks of 64 with scales of 8 bits, and these in blocks of 256
        rest = model.parameters - model.linear_parameters
        return rest * training.size + model.linear_parameters * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    return model.parameters * training.size


def _holes(model: Architecture, training: Training, grid: Grid) -> float:
    """Bytes that glibc's allocator keeps: it does not give an aligned block that was freed to the next of the same
    size. Beside LoRA's activations lie holes of about their size, to which DoRA and dropout add few. With
    MALLOC_MMAP_THRESHOLD_=1048576 in the environment there are none, and a step takes half as long again."""
    if not training.fragmented:
        return 0.0
    part = 0.3 if training.kind == "full" else 1.2 if training.half else 1.0  # measured to within 0.2
    if training.kind != "full" and not training.gradient_checkpointing:
        training = replace(training, kind="lora", lora=replace(training.lora, dropout=0.0))
    return part * model.layers * _Kept.of(model, training, grid).layer * grid.tokens


TORCH_CHUNK, CUDA_CHUNK, MLX_CHUNK = 48 * 2**20, 2**30, 128 * 2**20  # as in the backends' linear.py


@dataclass(frozen=True)
class _Kept:
    """Bytes a token, but for the last two."""

    layer: float  # for the backward pass of a layer
    layer_input: float  # what gradient checkpointing keeps of it
    transient: float  # beside that during the backward pass of a layer
    matrices: float  # of any number of tokens
    loss: float  # of all completion tokens

    @classmethod
    def of(cls, model: Architecture, training: Training, grid: Grid) -> "_Kept":
        d, f, size = model.hidden, model.inner, training.size
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        shapes = () if training.kind == "full" else model.adapted(training.lora.targets).values()
        outputs = sum(o for _, o in shapes)
        inputs, products, matrices = _inputs(model, training), 4 * training.lora.rank * len(shapes), 0.0
        if training.kind == "dora":  # a magnitude scales both products, and is that of a matrix as large as W
            products += (size + 4) * outputs
            eye = training.backend == "torch"  # PEFT multiplies A and B by way of an identity matrix
            matrices = max((4.0 * (3 * i * o + eye * i * i) for i, o in shapes), default=0.0)
        logits = grid.completion_tokens * model.vocab * 4
        if training.backend == "mlx":
            # Besides what PyTorch keeps, one more of F, the attention scores, in float32 unless there are masks, and
            # copies of what other pages hold.
            scores, copies = 4 * model.heads * grid.width, 0
            if grid.seen > 1:
                scores, copies = size * model.heads * grid.width * grid.seen, 2 * size * kv * grid.seen
            block = size * (4 * f + 2 * d + 2 * q + 2 * kv) + scores + copies
            widened = 10 * outputs if training.half else 0  # low-rank products, their sums and gradients
            return cls(
                block + inputs + products,
                4 * size * d,
                1.5 * (block + size * (2 * d + f)) + widened,
                matrices,
                min(10.0 * logits, MLX_CHUNK),  # MLX runs ahead, and frees late what is small
            )
        # The residual stream before attention and MLP, in float32, and where the norms are trained what they make of
        # it; queries, keys, values, attention; gate, its activation and up.
        stream = 4 * (4 if training.kind == "full" else 2) * d
        layer = stream + size * (3 * f + 2 * q + 2 * kv) + 4 * (model.heads + 2) + inputs + products
        chunk = CUDA_CHUNK if training.device.startswith("cuda") else TORCH_CHUNK
        loss = _chunked(logits, chunk) + grid.completion_tokens * d * size
        return cls(layer, size * d, 2 * size * f, matrices, loss)


def _inputs(model: Architecture, training: Training) -> float:
    """Bytes a token of what the linear layers of a layer read, as far as they keep it; attention keeps its own."""
    size, d, f = training.size, model.hidden, model.inner
    if training.kind == "full":  # autocast narrows the inputs of each layer anew
        return size * ((5 if training.half else 2) * d + f)
    chosen = model.adapted(training.lora.targets)
    if training.lora.dropout:  # each drops others
        mask = size if training.backend == "torch" and training.device.startswith("cpu") else 1
        return (size + mask) * sum(i for i, _ in chosen.values())
    attention = bool({"q_proj", "k_proj", "v_proj"} & chosen.keys())
    mlp = bool({"gate_proj", "up_proj"} & chosen.keys())
    return size * (attention * d + mlp * d + ("down_proj" in chosen) * f)


def _chunked(bytes_: float, most: float) -> float:
    """One of as many equal chunks as it takes for none to be larger."""
    return bytes_ / max(1, -(-bytes_ // most))
