"""The barriers of the TileLang kernel for 9.0: nothing is overwritten while it is read, and nobody waits for ever."""

import importlib.metadata
import importlib.util
import inspect
from types import ModuleType

import pytest
from tilelang_pipeline import Block, PipelineError, events_in_source, events_of, orders
from tilelang_source import expressions, recorded, statements

from sparsetrain.backends.experimental.tilelang import KernelKey, Tile, cuda_source, hopper, tiles_for

installed = pytest.mark.skipif(importlib.util.find_spec("tilelang") is None, reason="needs tilelang")
HOPPER = (9, 0)
TILES = tiles_for(256, 8192, HOPPER, 99)


def run(key: KernelKey, tokens: int, program: ModuleType = hopper, seeds: int = 2) -> None:
    """Run all blocks in several orders: every tile is written once."""
    rows, columns = range(0, key.rows, key.tile.rows), range(0, tokens, key.tile.tokens)
    blocks = min(key.multiprocessors, len(rows) * len(columns))
    for order in orders(seeds):
        written = []
        for block in range(blocks):
            written += Block(key, lambda warp, block=block: events_of(program, key, tokens, block, warp)).run(order)
        assert sorted(written) == [(token, row) for token in columns for row in rows]


def changed(*changes: tuple[str, str]) -> ModuleType:
    """Return the program with parts of its source replaced."""
    source = inspect.getsource(hopper)
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = ModuleType(hopper.__name__)
    module.__package__ = hopper.__package__
    exec(compile(source, "changed hopper.py", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("stages", [2, 3, 4, 5])
@pytest.mark.parametrize("columns", [64, 128])
def test_no_stage_is_overwritten_while_it_is_read(monkeypatch: pytest.MonkeyPatch, columns: int, stages: int) -> None:
    monkeypatch.setattr(Tile, "stages", lambda self, capability: stages)
    for steps in range(1, 21):
        if steps * columns % 128 == 0:
            run(
                KernelKey(64, steps * columns, "bfloat16", Tile(64, 128, columns), HOPPER, multiprocessors=1),
                300,
                seeds=1,
            )


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_all_blocks_write_every_tile(tile: Tile) -> None:
    run(KernelKey(768, 256, "bfloat16", tile, HOPPER, multiprocessors=3), 700, seeds=0)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "tokens", "multiprocessors"), [(256, 1, 132), (256, 257, 1), (4352, 1300, 7)])
def test_every_tile_is_written_once(tile: Tile, rows: int, tokens: int, multiprocessors: int) -> None:
    # 4352 rows are two panels and a rest
    key = KernelKey(rows, 128, "bfloat16", tile, HOPPER, multiprocessors=multiprocessors)
    expected = [(token, row) for token in range(0, tokens, tile.tokens) for row in range(0, rows, tile.rows)]
    written = [
        event[1:]
        for block in range(min(multiprocessors, len(expected)))
        for event in events_of(hopper, key, tokens, block, 1)[0]
        if event[0] == "store"
    ]
    assert sorted(written) == expected


def test_blocks_that_run_together_share_what_they_read() -> None:
    key = KernelKey(16384, 128, "bfloat16", Tile(128, 256, 64), HOPPER)
    first = [events_of(hopper, key, 4096, block, 1)[0] for block in range(key.multiprocessors)]
    corners = [next(event[1:] for event in events if event[0] == "store") for events in first]
    assert len({row for _, row in corners}) == 16  # a panel
    assert len({token for token, _ in corners}) == 9  # 132 tiles of it


SKIP = "(lambda *_, **__: None)("


def in_source(tile: Tile, listed: list[list[str]], found: dict[str, str], columns: int, seeds: int = 4) -> None:
    """Run the first block of a kernel with 256 rows of A for three waves, as its CUDA source says."""
    key = KernelKey(256, columns, "bfloat16", tile, HOPPER)
    tokens = 2 * key.multiprocessors // (256 // tile.rows) * tile.tokens + 1
    for order in orders(seeds):
        block = Block(key, lambda warp: events_in_source(listed, found, key, tokens, warp))
        assert len(block.barriers) == 2 * tile.stages(HOPPER)
        assert sorted(block.run(order)) == [(wave, 1000 + wave) for wave in range(3)]


def without(listed: list[list[str]], name: str, which: int = 0) -> list[list[str]]:
    """Return the statements without one of a name."""
    place = [at for at, (kind, *_) in enumerate(listed) if kind == name][which]
    return listed[:place] + listed[place + 1 :]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_recorded_source_gives_back_what_is_read(tile: Tile) -> None:
    listed, found = recorded()["statements"][str(tile)], recorded()["9.0"][str(tile)]
    in_source(tile, listed, found, 384)
    kinds = [kind for kind, *_ in listed]
    assert ["write output", "stmatrix_m8n8_x4_trans"] in listed
    assert kinds.count("write output") == 1  # and nothing writes it two bytes at a time
    drained = [at for at, kind in enumerate(kinds) if kind == "drain"]
    assert [listed[at][1] for at in drained] == ["1", "0"]
    assert kinds.index("read sums") > kinds.index("fence sums", drained[-1]) > drained[-1]


@pytest.mark.parametrize(
    ("name", "which", "message"),
    [
        ("drain", 0, "overwritten"),
        ("drain", 1, "overwritten|sums are"),
        ("fence sums", 2, "sums are"),
        ("arrive", 1, "nobody can go on"),
        ("arrive", 2, "nobody can go on"),
        ("stored", 0, "overwritten while it is stored"),
        ("fence output", 0, "before a fence"),
        ("meet some", 2, "before everybody"),
    ],
)
def test_a_wrong_source_is_seen(name: str, which: int, message: str) -> None:
    tile = TILES[0]
    listed, found = recorded()["statements"][str(tile)], recorded()["9.0"][str(tile)]
    with pytest.raises(PipelineError, match=message):
        in_source(tile, without(listed, name, which), found, 384, 40)


@installed
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_installed_source_gives_back_what_is_read(tile: Tile) -> None:
    for columns in (128, 256, 384, 1280):
        source = cuda_source(KernelKey(256, columns, "bfloat16", tile, HOPPER))
        in_source(tile, statements(source), expressions(source), columns)
        if (columns, importlib.metadata.version("tilelang")) == (384, recorded()["version"]):
            assert statements(source) == recorded()["statements"][str(tile)]


WAIT, RELEASE = "tl.wait_wgmma(1)", "tl.barrier_arrive(empty[(at - 1) % stages])"
LAST = "tl.barrier_arrive(empty[(wave * steps + steps - 1) % stages])"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # what gemm_sp with wg_wait=1 comes to: the stage that was just issued is given back
        ([("if step > 0", "if True"), (RELEASE, RELEASE.replace("(at - 1)", "at")), (LAST, "pass")], "overwritten"),
        ([(WAIT, "tl.wait_wgmma(2)")], "overwritten"),
        ([(WAIT, "pass")], "overwritten"),
        ([("tl.wait_wgmma(0)", "pass")], "overwritten|sums are read"),
        ([("tl.warpgroup_fence_operand(", SKIP)], "sums are read"),
        ([("at // stages % 2 ^ 1", "at // stages % 2")], "nobody can go on"),
        ([("tl.barrier_wait(empty[", SKIP + "empty[")], "overwritten|more arrive"),
        ([("tl.barrier_wait(full[", SKIP + "full[")], "before they have arrived|not what is multiplied"),
        ([(LAST, "pass")], "nobody can go on"),
        ([("[threads // 32]", "[threads // 32 - 1]")], "overwritten|more arrive"),
        ([("at // kept % slots, :, step", "at // kept % 2, :, step")], "before they have arrived|not what"),
        ([("tl.tma_store_wait(0)  # of the tile before", "pass")], "overwritten while it is stored"),
        ([("tl.fence_proxy_async()", "pass")], "before a fence"),
        ([("tl.fence_proxy_async()\n                    tl.sync_threads(WRITING_BARRIER, threads)",
           "tl.fence_proxy_async()")], "before everybody has written|before a fence"),
        ([("# of the tile before\n                    tl.sync_threads(WRITING_BARRIER, threads)", "")],
         "overwritten while it is stored"),
        ([("first + tl.truncmod(within", "0 * first + tl.truncmod(within")], "written once"),
    ],
)  # fmt: skip
def test_a_wrong_program_is_seen(changes: list[tuple[str, str]], message: str) -> None:
    program = changed(*changes)
    key = KernelKey(4352, 512, "bfloat16", Tile(256, 128, 64), HOPPER, multiprocessors=3)
    if message == "written once":
        with pytest.raises(AssertionError):
            run(key, 200, program, seeds=4)
    else:
        with pytest.raises(PipelineError, match=message):
            run(key, 200, program, seeds=40)


def test_metadata_of_two_steps_takes_a_slot_more(monkeypatch: pytest.MonkeyPatch) -> None:
    key = KernelKey(256, 1024, "bfloat16", Tile(256, 128, 64), HOPPER, multiprocessors=1)
    assert key.tile.stages(HOPPER) == 4
    assert key.tile.metadata_slots(4) == 3
    monkeypatch.setattr(Tile, "metadata_slots", lambda self, stages: stages // 2)
    with pytest.raises(PipelineError, match=r"meta of slot . are overwritten"):
        run(key, 128)
