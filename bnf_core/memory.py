"""How much memory training takes, from a model's configuration alone: formulae, no measurement."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnf_core.errors import UserError


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
