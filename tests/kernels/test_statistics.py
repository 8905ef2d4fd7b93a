"""Statistics by the kernel and on a CPU against sums over plain masks."""

from collections.abc import Callable

import pytest
import torch
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels.statistics import cpu, operator, reference
from sparsetrain.kernels.statistics.triton_kernel import partial_sums
from sparsetrain.kernels.tile_codes import pack_codes

SHAPES = [(4, 4), (12, 20), (36, 1036)]


def random_codes(shape: tuple[int, int]) -> Tensor:
    return torch.randint(-(2**15), 2**15, (shape[0] // 4, shape[1] // 4)).to(torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize("compare", [False, True])
def test_kernel_and_cpu_sum_what_plain_masks_sum(
    dtype: torch.dtype, nonfinite: bool, compare: bool, margins: Margins
) -> None:
    torch.manual_seed(0)
    weights, codes, previous, wanted = [], [], [], []
    for shape in [*SHAPES, SHAPES[0]]:
        weight = torch.randn(shape).to(dtype)
        if nonfinite:
            weight[torch.rand(shape) < 0.1] = float("nan")
            weight[torch.rand(shape) < 0.1] = -float("inf")
        weights.append(weight)
        codes.append(random_codes(shape))
        previous.append(random_codes(shape))
        wanted.append(reference.measure(weight, codes[-1], previous[-1] if compare else None))
    found = operator.tile_statistics(weights, codes, previous if compare else [])
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-6, atol=0)
    on_device = [[margins.of(tensor) for tensor in column] for column in (weights, codes, previous)]
    found = margins.empty(4, 6, dtype=torch.float64)
    partial_sums(on_device[0], on_device[1], on_device[2] if compare else [], found)
    torch.testing.assert_close(found.cpu(), torch.stack(wanted), rtol=1e-5, atol=0)
    assert torch.equal(found[:, 2:].cpu(), torch.stack(wanted)[:, 2:])


def test_large_sums_of_16_bit_weights_do_not_overflow() -> None:
    weight = torch.full((512, 512), 6e4, dtype=torch.float16)
    codes = pack_codes(torch.ones(512, 512, dtype=torch.bool))
    assert cpu.measure(weight, codes)[0].item() == pytest.approx(512 * 512 * weight[0, 0].item())


def test_views_are_measured_in_place(kernel_device: str, margins: Margins) -> None:
    storage = torch.randn(40, 100, device=kernel_device)
    codes = random_codes((36, 64)).to(kernel_device)
    for view in (storage[1:37, 3:67], storage[2:38, 8:72]):
        found = margins.empty(1, 6, dtype=torch.float64)
        partial_sums([view], [codes], [], found)
        wanted = reference.measure(view.cpu(), codes.cpu())[None]
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        operator.tile_statistics([view.t()], [codes.t().contiguous()], []).cpu()[0, 4:], wanted[0, 4:]
    )


def test_the_operator_passes_opcheck(kernel_device: str) -> None:
    weight, codes = torch.randn(12, 20, device=kernel_device), random_codes((12, 20)).to(kernel_device)
    for weights in ([weight], [weight, weight.double()]):
        torch.library.opcheck(operator.tile_statistics, (weights, [codes] * len(weights), []))
        torch.library.opcheck(operator.tile_statistics, (weights, [codes] * len(weights), [codes] * len(weights)))
    assert operator.tile_statistics([weight[:0]], [codes[:0]], []).tolist() == [[0.0] * 6]


CODES = torch.zeros(1, 1, dtype=torch.int16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: operator.tile_statistics([], [], []), "have 0, 0 and 0 entries"),
        (lambda: operator.tile_statistics([torch.zeros(4, 6)], [CODES], []), r"weights\[0\] is torch.float32 \(4, 6\)"),
        (lambda: operator.tile_statistics([torch.zeros(4, 8)], [CODES], []), r"codes\[0\] is torch.int16 \(1, 1\)"),
        (
            lambda: operator.tile_statistics([torch.zeros(4, 4)], [CODES], [CODES.int()]),
            r"previous\[0\] is torch.int32",
        ),
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
