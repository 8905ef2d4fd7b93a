"""What a step costs on the host: a sparse layer over ``nn.Linear``, the engine over a bare optimizer, dense products.

The first two are measured with nothing to wait for: the vendor's library is a stand-in whose product returns an empty
output, Triton's launcher returns at once, and the operators run what they run on a GPU. Every sample is taken beside
one of the dense counterpart, so that a machine that slows down slows both.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from sparsetrain import SparseTraining
from sparsetrain.backends import BACKENDS, Operand
from sparsetrain.backends.masked import MaskedBackend
from sparsetrain.kernels.mask_search import search_tiles
from sparsetrain.kernels.masked_update.operator import NOW
from sparsetrain.kernels.pack import pack_tiles_
from sparsetrain.kernels.pack.eager import NOW as PACK_NOW
from sparsetrain.kernels.torch_internals import kernels_of
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.matmul.execution import Execution

from .measure import append_csv, quantile_cells

STAND_IN = "a stand-in whose product returns an empty output"
WIDTH = 16
LAYERS = 120
SHAPES = ((16, 16), (16, 32), (32, 16), (32, 32), (48, 16))  # of the engine's layers, in turn
MASKED = (512, 512, 256)  # O, I, tokens
KERNELS: tuple[Any, ...] = (JITFunction, InterpretedFunction)
CALLS = 20  # in one sample of a layer


class StandIn(MaskedBackend):
    """A backend that holds packed weights in natural order, which the packer writes whole, and multiplies nothing."""

    name = "stand_in"
    symmetric = False

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Operand:
        """Return an operand whose metadata is natural."""
        values = torch.empty(shape[0], shape[1] // 2, dtype=dtype, device=device)
        meta = torch.empty(shape[0], -(-shape[1] // 16), dtype=torch.int16, device=device)
        return Operand(shape, (values, meta), values, meta)

    def product(
        self,
        operand: Operand,
        rows: Tensor,
        bias: Tensor | None = None,
        algorithm: str = "",
        transposed_output: bool = False,
    ) -> Tensor:
        """Return an empty output."""
        return rows.new_empty(rows.size(0), operand.shape[0])


@dataclass
class Pair:
    """Samples of something sparse and of its dense counterpart, taken in turn, in microseconds."""

    name: str
    sparse: list[float]
    dense: list[float]
    limit: str

    @property
    def over(self) -> list[float]:
        """By how much every sparse sample takes longer."""
        return [mine - theirs for mine, theirs in zip(self.sparse, self.dense, strict=True)]

    @property
    def ratio(self) -> list[float]:
        """How many times as long every sparse sample takes."""
        return [mine / theirs for mine, theirs in zip(self.sparse, self.dense, strict=True)]


def run(repeats: int, csv: Path | None) -> int:
    """Measure, print and store; return the exit code."""
    with stand_ins():
        pairs = [*layer_pairs(repeats), *step_pairs(repeats)]
    pairs += masked_pairs(repeats)
    _print(pairs, repeats)
    if csv is not None:
        append_csv(csv, [row for pair in pairs for row in _rows(pair)], "cpu")
    return 0


@contextmanager
def stand_ins(launched: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Have nothing computed: no library, no launches, and on a CPU the operators of a GPU.

    Args:
        launched: Called instead of each launch.
    """

    def launch(kernel: object, *arguments: object, **keywords: object) -> None:
        launched()

    run_kernels, packers = {kind: kind.run for kind in KERNELS}, kernels_of(pack_tiles_)
    elsewhere, packers[None] = packers[None], packers["cuda"]
    NOW["cpu"], PACK_NOW["cpu"] = NOW["cuda"], PACK_NOW["cuda"]
    BACKENDS[StandIn.name] = StandIn()
    for kind in KERNELS:
        kind.run = launch
    try:
        yield
    finally:
        for kind, run_kernel in run_kernels.items():
            kind.run = run_kernel
        del BACKENDS[StandIn.name]
        del NOW["cpu"], PACK_NOW["cpu"]
        packers[None] = elsewhere


def layer_pairs(repeats: int) -> list[Pair]:
    """Time a forward, and a forward with its backward, of a layer so small that its products cost nothing."""
    dense = nn.Linear(WIDTH, WIDTH)
    sparse = _sparse(nn.Linear(WIDTH, WIDTH), StandIn.name)
    rows, gradient = torch.randn(WIDTH, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH)

    def forward(layer: nn.Module) -> Callable[[], object]:
        return lambda: layer(rows)

    def both(layer: nn.Module) -> Callable[[], object]:
        return lambda: layer(rows).backward(gradient)

    limits = {"forward": "25 µs over", "forward and backward": "60 µs over"}
    return [
        taken_in_turn(f"layer {name}", kind(sparse), kind(dense), repeats, limit, CALLS)
        for (name, limit), kind in zip(limits.items(), (forward, both), strict=True)
    ]


def step_pairs(repeats: int) -> list[Pair]:
    """Time ``optimizer.step()`` of many layers with nothing due, in each phase."""
    pairs = []
    for phase, method in {
        "dense phase": {"preset": "fst", "warmup": 10**6, "dense_tail": 0.0, "refresh_every": 10**6},
        "sparse phase, decay and packing": {"preset": "fst", "warmup": 0.0, "dense_tail": 0.0, "refresh_every": 10**6},
        "frozen phase, masks and packing": {"preset": "asp_one_shot", "prune_at": 0},
    }.items():
        steps, passes = {}, {}
        for kind in ("sparse", "dense"):
            shapes = [SHAPES[number % len(SHAPES)] for number in range(LAYERS)]
            model = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            if kind == "sparse":
                SparseTraining(model, optimizer, method, 10**7, backend=StandIn.name, watch_dense=False, verbose=False)
            steps[kind], passes[kind] = optimizer.step, _passes(model, optimizer)

        def prepare(passes: Sequence[Callable[[], None]] = tuple(passes.values())) -> None:
            for both in passes:
                both()

        name = f"step of {LAYERS} layers, {phase}"
        pairs.append(taken_in_turn(name, steps["sparse"], steps["dense"], repeats, "1.5 ms over", prepare=prepare))
    return pairs


def _passes(model: nn.ModuleList, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a call that gives every weight a gradient, at another address than the last, and uses both operands."""
    rows = {
        layer: torch.randn(WIDTH, layer.in_features, requires_grad=True)
        for layer in model
        if isinstance(layer, nn.Linear)
    }

    def both() -> None:
        optimizer.zero_grad()
        for layer, tokens in rows.items():
            layer(tokens).sum().backward()

    return both


def masked_pairs(repeats: int) -> list[Pair]:
    """Time a forward and backward of the ``masked`` backend, with a weight as it was and one written before."""
    outputs, inputs, tokens = MASKED
    dense, sparse = nn.Linear(inputs, outputs), _sparse(nn.Linear(inputs, outputs), "masked")
    rows, gradient = torch.randn(tokens, inputs, requires_grad=True), torch.randn(tokens, outputs)

    def call(layer: nn.Module, run: Callable[[Tensor], Tensor], written: bool) -> Callable[[], object]:
        def both() -> None:
            if written:
                torch.autograd.graph.increment_version(layer.weight)
            run(rows).backward(gradient)

        return both

    what = f"masked {outputs}x{inputs}, {tokens} tokens, forward and backward"
    return [
        taken_in_turn(what, call(sparse, sparse, False), call(dense, dense, False), repeats, "1.1x"),
        taken_in_turn(f"{what}, new weight", call(sparse, sparse, True), call(dense, dense, True), repeats, "-"),
    ]


def taken_in_turn(
    name: str,
    sparse: Callable[[], object],
    dense: Callable[[], object],
    repeats: int,
    limit: str,
    calls: int = 1,
    prepare: Callable[[], None] = lambda: None,
) -> Pair:
    """Time both in turn, the one first that was second before; ``prepare`` comes before each, not timed."""
    pair = Pair(name, [], [], limit)
    sides = [(sparse, pair.sparse), (dense, pair.dense)]
    for function, _ in sides * 3:
        prepare()
        function()
    gc.collect()
    gc.disable()
    try:
        for number in range(repeats):
            for function, samples in sides if number % 2 else sides[::-1]:
                prepare()
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                samples.append(1e6 * (time.perf_counter() - start) / calls)
    finally:
        gc.enable()
    return pair


def _sparse(layer: nn.Linear, backend: str) -> nn.Module:
    sparse = to_sparse_(layer, "sparse", Execution(backend))
    sparse.set_codes_(search_tiles(sparse.weight.detach(), True))
    return sparse


def _print(pairs: Sequence[Pair], repeats: int) -> None:
    table = Table(
        "what",
        "dense µs",
        "sparse µs",
        "over µs",
        "ratio",
        "goal",
        title=f"host time on {torch.get_num_threads()} threads, medians of {repeats} pairs; {STAND_IN}, no launches",
    )
    for pair in pairs:
        medians = [statistics.median(values) for values in (pair.dense, pair.sparse, pair.over, pair.ratio)]
        table.add_row(pair.name, *(f"{value:.1f}" for value in medians[:3]), f"{medians[3]:.2f}x", pair.limit)
    Console(width=140).print(table)


def _rows(pair: Pair) -> list[dict[str, object]]:
    common = {"kernel_name": "host", "x_name": "what", "x_value": pair.name}
    kinds = {
        "sparse": ("time", "us", pair.sparse),
        "dense": ("time", "us", pair.dense),
        "sparse over dense": ("difference", "us", pair.over),
        "sparse to dense": ("ratio", "x", pair.ratio),
    }
    return [
        {**common, "kernel_provider": name, "metric_name": metric, "metric_unit": unit, **quantile_cells(values)}
        for name, (metric, unit, values) in kinds.items()
    ]
