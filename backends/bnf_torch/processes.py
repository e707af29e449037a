"""The processes of a run, as torchrun or accelerate launched them, and a model spread over them by DDP or FSDP2."""

import atexit
import ctypes
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor import Shard as Split
from torch.nn.parallel import DistributedDataParallel
from transformers.utils.logging import disable_progress_bar

from bnf_core.errors import UserError
from bnf_core.processes import ALONE, Processes, lost
from bnf_core.storage.shards import Shard, rows_of
from bnf_core.types import Array
from bnf_torch.scored import ScoredModel

# What torch.distributed says, in messages of no class of their own, when another process is gone.
LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "imed out", "imeout", "NCCL", "ncclRemoteError")
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
TENSOR = "tensor"  # the dimension of a mesh along which processes compute a layer together


class TorchProcesses(Processes):
    """Those of torch.distributed's default group."""

    def __init__(self, sharded: bool, replicas: int = 1, together: int = 1):
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()
        self.sharded = sharded  # FSDP2 instead of DDP
        self.replicas = replicas  # how many times the model is there, each in shards over as many processes
        self.together = together  # how many have parts of each layer, by tensor parallelism

    @cache  # noqa: B019  # there is one of these a process, and each new mesh brings groups with threads of their own
    def mesh(self, kind: str, replicas: int, together: int = 1) -> DeviceMesh:
        """Of the devices of this kind: a row is one replica of the model, or those that compute its layers together."""
        if together > 1:
            made = init_device_mesh(kind, (self.count // together, together), mesh_dim_names=("shards", TENSOR))
            made._flatten()  # so that a norm is summed over all at once
            return made
        if replicas == 1:
            return init_device_mesh(kind, (self.count,))
        shape = (replicas, self.count // replicas)
        return init_device_mesh(kind, shape, mesh_dim_names=("replicas", "shards"))

    def gather_bytes(self, data: bytes) -> list[bytes]:
        with lost_processes():
            mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
            dist.all_gather(lengths, torch.tensor([len(data)]))
            longest = max(int(length) for length in lengths)
            padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
            dist.all_gather(padded, torch.cat([mine, torch.zeros(longest - len(mine), dtype=torch.uint8)]))
        return [p[: int(length)].numpy().tobytes() for p, length in zip(padded, lengths, strict=True)]


@cache
def processes() -> Processes:
    """Those that this run was launched on; joins them on the first call.

    `accelerate launch` says through the environment whether to shard, as its configuration file has it. That is read
    here and then taken from the environment: transformers and accelerate would otherwise shard on their own terms,
    which a fused head does not meet and which differ between GPUs and CPUs.

    Raises:
        UserError: launched for something that is not supported: DeepSpeed, Megatron, FSDP1, CPU offload.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if _flag(f"ACCELERATE_USE_{name}"):
            raise UserError(f"accelerate was configured for {name}: expected DDP or FSDP2 (recipes/configs/accelerate)")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    arranged = _arrangement(count)
    sharded = _flag("ACCELERATE_USE_FSDP") or arranged.together > 1
    if _flag("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate was configured for FSDP1: set fsdp_version: 2 (recipes/configs/accelerate)")
    if sharded and _flag("FSDP_OFFLOAD_PARAMS"):
        raise UserError("fsdp_offload_params is not supported: set it to false, and use more GPUs or LoRA")
    if sharded and _flag("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("fsdp_activation_checkpointing is not supported: leave it out, and use gradient checkpointing")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        # What the processes tell each other goes through the CPU, tensors of the model through their own device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    if dist.get_rank() > 0:
        disable_progress_bar()
    return TorchProcesses(sharded, arranged.replicas if sharded else 1, arranged.together)


class Arrangement(NamedTuple):
    """How many times the model is there, and how many processes compute each of its layers together."""

    replicas: int = 1
    together: int = 1


def _arrangement(count: int) -> Arrangement:
    """By accelerate's `parallelism_config`.

    Raises:
        UserError: it does not go with the number of processes, or asks for what is not supported.
    """
    if not _flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return Arrangement()
    kinds = ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")
    size = {kind: int(os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")) for kind in kinds}
    if other := [f"parallelism_config_{kind.lower()}_size: {size[kind]}" for kind in kinds[3:] if size[kind] > 1]:
        raise UserError(f"{other[0]} is not supported: expected dp_replicate_size, dp_shard_size and tp_size alone")
    replicas, shards, together = (size[kind] for kind in kinds[:3])
    if (product := replicas * shards * together) != count:
        raise UserError(
            f"dp_replicate_size {replicas} × dp_shard_size {shards} × tp_size {together} is {product}, and this run "
            f"has {count} processes: set parallelism_config to sizes whose product that is"
        )
    if replicas > 1 and together > 1:
        raise UserError(f"tp_size {together} with dp_replicate_size {replicas}: expected dp_shard_size instead")
    if shards > 1 and not _flag("ACCELERATE_USE_FSDP"):
        raise UserError(f"dp_shard_size {shards} needs FSDP2: set distributed_type: FSDP and fsdp_version: 2")
    return Arrangement(replicas, together)


def _leave() -> None:
    """Before the interpreter goes. Gloo's threads drop the tensors of a collective a moment after it is done; one that
    does so when the interpreter is going aborts the process (github.com/pytorch/pytorch/pull/179291)."""
    time.sleep(0.1)
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """Which of this machine's GPUs is this process's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turns what torch.distributed raises when another process has died into TrainingStopped."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        raise lost(str(error)) from error


# The model


def spread(scored: ScoredModel, group: Processes, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """What to call for training: the model itself, alone or sharded in place, or DDP around it.

    FSDP2 shards each decoder layer, and everything else with the model as a whole: embeddings and head are gathered
    from the start of the forward to the end of the backward pass, so the fused loss finds the head whole.

    Args:
        scored: on the device; to be sharded it may be on none yet.
        device: what computes.
        dtype: gather the shards in this precision, and compute in it; None: as they are.
    """
    if not isinstance(group, TorchProcesses):
        return scored
    if not group.sharded:
        if not any(p.requires_grad for p in scored.parameters()):  # which DDP refuses
            return scored
        here = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(scored, device_ids=here, gradient_as_bucket_view=True)
    if device.type == "cpu":
        _give_back_what_is_freed()
    mesh = group.mesh(device.type, group.replicas, group.together)
    if group.together > 1:
        mesh = mesh["shards"]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    blocks = set(getattr(scored.model, "_no_split_modules", None) or ())
    for module in list(scored.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # The inputs of the whole are token ids, and the loss's coefficients, which must stay float32.
    whole = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, cast_forward_inputs=False)
    fully_shard(scored, mesh=mesh, mp_policy=whole)
    return scored


def _give_back_what_is_freed() -> None:
    """Have glibc give blocks of a MiB and more back to the system. It would keep them, and does not find an aligned one
    again for the next layer that is gathered: after one forward pass a process would hold as much as the whole model
    takes."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)


@contextmanager
def gradients_wait(model: nn.Module) -> Iterator[None]:
    """Within it gradients add up where they are computed; the next backward pass outside it sums them over all
    processes."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


class OrderedSum:
    """A sum of gradients in the order of a step's micro-batches, whichever process computes which: the k-th of rank r
    is the (k · count + r)-th of the step, as `Processes.share` deals them."""

    def __init__(self, parameters: Iterable[nn.Parameter], group: Processes):
        self.parameters, self.group = list(parameters), group
        self.sums: list[Tensor] = []

    def add(self) -> None:
        """What the parameters have for gradients, and what they have on the other processes; none is left there."""
        self.sums = self.sums or [torch.zeros_like(p) for p in self.parameters]
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for gradients in in_order(own, self.group):
            self.sums = [total + gradient for total, gradient in zip(self.sums, gradients, strict=True)]
        for p in self.parameters:
            p.grad = None

    def put_back(self) -> None:
        """Make the sums the parameters' gradients."""
        for p, total in zip(self.parameters, self.sums, strict=True):
            p.grad = total


def in_order(tensors: Sequence[Tensor], group: Processes) -> Iterator[Sequence[Tensor]]:
    """What each process has in place of these float32 tensors, in order of rank."""
    if group.count == 1:
        yield tensors
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    every = [torch.empty_like(flat) for _ in range(group.count)]
    dist.all_gather(every, flat)
    for one in every:
        parts = one.split([tensor.numel() for tensor in tensors])
        yield [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered: every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def pieces(tensors: Mapping[str, Tensor], group: Processes) -> dict[str, Callable[[], Array | Shard]]:
    """What this process is to save of tensors that may be sharded, as NumPy, each copied when it is asked for: rows
    that are its own, and of what several have alike the first one's. Every process must call this."""
    mine: dict[str, Callable[[], Array | Shard]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and _block(tensor).columns is not None:
            mine[name] = partial(_shard, *_by_rows(tensor), tuple(tensor.shape))
        elif _is_ours(tensor, group):
            mine[name] = partial(piece, tensor)
    return mine


def piece(tensor: Tensor) -> Array | Shard:
    """This process's rows of a tensor that may be sharded, as NumPy."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu().numpy().copy()
    return _shard(tensor.to_local().detach(), _block(tensor).rows.start, tuple(tensor.shape))


def _shard(rows: Tensor, start: int, shape: tuple[int, ...]) -> Shard:
    return Shard(rows.cpu().numpy().copy(), start, shape)


def _is_ours(tensor: Tensor, group: Processes) -> bool:
    """Whether this process is the one that saves its part of a tensor: of what several have alike, the first."""
    if not isinstance(tensor, DTensor):
        return group.rank == 0
    mesh = tensor.device_mesh
    if group.together > 1 and mesh.ndim == 1:
        return group.rank % group.together == 0
    return not any(p.is_replicate() and mesh.get_local_rank(i) for i, p in enumerate(tensor.placements))


def _by_rows(tensor: DTensor) -> tuple[Tensor, int]:
    """Of a matrix whose columns several processes have between them, whole rows instead, and the first one's number:
    each sends as much as it receives."""
    mesh, rows = tensor.device_mesh[TENSOR], _block(tensor).rows
    local = DTensor.from_local(tensor.to_local().detach(), mesh, [Split(1)], run_check=False)
    mine = local.redistribute(placements=[Split(0)]).to_local()
    return mine, rows.start + _chunk(range(rows.stop - rows.start), mesh.size(), mesh.get_local_rank()).start


def like(array: Array, tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A whole array as a tensor that lies, and is sharded, as another does.

    Args:
        device: where it is to be, where the other one is nowhere yet; default: where that is.
    """
    if not isinstance(tensor, DTensor):
        return torch.tensor(array, dtype=tensor.dtype, device=device or tensor.device)
    return of_rows(_columns(array[_block(tensor).rows], tensor), tensor, device)


def stored_like(arrays: Mapping[str, Array], name: str, tensor: Tensor) -> Tensor:
    """`like` of one of the arrays; of those on the disk only the rows that are needed are read."""
    if not isinstance(tensor, DTensor):
        return like(arrays[name], tensor)
    rows = _block(tensor).rows
    return of_rows(_columns(rows_of(arrays, name, rows.start, rows.stop), tensor), tensor)


def of_rows(rows: Array | Tensor, tensor: DTensor, device: torch.device | None = None) -> Tensor:
    """This process's part of a tensor that is sharded as another is."""
    local = torch.as_tensor(rows).to(device or tensor.to_local().device, tensor.dtype)
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


class _Block(NamedTuple):
    """Which part of a tensor is this process's."""

    rows: slice
    columns: slice | None = None  # None: all


def _block(tensor: DTensor) -> _Block:
    """FSDP2 deals out the rows as torch.chunk does: as many to each but the last; and tensor parallelism before it rows
    or columns. The last dimension of the mesh is the one that shards, but for tensor parallelism's; one before it has
    replicas."""
    mesh, rows, columns = tensor.device_mesh, range(tensor.shape[0]), None
    shards = mesh.ndim - 1
    if (mesh.mesh_dim_names or ())[-1:] == (TENSOR,):
        placement, part = tensor.placements[shards], (mesh.size(shards), mesh.get_local_rank(shards))
        if _dimension(placement, tensor) == 0:
            rows = _chunk(rows, *part)
        elif placement.is_shard():
            found = _chunk(range(tensor.shape[1]), *part)
            columns = slice(found.start, found.stop)
        shards -= 1
    rows = _chunk(rows, mesh.size(shards), mesh.get_local_rank(shards)) if shards >= 0 else rows
    return _Block(slice(rows.start, rows.stop), columns)


def _dimension(placement: Placement, tensor: Tensor) -> int | None:
    """Along which a tensor is split; None: it is not."""
    return placement.dim % tensor.ndim if isinstance(placement, Split) else None


def _chunk(of: range, count: int, number: int) -> range:
    """As torch.chunk deals them out: as many to each but the last."""
    size = -(-len(of) // count)
    return of[min(number * size, len(of)) : (number + 1) * size]


def _columns(rows: Array, tensor: DTensor) -> Array:
    columns = _block(tensor).columns
    return rows if columns is None else np.ascontiguousarray(rows[:, columns])
