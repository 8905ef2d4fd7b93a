"""A training step under FSDP2, sparse by each wire in turn with dense, and the bytes that a rank sends for it."""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sparsetrain import SparseTraining
from sparsetrain.layers.sharded.gathering import GatherMode

from .host import taken_in_turn
from .measure import append_csv, quantile_cells

WIRES: tuple[GatherMode, ...] = ("masked", "packed")

METHOD = {"preset": "fst", "warmup": 0.0, "dense_tail": 0.0, "refresh_every": 40}
"""A step in forty searches masks, as in training."""


ALL_GATHER: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Its name before torch 2.13 is the other."""


class Size(NamedTuple):
    """Of the model and its batch.

    Args:
        layers: Blocks of two linear layers.
        width: Features of a block.
        tokens: In the batch of a rank.
    """

    layers: int
    width: int
    tokens: int


class CountingAllGather:
    """FSDP2's all-gather, which counts the bytes that a rank sends."""

    def __init__(self) -> None:
        self.bytes = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for what is gathered."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        """Gather, and count."""
        self.bytes += input_tensor.numel() * input_tensor.element_size()
        return ALL_GATHER(output_tensor, input_tensor, group=group, async_op=async_op)


class Trainee:
    """A model under FSDP2 that is trained in bfloat16.

    Args:
        size: Of the model and its batch.
        device: ``"cpu"`` or ``"cuda"``.
        wire: Of its sparse weights; None for a dense run.
    """

    def __init__(self, size: Size, device: str, wire: GatherMode | None) -> None:
        torch.manual_seed(0)
        self._model = nn.Sequential(*[_block(size.width) for _ in range(size.layers)]).to(device)
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for module in (*self._model, self._model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self.optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        if wire is not None:
            SparseTraining(self._model, self.optimizer, METHOD, 10**6, gather=wire, watch_dense=False, verbose=False)
        self._batch = torch.randn(size.tokens, size.width, device=device)

    def step(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        self.optimizer.step()

    def timed(self) -> None:
        """Take a step and wait for it."""
        self.step()
        if self._batch.is_cuda:
            torch.cuda.synchronize()

    def count_bytes(self) -> int:
        """Return the bytes that this rank sends to gather weights in a step."""
        counter = CountingAllGather()
        for module in self._model:
            module.set_custom_all_gather(counter)  # type: ignore[operator]
        self.step()
        return counter.bytes


def _block(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))


def run(size: Size, ranks: int, repeats: int, device: str, csv: Path | None) -> int:
    """Measure on so many processes, print and store; return the exit code."""
    if ranks < 2:
        print(f"--ranks is {ranks}: it must be at least 2, as one alone sends nothing.")
        return 2
    if device == "cuda" and ranks > torch.cuda.device_count():
        print(f"--ranks is {ranks} but this machine has {torch.cuda.device_count()} GPUs: take fewer.")
        return 2
    parts = [-(-rows // ranks) for rows in (size.width, 4 * size.width)]
    if size.width % 4 or any(part % 4 for part in parts):
        print(
            f"--width is {size.width}, of which {ranks} ranks have parts of {parts[0]} and {parts[1]} rows: all must "
            f"be multiples of 4, so take a multiple of {4 * ranks}."
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, (size, ranks, repeats, device, csv, folder), nprocs=ranks)
    return 0


def _start(rank: int, size: Size, ranks: int, repeats: int, device: str, csv: Path | None, folder: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    measure(size, repeats, device, csv)
    dist.barrier()
    dist.destroy_process_group()


def measure(size: Size, repeats: int, device: str, csv: Path | None) -> None:
    """Measure on the processes of the default group; the first prints and stores."""
    rows, ranks = [], dist.get_world_size()
    for wire in WIRES:
        dense, sparse = Trainee(size, device, None), Trainee(size, device, wire)
        pair = taken_in_turn(f"{wire} wire", sparse.timed, dense.timed, repeats, "")
        rows.append((wire, pair, sparse.count_bytes(), dense.count_bytes()))
    if dist.get_rank() == 0:
        _print(rows, size, ranks, repeats, device)
        if csv is not None:
            append_csv(csv, [cell for row in rows for cell in _cells(*row, size, ranks)], device)


def _print(rows: Sequence[Any], size: Size, ranks: int, repeats: int, device: str) -> None:
    what = f"{size.layers} blocks of {size.width}, {size.tokens} tokens a rank"
    title = f"FSDP2 step on {ranks} {device} ranks, bfloat16, {what}, medians of {repeats} pairs"
    table = Table("wire", "dense ms", "sparse ms", "sparse over dense", "KB sent", "of dense", title=title)
    for wire, pair, sent, whole in rows:
        dense, sparse = (statistics.median(values) / 1e3 for values in (pair.dense, pair.sparse))
        ratio = statistics.median(pair.ratio)
        table.add_row(
            wire, f"{dense:.1f}", f"{sparse:.1f}", f"{ratio:.2f}x", f"{sent / 1e3:.1f}", f"{sent / whole:.4f}"
        )
    Console(width=140).print(table)


def _cells(wire: str, pair: Any, sent: int, whole: int, size: Size, ranks: int) -> list[dict[str, object]]:
    x = f"{size.layers} blocks of {size.width}, {size.tokens} tokens, {ranks} ranks"
    common = {"kernel_name": "fsdp2-step", "x_name": "what", "x_value": x}
    kinds: dict[str, tuple[str, str, list[float]]] = {
        wire: ("time", "us", pair.sparse),
        f"dense, in turn with {wire}": ("time", "us", pair.dense),
        f"{wire} to dense": ("ratio", "x", pair.ratio),
        f"{wire}, sent to dense": ("bytes", "x", [sent / whole]),
    }
    return [
        {**common, "kernel_provider": name, "metric_name": metric, "metric_unit": unit, **quantile_cells(values)}
        for name, (metric, unit, values) in kinds.items()
    ]
