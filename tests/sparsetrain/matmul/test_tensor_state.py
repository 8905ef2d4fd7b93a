"""What tells a write: stamps, and fingerprints of weights that were written to without a trace."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsetrain.matmul.tensor_state import fingerprint, stamp_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "matrix": lambda dtype: torch.randn(64, 128, dtype=dtype),
    "long": lambda dtype: torch.randn(8, 4096, dtype=dtype),
    "transposed": lambda dtype: torch.randn(128, 64, dtype=dtype).t(),
    "kernels": lambda dtype: torch.randn(32, 16, 3, 3, dtype=dtype),
    "channels last": lambda dtype: torch.randn(32, 16, 3, 3, dtype=dtype).to(memory_format=torch.channels_last),
    "rows apart": lambda dtype: torch.randn(64, 200, dtype=dtype)[:, :128],
    "not at the start": lambda dtype: torch.randn(64 * 128 + 1, dtype=dtype)[1:].view(64, 128),
    "small": lambda dtype: torch.randn(4, 4, dtype=dtype),
    "empty": lambda dtype: torch.randn(0, 8, dtype=dtype),
}
WRITES: dict[str, Callable[[Tensor], object]] = {
    "first": lambda data: data.flatten()[:0] if not data.numel() else data[(0,) * data.dim()].add_(0.5),
    "last": lambda data: data[(-1,) * data.dim()].mul_(2),
    "sign": lambda data: data.neg_(),
    "a small step": lambda data: data.mul_(1.01),
    "rows that change places": lambda data: data.copy_(data.roll(1, 0)),
    "columns that change places": lambda data: data.copy_(data.roll(1, 1)),
    "columns far apart": lambda data: data.copy_(data.roll(data.shape[1] // 2, 1)),
    "two entries": lambda data: data[0].copy_(data[0].flip(0)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fingerprint_changes_with_what_is_written(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for name, write in WRITES.items():
        weight = nn.Parameter(LAYOUTS[layout](dtype))
        before, version = fingerprint(weight), weight._version
        assert torch.equal(before, fingerprint(weight))
        if weight.numel():
            write(weight.data)
            assert weight._version == version
            assert not torch.equal(before, fingerprint(weight)), name


def test_a_small_step_of_one_entry_is_seen_beside_large_ones() -> None:
    weight = torch.full((4, 1024), 1e4)
    before = fingerprint(weight)
    weight.data[0, 0] += 1e3 * torch.finfo(torch.float32).eps * 1e4
    assert not torch.equal(before, fingerprint(weight))


def test_numbers_that_are_no_numbers_are_never_the_same() -> None:
    weight = torch.ones(4, 8)
    weight[1, 2] = float("nan")
    assert not torch.equal(fingerprint(weight), fingerprint(weight))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu")])
def test_a_fingerprint_is_that_of_the_numbers_in_any_mode(mode: Callable[[], torch.autograd.grad_mode.no_grad]) -> None:
    weight = nn.Parameter(torch.randn(16, 32))
    before = fingerprint(weight)
    with mode():
        assert torch.equal(fingerprint(weight), before)


def test_a_stamp_tells_a_write_and_another_tensor() -> None:
    weight = torch.zeros(4)
    before = stamp_of(weight)
    assert stamp_of(weight) == before
    assert stamp_of(weight.clone()) != before
    assert stamp_of(weight[1:]) != before
    assert stamp_of(weight.add_(1)) != before
