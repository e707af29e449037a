"""Loading a causal language model; its hidden states, its head, and the loss as the end of its forward pass."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from bnf_core.devices import choose_device
from bnf_core.errors import UserError
from bnf_core.models.model_config import read_config
from bnf_core.models.quantization import Quantization, quantization_of
from bnf_core.storage.tensors import weight_files
from bnf_torch.attention import attending

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VALUES = 1 << 22  # to unpack at a time
IN_4BIT = ("cuda",)  # devices that have what bitsandbytes needs; on a CPU it is there for tests
QUANTIZED = ("quantization", "quantization_config")  # keys of the config of a model that MLX quantised


def devices() -> list[str]:
    """What a model can be put on here, best first."""
    found = [f"cuda:{i}" if i else "cuda" for i in range(torch.cuda.device_count())]
    return found + (["mps"] if torch.backends.mps.is_available() else []) + ["cpu"]


def resolve_device(device: str) -> torch.device:
    """`auto` is the best there is.

    Raises:
        UserError: the device is not present.
    """
    return torch.device(choose_device(device, devices(), f"PyTorch {torch.__version__}"))


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype, *, load_in_4bit: bool = False
) -> PreTrainedModel:
    """A frozen model in evaluation mode; safetensors only, no code from the checkpoint. Of one that MLX quantised, the
    weights that it stands for.

    Args:
        dtype: of the weights, or with `load_in_4bit` of what is computed with them.
        load_in_4bit: quantise the linear layers to NF4 (arXiv 2305.14314) while loading.
    Raises:
        UserError: transformers cannot read it, tensors are missing, or 4-bit weights without CUDA and bitsandbytes,
            or of a quantised model.
    """
    for chatty in ("transformers.modeling_utils", "transformers.distributed"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    options = _in_4bit(device, dtype) if load_in_4bit else {}
    weight_files(folder)  # or the two libraries would not read the same ones
    quantised = quantization_of(folder) is not None
    if quantised and load_in_4bit:
        raise UserError(f"{folder} is quantised already: leave out hardware.load_in_4bit")
    common: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    with readable(folder):
        loaded: Any
        if quantised:
            family, config = family_of(folder)
            loaded = family.from_pretrained(None, config=config, state_dict=stored_tensors(folder, dtype), **common)
        else:
            options |= {"config": read_config(folder), "use_safetensors": True}
            loaded = AutoModelForCausalLM.from_pretrained(folder, **common, **options)
    model, info = loaded
    require_every_tensor(folder, info)
    model.requires_grad_(False)
    return (model if load_in_4bit else model.to(device)).eval()


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns what transformers raises in the block into UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot load this model: {error}") from error


def require_every_tensor(folder: Path, info: Mapping[str, Any]) -> None:
    """Raises UserError where the checkpoint lacks tensors of the model, by what transformers says of loading it."""
    if absent := sorted(info["missing_keys"]):
        raise UserError(
            f"{folder}: {len(absent)} tensors are missing from the checkpoint, the first is {absent[0]}; "
            "download or convert it again"
        )


def family_of(folder: Path) -> tuple[Any, Any]:
    """transformers' class for a checkpoint, and its configuration as that of plain weights."""
    config = read_config(folder)
    for key in QUANTIZED:  # transformers would look for a quantiser of its own
        config.__dict__.pop(key, None)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config


class Stored(Protocol):
    """A tensor in a file: none of it is read before it is sliced, and then what was asked for."""

    def get_shape(self) -> list[int]: ...
    def __getitem__(self, index: Any) -> Tensor: ...


def stored_tensors(folder: Path, dtype: torch.dtype) -> dict[str, Stored]:
    """All tensors of a checkpoint by name, unread. Of one that MLX quantised, what its weights stand for in `dtype`."""
    stored: dict[str, Stored] = {}
    for path in weight_files(folder):
        # Mapped into memory, what was read would count as this process's until the file is closed.
        file = safe_open(path, framework="pt", backend="pread")
        stored |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, for it is no mapping
    quantization = quantization_of(folder)
    if quantization is None:
        return stored
    for layer in [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]:
        scales, biases = (stored.pop(f"{layer}.{part}") for part in ("scales", "biases"))
        stored[f"{layer}.weight"] = _Packed(quantization, layer, stored[f"{layer}.weight"], scales, biases, dtype)
    return stored


@dataclass(frozen=True)
class _Packed:
    """The weight of a layer that MLX quantised."""

    quantization: Quantization
    layer: str
    packed: Stored
    scales: Stored
    biases: Stored
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        groups = self.scales.get_shape()
        return [*groups[:-1], groups[-1] * self.quantization.of(self.layer)[0]]

    def __getitem__(self, index: Any) -> Tensor:
        """Rows by a slice, and of these what the other slices say; or `...`, all."""
        shape = self.get_shape()
        rows, *rest = index if isinstance(index, tuple) else (slice(None),)
        start, stop, _ = rows.indices(shape[0])
        found = torch.empty(max(0, stop - start), *shape[1:], dtype=self.dtype)
        at_a_time = max(1, VALUES // math.prod(shape[1:]))
        for at in range(start, stop, at_a_time):
            some = slice(at, min(at + at_a_time, stop))
            scales, biases = (part[some].to(self.dtype).float().numpy() for part in (self.scales, self.biases))
            name = str(self.dtype).removeprefix("torch.")
            weight = self.quantization.dequantize(self.layer, self.packed[some].numpy(), scales, biases, name)
            found[at - start : some.stop - start] = torch.from_numpy(weight)
        return found[(slice(None), *rest)]


def _in_4bit(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    if device.type not in IN_4BIT:
        raise UserError(f"hardware.load_in_4bit needs a CUDA device, and this run is on {device.type}: leave it out")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError("hardware.load_in_4bit needs bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # what FSDP2 gathers, and would cast if it were of another kind
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def head_weight(model: PreTrainedModel) -> Tensor:
    """(V, D), tied or not."""
    return model.get_output_embeddings().weight


def head_bias(model: PreTrainedModel) -> Tensor | None:
    """(V,), where the head has one."""
    return getattr(model.get_output_embeddings(), "bias", None)


def completion_hidden(model: PreTrainedModel, input_ids: Tensor, positions: Tensor, **layout: Tensor) -> Tensor:
    """The states before the head, (N, D), at flat positions of the (B, T) grid of token ids.

    Rows are padded on the right and the model is causal, so no attention mask is needed but in a packed or shared grid,
    whose `layout` tells `attending` what is where.
    """
    with attending(model, **layout) as options:
        hidden = decoder(model)(input_ids=input_ids, use_cache=False, **options).last_hidden_state  # (B, T, D)
    return hidden.flatten(0, 1)[positions]


def completion_logits(model: PreTrainedModel, input_ids: Tensor, positions: Tensor, **layout: Tensor) -> Tensor:
    """The model's own logits, (N, V), at flat positions: for heads that are more than a matrix."""
    with attending(model, **layout) as options:
        return model(input_ids=input_ids, use_cache=False, **options).logits.flatten(0, 1)[positions]


def decoder(model: PreTrainedModel) -> nn.Module:
    return model.get_decoder()
