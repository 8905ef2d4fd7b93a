"""What tests on a GPU compare and allow; ``test_gpu_checks.py`` shows on a CPU that each of them can fail."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetrain.kernels.layouts import LearnedLayout
from sparsetrain.matmul.masked_matmul import _multiply

WORKSPACE = 64 << 20
"""Bytes that a library may want beside its operands."""


def assert_same_gradients(found: list[Tensor], expected: list[Tensor]) -> None:
    """Outputs and gradients in float64, which TF32 does not touch, are those of the CPU but for the order of sums."""
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.dtype == torch.float64, f"{theirs.dtype} may be multiplied in TF32: compare in float64"
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-9, atol=1e-9)


def places_that_differ(ours: Tensor, theirs: Tensor, shape: tuple[int, int], table: LearnedLayout) -> int:
    """Count the values and units of metadata in which two compressed buffers differ, padding aside.

    Args:
        ours: Buffer of 16-bit elements, values first.
        theirs: The vendor's, whose padding nobody wrote; it may be longer.
        shape: ``[R, C]`` of the matrix.
        table: Where what lies behind the values; -1 is padding.
    """
    kept = shape[0] * shape[1] // 2
    end = kept + table.source.numel() * table.unit_bits // 16
    mine, other = (buffer.flatten()[:end].view(torch.int16) for buffer in (ours, theirs))
    differing = units(mine[kept:], table.unit_bits) != units(other[kept:], table.unit_bits)
    return int((mine[:kept] != other[:kept]).sum()) + int((differing & (table.source >= 0)).sum())


def units(words: Tensor, bits: int) -> Tensor:
    """Take words of 16 bits apart into units, the lowest first."""
    shifts = torch.arange(0, 16, bits, device=words.device)
    return ((words.long()[:, None] >> shifts) & ((1 << bits) - 1)).flatten()


def most_bytes(output: Tensor, input: Tensor, workspace: int = WORKSPACE, outputs: int = 1) -> int:
    """Return what a forward may allocate: its output and a workspace, but no copy of its input.

    Args:
        output: What it returns.
        input: What it is given.
        workspace: Bytes that the library may want.
        outputs: Two, if the library's output has to be transposed.

    Raises:
        ValueError: If the input is so small that a copy of it would pass for workspace.
    """
    copy = input.numel() * input.element_size()
    if copy < 2 * workspace:
        raise ValueError(f"input takes {copy} bytes: a copy of it shows beside {workspace} only if it is twice that.")
    return outputs * output.numel() * output.element_size() + workspace


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Return how many bytes a call has allocated at most, beyond what there was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        most: int = torch.cuda.max_memory_allocated(device) - before
        return most
    seen = _Allocations()
    with seen:
        call()
    return seen.peak


class _Allocations(TorchDispatchMode):
    """Follows the storages that torch's operations make, those of a masked product too, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.sparsetrain.masked_matmul.default:
            with self:  # what is inside of an operator is not dispatched to a mode
                return _multiply(*args, **(kwargs or {}))
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if _storage(tensor) not in given:
                storage = tensor.untyped_storage()
                self._living[_storage(tensor)] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self._living = {key: entry for key, entry in self._living.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def captured(step: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """Return what a step returns, and a call that does it again: a CUDA graph, or on a CPU the step itself."""
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step()
        return output, graph.replay
    output = step().detach()

    def replay() -> None:
        output.copy_(step().detach())

    return output, replay
