"""Grids of tokens, weights and dtypes: what ``gemm`` and ``linear`` measure one point of at a time."""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sparsetrain.dispatch import DeviceFaultError, describe_environment

from .comparison import Comparison, rows, show
from .measure import append_csv

FAULTED = 3  # exit code: a new process would leave out the algorithm that took the device from this one
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Point:
    """One problem: a weight ``[O, I]``, its dtype in products, and the rows that are multiplied by it."""

    tokens: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Shape and dtype, as in the CSV."""
        return f"{self.shape[0]}x{self.shape[1]} {str(self.dtype).removeprefix('torch.')}"

    @property
    def fewest_bytes(self) -> int:
        """Bytes that any product reads: the rows, and the kept half of the weight."""
        return self.dtype.itemsize * (self.tokens * min(self.shape) + self.shape[0] * self.shape[1] // 2)

    @property
    def flops(self) -> float:
        """Operations of one dense product."""
        return 2.0 * self.tokens * self.shape[0] * self.shape[1]


@dataclass
class Grid:
    """What to measure, and how.

    Args:
        tokens: Numbers of rows.
        shapes: Of the weights, ``(O, I)``.
        dtypes: Of the products.
        repeats: Timed calls of each provider.
        device: ``"cuda"`` or ``"cpu"``.
        csv: Where rows are appended, after every point.
        seconds: No point is begun later than this.
        micro_batches: Forward and backward passes of a step.
    """

    tokens: Sequence[int]
    shapes: Sequence[tuple[int, int]]
    dtypes: Sequence[torch.dtype]
    repeats: int
    device: str
    csv: Path | None = None
    seconds: float = float("inf")
    micro_batches: int = 1
    notes: dict[str, None] = field(default_factory=dict)

    @functools.cached_property
    def place(self) -> torch.device:
        """Where it runs."""
        return torch.device("cuda", torch.cuda.current_device()) if self.device == "cuda" else torch.device("cpu")

    @property
    def points(self) -> list[Point]:
        """Every problem."""
        return [
            Point(tokens, shape, dtype)
            for dtype, tokens, shape in itertools.product(self.dtypes, self.tokens, self.shapes)
        ]

    def note(self, text: str) -> None:
        """Print a sentence, once."""
        if text not in self.notes:
            self.notes[text] = None
            print(text, flush=True)


def why_not(command: str, device: str) -> str | None:
    """Say in one sentence why a benchmark cannot run on a device, or return None."""
    if device == "cpu" or torch.cuda.is_available():
        return None
    return (
        f"{command} needs a CUDA device and there is none here: run it on a machine with one, or give --device cpu "
        "with a small --tokens and --shape, which compares dense and masked products on the CPU."
    )


def measure_grid(command: str, grid: Grid, measure: Callable[[Point, Grid], list[Comparison]]) -> int:
    """Measure, print and store every point there is time for; returns 1 if one failed."""
    torch.manual_seed(0)
    where = describe_environment(grid.place)
    print(where if grid.device == "cuda" else f"{where}, {torch.get_num_threads()} threads", flush=True)
    start, failed, points = time.monotonic(), 0, grid.points
    for place, point in enumerate(points):
        if time.monotonic() - start > grid.seconds:
            print(
                f"{len(points) - place} of {len(points)} problems are not measured: the {grid.seconds:.0f} s are over."
            )
            break
        try:
            comparisons = measure(point, grid)
        except DeviceFaultError as error:
            print(error, flush=True)
            return FAULTED
        except (RuntimeError, ValueError) as error:
            failed += 1
            print(f"{command} of {point.name} at {point.tokens} tokens fails: {first_line(error)}", flush=True)
            continue
        show(f"{command}: {point.tokens} tokens, weight {point.name}", comparisons, grid.device)
        if grid.csv is not None:
            append_csv(grid.csv, rows(command, comparisons, point.tokens, point.name, grid.device), grid.device)
    return int(failed > 0)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its name."""
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)
