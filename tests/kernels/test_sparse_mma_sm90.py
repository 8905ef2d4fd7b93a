"""Metadata in the orders of CUTLASS on compute capability 9.0, multiplied by ``wgmma.sp`` as CUTLASS loads them."""

import pytest
import torch
from sparse_mma import fragment_d_of_wgmma, wgmma_sp
from torch import Tensor

from sparsetrain.kernels.metadata_order import Order, metadata_places
from sparsetrain.kernels.pack import search_and_pack
from sparsetrain.kernels.tile_codes.reference import unpack_codes

ROWS, COLUMNS, TOKENS = 128, 256, 8


def registers(ordered: Tensor, blocks: int, top: int, block: int) -> Tensor:
    """A thread's register: of an atom of 64 rows × 32·blocks columns, it has one 32-bit word for each block in a run.

    Threads follow each other by groupID, then by threadID_in_group % 2, then by warp.
    """
    atom = (block // blocks) * (ROWS // 64) + top // 64
    thread = torch.arange(128)
    warp, group, parity = thread // 32, thread % 32 // 4, thread % 2
    run = (warp * 2 + parity) * 8 + group
    return ordered.view(torch.int32).view(-1, 128 // 2, blocks)[atom, run, block % blocks]


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_orders_of_9_0_multiply_right(blocks: int) -> None:
    order = Order[f"CUTLASS_SM90_{blocks}"]
    weight = torch.randint(1, 9, (ROWS, COLUMNS)) * (torch.randint(0, 2, (ROWS, COLUMNS)) * 2.0 - 1)
    right = torch.randint(-8, 9, (COLUMNS, TOKENS)).float()
    codes, values, meta, *_ = search_and_pack(weight, torch.bfloat16)
    places = metadata_places(ROWS, COLUMNS, order, torch.device("cpu"))
    ordered = torch.zeros(meta.numel(), dtype=torch.int16).scatter_(0, places.flatten(), meta.flatten())

    def product(given: Tensor, read_as: int) -> Tensor:
        result = torch.full((ROWS, TOKENS), float("nan"))
        rows, columns = fragment_d_of_wgmma(TOKENS)
        for top in range(0, ROWS, 64):
            sums = torch.zeros(128, TOKENS // 2)
            for block in range(COLUMNS // 32):
                a, b = values[top : top + 64, 16 * block :][:, :16], right[32 * block :][:32].bfloat16()
                sums = wgmma_sp(a, b, sums, registers(given, read_as, top, block), 0)
            result[top + rows, columns] = sums
        return result

    exact = (weight * unpack_codes(codes)) @ right
    assert torch.equal(product(ordered, blocks), exact)
    assert not torch.equal(product(meta.flatten(), blocks), exact)
    assert not any(torch.equal(product(ordered, other), exact) for other in {1, 2, 4} - {blocks})
