"""``WireOperands``: what backends multiply by, made of a weight that came packed over the wire."""

import torch
from torch import Tensor

from ..backends import Backend, Operand
from ..backends.packing import fill_from_wire_
from ..dispatch import Product

Key = tuple[str, torch.dtype]
"""Backend, dtype of the product."""


class WireOperands:
    """The operands that backends read, made of a wire when a product first asks for them after each gathering.

    Args:
        memory: Gets the operands' tensors; who owns the list may take their memory away between two gatherings.
    """

    def __init__(self, memory: list[Tensor]) -> None:
        self._memory = memory
        self._made: dict[Key, dict[Product, Operand]] = {}
        self._filled: set[tuple[Key, Product]] = set()
        self._asked: set[tuple[Key, Product]] = set()  # since the last gathering but one

    def outdate(self) -> None:
        """Take note of a gathering: whatever is asked for has to be filled."""
        self._asked, self._filled = self._filled, set()

    def get(self, values: Tensor, numbers: Tensor, backend: Backend, product: Product, dtype: torch.dtype) -> Operand:
        """Return W, or Wᵀ for the input gradient, as the backend reads it.

        Both are filled in one launch where both were asked for after the last gathering.

        Args:
            values: Of the wire.
            numbers: Of the wire.
            backend: Which reads them.
            product: Which reads them.
            dtype: Of the product.
        """
        key = backend.name, dtype
        if backend.symmetric and product == "input_gradient":
            operand = self.get(values, numbers, backend, "forward", dtype)
            return Operand(operand.shape[::-1], (operand.tensors[0].t(),))
        if (key, product) in self._filled:
            return self._made[key][product]
        wanted: dict[Product, Operand | None] = {"forward": None, "input_gradient": None}
        for each in wanted:
            if each == product or ((key, each) in self._asked and (key, each) not in self._filled):
                wanted[each] = self._operand(values, backend, each, dtype)
                self._filled.add((key, each))
        fill_from_wire_(values, numbers, backend, dtype, wanted["forward"], wanted["input_gradient"])
        return self._made[key][product]

    def _operand(self, values: Tensor, backend: Backend, product: Product, dtype: torch.dtype) -> Operand:
        made = self._made.setdefault((backend.name, dtype), {})
        if product not in made:
            rows, columns = values.shape[0], 2 * values.shape[1]
            shape = (columns, rows) if product == "input_gradient" else (rows, columns)
            with torch.inference_mode(False):
                made[product] = backend.allocate(shape, dtype, values.device)
            self._memory.extend(made[product].tensors)
        return made[product]
