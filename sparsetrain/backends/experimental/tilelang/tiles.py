"""Tiles of the TileLang kernels, the shared memory that they take, and what a compiled kernel depends on."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Epilogue: TypeAlias = Literal["relu2", "gelu"]
"""What is applied after the bias, in float32: the squared ReLU, or the exact GELU."""

EPILOGUES = ("relu2", "gelu")

FEWEST_STAGES, MOST_STAGES = 3, 4
"""With two, a stage that is given back one step late is loaded while nothing else is; more than four hide no more."""

METADATA_COLUMNS = 128
"""Columns of A whose metadata makes rows of 16 bytes, the shortest that are copied in bulk."""

FEW_TOKENS = 64
"""Tiles of so many tokens are offered for any number."""

LOADING_THREADS = 128
"""On compute capability 9.0, beside those that multiply."""

_KIB = 1024
_SHARED_MEMORY = {(8, 0): 163 * _KIB, (8, 7): 163 * _KIB, (9, 0): 227 * _KIB}
_LEAST_SHARED_MEMORY = 99 * _KIB  # of a block on any other GPU of compute capability 8.x


@dataclass(frozen=True)
class Tile:
    """What a block computes at a time.

    Args:
        rows: Of A; columns of Y.
        tokens: Rows of Y.
        columns: Of A, in one stage: 128 or 64.

    Example:
        >>> str(Tile(128, 256, 64)), Tile(128, 256, 64).threads, Tile(128, 256, 64).stages((9, 0))
        ('128x256x64', 256, 3)
    """

    rows: int
    tokens: int
    columns: int = 128

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}x{self.columns}"

    @property
    def threads(self) -> int:
        """Threads that multiply; on compute capability 9.0 there are 128 more that load."""
        return 128 if self.rows * self.tokens < 128 * 128 else 256

    @property
    def stage_bytes(self) -> int:
        """Shared memory for values, metadata and tokens of one stage."""
        return self.rows * self.columns + self.rows * self.columns // 8 + self.tokens * self.columns * 2

    @property
    def steps_per_metadata(self) -> int:
        """Steps whose metadata is loaded at once on compute capability 9.0."""
        return METADATA_COLUMNS // self.columns

    def metadata_slots(self, stages: int) -> int:
        """Return how many loads of metadata are kept on compute capability 9.0.

        A step's load waits until the step that had its stage is done. Metadata of several steps may be overwritten when
        the last of them is, which takes one slot more.
        """
        return (stages + 2 * (self.steps_per_metadata - 1)) // self.steps_per_metadata

    def shared_bytes(self, stages: int, capability: tuple[int, int]) -> int:
        """Return the shared memory of a block.

        On compute capability 9.0 the output has memory of its own, because the next tile is loaded while it is written.
        """
        output = self.rows * self.tokens * 2
        if capability[0] == 8:
            return max(stages * self.stage_bytes, output)
        metadata = self.metadata_slots(stages) * self.rows * METADATA_COLUMNS // 8
        return stages * (self.rows + self.tokens * 2) * self.columns + metadata + output

    def stages(self, capability: tuple[int, int]) -> int:
        """Return how many stages are loaded ahead of each other on a GPU, or 0 if the fewest do not fit."""
        room = _SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY) - _KIB  # barriers and alignment
        return next(
            (
                stages
                for stages in range(MOST_STAGES, FEWEST_STAGES - 1, -1)
                if self.shared_bytes(stages, capability) <= room
            ),
            0,
        )


SHAPES = ((128, 256), (256, 128), (128, 128), (128, 64), (64, 128))
"""Rows and tokens of the tiles, in the order in which they are taken without a measurement; the first on 9.0 alone.

It loads more than the second for as many products, which only pays for instructions of 256 tokens.
"""


def tiles_for(rows: int, tokens: int, capability: tuple[int, int], most: int = 4) -> tuple[Tile, ...]:
    """Return the tiles that a product with ``[R, C]`` can use, the default first.

    Args:
        rows: R, a multiple of 128.
        tokens: T.
        capability: Compute capability of the GPU.
        most: How many; each is compiled and measured once for a matrix.

    Example:
        >>> [str(tile) for tile in tiles_for(4096, 8192, (9, 0))]
        ['128x256x64', '256x128x64', '128x128x128', '128x64x128']
        >>> [str(tile) for tile in tiles_for(4096, 8192, (8, 9))]
        ['128x128x64', '128x64x64', '64x128x64']
    """
    found = []
    for high, wide in SHAPES if capability[0] == 9 else SHAPES[1:]:
        fitting = (tile for tile in (Tile(high, wide), Tile(high, wide, 64)) if tile.stages(capability))
        tile = next(fitting, None)
        if tile is not None and rows % high == 0 and wide <= max(tokens, FEW_TOKENS):
            found.append(tile)
    return tuple(found[:most])


@dataclass(frozen=True)
class KernelKey:
    """What a compiled kernel depends on.

    Args:
        rows: R.
        columns: C.
        dtype: ``"bfloat16"`` or ``"float16"``.
        tile: What a block computes.
        capability: Compute capability of the GPU.
        bias: Whether a bias is added.
        epilogue: What follows.
        multiprocessors: Of the GPU: so many blocks share all tiles on compute capability 9.0.
    """

    rows: int
    columns: int
    dtype: str
    tile: Tile
    capability: tuple[int, int]
    bias: bool = False
    epilogue: Epilogue | None = None
    multiprocessors: int = 132

    @property
    def target(self) -> dict[str, str]:
        """What TileLang compiles for."""
        major, minor = self.capability
        return {"kind": "cuda", "arch": f"sm_{major}{minor}" + ("a" if major == 9 else "")}
