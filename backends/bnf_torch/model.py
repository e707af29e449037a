"""Loading a causal language model, and splitting it into a body that gives hidden states and a head."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bnf_core.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def devices() -> list[str]:
    """What a model can be put on here, best first."""
    found = [f"cuda:{i}" if i else "cuda" for i in range(torch.cuda.device_count())]
    return found + (["mps"] if torch.backends.mps.is_available() else []) + ["cpu"]


def resolve_device(device: str) -> torch.device:
    """`auto` is the best there is.

    Raises:
        UserError: the device is not present.
    """
    present = devices()
    if device == "auto":
        return torch.device(present[0])
    if device not in present:
        raise UserError(f"device {device!r} is not present: PyTorch {torch.__version__} offers {', '.join(present)}")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen model in evaluation mode; safetensors only, no code from the checkpoint.

    Raises:
        UserError: transformers cannot read it, or tensors are missing.
    """
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{folder}: transformers cannot load this model: {error}") from error
    model, info = loaded
    if absent := sorted(info["missing_keys"]):
        raise UserError(
            f"{folder}: {len(absent)} tensors are missing from the checkpoint, the first is {absent[0]}; "
            "download or convert it again"
        )
    model.requires_grad_(False)
    return model.to(device).eval()


def head_weight(model: PreTrainedModel) -> Tensor:
    """(V, D), tied or not."""
    return model.get_output_embeddings().weight


def completion_hidden(model: PreTrainedModel, input_ids: Tensor, positions: Tensor) -> Tensor:
    """The states before the head, (N, D), at flat positions of the (B, T) grid of token ids.

    Rows are padded on the right and the model is causal, so no attention mask is needed.
    """
    hidden = _body(model)(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)
    return hidden.flatten(0, 1)[positions]


def completion_logits(model: PreTrainedModel, input_ids: Tensor, positions: Tensor) -> Tensor:
    """The model's own logits, (N, V), at flat positions: for heads that are more than a matrix."""
    return model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)[positions]


@torch.no_grad()
def head_is_linear(model: PreTrainedModel) -> bool:
    """Whether the logits are hidden @ head.T and nothing else. Some families scale or cap them or add a bias;
    comparing is surer than a list of them."""
    if getattr(model.get_output_embeddings(), "bias", None) is not None:  # may be below half precision's tolerance
        return False
    head = head_weight(model)
    positions = torch.arange(8, device=head.device)
    logits = completion_logits(model, positions.unsqueeze(0) % len(head), positions)
    linear = completion_hidden(model, positions.unsqueeze(0) % len(head), positions) @ head.T
    if linear.shape != logits.shape:
        return False
    tolerance = 1e-5 if logits.dtype == torch.float32 else 2e-2
    return bool((logits.float() - linear.float()).abs().max() <= tolerance * logits.float().abs().max())


def _body(model: PreTrainedModel) -> nn.Module:
    return model.get_decoder()
