"""What only a GPU can show: no waiting for the device, CUDA graphs, matrices beyond 2^31 entries."""

from collections.abc import Iterator

import pytest
import torch

from sparsetrain.kernels.mask_search import search_tiles, search_tiles_, search_transposable
from sparsetrain.kernels.masked_update import add_masked_decays_, apply_masks_
from sparsetrain.kernels.pack import pack_tiles_, search_and_pack, search_and_pack_
from sparsetrain.kernels.statistics import tile_statistics
from sparsetrain.kernels.wire import (
    codes_of_numbers,
    from_wire,
    from_wire_,
    numbers_of_codes,
    pack_wires_,
    to_wire,
    to_wire_,
)

pytestmark = pytest.mark.gpu

SHAPES = [(256, 512), (512, 256), (256, 512), (132, 260)]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device(no_waiting: None) -> None:
    weights = [torch.randn(shape, device="cuda") for shape in SHAPES]
    parts = [search_and_pack(weight, torch.bfloat16) for weight in weights]
    codes, *packed = ([part[place] for part in parts] for place in range(5))
    decay = torch.full((), 0.1, device="cuda")
    wires = [to_wire(weight, code, torch.bfloat16) for weight, code in zip(weights, codes, strict=True)]
    kept, numbers = ([wire[place] for wire in wires] for place in range(2))
    dense = torch.empty(SHAPES[0], dtype=torch.bfloat16, device="cuda")
    for mode in ("default", "error"):  # the first round compiles, and makes the tables of offsets
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        search_tiles_(weights, codes, magnitude=True)
        search_and_pack_(weights, codes, *packed, [])
        pack_tiles_(weights, codes, *packed, [])
        tile_statistics(weights, codes, codes)
        add_masked_decays_(weights, weights, codes, decay)
        apply_masks_(weights, codes)
        to_wire_(weights[0], codes[0], *wires[0])
        from_wire_(*wires[0], dense)
        pack_wires_(kept, numbers, *packed, [])
        assert codes_of_numbers(numbers_of_codes(codes[0])).shape == codes[0].shape


def test_wires_on_a_gpu_are_those_of_a_cpu() -> None:
    for shape in SHAPES:
        weight = torch.randn(shape)
        codes, *expected = search_and_pack(weight, torch.bfloat16)
        wire = to_wire(weight, codes, torch.bfloat16)
        found = to_wire(weight.cuda(), codes.cuda(), torch.bfloat16)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, wire, strict=True))
        assert torch.equal(from_wire(*found).cpu(), from_wire(*wire))
        targets = [[torch.empty_like(part, device="cuda")] for part in expected]
        pack_wires_([found[0]], [found[1]], *targets, [])
        assert all(torch.equal(one.cpu(), other) for (one,), other in zip(targets, expected, strict=True))


def test_a_captured_refresh_follows_the_weights() -> None:
    weights = [torch.randn(shape, device="cuda") for shape in SHAPES]
    parts = [search_and_pack(weight, torch.bfloat16) for weight in weights]
    columns = [[part[place] for part in parts] for place in range(5)]
    search_and_pack_(weights, *columns, [])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        search_and_pack_(weights, *columns, [])
    for weight in weights:
        weight.normal_()
    graph.replay()
    for position, weight in enumerate(weights):
        for column, wanted in zip(columns, search_and_pack(weight.cpu(), torch.bfloat16), strict=True):
            assert torch.equal(column[position].cpu(), wanted)


def test_addresses_beyond_two_to_the_31_entries() -> None:
    rows, columns = 66_000, 33_000  # 2.2e9 entries
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    weight = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_()
    codes, values, meta, values_t, meta_t = search_and_pack(weight, torch.bfloat16)
    last = slice(rows - 64, rows)
    corner = search_and_pack(weight[last].cpu(), torch.bfloat16)
    assert torch.equal(search_tiles(weight, True), codes)
    assert torch.equal(codes[-16:].cpu(), corner[0])
    assert torch.equal(values[last].cpu(), corner[1])
    assert torch.equal(meta[last].cpu(), corner[2])
    assert torch.equal(values_t[:, -32:].cpu(), corner[3])
    assert torch.equal(meta_t[:, -4:].cpu(), corner[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_subnormal_weights_are_ranked(dtype: torch.dtype) -> None:
    weight = (torch.randn(256, 256) * torch.finfo(dtype).tiny / 16).to(dtype)
    assert torch.equal(search_tiles(weight.cuda(), True).cpu(), search_transposable(weight, magnitude=True))
