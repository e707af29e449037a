"""How much memory training takes, from a model's configuration alone: formulae, no measurement.

What each layer keeps for its backward pass was read off the backends with PyTorch's saved-tensor hooks and MLX's peak
counter, in float32 and over models of different sizes; of half precision only the former. tests/test_plan_run.py
holds the sums against measured runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnf_core.batching import Batch
from bnf_core.config import LoraConfig
from bnf_core.errors import UserError
from bnf_core.pages import pages


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
            UserError: a size is missing, or the layers are mixtures of experts or recurrent.
        """
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
    def parameters(self) -> int:
        """All weights; biases, which some families have, are too few to count."""
        layer = sum(i * o for i, o in self.linear.values()) + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int, targets: list[str]) -> int:
        """Of LoRA on these linear layers, or with `all-linear` on every one."""
        chosen = [shape for name, shape in self.linear.items() if targets == ["all-linear"] or name in targets]
        return self.layers * rank * sum(i + o for i, o in chosen)

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
    def of(cls, batch: Batch, backend: str) -> "Grid":
        if batch.shared and backend == "mlx":
            cut = pages(batch)
            (rows, width), seen = cut.input_ids.shape, cut.table.shape[1]
        else:
            (rows, width), seen = batch.input_ids.shape, 1
        return cls(rows, width, len(batch.targets), seen)

    @property
    def tokens(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class Training:
    """What is trained, and where."""

    backend: str  # torch or mlx
    device: str  # cpu, cuda, mps or gpu
    dtype: str  # float32, bfloat16 or float16
    lora: LoraConfig | None  # None: all weights
    gradient_checkpointing: bool = False
    fragmented: bool = False  # whether glibc allocates


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
    size = 4 if training.dtype == "float32" else 2
    kept = _Kept.of(model, training, grid)
    if training.lora is None:  # trained weights are float32, and a copy is computed with
        weights = model.parameters * (4 if size == 4 else 6)
        trained = 3 * 4 * model.parameters
    else:
        weights = model.parameters * size
        trained = 4 * 4 * model.adapter_parameters(training.lora.rank, training.lora.targets)
    layer = kept.layer * grid.tokens
    if training.gradient_checkpointing:
        activations = model.layers * kept.layer_input * grid.tokens
        backward = kept.recomputed * layer + kept.transient * grid.tokens
    else:
        activations = model.layers * layer
        backward = kept.transient * grid.tokens
    working = max(kept.loss, backward)
    holes = FRAGMENTS[training.gradient_checkpointing] * model.layers * layer if training.fragmented else 0.0
    return Memory(runtime, weights, trained, activations, working, holes)


# glibc does not give an aligned block that was freed to the next of the same size: beside the activations lie holes of
# about their size, and gradient checkpointing, which makes the activations again and again, leaves as many. As parts of
# all layers' activations; measured 0.86 to 0.93 without checkpointing, 1.0 to 1.5 with it. With
# MALLOC_MMAP_THRESHOLD_=1048576 in the environment there are none, and a step takes half as long again.
FRAGMENTS = {False: 0.9, True: 1.2}
TORCH_CHUNK, CUDA_CHUNK, MLX_CHUNK = 48 * 2**20, 2**30, 128 * 2**20  # as in the backends' linear.py


@dataclass(frozen=True)
class _Kept:
    """Bytes a token, but for the loss."""

    layer: float  # for the backward pass of a layer
    layer_input: float  # what gradient checkpointing keeps of it
    recomputed: float  # layers whole at a time with gradient checkpointing
    transient: float  # beside that during the backward pass
    loss: float  # of all completion tokens

    @classmethod
    def of(cls, model: Architecture, training: Training, grid: Grid) -> "_Kept":
        d, f = model.hidden, model.inner
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        size = 4 if training.dtype == "float32" else 2
        low_rank = 7 * training.lora.rank * 4 if training.lora else 0
        logits = grid.completion_tokens * model.vocab * 4
        if training.backend == "mlx":
            # Besides what PyTorch keeps, one more of F, the attention scores, and copies of what other pages hold.
            scores, copies = model.heads * grid.width * grid.seen, 2 * kv * grid.seen if grid.seen > 1 else 0
            layer = size * (5 * f + 4 * d + 2 * q + 2 * kv + scores + copies) + low_rank
            checkpoint = 2.5 if training.gradient_checkpointing else 1.25
            return cls(
                layer,
                4 * size * d,
                checkpoint,
                0 if checkpoint > 2 else 1.25 * layer,
                _chunked(logits * 5.33, MLX_CHUNK),
            )
        # Residual stream and normed, before attention and MLP; queries, keys, values, attention; gate, its
        # activation, up and their product.
        layer = size * (4 * f + 4 * d + 2 * q + 2 * kv) + low_rank + 4 * (model.heads + 2)
        if size == 2:  # LoRA reads each input anew in float32, and the norms compute in it
            layer = 10 * f + 28 * d + 8 * q + 4 * kv + low_rank + 4 * (model.heads + 2)
        chunk = CUDA_CHUNK if training.device.startswith("cuda") else TORCH_CHUNK
        return cls(layer, size * d, 1.0, 2 * size * f, _chunked(logits, chunk) + grid.completion_tokens * d * size)


def _chunked(bytes_: float, most: float) -> float:
    """One of as many equal chunks as it takes for none to be larger."""
    return bytes_ / max(1, -(-bytes_ // most))
