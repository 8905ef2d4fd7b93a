"""Runs on sharded models, on ranks (``ranks.py``) and in one process, to be compared."""

from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from ranks import failure
from simulated_backend import SimulatedBackend
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparsetrain as st
from scripts.benchmarks.sharded import CountingAllGather
from sparsetrain.backends import BACKENDS

STEPS = 12

WIDTH = 16

_MESHES: dict[tuple[object, ...], DeviceMesh] = {}


class Block(nn.Module):
    """A residual block of three layers, one with a bias."""

    def __init__(self, width: int = WIDTH, hidden: int = 2 * WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.relu(self.up(x)) * self.gate(x)
        return torch.add(x, self.down(hidden))


def blocks(count: int = 2, width: int = WIDTH, hidden: int = 2 * WIDTH) -> nn.Module:
    """Return a model of blocks and a head, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(*[Block(width, hidden) for _ in range(count)], nn.Linear(width, width))


def batch(number: int, shape: tuple[int, ...] = (8, WIDTH)) -> Tensor:
    """Return inputs, always the same of a number."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1 + number))


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Return a mesh of the ranks; the same one for the same shape."""
    key = (*shape, *names)
    if key not in _MESHES:
        _MESHES[key] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _MESHES[key]


def shard(model: nn.Module, shape: tuple[int, ...], **options: Any) -> nn.Module:
    """Apply FSDP2 to every child and to the model; two dimensions are HSDP."""
    mesh = mesh_of(shape, ("replicate", "shard")[-len(shape) :])
    for child in model.children():
        if len(list(child.children())):
            fully_shard(child, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def by_columns(parameter: Tensor) -> Shard | None:
    """Say that a weight is cut by its columns, as a ``shard_placement_fn``."""
    return Shard(1) if parameter.dim() == 2 else None


def parallelize(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Apply tensor parallelism to every block over the last dimension of a mesh, then FSDP2 over those before it."""
    names = ("replicate", "shard")[-len(shape) + 1 :] if len(shape) > 1 else ()
    mesh = mesh_of(shape, (*names, "tp"))
    for child in model.children():
        if isinstance(child, Block):
            parallelize_block(child, mesh["tp"])
    for module in (*model.children(), model) if names else ():
        if len(list(module.children())):
            fully_shard(module, mesh=mesh[names])
    return model


def parallelize_block(block: nn.Module, mesh: DeviceMesh) -> None:
    """Apply tensor parallelism to a block, whose inner features are cut."""
    parallelize_module(block, mesh, {"up": ColwiseParallel(), "gate": ColwiseParallel(), "down": RowwiseParallel()})


def policy(name: str | None) -> MixedPrecisionPolicy:
    """Return a policy whose parameters have a dtype, reduced in float32."""
    return MixedPrecisionPolicy(None if name is None else getattr(torch, name), torch.float32)


def train(
    model: nn.Module,
    method: Any,
    steps: int = STEPS,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    loop: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a model, sharded or not, on the same batches in every process, and return what there is to compare."""
    owner = optimizer(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, owner, method, steps, verbose=False, **options)
    losses = [loss for step in range(steps) for loss in take_step(model, owner, step, **(loop or {}))]
    return {"losses": losses, **outcome(model, training)}


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    micro_batches: int = 1,
    syncs_each: bool = True,
    evaluates: bool = False,
    clip: float = 0.0,
    shape: tuple[int, ...] = (8, WIDTH),
    repeats: int = 1,
) -> list[float]:
    """Take a step as a user's loop does, on batches that are repeated along their rows, and return its losses."""
    optimizer.zero_grad()
    losses = []
    for number in range(micro_batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(syncs_each or number == micro_batches - 1)
        inputs = torch.cat([batch(10 * step + number, shape)] * repeats)
        loss = model(inputs).square().mean() / micro_batches
        loss.backward()
        losses.append(loss.item())
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    if evaluates:
        model.eval()
        with torch.no_grad():
            losses.append(model(batch(-1, shape)).square().mean().item())
        model.train()
    return losses


def outcome(model: nn.Module, training: st.SparseTraining) -> dict[str, Any]:
    """Return weights, masks and metrics of a run, whole."""
    layers = training.masks.layers
    return {
        "weights": {name: whole(value) for name, value in model.state_dict().items()},
        "masks": {name: whole(layer.mask) for name, layer in layers.items()},
        "metrics": {name: value for name, value in training.metrics(per_layer=True).items() if comparable(name)},
    }


def comparable(name: str) -> bool:
    """Say whether a metric is the same wherever a run takes place."""
    return not name.endswith("_ms") and name != "operand_bytes"


def whole(value: Any) -> Tensor:
    """Return a tensor, gathered if it is spread."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().clone()


def fsdp(
    method: Any,
    shape: tuple[int, ...],
    dtype: str | None = None,
    sharding: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train blocks under FSDP2."""
    return train(shard(blocks(), shape, mp_policy=policy(dtype), **(sharding or {})), method, **options)


def simulated(method: Any, gather: str, **options: Any) -> dict[str, Any]:
    """Train blocks under FSDP2 whose products a simulated sparse backend computes."""
    with patch.dict(BACKENDS, simulated=(backend := SimulatedBackend())):
        found = fsdp(method, (2,), steps=10, gather=gather, backend="simulated", **options)
    return {**found, "used": backend.calls["product"] > 0}


def criterion_of(gain: list[float]) -> Any:
    """Return what ranks the entries under FSDP2 by the recommended method, of a model with a norm of this gain."""
    model = nn.Sequential(blocks(), nn.LayerNorm(len(gain)))
    model[1].load_state_dict({"weight": torch.tensor(gain)}, strict=False)
    shard(model, (2,))
    optimizer = torch.optim.AdamW(model.parameters())
    return st.SparseTraining(model, optimizer, total_steps=12, verbose=False).method.criterion


def bytes_sent(dtype: str | None) -> dict[str, dict[str, int]]:
    """Return the bytes that this rank sends in a step by each wire: for sparse weights, and for a dense head."""
    found = {}
    for wire in ("dense", "masked", "packed"):
        hidden = nn.Sequential(nn.Linear(WIDTH, 32, bias=False), nn.ReLU(), nn.Linear(32, WIDTH, bias=False))
        model = shard(nn.Sequential(hidden, nn.Linear(WIDTH, WIDTH)), (2,), mp_policy=policy(dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if wire != "dense":
            st.SparseTraining(model, optimizer, "fst", 4, exclude="1", gather=wire, verbose=False)  # type: ignore[arg-type]
        counters = {"sparse": CountingAllGather(), "other": CountingAllGather()}
        hidden.set_custom_all_gather(counters["sparse"])  # type: ignore[operator]
        model.set_custom_all_gather(counters["other"])  # type: ignore[operator]
        take_step(model, optimizer, 0)
        found[wire] = {what: counter.bytes for what, counter in counters.items()}
    return found


def wires(gather: Any, method: Any = "fst", backend: str = "auto") -> set[str]:
    """Return what a report says of the layers of a run under FSDP2."""
    model = shard(blocks(), (2,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with patch.dict(BACKENDS, simulated=SimulatedBackend()):
        training = st.SparseTraining(model, optimizer, method, 6, gather=gather, backend=backend, verbose=False)
        return {choice.products.partition("; ")[2] for choice in training.report.sparse}


def clipped_adapters(micro_batches: int, under_fsdp: bool) -> tuple[list[float], list[Tensor]]:
    """Return norms by which adapters too are clipped, and adapters and weights after it, where ranks halve batches."""
    module = blocks()
    model = shard(module, (2,)) if under_fsdp else nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = {"preset": "slope", "adapter_rank": 4, "adapter_start": 0.25}
    training = st.SparseTraining(model, optimizer, method, 8, verbose=False)
    norms = []
    for step in range(8):
        optimizer.zero_grad()
        for number in range(micro_batches):
            half = batch(10 * step + number).chunk(2)[dist.get_rank()]
            (model(half).square().mean() / micro_batches).backward()
        norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.05)
        norms.append(whole(norm).item())
        optimizer.step()
    parts = [whole(part) for pair in training.adapters().values() for part in pair]
    return norms, [*parts, *map(whole, module.state_dict().values())]


def second_gradient() -> str:
    """Return what a gradient of gradients of packed weights says."""
    model = shard(blocks(), (2,))
    st.SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "fst", 6, gather="packed", verbose=False)
    x = batch(0).requires_grad_()
    loss = model(x).square().mean()
    return failure(torch.autograd.grad, loss, x, create_graph=True)


def wires_of_a_model_sharded_late() -> list[set[str]]:
    """Return the kinds of wires before the first step and after it."""
    model = blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = st.SparseTraining(model, optimizer, "fst", 6, gather="packed", verbose=False)
    shard(model, (2,))
    optimizer.param_groups[0]["params"] = list(model.parameters())

    def kinds() -> set[str]:
        return {type(layer.shard.wire).__name__ for layer in training.masks.layers.values() if layer.shard}

    found = [kinds()]
    take_step(model, optimizer, 0)
    return [*found, kinds()]


def require_equal(found: Mapping[str, Any], wanted: Mapping[str, Any], relative: float = 0.0) -> None:
    """Raise unless losses, weights and masks are equal, or losses and weights within a bound; metrics as sums are."""
    for key, mask in wanted["masks"].items():
        assert torch.equal(found["masks"][key], mask), f"masks of {key}"
    for name in ("losses", "weights"):
        torch.testing.assert_close(found[name], wanted[name], rtol=relative, atol=relative, equal_nan=True)
    assert found["metrics"].keys() == wanted["metrics"].keys()
    for key, value in wanted["metrics"].items():
        torch.testing.assert_close(found["metrics"][key], value, rtol=max(relative, 1e-9), atol=1e-9, msg=key)
