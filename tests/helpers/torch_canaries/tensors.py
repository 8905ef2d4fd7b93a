"""Canaries: tensors, and operators on lists of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .registry import canary


def of(number: float) -> list[torch.Tensor]:
    return [torch.tensor(number)]


FOREACH: dict[str, tuple[Callable[[], tuple[Any, ...]], float]] = {
    "_foreach_add": (lambda: (of(3.0), of(2.0)), 5.0),
    "_foreach_add_": (lambda: (of(3.0), [2]), 5.0),
    "_foreach_addcdiv_": (lambda: (of(3.0), of(4.0), of(2.0), [-1.0]), 1.0),
    "_foreach_div_": (lambda: (of(3.0), 2.0), 1.5),
    "_foreach_lerp_": (lambda: (of(3.0), of(5.0), 0.25), 3.5),
    "_foreach_mul_": (lambda: (of(3.0), of(2.0)), 6.0),
    "_foreach_neg": (lambda: (of(3.0),), -3.0),
    "_foreach_pow": (lambda: (2.0, of(3.0)), 8.0),
    "_foreach_sqrt_": (lambda: (of(9.0),), 3.0),
    "_foreach_sub_": (lambda: (of(3.0), 1), 2.0),
}
"""Arguments and the result of each."""


@canary(
    "_storage_address",
    "torch._C._storage_address(tensor) is one number for each storage, for views and for empty ones too",
    "torch/csrc/Module.cpp, THPModule_storageAddress, or Tensor.untyped_storage()._cdata",
    "stamp_of and the registry of operands, so packed weights would be stale or never used again",
)
def _() -> None:
    address, memory = torch._C._storage_address, bytearray(16)  # type: ignore[attr-defined]
    one, other = (torch.frombuffer(memory, dtype=torch.float32) for _ in range(2))
    assert one.data_ptr() == other.data_ptr()
    assert address(one) == address(one[1:]) == address(one.detach()) != address(other)
    assert len({address(empty) for empty in [torch.empty(0), torch.empty(0)]}) == 2
    before = address(one)
    one.data = other
    assert address(one) == address(other) != before


@canary(
    "_version",
    "Tensor._version counts the writes to a tensor and its views, and not those through .data",
    "torch/csrc/autograd/python_variable.cpp and torch.autograd.graph.increment_version",
    "stamp_of, KeptWeight and Renewal, so products would take masked weights of before a write",
)
def _() -> None:
    weight = nn.Parameter(torch.zeros(4))
    versions = [weight._version]
    for write in (weight.detach().add_, weight.detach()[1:].mul_, weight.data.add_):
        write(1)
        versions.append(weight._version)
    assert versions == [0, 1, 2, 2]


def check_foreach(name: str) -> None:
    make, expected = FOREACH[name]
    arguments = make()
    result = getattr(torch, name)(*arguments)
    assert (arguments[0] if name.endswith("_") else result)[0].item() == expected


for each in FOREACH:
    canary(
        each,
        f"torch.{each} does to tensors of a list what the operator of its name does to one",
        "torch/optim/adam.py, _multi_tensor_adam, which uses them too",
        "the update with frozen second moments, or tables of pointers while a CUDA graph is captured",
    )(lambda name=each: check_foreach(name))


@canary(
    "_unsafe_view",
    "torch.ops.aten._unsafe_view gives the numbers another shape, and autograd does not take it for a view",
    "aten/src/ATen/native/TensorShape.cpp, _unsafe_view, which Linear.cpp uses",
    "nothing but peace: FSDP2 would warn of outputs of packed products that are views",
)
def _() -> None:
    matrix = torch.arange(8.0, requires_grad=True) * 1
    found = torch.ops.aten._unsafe_view(matrix, (2, 4))
    assert torch.equal(found, matrix.view(2, 4))
    assert not found._is_view()
    assert matrix.view(2, 4)._is_view()
