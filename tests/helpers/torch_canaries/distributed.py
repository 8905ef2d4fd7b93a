"""Canaries: DTensors, and what FSDP2 keeps of the parameters that it shards."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from .registry import canary

FSDP = "torch/distributed/fsdp/_fully_shard/"

WIRES = "packed weights over FSDP2, so gather='packed' would fail or gather stale buffers"


@contextmanager
def mesh_of_one() -> Iterator[DeviceMesh]:
    if dist.is_initialized():
        dist.destroy_process_group()
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()


def sharded(mesh: DeviceMesh) -> tuple[nn.Module, Any]:
    """Return a module under FSDP2, and what that keeps of its weight."""
    module = nn.Sequential(nn.Linear(4, 4, bias=False))
    fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)
    group = state._fsdp_param_group if groups is None else groups[0]
    (parameter,) = group.fsdp_params
    return module, parameter


@canary(
    "_local_tensor",
    "DTensor._local_tensor is the memory that operators on the DTensor write to, the same object each time",
    "torch/distributed/tensor/_api.py, DTensor.__new__ and to_local",
    "every run on shards, as masks would be searched in, and hooks hang on, tensors that nobody else has",
)
def _() -> None:
    with mesh_of_one() as mesh:
        part = torch.zeros(4, 4)
        tensor = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)]))
        here: Any = tensor._local_tensor  # type: ignore[attr-defined]
        with torch.no_grad():
            tensor.add_(1)
        assert here is tensor._local_tensor  # type: ignore[attr-defined]
        assert here.sum() == 16


@canary(
    "_get_fsdp_state",
    "FSDPModule._get_fsdp_state() returns the state whose groups have the sharded parameters",
    f"{FSDP}_fully_shard.py, FSDPModule.reshard, which calls it",
    WIRES,
)
def _() -> None:
    with mesh_of_one() as mesh:
        assert sharded(mesh)[1].sharded_param.shape == (4, 4)


@canary(
    "_fsdp_param_groups",
    "an FSDP2 state has one group of parameters, or since torch 2.12 several in _fsdp_param_groups, with fsdp_params",
    f"{FSDP}_fsdp_state.py, FSDPState.__init__",
    WIRES,
)
def _() -> None:
    with mesh_of_one() as mesh:
        module = sharded(mesh)[0]
        state = module._get_fsdp_state()  # type: ignore[operator]
        assert len(getattr(state, "_fsdp_param_groups", [state._fsdp_param_group])) == 1


@canary(
    "_fsdp_param_group",
    "an FSDP2 state has its only group of parameters in _fsdp_param_group, None where it has none",
    f"{FSDP}_fsdp_state.py, FSDPState",
    "the same on torch 2.11",
)
def _() -> None:
    with mesh_of_one() as mesh:
        state = sharded(mesh)[0]._get_fsdp_state()  # type: ignore[operator]
        assert len(state._fsdp_param_group.fsdp_params) == 1


@canary(
    "_module_info",
    "FSDPParam._module_info has the module and the name of a parameter; others are shape, policy, padded size, and "
    "reset_sharded_param, which is called on the instance after conversions",
    f"{FSDP}_fsdp_param.py, FSDPParam.__init__ and _init_sharded_param; _fully_shard.py, FSDPModule._apply",
    WIRES,
)
def _() -> None:
    with mesh_of_one() as mesh:
        module, parameter = sharded(mesh)
        info = parameter._module_info
        assert (info.module, info.param_name) == (module[0], "weight")  # type: ignore[index]
        assert parameter.mp_policy.param_dtype is torch.bfloat16
        assert tuple(parameter.padded_sharded_param_size) == (4, 4)
        resets: list[int] = []
        parameter.reset_sharded_param = lambda: resets.append(1)
        module.double()
        assert resets


@canary(
    "_orig_size",
    "FSDPParam._orig_size is the size of what is gathered: of tensor parallelism's part where there is one",
    f"{FSDP}_fsdp_param.py, FSDPParam._init_sharded_param",
    WIRES,
)
def _() -> None:
    with mesh_of_one() as mesh:
        assert tuple(sharded(mesh)[1]._orig_size) == (4, 4)


class Sends:
    """Extension methods that send a part in another form."""

    def __init__(self, part: Tensor, factor: int) -> None:
        self.part, self.factor = part, factor

    def send(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        return (self.part.detach().bfloat16().repeat(self.factor, 1),), None

    def receive(self, parts: Any, metadata: Any, dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
        return parts[0][:4], []


def gathers(module: nn.Module, parameter: Any, factor: int) -> Tensor:
    part = parameter.sharded_param._local_tensor
    sends = Sends(part, factor)
    part.fsdp_pre_all_gather, part.fsdp_post_all_gather = sends.send, sends.receive
    parameter.all_gather_outputs = []
    parameter.__dict__.pop("_unsharded_param", None)
    parameter._init_extensions()
    result: Tensor = module(torch.ones(1, 4))
    module.reshard()  # type: ignore[operator]
    return result


@canary(
    "_init_extensions",
    "FSDPParam._init_extensions() looks for extension methods on the local tensor again, after a forward too",
    f"{FSDP}_fsdp_param.py, FSDPParam._init_extensions",
    WIRES,
)
def _() -> None:
    with mesh_of_one() as mesh:
        module, parameter = sharded(mesh)
        plain = module(torch.ones(1, 4))
        module.reshard()  # type: ignore[operator]
        assert torch.equal(gathers(module, parameter, 1), plain)


@canary(
    "_unsharded_param",
    "FSDP2 makes _unsharded_param and all_gather_outputs at a parameter's first gathering, of what is sent then, and "
    "again where they are gone",
    f"{FSDP}_fsdp_param.py, FSDPParam.init_all_gather_outputs and init_unsharded_param",
    WIRES,
)
def _() -> None:
    with mesh_of_one() as mesh:
        module, parameter = sharded(mesh)
        assert torch.equal(gathers(module, parameter, 1), gathers(module, parameter, 2))
