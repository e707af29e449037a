"""What layers of any kind keep in memory while they are trained: a pass over them without data, its tensors counted."""

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from bnf_core.config import LoraConfig
from bnf_core.errors import UserError
from bnf_core.models.architecture import Training
from bnf_core.models.layers import Layers, kinds_of
from bnf_torch import adapter
from bnf_torch.engine import checkpoint_activations
from bnf_torch.model import DTYPES, decoder, family_of, readable

WIDEST = 1024  # tokens in a row
MAPPED = 32 * 2**20  # bytes from which on glibc has the system map a block of its own, and leaves no hole


def measured(folder: Path, training: Training, device: torch.device) -> Layers:
    """The layers of a checkpoint, of which the configuration is read alone.

    Raises:
        UserError: transformers cannot read it.
    """
    with readable(folder):
        _, config = family_of(folder)
        trace = _Trace(config, training, device)
    return Layers(
        kinds=trace.kinds,
        hidden=config.get_text_config().hidden_size,
        vocab=config.get_text_config().vocab_size,
        parameters=trace.parameters,
        linear_parameters=trace.linear_parameters,
        trained=trace.trained,
        peak=trace.peak,
        widest=WIDEST,
        how=f"of {len(set(trace.kinds))} kinds, traced on {device.type} without data",
        scattered=_Scattered(config, training, device),
    )


class _Scattered:
    """`Layers.scattered`: of plain LoRA, whatever is trained, and found out when it is asked for."""

    def __init__(self, config: Any, training: Training, device: torch.device):
        lora = replace(training.lora, dropout=0.0)
        if training.kind == "full":
            lora = LoraConfig()
        self.plain = replace(training, kind="lora", lora=lora, gradient_checkpointing=False)
        self.config, self.device = config, device

    @cached_property
    def trace(self) -> "_Trace":
        return _Trace(self.config, self.plain, self.device)

    def __call__(self, rows: int, width: int) -> float:
        few, at = 2, min(width, WIDEST)
        kinds, times = self.trace.kinds, rows / few * width / at
        one = {kind: self.trace.kept({kind: kind}, few, at, MAPPED / times) for kind in set(kinds)}
        return times * sum(one[kind] for kind in kinds)


class _Trace:
    """A model on no device, with what is trained of it."""

    def __init__(self, config: Any, training: Training, device: torch.device):
        self.training, self.device = training, device
        full = training.kind == "full"
        with torch.device("meta"):
            dtype = torch.float32 if full else DTYPES[training.dtype]
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.requires_grad_(full).eval()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.linear_parameters = sum(m.weight.numel() for m in decoder(self.model).modules() if type(m) is nn.Linear)
        self.layers = cast(nn.ModuleList, decoder(self.model).layers)
        types = getattr(config.get_text_config(), "layer_types", None) or [None] * len(self.layers)
        self.kinds = kinds_of([(kind, *_parts(layer)) for kind, layer in zip(types, self.layers, strict=True)])
        whole: Any = self.model
        if not full:
            whole = adapter.add_lora(self.model, training.lora, 0, dora=training.kind == "dora")
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if training.gradient_checkpointing:
            checkpoint_activations(self.model)
        adapter.drop_inputs(whole)

    def peak(self, places: Mapping[int, int], rows: int, width: int) -> float:
        """`Layers.peak`."""
        return float(self._passed(places, rows, width, math.inf, backward=True).most)

    def kept(self, places: Mapping[int, int], rows: int, width: int, below: float) -> float:
        """Bytes after a forward pass alone, in blocks of fewer than so many."""
        return float(self._passed(places, rows, width, below, backward=False).kept)

    def _passed(self, places: Mapping[int, int], rows: int, width: int, below: float, *, backward: bool) -> "_Live":
        try:
            return self._pass(places, rows, width, below, backward=backward)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"what layers of {type(self.model).__name__} keep cannot be traced without data, with the kernels that "
                f"are installed here: {reason}"
            ) from error

    def _pass(self, places: Mapping[int, int], rows: int, width: int, below: float, *, backward: bool) -> "_Live":
        live = _Live(below)
        with self._layers(places, self._gives_tuples), FakeTensorMode(), _on(self.model, self.device), live:
            live.leave_out(self.model)
            states = self._states(rows, width)
            if states.shape[:2] != (rows, width):
                raise ValueError(f"states of shape {tuple(states.shape)}")
            live.kept = live.now
            if backward:
                states.backward(torch.zeros_like(states))
        return live

    def _states(self, rows: int, width: int) -> Tensor:
        """A forward pass, up to the head."""
        dtype = DTYPES[self.training.dtype]
        narrow = self.training.kind == "full" and dtype != torch.float32
        ids = torch.zeros(rows, width, dtype=torch.int64, device=self.device)
        with _unpacked(), torch.autocast(self.device.type, dtype) if narrow else nullcontext():
            states: Tensor = decoder(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        return states

    @cached_property
    def _gives_tuples(self) -> bool:
        """Whether a layer gives its states within a tuple."""
        given: list[Any] = []

        def look(*args: Any) -> None:
            given.append(args[-1])
            raise _Enough

        hook = self.layers[0].register_forward_hook(look)
        try:
            with FakeTensorMode(), _on(self.model, self.device), _Live(math.inf), suppress(_Enough):
                self._states(2, 4)
        finally:
            hook.remove()
        return isinstance(given[0], tuple)

    @contextmanager
    def _layers(self, places: Mapping[int, int], tuples: bool) -> Iterator[None]:
        """In these places the layers named, in all others nothing."""
        layers = list(self.layers)
        # As an inner layer's, the input of each needs a gradient.
        needs = self.model.get_input_embeddings().register_forward_hook(lambda *args: args[-1].requires_grad_())
        for i, layer in enumerate(layers):
            self.layers[i] = layers[places[i]] if i in places else _Skipped(layer, tuples)
        try:
            yield
        finally:
            needs.remove()
            for i, layer in enumerate(layers):
                self.layers[i] = layer


class _Skipped(nn.Module):
    """In the place of a layer: gives back its input. The rest of the layer can be seen through."""

    def __init__(self, layer: nn.Module, tuples: bool):
        super().__init__()
        self.tuples = tuples
        self.__dict__["_layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if self.tuples else hidden_states


class _Enough(Exception):
    """Nothing more of a forward pass is wanted."""


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that there are, in blocks of fewer than so many."""

    def __init__(self, below: float):
        super().__init__()
        self.below = below
        self.held: dict[int, int] = {}  # by storage
        self.now = self.most = self.kept = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        grouped = func is torch.ops.aten._grouped_mm.default  # without data it takes bfloat16 alone
        made = _grouped(*args, **(kwargs or {})) if grouped else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def leave_out(self, model: nn.Module) -> None:
        """Its weights and their gradients are counted by others, and are seen where a view of them is made."""
        for p in [*model.parameters(), *model.buffers()]:
            for tensor in (p, p.grad):
                if tensor is not None:
                    self.held[tensor.untyped_storage()._cdata] = 0

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes() if storage.nbytes() < self.below else 0
            self.now += self.held[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.held.pop(key)


def _grouped(a: Tensor, b: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Of the shape of a grouped product: of rows with matrices (E, K, N), or of columns with rows."""
    shape = (a.shape[0], b.shape[-1]) if b.ndim == 3 else (len(offs), a.shape[0], b.shape[-1])
    return a.new_empty(shape)


def _parts(layer: nn.Module) -> tuple[Any, ...]:
    """What a layer is made of."""
    return (
        tuple((name, type(module)) for name, module in layer.named_modules()),
        tuple((name, p.shape) for name, p in layer.named_parameters()),
    )


@contextmanager
def _on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it and a mode of fake tensors, the model's tensors are on a device; gradients are there already."""
    made: dict[int, Tensor] = {}
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        groups: list[dict[str, Any]] = [module._parameters, module._buffers]
        for group in groups:
            for name, x in group.items():
                if x is None:
                    continue
                if id(x) not in made:
                    fake: Tensor = torch.empty(x.shape, dtype=x.dtype, device=device)
                    if isinstance(x, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=x.requires_grad)
                        fake.grad = torch.zeros_like(fake) if x.requires_grad else None
                    made[id(x)] = fake
                before.append((group, name, x))
                group[name] = made[id(x)]
    try:
        yield
    finally:
        for group, name, x in before:
            group[name] = x


@contextmanager
def _unpacked() -> Iterator[None]:
    """Within it transformers makes no mask for packed rows, which there might be for all that it knows of ids without
    data."""
    with mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None):
        yield
