"""Runs on sharded models, on ranks (``ranks.py``) and in one process, to be compared."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparsetrain as st

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


def batch(step: int, rows: int = 8, width: int = WIDTH) -> Tensor:
    """Return the inputs of a step."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(step))


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


def parallelize(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Apply tensor parallelism to every block over the last dimension of a mesh, then FSDP2 over those before it."""
    names = ("replicate", "shard")[-len(shape) + 1 :] if len(shape) > 1 else ()
    mesh = mesh_of(shape, (*names, "tp"))
    for child in model.children():
        if isinstance(child, Block):
            plan = {"up": ColwiseParallel(), "gate": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(child, mesh["tp"], plan)
    for module in (*model.children(), model) if names else ():
        if len(list(module.children())):
            fully_shard(module, mesh=mesh[names])
    return model


def policy(name: str | None) -> MixedPrecisionPolicy:
    """Return a policy whose parameters have a dtype, reduced in float32."""
    return MixedPrecisionPolicy(None if name is None else getattr(torch, name), torch.float32)


def train(
    model: nn.Module,
    method: Any,
    steps: int = STEPS,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    micro_batches: int = 1,
    part: tuple[int, int] = (0, 1),
    average: Callable[[nn.Module], None] = lambda model: None,
    **options: Any,
) -> dict[str, Any]:
    """Train a model, sharded or not, and return what there is to compare.

    Args:
        model: What is trained.
        method: Of the run.
        steps: Of the run.
        optimizer: Called with parameters and lr.
        micro_batches: Of a step.
        part: Which of how many parts of every batch this process has.
        average: Called with the model before every step, to average gradients.
        options: Of the run.
    """
    owner = optimizer(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, owner, method, steps, verbose=False, **options)
    losses = []
    for step in range(steps):
        owner.zero_grad()
        loss = torch.zeros(())
        for tokens in batch(step).chunk(part[1])[part[0]].chunk(micro_batches):
            own = training.distilled(model(tokens).square().mean()) / micro_batches
            own.backward()  # type: ignore[no-untyped-call]
            loss += own.detach()
        average(model)
        owner.step()
        losses.append(loss.item())
    return {"losses": losses, **outcome(model, training)}


def tensor_parallel(method: Any, shape: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """Train blocks under tensor parallelism, with FSDP2 if the mesh has more than one dimension."""
    return train(parallelize(blocks(), shape), method, **options)


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


def fsdp(method: Any, shape: tuple[int, ...], dtype: str | None = None, **options: Any) -> dict[str, Any]:
    """Train blocks under FSDP2."""
    return train(shard(blocks(), shape, mp_policy=policy(dtype)), method, **options)


def require_equal(found: Mapping[str, Any], wanted: Mapping[str, Any], relative: float = 0.0) -> None:
    """Raise unless losses, weights and masks are equal, or losses and weights within a bound; metrics as sums are."""
    for key, mask in wanted["masks"].items():
        assert torch.equal(found["masks"][key], mask), f"masks of {key}"
    for name in ("losses", "weights"):
        torch.testing.assert_close(found[name], wanted[name], rtol=relative, atol=relative, equal_nan=True)
    assert found["metrics"].keys() == wanted["metrics"].keys()
    for key, value in wanted["metrics"].items():
        torch.testing.assert_close(found["metrics"][key], value, rtol=max(relative, 1e-9), atol=1e-9, msg=key)
