"""A linear layer in training: ``nn.Linear`` under autocast against ``SparseLinear``, with its share of packing."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsetrain.backends import BACKENDS
from sparsetrain.kernels.mask_search import search_tiles
from sparsetrain.kernels.tile_codes import unpack_codes
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.layers.linear import SparseLinear
from sparsetrain.matmul.choices import describe
from sparsetrain.matmul.execution import Execution

from .comparison import Comparison, Provider, set_count, take_turns
from .grid import Grid, Point, first_line, measure_grid

TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
QUICK_TOKENS = (8192, 2048)  # every new problem is tuned before, which takes seconds
LARGEST_ERROR = 1e-2  # relative, of sums of bfloat16 products


class Layer:
    """A layer and what goes through it: rows ``[T, I]``, and gradients ``[T, O]`` of what comes out."""

    def __init__(self, layer: nn.Linear, rows: Tensor, gradient: Tensor) -> None:
        self.layer, self.gradient = layer, gradient
        self.rows = rows.detach().requires_grad_()
        self._output: Tensor | None = None

    def forward(self) -> Tensor:
        """Multiply; autocast forgets the weight it cast when a micro-batch ends, as in a training loop."""
        with torch.autocast(self.rows.device.type, self.rows.dtype):
            output: Tensor = self.layer(self.rows)
        return output

    def backward(self) -> tuple[Tensor, ...]:
        """Return the gradients of rows and weight, of one forward pass."""
        if self._output is None:
            self._output = self.forward()
        return torch.autograd.grad(self._output, (self.rows, self.layer.weight), self.gradient, retain_graph=True)

    def step(self, micro_batches: int) -> None:
        """Say that the weight was written, as an optimizer does, and accumulate the gradients of micro-batches."""
        self._output = None
        torch.autograd.graph.increment_version(self.layer.weight)
        self.layer.weight.grad = None
        for _ in range(micro_batches):
            self.rows.grad = None
            self.forward().backward(self.gradient)


def run(grid: Grid) -> int:
    """Measure a grid and return the exit code."""
    return measure_grid("linear", grid, measure)


def measure(point: Point, grid: Grid) -> list[Comparison]:
    """Time a step, a forward and a backward pass of the layer, dense and by every backend that runs here."""
    rows, columns = point.shape
    inputs = [
        tuple(torch.randn(point.tokens, size, device=grid.place, dtype=point.dtype) for size in (columns, rows))
        for _ in range(set_count(point.fewest_bytes, grid.device))
    ]
    variants = {"dense": [Layer(_dense(point, grid.place), *pair) for pair in inputs]}
    for name in ("auto", *BACKENDS):
        reason = None if name == "auto" else BACKENDS[name].why_not(grid.place, point.dtype, point.shape)
        if reason is not None:
            grid.note(f"{name} does not run here: {reason}")
            continue
        layers = [Layer(_sparse(_dense(point, grid.place), name), *pair) for pair in inputs]
        try:
            layers[0].step(1)
            reason = find_mismatch(layers[0])
        except (RuntimeError, ValueError) as error:
            reason = first_line(error)
        if reason is not None:
            print(f"{name}, {point.name}, {point.tokens} tokens, is not timed: {reason}", flush=True)
            continue
        variants[f"sparse {name}"] = layers
    step = "step" if grid.micro_batches == 1 else f"step of {grid.micro_batches} micro-batches"
    kinds: dict[str, tuple[float, Callable[[Layer], Callable[[], object]]]] = {
        step: (3 * grid.micro_batches, lambda layer: functools.partial(layer.step, grid.micro_batches)),
        "forward": (1, lambda layer: layer.forward),
        "backward": (2, lambda layer: layer.backward),
    }
    comparisons = []
    for what, (products, call) in kinds.items():
        providers = [Provider(name, list(map(call, layers))) for name, layers in variants.items()]
        comparisons.append(Comparison(what, products * point.flops, providers))
        take_turns(comparisons[-1], grid.repeats, grid.device)
    for name, layers in variants.items():
        if isinstance(layers[0].layer, SparseLinear):
            print(f"{name}, {point.name}: {describe(layers[0].layer.operands)}")
    return comparisons


def find_mismatch(layer: Layer) -> str | None:
    """Compare output and gradients with those of the masked weight in float32; return one sentence, or None."""
    sparse = layer.layer
    assert isinstance(sparse, SparseLinear)
    weight = sparse.weight.detach().masked_fill(~unpack_codes(sparse.mask_codes), 0)
    rows, gradient = layer.rows.detach().float(), layer.gradient.float()
    wanted = {
        "output": rows @ weight.t(),
        "gradient of the rows": gradient @ weight,
        "gradient of the weight": gradient.t() @ rows,
    }
    found = (layer.forward().detach(), *layer.backward())
    for (name, want), have in zip(wanted.items(), found, strict=True):
        error = float((have.float() - want).norm() / want.norm())
        if not error <= LARGEST_ERROR:
            return f"its {name} is wrong by {error:.2g}"
    return None


def _dense(point: Point, device: torch.device) -> nn.Linear:
    return nn.Linear(point.shape[1], point.shape[0], bias=False, device=device)


def _sparse(layer: nn.Linear, backend: str) -> SparseLinear:
    sparse = to_sparse_(layer, "sparse", Execution(backend))
    assert isinstance(sparse, SparseLinear)
    sparse.set_codes_(search_tiles(sparse.weight.detach(), True))
    return sparse
