"""Operators run their kernels on CPU tensors, in Triton's interpreter, with a hook on its launcher."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.interpreter import GridExecutor

from sparsetrain.kernels.mask_search import operator as mask_search
from sparsetrain.kernels.masked_update import operator as masked_update
from sparsetrain.kernels.pack import operator as pack
from sparsetrain.kernels.statistics import operator as statistics
from sparsetrain.kernels.wire import number_operator as numbers
from sparsetrain.kernels.wire import operator as wire
from sparsetrain.kernels.wire import pack_operator as pack_wires

OPERATORS = {
    "search_tiles_": mask_search.search_tiles_,
    "add_masked_decays_": masked_update.add_masked_decays_,
    "apply_masks_": masked_update.apply_masks_,
    "pack_tiles_": pack.pack_tiles_,
    "search_and_pack_": pack.search_and_pack_,
    "tile_statistics": statistics.tile_statistics,
    "codes_of_numbers": numbers.codes_of_numbers,
    "numbers_of_codes": numbers.numbers_of_codes,
    "to_wire_": wire.to_wire_,
    "from_wire_": wire.from_wire_,
    "pack_wires_": pack_wires.pack_wires_,
}


@dataclass
class Launches:
    """What was launched: names of kernels, and their arguments by keyword."""

    names: list[str] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)

    def clear(self) -> None:
        self.names.clear()
        self.arguments.clear()


@contextmanager
def kernels_on_cpu(run: bool = True) -> Iterator[Launches]:
    """Take kernels for CPU tensors too and count every launch; without ``run`` they are counted alone."""
    launches, launch = Launches(), GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.names.append(self.fn.__name__)
        launches.arguments.append(kwargs)
        if run:
            launch(self, *args, **kwargs)

    library = torch.library.Library("sparsetrain", "IMPL")  # type: ignore[no-untyped-call]
    for name, operator in OPERATORS.items():
        library.impl(name, operator._backend_fns["cuda"], "CPU")  # type: ignore[no-untyped-call]
    try:
        with patch.object(GridExecutor, "__call__", counted):
            yield launches
    finally:
        library._destroy()  # type: ignore[no-untyped-call]
