"""Masked decay and re-masking as Triton kernels: several tensors at a time, no mask in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import load_code, tensor_pointer
from ..dtypes import HALF_DTYPES
from ..launch import Known, Launch, launch
from ..plan import Group, Plan, groups_of_equal_layout
from .reference import SEED as KEY

BLOCK = (1, 256)  # tiles of one program: rows, columns
WARPS = 4
SEED = tl.constexpr(KEY)


@dataclass(frozen=True)
class Settings:
    """What a launch is told of its tensors' layout."""

    grid: tuple[int, int]
    tiles: tuple[int, int]
    strides: tuple[int, int]
    at_random: bool


def plan_of(targets: Sequence[Tensor], weights: Sequence[Tensor], codes: Sequence[Tensor]) -> Plan[Settings]:
    """Return the launches of targets, weights and codes; tensors of equal layout share one."""
    groups = []
    for positions in groups_of_equal_layout(targets, weights, codes):
        target, weight, code = (column[positions[0]] for column in (targets, weights, codes))
        rows, columns = code.shape
        blocks = -(-rows // BLOCK[0]) * -(-columns // BLOCK[1])
        settings = Settings(
            (blocks, len(positions)), (rows, columns), (target.stride(0), weight.stride(0)), target.dtype in HALF_DTYPES
        )
        groups.append(Group(positions, [one.element_size() for one in (target, weight, code)], settings))
    return Plan(groups)


def decay_in_place(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], codes: Sequence[Tensor], decay: Tensor,
    numbers: Sequence[int], clock: int, plan: Plan[Settings] | None = None, known: Known | None = None,
) -> None:  # fmt: skip
    """Add ``decay * (1 - mask) * weight`` to gradients; tensors of equal layout share one launch.

    Args:
        gradients: ``[O, I]`` each, columns contiguous, rows at any stride; changed.
        weights: The same shapes; any strides of rows.
        codes: int16 ``[O/4, I/4]`` each, contiguous.
        decay: float32, one element, on their device.
        numbers: Of the layers, one each: the counter of the random numbers that round 16-bit gradients.
        clock: Its other word.
        plan: Of these layouts; None to make one.
        known: Of these columns; None to look where they are.
    """
    plan, columns = plan or plan_of(gradients, weights, codes), (gradients, weights, codes)
    launch(_launches(plan, columns, decay, numbers, clock, known), None, gradients[0])  # the decay is another


def mask_in_place(
    tensors: Sequence[Tensor], codes: Sequence[Tensor], plan: Plan[Settings] | None = None, known: Known | None = None
) -> None:
    """Write zeros into pruned entries; tensors of equal layout share one launch.

    Args:
        tensors: ``[O, I]`` each, columns contiguous, rows at any stride; changed.
        codes: int16 ``[O/4, I/4]`` each, contiguous.
        plan: Of these layouts, the tensors being the weights too; None to make one.
        known: Of these columns; None to look where they are.
    """
    plan, columns = plan or plan_of(tensors, tensors, codes), (tensors, tensors, codes)
    launch(_launches(plan, columns, None, [0] * len(tensors), 0, known), known, tensors[0])


def _launches(
    plan: Plan[Settings], columns: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], decay: Tensor | None,
    numbers: Sequence[int], clock: int, known: Known | None,
) -> Iterator[Launch]:  # fmt: skip
    counters = plan.numbered(numbers, columns[0])
    for own, (group, offsets, aligned) in zip(counters, plan.placed(columns, known), strict=True):
        target, weight, code = [column[group.first] for column in columns]
        settings = group.settings
        arguments = (
            target, offsets[0], weight, offsets[1], code, offsets[2], code if decay is None else decay, own,
            clock & 0xFFFFFFFF, *settings.tiles, *settings.strides,
        )  # fmt: skip
        options = {
            "ADD": decay is not None, "AT_RANDOM": settings.at_random, "ALIGNED": all(aligned), "ROWS": BLOCK[0],
            "COLUMNS": BLOCK[1], "num_warps": WARPS,
            "enable_fp_fusion": False,  # the reference rounds the product
        }  # fmt: skip
        yield Launch(masked_update_kernel, settings.grid, arguments, options)


@triton.jit
def rounded_at_random(value, draw, DTYPE: tl.constexpr):
    """A float32 value in a 16-bit DTYPE, up or down by 16 random bits; the interpreter's bfloat16 is made of bits."""
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    if DTYPE == tl.bfloat16:
        high = tl.where(finite, bits + draw, tl.where(value == value, bits, 0x7FC00000)) >> 16
        return high.to(tl.int16).to(DTYPE, bitcast=True)
    else:
        rounded = ((bits + (draw >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        steps = tl.where(finite, tl.abs(value), 0.0) * 16777216.0  # of subnormal numbers, exact
        below = tl.floor(steps)
        small = (below + tl.where((steps - below) * 65536.0 > draw.to(tl.float32), 1.0, 0.0)) * 5.9604644775390625e-08
        rounded = tl.where(steps < 1024.0, tl.where(bits >> 31 != 0, -small, small), rounded)
        return tl.where(finite, rounded, value).to(DTYPE)


@triton.jit(do_not_specialize=["clock"])
def masked_update_kernel(
    target_base, target_offsets, weight_base, weight_offsets, code_base, code_offsets, decay, numbers, clock, tile_rows,
    tile_columns, target_stride, weight_stride, ADD: tl.constexpr, AT_RANDOM: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Update ROWS × COLUMNS tiles of the program's target: add the masked decay if ADD, else zero what is pruned.

    Every entry is a thread's own, and so is its copy of its tile's code. AT_RANDOM sums are rounded by a word of Philox
    for each entry, four of a column of a tile at a time.
    """
    tensor = tl.program_id(1)
    blocks = tl.cdiv(tile_columns, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    element = (tl.program_id(0) % blocks) * (4 * COLUMNS) + tl.arange(0, 4 * COLUMNS)[None, :]
    within = (row < tile_rows) & (element < tile_columns * 4)  # [ROWS, 4·COLUMNS] entries of one row of every tile
    codes = tensor_pointer(code_base, code_offsets, tensor, ALIGNED) + row * tile_columns + (element >> 2)
    bits = load_code(codes, within) >> (element & 3)  # bit 4·line says whether the entry of a line is kept
    targets = tensor_pointer(target_base, target_offsets, tensor, ALIGNED) + row * 4 * target_stride + element
    weights = tensor_pointer(weight_base, weight_offsets, tensor, ALIGNED) + row * 4 * weight_stride + element
    if ADD:
        factor = tl.load(decay)
        if AT_RANDOM:
            place = (row * (4 * tile_columns) + element).to(tl.uint32)
            number = tl.load(numbers + tensor).to(tl.uint32)
            above = (bits >> 16).to(tl.uint32)  # zeros, which have every thread draw for its own entries
            r0, r1, r2, r3 = tl.philox(SEED, place, number, tl.cast(clock, tl.uint32), above)
    for line in tl.static_range(4):
        target = tl.load(targets + line * target_stride, mask=within, other=0.0)
        pruned = ((bits >> (4 * line)) & 1) == 0
        if ADD:
            weight = tl.load(weights + line * weight_stride, mask=within, other=0.0).to(tl.float32)
            result = target.to(tl.float32) + tl.where(pruned, weight, 0.0) * factor
            if AT_RANDOM:
                draw = r0 if line == 0 else r1 if line == 1 else r2 if line == 2 else r3
                result = rounded_at_random(result, draw >> 16, target.dtype)
        else:
            result = tl.where(pruned, tl.zeros_like(target), target)
        tl.store(targets + line * target_stride, result.to(target.dtype), mask=within)
