"""The TileLang program for compute capability 9.0: a warp loads in bulk, warpgroups multiply one step behind.

So many blocks as there are multiprocessors share all tiles, and steps are counted on from one tile to the next: the
loading warp is ahead by all stages, also while a tile is written. A stage is full when its bytes have arrived. It is
empty when every multiplying warp has said so, which it does when the products that read the stage are done: one step
later, after the products of that step were issued.
"""

from typing import Any

from .epilogue import epilogue_macro
from .tiles import LOADING_THREADS, METADATA_COLUMNS, KernelKey

PANEL_ROWS = 2048
"""Rows of A, about, that blocks walk along while they stay at the same tokens: both are then found in the L2 cache."""

LOADING_REGISTERS, MULTIPLYING_REGISTERS = 24, 240
"""Of 128 and 256 threads: together no more than a block of 384 has from the start."""

WRITING_BARRIER = 3
"""Number of the barrier between multiplying warps that share an output tile."""


def blocks(tilelang: Any, key: KernelKey) -> Any:
    """Return the function of values, metadata, tokens, bias and output that TileLang parses."""
    tl: Any = tilelang.language
    tile, dtype, columns, multiprocessors = key.tile, key.dtype, key.columns, key.multiprocessors
    high, wide, deep, threads = tile.rows, tile.tokens, tile.columns, tile.threads
    stages, steps, row_blocks = tile.stages(key.capability), columns // deep, key.rows // high
    kept, slots = tile.steps_per_metadata, tile.metadata_slots(stages)
    of_metadata, panel = METADATA_COLUMNS // 16, PANEL_ROWS // high
    trade_registers = threads == 256  # a smaller block has enough of them from the start
    finish = epilogue_macro(tl, key)
    policy = tl.GemmWarpPolicy.FullRow  # operands are read from shared memory: wide instructions read least
    of_group = high // (threads // 128)

    def holder(token, row):  # type: ignore[no-untyped-def]
        return row // of_group * 128 + row % 64 // 16 * 32 + row % 8 * 4 + token % 8 // 2

    def place(token, row):  # type: ignore[no-untyped-def]
        return row % of_group // 64 * (wide // 2) + token // 8 * 4 + row % 16 // 8 * 2 + token % 2

    # the sums of a wgmma, seen from the output: TileLang stores that layout by stmatrix
    as_summed = tilelang.layout.Fragment((wide, high), forward_thread_fn=holder, forward_index_fn=place)

    def locate(tile, token_blocks, corner):  # type: ignore[no-untyped-def]
        first = tl.alloc_var("int32")
        within = tl.alloc_var("int32")
        across = tl.alloc_var("int32")
        first = tl.truncdiv(tile, panel * token_blocks) * panel
        within = tl.truncmod(tile, panel * token_blocks)
        across = tl.min(row_blocks - first, panel)
        corner[0] = (first + tl.truncmod(within, across)) * high
        corner[1] = tl.truncdiv(within, across) * wide

    find_corner: Any = tl.macro(locate)

    def product(values, meta, x, bias, y):  # type: ignore[no-untyped-def]
        tokens = x.shape[0]
        token_blocks = tl.ceildiv(tokens, wide)
        with tl.Kernel(tl.min(row_blocks * token_blocks, multiprocessors), threads=threads + LOADING_THREADS) as block:
            value_tile = tl.alloc_shared((stages, high, deep // 2), dtype)
            meta_tile = tl.alloc_shared((slots, high, of_metadata), "int16")
            x_tile = tl.alloc_shared((stages, wide, deep), dtype)
            y_tile = tl.alloc_shared((wide, high), dtype)
            sums = tl.alloc_fragment((high, wide), "float32")
            turned = tl.alloc_fragment((wide, high), dtype)
            full = tl.alloc_barrier([32] * stages)  # threads that load
            empty = tl.alloc_barrier([threads // 32] * stages)  # warps that multiply
            corner = tl.alloc_local((2,), "int32")
            thread = tl.get_thread_binding()
            waves = tl.truncdiv(row_blocks * token_blocks - block + multiprocessors - 1, multiprocessors)
            tl.annotate_layout({turned: as_summed})
            if thread < LOADING_THREADS:
                if trade_registers:
                    tl.dec_max_nreg(LOADING_REGISTERS)
                if thread < 32:
                    for wave in tl.serial(waves):
                        find_corner(wave * multiprocessors + block, token_blocks, corner)
                        row = corner[0]
                        token = corner[1]
                        for step in tl.serial(steps):
                            at = wave * steps + step
                            tl.barrier_wait(empty[at % stages], at // stages % 2 ^ 1)
                            tl.tma_copy(
                                values[row : row + high, step * (deep // 2) : (step + 1) * (deep // 2)],
                                value_tile[at % stages, :, :],
                                barrier=full[at % stages],
                            )
                            if step % kept == 0:
                                tl.tma_copy(
                                    meta[
                                        row : row + high, step // kept * of_metadata : (step // kept + 1) * of_metadata
                                    ],
                                    meta_tile[at // kept % slots, :, :],
                                    barrier=full[at % stages],
                                )
                            tl.tma_copy(
                                x[token : token + wide, step * deep : (step + 1) * deep],
                                x_tile[at % stages, :, :],
                                barrier=full[at % stages],
                            )
                            tl.barrier_arrive(full[at % stages])
            else:
                if trade_registers:
                    tl.inc_max_nreg(MULTIPLYING_REGISTERS)
                for wave in tl.serial(waves):
                    find_corner(wave * multiprocessors + block, token_blocks, corner)
                    row = corner[0]
                    token = corner[1]
                    tl.clear(sums)
                    for step in tl.serial(steps):
                        at = wave * steps + step
                        tl.barrier_wait(full[at % stages], at // stages % 2)
                        tl.wgmma_gemm_sp(
                            value_tile[at % stages, :, :],
                            meta_tile[
                                at // kept % slots, :, step % kept * (deep // 16) : (step % kept + 1) * (deep // 16)
                            ],
                            x_tile[at % stages, :, :],
                            sums,
                            transpose_B=True,
                            policy=policy,
                        )
                        if step > 0:
                            tl.wait_wgmma(1)  # all but the products of this step
                            tl.sync_warp()
                            if tl.shuffle_elect(32):
                                tl.barrier_arrive(empty[(at - 1) % stages])
                    tl.wait_wgmma(0)
                    tl.sync_warp()
                    if tl.shuffle_elect(32):
                        tl.barrier_arrive(empty[(wave * steps + steps - 1) % stages])
                    tl.warpgroup_fence_operand(sums, num_regs=high * wide // threads)  # no sum is read earlier
                    finish(sums, bias, row)
                    for i, j in tl.Parallel(high, wide):
                        turned[j, i] = tl.cast(sums[i, j], dtype)
                    tl.tma_store_wait(0)  # of the tile before
                    tl.sync_threads(WRITING_BARRIER, threads)
                    tl.copy(turned, y_tile)
                    tl.fence_proxy_async()
                    tl.sync_threads(WRITING_BARRIER, threads)
                    tl.tma_copy(y_tile, y[token : token + wide, row : row + high])
                tl.tma_store_wait(0)

    return product
