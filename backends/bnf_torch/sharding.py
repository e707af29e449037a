"""A model in shards from the start: built on no device, sharded, and only then filled, by each process with the rows
that are its own. No process ever holds more of the weights than its share (docs/cluster.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.distributed import DistributedConfig

from bnf_core.errors import UserError
from bnf_core.storage.files import agreed
from bnf_torch.model import family_of, readable, require_every_tensor, stored_tensors
from bnf_torch.processes import TENSOR, TorchProcesses, of_rows
from bnf_torch.tensor_parallel import split_layers

META = torch.device("meta")


class Unfilled:
    """A frozen model on no device, beside the rows of its weights that this process has read. What is put around the
    model's layers in the meantime, adapters and FSDP2, leaves them in place.

    Args:
        folder: of the checkpoint, plain or quantised by MLX.
        device: what computes, and where the rows are.
        dtype: of the weights.
        group: how many processes have a copy of the model between them, and how many copies there are.
    Raises:
        UserError: transformers cannot read it, or tensors are missing.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, group: TorchProcesses):
        self.model: PreTrainedModel
        with _together(group), readable(folder):
            stored = stored_tensors(folder, dtype)
            empty = {name: torch.empty(tensor.get_shape(), dtype=dtype, device=META) for name, tensor in stored.items()}
            family, config = family_of(folder)
            load: Any = partial(family.from_pretrained, None, config=config, dtype=dtype, output_loading_info=True)
            self.model, info = load(state_dict=empty, device_map={"": META})
            require_every_tensor(folder, info)
        self._require_experts(folder, group.shares // group.replicas)
        mesh = group.mesh(device.type, group.replicas, group.together)
        if group.together > 1:
            split_layers(self.model, mesh[TENSOR])
        with _together(group), readable(folder):
            load = _sharding(family, mesh).from_pretrained
            read = load(None, config=config, dtype=dtype, state_dict=stored, distributed_config=DistributedConfig(),
                        device_map={"": device})  # fmt: skip
        for name, buffer in read.named_buffers():
            owner, _, attribute = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[attribute] = buffer.to(device)
        rows = {name: parameter.detach().to_local() for name, parameter in read.named_parameters()}
        by_parameter = {id(parameter): rows[name] for name, parameter in self.model.named_parameters()}
        self._places = [
            (module, attribute, by_parameter[id(parameter)])
            for module in self.model.modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.device = device
        self.model.requires_grad_(False).eval()

    def _require_experts(self, folder: Path, shards: int) -> None:
        """Raises UserError where a process would have none of a layer's experts: transformers cannot join them then."""
        conversions: Any = self.model._weight_conversions
        if not any(isinstance(conversion, WeightConverter) for conversion in conversions or ()):
            return
        for name, p in self.model.named_parameters():
            if p.ndim > 2 and -(-p.shape[0] // shards) * (shards - 1) >= p.shape[0]:
                raise UserError(
                    f"{folder}: the {p.shape[0]} experts of {name} in {shards} shards leave a process without any: "
                    "use fewer processes, or replicas of fewer shards (recipes/configs/accelerate/hsdp.yaml)"
                )

    def fill(self) -> None:
        """Once the model is sharded: put the rows where they belong. Nothing is copied."""
        filled: dict[int, nn.Parameter] = {}  # a tied head is its embedding
        for module, attribute, rows in self._places:
            sharded = module._parameters[attribute]
            assert sharded is not None
            if id(rows) not in filled:
                filled[id(rows)] = nn.Parameter(_sharded(rows, sharded, self.device), sharded.requires_grad)
            module._parameters[attribute] = filled[id(rows)]
        self._places = []


def _sharding(family: Any, mesh: DeviceMesh) -> Any:
    """A family of models whose weights are to be loaded in shards: of a parameter that is a DTensor transformers reads
    no other rows. It would make such parameters itself, on meshes and with wrappers of its own."""
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]

    def sharded(cls: Any, model: PreTrainedModel, *_: Any) -> PreTrainedModel:
        if TENSOR in (mesh.mesh_dim_names or ()):
            split_layers(model, mesh[TENSOR])
            fully_shard(model, mesh=mesh["shards"])
            return model
        made: dict[int, nn.Parameter] = {}  # a tied head is its embedding
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    if id(p) not in made:
                        made[id(p)] = nn.Parameter(distribute_tensor(p, mesh, placements, src_data_rank=None), False)
                    module._parameters[name] = made[id(p)]
        return model

    return type(family.__name__, (family,), {"maybe_distribute_model": classmethod(sharded)})


@contextmanager
def _together(group: TorchProcesses) -> Iterator[None]:
    """What one process cannot read, such as a file that it does not see, none goes on without.

    Raises:
        UserError: on all processes.
    """
    try:
        with agreed(group):
            yield
    except OSError as error:
        raise UserError(str(error)) from error


def _sharded(rows: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    return of_rows(rows, parameter, device) if isinstance(parameter, DTensor) else rows.to(device)
