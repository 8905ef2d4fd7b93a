"""What ranks do with tensor parallelism (``test_tensor_parallel.py``)."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import failure
from sharded_runs import STEPS, WIDTH, batch, blocks, mesh_of, outcome, parallelize, parallelize_block, take_step, whole
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.layers.masked_layer import MaskedLayer

FIRST = {"preset": "asp_one_shot", "prune_at": 0}
"""Masks are in force from the start."""


OBSERVED = {"preset": "sr_ste", "criterion": "wanda", "warmup": 1}


def world_mesh() -> Any:
    """Return the mesh of all ranks."""
    return mesh_of((dist.get_world_size(),), ("tp",))


def train_part(
    model: nn.Module,
    method: Any,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    micro_batches: int = 1,
    part: tuple[int, int] = (0, 1),
    average: Callable[[nn.Module], None] = lambda model: None,
    spread: Callable[[nn.Module], object] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a model, spread or not, and return what there is to compare.

    Args:
        model: What is trained.
        method: Of the run.
        optimizer: Called with parameters and lr.
        micro_batches: Of a step.
        part: Which of how many parts of every batch this process has.
        average: Called with the model before every step, to average gradients.
        spread: Called with the model once its run is made, to spread its weights.
        options: Of the run.
    """
    owner = optimizer(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, owner, method, STEPS, verbose=False, **options)
    if spread is not None:
        spread(model)
        owner.param_groups[0]["params"] = list(model.parameters())
    losses = []
    for step in range(STEPS):
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
    return train_part(parallelize(blocks(), shape), method, **options)


def warned(method: Any, shape: tuple[int, ...], **options: Any) -> str:
    """Return what a user is warned of who trains so."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        tensor_parallel(method, shape, **options)
    return " ".join(str(entry.message) for entry in found)


def parallel_late(method: Any, shape: tuple[int, ...], **options: Any) -> str:
    """Return what training is refused with, if the model is spread after its run was made."""
    return failure(train_part, blocks(), method, spread=lambda model: parallelize(model, shape), **options)


def copied() -> list[bool]:
    """Return whether a copy of a parallel model with masks multiplies like it, and has parts of its own."""
    model = parallelize(blocks(), (2,))
    owner = torch.optim.SGD(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, owner, FIRST, STEPS, verbose=False)
    model(batch(0)).square().mean().backward()
    owner.step()
    twin, ours = copy.deepcopy(model), training.masks.layers["0.up"]
    own: Any = twin.get_submodule("0.up")
    found = [own.shard.weight is own.weight, torch.equal(twin(batch(0)), model(batch(0)))]
    own.master.zero_()
    return [*found, not own.matrix.any(), bool(ours.matrix.any())]


def distributed(method: Any, shape: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """Train with the batch split over the first dimension of the mesh, over which FSDP2 averages gradients."""
    return train_part(parallelize(blocks(), shape), method, part=(_mesh(shape).get_local_rank(0), shape[0]), **options)


def averaged_by_hand(method: Any, shape: tuple[int, int], **options: Any) -> dict[str, Any]:
    """Do so with two replicas of a tensor-parallel model, whose gradients are averaged by hand."""
    mesh, model = _mesh(shape), blocks()
    group = mesh.get_group(0)

    def average(model: nn.Module) -> None:
        for parameter in model.parameters():
            gradient = parameter.grad
            assert gradient is not None
            part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            dist.all_reduce(part, group=group)
            part /= shape[0]

    for block in list(model.children())[:-1]:
        parallelize_block(block, mesh["tp"])
    part = mesh.get_local_rank(0), shape[0]
    return train_part(model, method, part=part, average=average, group=group, **options)


def _mesh(shape: tuple[int, ...]) -> Any:
    return mesh_of(shape, (*("replicate", "shard")[-len(shape) + 1 :], "tp"))


class Sequences(nn.Module):
    """A norm and two layers on sequences ``[batch, tokens, features]``."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


def sequences(bias: bool, seed: int = 0) -> Sequences:
    """Return such a model, the same in every process."""
    torch.manual_seed(seed)
    return Sequences(bias)


PLANS: dict[str, Callable[[], dict[str, Any]]] = {
    "tensors": lambda: {"up": ColwiseParallel(), "down": RowwiseParallel()},
    "dtensors": lambda: {
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(use_local_output=False),
    },
    "of tokens": lambda: {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    },
    "gathered output": lambda: {"up": ColwiseParallel(output_layouts=Replicate())},
    "another input": lambda: {"up": RowwiseParallel(input_layouts=Replicate())},
}


def one_step(model: nn.Module, sparse: bool, x: Tensor, of_tokens: bool = False) -> dict[str, Tensor]:
    """Return output and gradients of a forward and a backward, whole; the input may be spread by tokens."""
    if sparse:
        st.sparsify_(model, verbose=False)
    x = x.clone().requires_grad_()
    if of_tokens:
        output = model(DTensor.from_local(x, world_mesh(), [Replicate()]).redistribute(placements=[Shard(1)]))
    else:
        output = model(x)
    full = _full(output)
    full.sin().sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    assert x.grad is not None
    return {"output": full.detach(), "input": x.grad, **gradients}


def planned(plan: str, bias: bool) -> tuple[dict[str, Tensor], list[dict[Any, int]]]:
    """Return a masked model's output and gradients under a plan, and the messages of the dense and the masked one."""
    x, found, messages = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1)), {}, []
    for sparse in (False, True):
        model = parallelize_module(sequences(bias), world_mesh(), PLANS[plan]())
        with CommDebugMode() as counted:  # type: ignore[no-untyped-call]
            found = one_step(model, sparse, x, of_tokens="norm" in PLANS[plan]())
        messages.append({str(name): count for name, count in counted.get_comm_counts().items()})
    return found, messages


class Alike(nn.Module):
    """A layer whose weight every rank has, each with tokens of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def _full(output: Tensor) -> Tensor:
    """Return an output whole, with its graph."""
    return output.full_tensor() if isinstance(output, DTensor) else output


def _train_alike(model: nn.Module, spread: Callable[[Tensor], Tensor] = lambda tokens: tokens) -> st.SparseTraining:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = st.SparseTraining(model, optimizer, OBSERVED, 6, verbose=False)
    for step in range(6):
        optimizer.zero_grad()
        _full(model(spread(batch(step)))).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return training


def replicated() -> tuple[dict[str, Any], str]:
    """Train with a replicated weight and tokens that are spread; and say what unequal parts are refused with."""
    torch.manual_seed(0)
    model = distribute_module(Alike(), world_mesh())
    training = _train_alike(model, lambda tokens: distribute_tensor(tokens, world_mesh(), [Shard(0)]))
    found = outcome(model, training)
    generator = torch.Generator().manual_seed(dist.get_rank())
    training.masks.layers["layer"].master.data.mul_(torch.randn(WIDTH, WIDTH, generator=generator))
    return found, failure(training.refresh)


def in_one_process() -> dict[str, Any]:
    """Train it where all tokens are."""
    torch.manual_seed(0)
    model = Alike()
    return outcome(model, _train_alike(model))


def transposed(cut: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return output and gradients of a layer stored ``[I, O]``, masked, in one process and spread by hand."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model, mesh, x = nn.Sequential(Conv1D(2 * WIDTH, WIDTH)), world_mesh(), torch.randn(3, WIDTH)  # type: ignore[no-untyped-call]
    one = one_step(copy.deepcopy(model), True, x)
    layer: Any = model[0]
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(cut)]))
    layer.bias = nn.Parameter(distribute_tensor(layer.bias, mesh, [Shard(0) if cut else Replicate()]))
    layer.register_forward_pre_hook(lambda _, args: (DTensor.from_local(args[0], mesh, [Replicate()]),))
    return one, one_step(model, True, x)


def as_used() -> dict[str, Any]:
    """Use a tensor-parallel model as trainers do, and return what there is to look at."""
    model = parallelize(blocks(), (dist.get_world_size(),))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, optimizer, {"preset": "fst", "dense_tail": 0, "warmup": 1}, 4, verbose=False)
    losses = []
    blocks_of = list(model.children())
    compiled = torch.compile(blocks_of[0], backend="aot_eager", fullgraph=True)
    for step in range(4):
        with torch.no_grad():
            model.eval()
            losses.append(model(batch(100)).square().mean().item())
            model.train()
        optimizer.zero_grad()
        middle = checkpoint(blocks_of[1], compiled(batch(10 * step)), use_reentrant=False)
        assert isinstance(middle, Tensor)
        loss = blocks_of[2](middle).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    layer = model.get_submodule("0.up")
    assert isinstance(layer, MaskedLayer)
    found = {"losses": losses, "input_features": layer.input_features, "text": repr(layer), **outcome(model, training)}
    found["report"] = [(choice.name, choice.count) for choice in training.report.sparse]
    training.finish()
    found["ending"], found["zeros"] = str(training.ending), _zeros(model)
    st.sparsify_(model, verbose=False)
    st.export_dense_(model)
    found["exported"] = _zeros(model)
    return found


def used_in_one_process() -> dict[str, Any]:
    """Do so in one process, eagerly."""
    model = blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, optimizer, {"preset": "fst", "dense_tail": 0, "warmup": 1}, 4, verbose=False)
    losses = []
    for step in range(4):
        with torch.no_grad():
            losses.append(model(batch(100)).square().mean().item())
        losses += take_step(model, optimizer, step)
    return {"losses": losses, **outcome(model, training)}


def _zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((whole(value) == 0).sum()) for name, value in model.state_dict().items() if "weight" in name}


def refusals() -> dict[str, str]:
    """Return what is refused with which sentence; the models are as they were."""
    found, mesh = {}, world_mesh()
    conv = nn.Sequential(kernel := nn.Conv1d(8, 8, 3))
    kernel.weight = nn.Parameter(distribute_tensor(kernel.weight.detach(), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    found["convolution"] = failure(st.SparseTraining, conv, optimizer, FIRST, 12, "all-conv")
    assert type(kernel) is nn.Conv1d
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    st.sparsify_(outer := nn.Sequential(layer), verbose=False)
    found["plain input"] = failure(outer, torch.zeros(2, 8))
    return found


def drawn(cut: int) -> tuple[Tensor, Tensor]:
    """Return the estimated weight gradients of a step with tokens that are all alike, and one with others."""
    found = []
    for x in (torch.ones(16, WIDTH), torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))):
        torch.manual_seed(0)
        style = RowwiseParallel(input_layouts=Replicate()) if cut else ColwiseParallel(output_layouts=Replicate())
        layer = nn.Linear(WIDTH, WIDTH, bias=False)
        layer.weight.data[8:] = layer.weight.data[:8]  # so that both parts would draw alike
        model = parallelize_module(nn.Sequential(layer), world_mesh(), {"0": style})
        st.sparsify_(model, weight_product="mvue", verbose=False)
        model(x).sin().sum().backward()
        found.append(whole(layer.weight.grad))
    return found[0], found[1]
