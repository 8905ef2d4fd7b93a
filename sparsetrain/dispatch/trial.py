"""A trial: random data of a problem, and the products of candidates exactly as a layer computes them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import Backend, Operand
from ..backends.packing import Packed, PackJob, fill_, operand_of_packed
from ..kernels.mask_search.operator import search_tiles
from ..kernels.pack.operator import pack_tiles_
from ..kernels.tile_codes import unpack_codes
from .problem import Problem, bucket
from .verify import Multiply


class Trial:
    """Random operands of a problem, from generators of their own, so that a run's random numbers stay as they are.

    Args:
        problem: What is multiplied.
        device: Where.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        self._generator = torch.Generator(device).manual_seed(0)
        self._weight = self._random(problem.matrix, torch.float32)
        self._codes = search_tiles(self._weight, True)
        self.matrix = self._weight.to(problem.dtype).masked_fill_(~unpack_codes(self._codes), 0)
        self.bias = self._random((problem.matrix[0],), problem.dtype) if problem.bias else None
        self._held: tuple[Backend, Operand] | None = None

    def rows(self, run: int) -> Tensor:
        """Return fresh dense rows, strided as a layer's are: of the problem's own size at first, then of its bucket."""
        if self.problem.product == "weight_gradient":
            return self._random((self.problem.matrix[1], self.problem.rows), self.problem.dtype).t()
        tokens = self.problem.tokens if run == 0 else bucket(self.problem.tokens)
        return self._random((tokens, self.problem.matrix[1]), self.problem.dtype)

    def dense(self, rows: Tensor) -> Tensor:
        """Return the dense product of the same dtype."""
        return F.linear(rows, self.matrix, self.bias)

    def multiplier(self, backend: Backend, algorithm: str) -> Multiply:
        """Return the product by a backend's algorithm; what a layer does again for every product is part of it."""
        if self.problem.product == "weight_gradient":
            packed = self._packed()

            def multiply(rows: Tensor) -> Tensor:
                operand = operand_of_packed(backend, packed)
                return backend.product(operand, rows, self.bias, algorithm, transposed_output=True).t()

            return multiply
        if self._held is None or self._held[0] is not backend:
            self._held = None  # one operand at a time on the device
            operand = backend.allocate(self.problem.matrix, self.problem.dtype, self._weight.device)
            fill_([PackJob(self._weight, self._codes, backend, self.problem.dtype, operand)])
            self._held = backend, operand
        held = self._held[1]
        return lambda rows: backend.product(held, rows, self.bias, algorithm)

    def _packed(self) -> Packed:
        rows, columns = self.problem.matrix
        values = torch.empty(rows, columns // 2, dtype=self.problem.dtype, device=self._weight.device)
        meta = torch.empty(rows, columns // 16, dtype=torch.int16, device=self._weight.device)
        pack_tiles_([self._weight], [self._codes], [values], [meta], [], [], [])
        return Packed(values, meta)

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self._generator.device, generator=self._generator)
