"""A sparse backend for machines without a GPU: packed operands in an order of its own, and counters."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrain.backends import Operand
from sparsetrain.kernels.pack.reference import unpack_rows


class SimulatedBackend:
    """Holds values and metadata in reversed word order; multiplies by unpacking, on a CPU.

    Algorithm ``"wrong"`` forgets a row of tokens, ``"flaky"`` returns other bits in every call, ``"broken"`` raises.
    """

    name = "simulated"
    symmetric = False

    def __init__(self, native: bool = False, algorithms: Sequence[str] = ("0",)) -> None:
        self.native = native  # metadata in natural order
        self.names = tuple(algorithms)
        self.calls: Counter[str] = Counter()
        self.refusal: str | None = None

    def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        if self.refusal is None and any(size % 16 for size in shape):
            return f"shape is {shape[0]}x{shape[1]}: simulated needs multiples of 16."
        return self.refusal

    def algorithms(
        self, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
    ) -> Sequence[str]:
        return self.names

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Operand:
        self.calls["allocate"] += 1
        values = torch.full((shape[0], shape[1] // 2), float("nan"), dtype=dtype)
        meta = torch.full((shape[0], -(-shape[1] // 16)), -1, dtype=torch.int16)
        return Operand(shape, (values, meta), values, meta if self.native else None)

    def finish_(self, operand: Operand, source: Tensor) -> None:
        self.calls["finish_"] += 1
        operand.tensors[1].copy_(source.flip(0, 1))

    def product(
        self, operand: Operand, rows: Tensor, bias: Tensor | None = None, algorithm: str = "",
        transposed_output: bool = False,
    ) -> Tensor:  # fmt: skip
        self.calls["product"] += 1
        values, meta = operand.tensors
        dense = unpack_rows(values, meta if self.native else meta.flip(0, 1))
        result = torch.nn.functional.linear(rows, dense, bias)
        if algorithm == "broken":
            raise RuntimeError("operation not supported\nsecond line")
        if algorithm == "wrong":
            result[-1] = 0
        if algorithm == "flaky":
            result = result * (1 + torch.finfo(result.dtype).eps * (self.calls["product"] % 2))
        return result.t().contiguous() if transposed_output else result
