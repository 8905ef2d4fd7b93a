"""A block of the TileLang kernel, its index expressions taken from CUDA source, on emulated sparse tensor cores."""

import importlib.metadata
import importlib.util

import pytest
import torch
from tilelang_source import CAPABILITIES, Expressions, expressions, recorded, run_warpgroups, run_warps
from torch import Tensor

from sparsetrain.backends.experimental.tilelang import KernelKey, cuda_source, tiles_for
from sparsetrain.kernels.pack import search_and_pack
from sparsetrain.kernels.tile_codes.reference import unpack_codes

installed = pytest.mark.skipif(importlib.util.find_spec("tilelang") is None, reason="needs tilelang")
TILES = [(capability, str(tile)) for capability in CAPABILITIES for tile in tiles_for(256, 8192, capability, 99)]
COLUMNS = 384  # three steps of 128, or six of 64


def sizes(tile: str) -> tuple[int, int, int]:
    rows, tokens, columns = map(int, tile.split("x"))
    return rows, tokens, columns


def is_right(capability: tuple[int, int], tile: str, found: Expressions, wave: int = 0) -> bool:
    """Whether a block multiplies exactly, with all operands small integers."""
    rows, tokens, deep = sizes(tile)
    columns, tokens = (COLUMNS, tokens) if capability[0] == 9 else (deep, 8)
    weight = torch.randint(1, 9, (rows, columns)) * (torch.randint(0, 2, (rows, columns)) * 2.0 - 1)
    x = torch.randint(-2, 3, (tokens, columns)).float()
    codes, values, meta, *_ = search_and_pack(weight, torch.bfloat16)
    operands = sizes(tile), values, meta, x.bfloat16()
    result: Tensor = run_warpgroups(found, *operands, wave) if capability[0] == 9 else run_warps(found, *operands)
    exact = x.double() @ (weight * unpack_codes(codes)).double().t()
    return torch.equal(result, exact.to(result.dtype))


@pytest.mark.parametrize(("capability", "tile"), TILES, ids=str)
def test_recorded_expressions_multiply_natural_order_right(capability: tuple[int, int], tile: str) -> None:
    assert is_right(capability, tile, recorded()[".".join(map(str, capability))][tile])


@pytest.mark.parametrize("tile", [tile for capability, tile in TILES if capability == (9, 0)])
def test_later_tiles_of_a_block_count_stages_on(tile: str) -> None:
    assert is_right((9, 0), tile, recorded()["9.0"][tile], wave=3)


def test_every_tile_is_recorded() -> None:
    assert [
        (capability, tile) for capability in CAPABILITIES for tile in recorded()[".".join(map(str, capability))]
    ] == TILES


@pytest.mark.parametrize(
    ("capability", "name", "old", "new"),
    [
        ((9, 0), "metadata_from", "(thread & 1)", "((thread >> 1) & 1)"),  # the other pair of lanes
        ((9, 0), "metadata_from", "(j * 64)", "((1 - j) * 64)"),  # rows 8 apart, swapped
        ((9, 0), "metadata_from", "(ki * 2)", "0"),
        ((9, 0), "product_a", "(ki * 32)", "(ki * 16)"),
        ((9, 0), "y_tile_to", "(thread & 3) >> 1", "thread & 0"),  # the swizzle
        ((9, 0), "y_tile_from0", "(i * 8)", "((i * 8) + 2)"),
        ((8, 0), "metadata_from", "(thread & 1)", "((thread >> 1) & 1)"),
        ((8, 0), "metadata_from", "(j * 64)", "((1 - j) * 64)"),
    ],
)
def test_a_wrong_expression_is_seen(capability: tuple[int, int], name: str, old: str, new: str) -> None:
    # the selector is none of them: either pair of lanes holds the metadata
    tile = "64x128x128"
    found = recorded()[".".join(map(str, capability))][tile]
    assert old in found[name]
    wrong = found | {name: found[name].replace(old, new)}
    assert not is_right(capability, tile, wrong)


@installed
@pytest.mark.parametrize(("capability", "tile"), TILES, ids=str)
def test_the_installed_source_multiplies_natural_order_right(capability: tuple[int, int], tile: str) -> None:
    (chosen,) = (each for each in tiles_for(256, 8192, capability, 99) if str(each) == tile)
    found = expressions(cuda_source(KernelKey(256, COLUMNS, "bfloat16", chosen, capability)))
    if importlib.metadata.version("tilelang") == recorded()["version"]:
        assert found == recorded()[".".join(map(str, capability))][tile]
    assert is_right(capability, tile, found)


@installed
def test_a_source_of_another_form_is_said_to_be_one() -> None:
    with pytest.raises(ValueError, match="the source has no expression for values"):
        expressions("tl::mma_sp_sync<>(sums)")
