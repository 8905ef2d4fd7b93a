"""What the machine code of the TileLang kernels uses: the committed figures, and some of them compiled again."""

import importlib.metadata
import importlib.util
import re

import pytest
from tilelang_compiled import CAPABILITIES, NOW, RECORDED, Row, figures, keys, name_of, recorded

from sparsetrain.backends.experimental.tilelang import KernelKey, Tile, hopper, kernel, tiles_for
from sparsetrain.hardware.machine import Machine
from sparsetrain.hardware.requirements import why_not

installed = pytest.mark.skipif(importlib.util.find_spec("tilelang") is None, reason="needs tilelang")
ROWS = {tuple(name_of(key).values()): key for key in keys()}
FOUND = {(row["capability"], row["tile"], row["epilogue"]): row for row in recorded() if row["kernel"] == NOW}
SHARED_KIB = {"8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227}
REGISTERS = 65536  # of a multiprocessor


def tile_of(row: Row) -> Tile:
    return Tile(*map(int, row["tile"].split("x")))


def test_every_kernel_that_is_offered_was_compiled() -> None:
    assert set(FOUND) == set(ROWS)
    for capability in CAPABILITIES:
        name = ".".join(map(str, capability))
        for rows in (128, 256, 384, 4096):
            for tokens in (1, 64, 128, 8192):
                tiles = tiles_for(rows, tokens, capability, 99)
                assert tiles, "a matrix that the requirements allow has a tile"
                assert {(name, str(tile), epilogue) for tile in tiles for epilogue in ("none", "bias+gelu")} <= set(
                    FOUND
                )


@pytest.mark.parametrize("row", FOUND.values(), ids=lambda row: f"{row['capability']} {row['tile']} {row['epilogue']}")
def test_a_kernel_keeps_to_its_limits(row: Row) -> None:
    tile, count = tile_of(row), {name: int(row[name]) for name in row if row[name].isdigit()}
    assert count["spilled_bytes"] == count["spill_loads"] == count["spill_stores"] == 0
    assert count["sparse_products"] > 0
    assert count["dense_products"] == 0
    assert 3 <= count["stages"] <= 4
    assert count["static_shared_bytes"] + count["dynamic_shared_bytes"] <= SHARED_KIB[row["capability"]] * 1024
    if row["capability"] != "9.0":
        assert count["registers"] * tile.threads <= REGISTERS
        assert count["ldgsts"] > 0
        return
    threads = tile.threads + 128
    assert count["registers"] * threads <= REGISTERS
    if tile.threads == 256:  # what warps give up is enough for what others ask for: otherwise they would wait for ever
        asked = 128 * hopper.LOADING_REGISTERS + 256 * hopper.MULTIPLYING_REGISTERS
        assert asked <= count["registers"] * threads
    assert count["products_serialized"] == 0
    assert count["bulk_loads"] >= 3
    assert count["bulk_stores"] >= 1
    assert count["stsm"] == tile.rows * tile.tokens // tile.threads // 8  # of eight sums of a thread each
    assert count["sts_16"] == count["sts_32"] == 0
    assert count["waits_for_products"] >= 2


def test_shared_memory_is_what_tiles_say() -> None:
    for place, row in FOUND.items():
        key = ROWS[place]
        stages = key.tile.stages(key.capability)
        assert int(row["stages"]) == stages
        assert int(row["dynamic_shared_bytes"]) == key.tile.shared_bytes(stages, key.capability)


def test_one_compiler_made_them_all() -> None:
    assert len({(row["tilelang"], row["nvcc"]) for row in recorded()}) == 1


def test_a_kernel_is_offered_where_requirements_allow_it() -> None:
    for capability in CAPABILITIES:
        machine = Machine(gpu="a GPU", capability=capability, torch="2.13.0", tilelang="0.1.15")
        assert why_not("tilelang", machine, "torch.bfloat16", (128, 128)) is None


@installed
@pytest.mark.parametrize(("capability", "tile"), [((9, 0), Tile(64, 128)), ((8, 9), Tile(128, 64, 64))])
def test_compiled_again_it_is_the_same(capability: tuple[int, int], tile: Tile) -> None:
    if kernel.why_not_usable() is not None:
        pytest.skip("needs nvcc")
    found = figures(KernelKey(4096, 4096, "bfloat16", tile, capability))
    row = FOUND[found["capability"], found["tile"], found["epilogue"]]
    if (found["tilelang"], found["nvcc"]) == (row["tilelang"], row["nvcc"]):
        assert found == row
    assert found["spilled_bytes"] == found["products_serialized"] == "0"
    assert importlib.metadata.version("tilelang") == found["tilelang"]


def test_the_table_in_the_documents_is_the_files() -> None:
    text = (RECORDED.parents[1] / "backends.md").read_text()
    lines = re.findall(r"^\| (\d\.\d) (earlier|now) \| (\S+) \| (.*) \|$", text, re.MULTILINE)
    assert len(lines) >= 8
    rows = {(row["capability"], row["kernel"], row["tile"]): row for row in recorded() if row["epilogue"] != "none"}
    for capability, label, tile, cells in lines:
        row = rows[capability, label, tile]
        shared = (int(row["static_shared_bytes"]) + int(row["dynamic_shared_bytes"])) / 1024
        found = ["stages", "registers", "spilled_bytes", "multiplications_per_loaded_byte", "sts_16", "stsm"]
        expected = [row[name] for name in found]
        assert cells.split(" | ") == [*expected[:3], f"{shared:.0f}", *expected[3:]]
