"""Plans: what the library prepares for a product, described by a key; checks before it is asked."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from .library import ALIGNMENT, DATA_TYPES, ORDERS, Library, Order


@dataclass(frozen=True)
class Algorithm:
    """Which of the library's algorithms runs a product.

    Args:
        config_id: ``0 <= config_id <`` :meth:`CuSparseLt.algorithm_count`; None lets the library choose.
        split_k: Parts into which the sum is split; the library allows 1 and -1 alone on compute capability 9.0.
        split_k_mode: ``cusparseLtSplitKMode_t``; 0 lets the library choose.

    Example:
        >>> str(Algorithm(7)), str(Algorithm(7, 2, 1)), str(Algorithm())
        ('7', '7/2/1', '')
    """

    config_id: int | None = None
    split_k: int = 1
    split_k_mode: int = 0

    def __str__(self) -> str:
        config_id = "" if self.config_id is None else str(self.config_id)
        whole = (self.split_k, self.split_k_mode) == (1, 0)
        return config_id if whole else f"{config_id}/{self.split_k}/{self.split_k_mode}"

    @classmethod
    def parse(cls, text: str) -> "Algorithm":
        """Read what ``str`` writes.

        Raises:
            ValueError: If the text is neither ``""``, ``"id"`` nor ``"id/split_k/split_k_mode"``.

        Example:
            >>> Algorithm.parse("7/2/1")
            Algorithm(config_id=7, split_k=2, split_k_mode=1)
        """
        first, *rest = text.split("/")
        try:
            if len(rest) not in (0, 2):
                raise ValueError
            return cls(int(first) if first else None, *map(int, rest))
        except ValueError:
            raise ValueError(
                f"algorithm is {text!r}: it must be '' for the library's choice, an id such as '7', or "
                "'id/split_k/split_k_mode' such as '7/2/1'."
            ) from None


DEFAULT_ALGORITHM = Algorithm()
"""The library's own choice."""


@dataclass(frozen=True)
class PlanKey:
    """Everything a plan depends on: ``D [rows, n] = A [rows, columns] · B [columns, n] + bias``.

    ``bias`` is an address, or 0 for none: the library keeps it inside the plan. :meth:`CuSparseLt.key` makes one.
    """

    rows: int
    columns: int
    n: int
    dtype: torch.dtype
    dense_order: Order
    dense_leading: int
    output_order: Order
    output_leading: int
    bias: int
    algorithm: Algorithm


@dataclass(frozen=True, slots=True)
class Closable:
    """What holds structs of the library."""

    resources: ExitStack

    def close(self) -> None:
        """Destroy the structs, the last one made first."""
        self.resources.close()


@dataclass(frozen=True, slots=True)
class Plan(Closable):
    """A plan with what a call needs beside it."""

    plan: int
    workspace: int  # bytes
    elements: int  # of the compressed matrix
    size: tuple[int, int]
    stride: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Matrix(Closable):
    """The description of a sparse matrix, with the sizes of its compression."""

    sparse: int
    elements: int
    buffer: int  # bytes


def describe_product(library: Library, handle: int, key: PlanKey, stack: ExitStack) -> tuple[int, int, int]:
    """Describe a product; return the structs of its sparse matrix, of itself and of the choice of an algorithm."""
    # the stack destroys in reverse: selection, product, matrices
    sparse = library.sparse_matrix(handle, key.rows, key.columns, key.columns, key.dtype)
    stack.callback(library.destroy_matrix, sparse)
    dense = library.dense_matrix(handle, key.columns, key.n, key.dense_leading, key.dtype, key.dense_order)
    stack.callback(library.destroy_matrix, dense)
    output = library.dense_matrix(handle, key.rows, key.n, key.output_leading, key.dtype, key.output_order)
    stack.callback(library.destroy_matrix, output)
    product = library.product(handle, sparse, dense, output)
    stack.callback(library.destroy_product, product)
    kept = []
    if key.bias:
        kept.append(library.set_bias(handle, product, key.bias))
    selection = library.selection(handle, product)
    stack.callback(library.destroy_selection, selection)
    algorithm = key.algorithm
    if algorithm.config_id is not None:
        kept.append(library.set_algorithm(handle, selection, "CONFIG_ID", algorithm.config_id))
    if algorithm.split_k != 1:
        kept.append(library.set_algorithm(handle, selection, "SPLIT_K", algorithm.split_k))
    if algorithm.split_k_mode != 0:
        kept.append(library.set_algorithm(handle, selection, "SPLIT_K_MODE", algorithm.split_k_mode))
    stack.callback(kept.clear)
    return sparse, product, selection


def count_algorithms(library: Library, handle: int, key: PlanKey) -> int:
    """Return how many values ``config_id`` may have for a product."""
    with ExitStack() as stack:
        _, _, selection = describe_product(library, handle, key, stack)
        return library.algorithm_count(handle, selection)


def build_plan(library: Library, handle: int, key: PlanKey) -> Plan:
    """Make a plan."""
    try:
        with ExitStack() as stack:
            sparse, product, selection = describe_product(library, handle, key, stack)
            plan = library.plan(handle, product, selection)
            stack.callback(library.destroy_plan, plan)
            elements, _ = _elements(library, handle, sparse, key.dtype)
            size = (key.rows, key.n)
            stride = (key.output_leading, 1) if key.output_order == "rows" else (1, key.output_leading)
            workspace = library.workspace_size(handle, plan)
            return Plan(stack.pop_all(), plan, workspace, elements, size, stride)
    except Exception as error:
        raise RuntimeError(f"cuSPARSELt refuses {key}: {error}.") from error


def describe_matrix(library: Library, handle: int, token: tuple[int, int, int, torch.dtype]) -> Matrix:
    """Describe a sparse matrix ``(rows, columns, leading, dtype)``."""
    try:
        with ExitStack() as stack:
            sparse = library.sparse_matrix(handle, *token)
            stack.callback(library.destroy_matrix, sparse)
            elements, buffer = _elements(library, handle, sparse, token[-1])
            return Matrix(stack.pop_all(), sparse, elements, buffer)
    except Exception as error:
        raise RuntimeError(f"cuSPARSELt refuses a matrix with (rows, columns, ld, dtype) {token}: {error}.") from error


def _elements(library: Library, handle: int, sparse: int, dtype: torch.dtype) -> tuple[int, int]:
    size, buffer = library.compressed_size(handle, sparse)
    return -(-size // dtype.itemsize), buffer


def plan_key(
    shape: tuple[int, int],
    dense: Tensor,
    bias: int,
    output: Order,
    algorithm: Algorithm,
) -> PlanKey:
    """Return the key of a product, or raise ``ValueError`` if an operand does not fit."""
    rows, columns = shape
    check_shape(shape, dense.dtype)
    if dense.dim() != 2 or dense.shape[0] != columns or dense.shape[1] < 8 or dense.shape[1] % 8:
        raise ValueError(
            f"dense is {tuple(dense.shape)}: it must be [{columns}, N] with N a positive multiple of 8; pad it."
        )
    n, (row_stride, column_stride) = dense.shape[1], dense.stride()
    order: Order = "rows" if column_stride == 1 else "columns"
    leading, least = (row_stride, n) if order == "rows" else (column_stride, columns)
    if 1 not in (row_stride, column_stride) or leading < least or leading % 8:
        raise ValueError(
            f"dense has strides {dense.stride()}: its rows or its columns must be contiguous and lie a multiple of 8 "
            "elements apart, without overlap; copy it with .contiguous()."
        )
    if output not in ORDERS:
        raise ValueError(f"output is {output!r}: it must be one of {sorted(ORDERS)}.")
    output_leading = n if output == "rows" else rows
    return PlanKey(rows, columns, n, dense.dtype, order, leading, output, output_leading, bias, algorithm)


def check_shape(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Raise ``ValueError`` if the library has no sparse matrix of that shape and dtype."""
    if dtype not in DATA_TYPES:
        raise ValueError(f"dtype is {dtype}: it must be float16 or bfloat16; cast with .to(torch.bfloat16).")
    if len(shape) != 2 or any(size < 16 or size % 16 for size in shape):
        raise ValueError(f"shape is {tuple(shape)}: it must be two positive multiples of 16; pad the matrix.")


def check_sparse(dense: Tensor) -> tuple[int, int, int]:
    """Return rows, columns and leading dimension of a matrix, or raise ``ValueError`` if it cannot be compressed."""
    check_shape(tuple(dense.shape), dense.dtype)  # type: ignore[arg-type]
    (rows, columns), (leading, inner) = dense.shape, dense.stride()
    if inner != 1 or leading < columns or leading % 16:
        raise ValueError(
            f"dense has strides {dense.stride()}: its rows must be contiguous and lie a multiple of 16 elements apart; "
            "copy it with .contiguous()."
        )
    return rows, columns, leading


def misaligned(**operands: Tensor | None) -> str:
    """Return the sentence about the first operand whose address does not fit."""
    address = {name: tensor.data_ptr() for name, tensor in operands.items() if tensor is not None}
    name = next(name for name in address if address[name] % ALIGNMENT)
    return f"{name} is at address {address[name]:#x}: it must be at a multiple of {ALIGNMENT} bytes; copy it."
