"""A GPU's host side on a machine without one: its operators and launchers run, and nothing is computed."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from sparsetrain.backends import BACKENDS, Operand
from sparsetrain.backends.masked import MaskedBackend
from sparsetrain.kernels.mask_search.operator import search_tiles_
from sparsetrain.kernels.masked_update import operator as masked_update
from sparsetrain.kernels.pack import eager as pack
from sparsetrain.kernels.pack import pack_tiles_
from sparsetrain.kernels.statistics.operator import tile_statistics

OPERATORS = (
    masked_update.add_masked_decays_,
    masked_update.apply_masks_,
    pack_tiles_,
    search_tiles_,
    tile_statistics,
)


class StandIn(MaskedBackend):
    """A vendor's library that multiplies nothing and returns an empty output."""

    name, symmetric = "stand_in", False

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Operand:
        values = torch.zeros(shape[0], shape[1] // 2, dtype=dtype)
        meta = torch.zeros(shape[0], -(-shape[1] // 16), dtype=torch.int16)
        return Operand(shape, (values, meta), values, meta)

    def finish_(self, operand: Operand, source: Tensor) -> None:
        raise AssertionError("its metadata is natural")

    def product(
        self, operand: Operand, rows: Tensor, bias: Tensor | None = None, algorithm: str = "",
        transposed_output: bool = False,
    ) -> Tensor:  # fmt: skip
        return rows.new_zeros(rows.shape[0], operand.shape[0])


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Install it; returns the names of the kernels that are launched, as they come."""
    launches: list[str] = []

    def launch(kernel: Any, *arguments: object, **keywords: object) -> None:
        launches.append(kernel.fn.__name__)

    for kind in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(kind, "run", launch)
    monkeypatch.setitem(BACKENDS, StandIn.name, StandIn())
    for operator in OPERATORS:
        monkeypatch.setitem(operator._backend_fns, None, operator._backend_fns["cuda"])
    for module in (masked_update, pack):
        monkeypatch.setitem(module.NOW, "cpu", module.NOW["cuda"])
    return launches


WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
    "lift_fresh",
)
"""Operators that wait for a CUDA device, or copy to it what lies in pageable memory, as ``torch.tensor(...)`` does."""


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that would wait for a device; ``on_host`` are storages that a GPU's run has on the host too."""

    def __init__(self, on_host: Callable[[], set[int]] = lambda: set()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self._on_host = on_host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS and not (args and isinstance(args[0], Tensor) and args[0].data_ptr() in self._on_host()):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the methods that bring a tensor's values to the host and that no operator tells of on a CPU."""
    counts: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for name in ("cpu", "tolist", "numpy"):

            def counted(tensor: Tensor, *arguments: Any, _name: str = name, **keywords: Any) -> Any:
                counts[_name] += 1
                return REAL[_name](tensor, *arguments, **keywords)

            patch.setattr(Tensor, name, counted)
        yield counts


REAL = {name: getattr(Tensor, name) for name in ("cpu", "tolist", "numpy")}
