"""Loading a causal language model; its hidden states, its head, and the loss as the end of its forward pass."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as progress

from bnf_core.devices import choose_device
from bnf_core.errors import UserError
from bnf_core.models.model_config import normalised_config
from bnf_core.models.model_folder import copy_companions
from bnf_core.models.quantization import Quantization, quantization_of
from bnf_core.storage.tensors import weight_files
from bnf_torch.attention import attending

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    quantization = quantization_of(folder)
    if quantization is not None and load_in_4bit:
        raise UserError(f"{folder} is quantised already: leave out hardware.load_in_4bit")
    common: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    try:
        loaded: Any
        if quantization is None:
            loaded = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **common, **options)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            for key in QUANTIZED:  # transformers would look for a quantiser of its own
                config.__dict__.pop(key, None)
            family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            loaded = family.from_pretrained(None, config=config, state_dict=_dequantized(quantization, dtype), **common)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot load this model: {error}") from error
    model, info = loaded
    if absent := sorted(info["missing_keys"]):
        raise UserError(
            f"{folder}: {len(absent)} tensors are missing from the checkpoint, the first is {absent[0]}; "
            "download or convert it again"
        )
    model.requires_grad_(False)
    return (model if load_in_4bit else model.to(device)).eval()


def _dequantized(quantization: Quantization, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a checkpoint that MLX quantised."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(quantization.folder):
        tensors |= load_file(path)
    for layer in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        packed = tensors[f"{layer}.weight"].numpy()
        scales, biases = (tensors.pop(f"{layer}.{part}").to(dtype).float().numpy() for part in ("scales", "biases"))
        weight = quantization.dequantize(layer, packed, scales, biases, str(dtype).removeprefix("torch."))
        tensors[f"{layer}.weight"] = torch.from_numpy(weight).to(dtype)
    return tensors


def _in_4bit(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    if device.type != "cuda":
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
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def save_model(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path, source: Path | None) -> None:
    """Write a model folder: safetensors under the names of the family's own checkpoints, and what goes with them.

    Args:
        model: whose weights these are.
        tensors: by the names that the model has for them.
        source: the folder it is from, whose tokenizer and configuration stay as they are, but for keys that mlx-lm
            reads and transformers 5 leaves out.
    """
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    with _no_progress_bar():
        model.save_pretrained(folder, state_dict=buffers | dict(tensors))
    if source is not None:
        copy_companions(source, folder)
    config = normalised_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    for key in ("torch_dtype", *QUANTIZED):  # of the source: these are plain tensors
        config.pop(key, None)
    for part, own in ((config, model.config), (config.get("text_config"), model.config.get_text_config())):
        if isinstance(part, dict) and not own.tie_word_embeddings:
            part["tie_word_embeddings"] = False
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers' own bar would be drawn into the one of the run."""
    enabled = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            progress.enable_progress_bar()


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
