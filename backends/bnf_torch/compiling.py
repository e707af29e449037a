"""Decoder layers compiled by torch.compile: one set of kernels for all layers that are alike."""

from functools import partial
from inspect import unwrap
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from bnf_core.errors import UserError

COMPILER = "inductor"
VARIANTS = 64  # of a layer's code: its adapter on or off, with gradients or without, kinds of masks, one row or several

uncompiled = partial(torch.compiler.set_stance, "force_eager")
"""Within it layers run as they are written: for what is computed once, or at ever new sizes."""


def compile_layers(model: PreTrainedModel, device: torch.device) -> None:
    """From now on each decoder layer is compiled as it is first used. Modules, names and hooks stay, and what others
    put around a layer, such as FSDP2, or gradient checkpointing, runs outside of what is compiled. To be called before
    the model is sharded.

    Raises:
        UserError: nothing can be compiled here, or the model has no layers of transformers' common kind.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"hardware.compile is true, and {type(model).__name__} has no layers of transformers' common kind: leave "
            "it out"
        )
    _require_compiler(device)
    # At the limit PyTorch would go on without compiling.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for layer in layers:
        own = MethodType(unwrap(type(layer).forward), layer)  # transformers wraps it in gradient checkpointing
        compiled = torch.compile(own, dynamic=True, backend=COMPILER)
        layer.forward = partial(_forward, layer, compiled)


def _forward(layer: nn.Module, compiled: Any, *args: Any, **kwargs: Any) -> Any:
    """As transformers' wrapper, which would have the checkpointing compiled."""
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(partial(compiled, **kwargs), *args)  # type: ignore[operator]
    return compiled(*args, **kwargs)


def _require_compiler(device: torch.device) -> None:
    try:
        torch.compile(torch.neg, backend=COMPILER)(torch.zeros(2, device=device))
    except (TorchDynamoException, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        needed = "a C++ compiler" if device.type == "cpu" else "Triton"
        raise UserError(
            f"hardware.compile is true, and PyTorch cannot compile for {device.type} here, for which it needs "
            f"{needed}: {reason}. Install it, or leave hardware.compile out"
        ) from error
