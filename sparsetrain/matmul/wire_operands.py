"""``WireOperands``: what backends multiply by, made of a weight that came packed over the wire."""

import torch
from torch import Tensor

from ..backends import Backend, Operand
from ..backends.wires import WireJob, fill_from_wires_
from ..dispatch import Product
from ..kernels.torch_internals import storage_address

Key = tuple[str, torch.dtype]
"""Backend, dtype of the product."""


class WireOperands:
    """The operands that backends read, made of a wire when a product first asks for them after each gathering.

    Args:
        memory: Gets the operands' storages as bytes; who has the list may take them away between two gatherings.
    """

    def __init__(self, memory: list[Tensor]) -> None:
        self._memory = memory
        self._made: dict[Key, dict[Product, Operand]] = {}
        self._filled: set[tuple[Key, Product]] = set()
        self._asked: set[tuple[Key, Product]] = set()
        self._both: set[Key] = set()  # where both were asked for between the last two gatherings

    def outdate(self) -> None:
        """Take note of a gathering: whatever is asked for has to be filled."""
        asked = self._asked
        self._both = {key for key, product in asked if product == "forward" and (key, "input_gradient") in asked}
        self._asked, self._filled = set(), set()

    def get(self, values: Tensor, numbers: Tensor, backend: Backend, product: Product, dtype: torch.dtype) -> Operand:
        """Return W, or Wᵀ for the input gradient, as the backend reads it.

        Both are filled in one launch where both were asked for after one gathering, as of weights that stay gathered.

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
        self._asked.add((key, product))
        if (key, product) not in self._filled:
            products: tuple[Product, ...] = ("forward", "input_gradient") if key in self._both else (product,)
            own = {each: self._operand(values, backend, each, dtype) for each in products}
            sides = own.get("forward"), own.get("input_gradient")
            fill_from_wires_([WireJob(values.to(dtype), numbers, backend, *sides)])
            self._filled.update((key, each) for each in products)
        return self._made[key][product]

    def _operand(self, values: Tensor, backend: Backend, product: Product, dtype: torch.dtype) -> Operand:
        made = self._made.setdefault((backend.name, dtype), {})
        if product not in made:
            rows, columns = values.shape[0], 2 * values.shape[1]
            shape = (columns, rows) if product == "input_gradient" else (rows, columns)
            with torch.inference_mode(False):
                made[product] = backend.allocate(shape, dtype, values.device)
            storages = {storage_address(tensor): tensor.untyped_storage() for tensor in made[product].tensors}
            self._memory += [values.new_empty(0, dtype=torch.uint8).set_(each) for each in storages.values()]
        return made[product]
