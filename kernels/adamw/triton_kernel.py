"""AdamW, masked decay and packing in one pass, as a Triton kernel over several weights."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import (
    load_code,
    nibbles_of,
    rounded,
    split_columns,
    tensor_pointer,
    tiles_of_program,
)
from ..launch import interpreted, on_device_of
from ..masked_update.reference import SEED as KEY
from ..masked_update.triton_kernel import rounded_at_random
from ..pack.sides import Side
from ..pack.triton_sides import TRITON, groups_of_equal_sides, side_arguments, store_sides
from ..plan import are_aligned
from ..pointer_tables import members, table
from .reference import RULES, Factors

# one program: rows and columns in tiles, warps; with two tiles a thread, registers last for twelve warps and more
BOTH = (16, 16, 4)
ALONE = (4, 64, 4)  # without the transpose
SEED = tl.constexpr(KEY)


def update_in_place(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    codes: Sequence[Tensor], side: Side | None, side_t: Side | None, numbers: Sequence[int], sums: Factors, rule: str,
    decay: float, zeros: bool, maximize: bool, clock: int,
) -> None:  # fmt: skip
    """Update weights and moments, and pack the weights; tensors of equal layout share one launch.

    Args:
        weights: float32 or bfloat16 ``[O, I]`` each, columns contiguous, rows at any stride; changed.
        gradients: The same shapes and dtypes; rows at any stride.
        exp_avgs: The same; changed.
        exp_avg_sqs: The same, with the strides of ``exp_avgs``; changed.
        codes: int16 ``[O/4, I/4]`` each, contiguous.
        side: Targets of W, overwritten; or None.
        side_t: The same of Wᵀ; values of both sides have one dtype.
        numbers: Of the layers, one each: the counter of the random numbers that round a decay in 16 bits.
        sums: Of the step.
        rule: One of :data:`.reference.RULES`.
        decay: What the rule adds times pruned weights.
        zeros: Write zeros into what is pruned of the weights.
        maximize: Follow gradients upwards.
        clock: The counter's other word.
    """
    lists = [weights, gradients, exp_avgs, exp_avg_sqs, codes]
    for group in groups_of_equal_sides(lists, side, side_t):
        own = [[column[i] for i in group] for column in lists]
        first, second = (None if given is None else given.of(group) for given in (side, side_t))
        _launch(own, first, second, [numbers[i] for i in group], sums, rule, decay, zeros, maximize, clock)


def _launch(
    lists: Sequence[Sequence[Tensor]], side: Side | None, side_t: Side | None, numbers: Sequence[int], sums: Factors,
    rule: str, decay: float, zeros: bool, maximize: bool, clock: int,
) -> None:  # fmt: skip
    (weight, gradient, moment, _, codes), packed = (column[0] for column in lists), side or side_t
    tile_rows, tile_columns = codes.shape
    outputs, arguments = side_arguments(side, side_t, lists[4])
    rows, columns, warps = ALONE if side_t is None else BOTH
    grid = (triton.cdiv(tile_rows, rows) * triton.cdiv(tile_columns, columns), len(numbers))
    with on_device_of(weight):
        adamw_kernel[grid](
            *(entry for column in lists for entry in members(column)), *arguments,
            table(tuple(numbers), weight.device), clock & 0xFFFFFFFF, *map(float, sums), float(decay), tile_rows,
            tile_columns, triton.cdiv(tile_rows, 4), triton.cdiv(tile_columns, 4), weight.stride(0),
            gradient.stride(0), moment.stride(0), DTYPE=TRITON[packed.values[0].dtype if packed else weight.dtype],
            RULE=RULES.index("decay_weight" if rule == "shrink_weight" else rule),  # one sum, with another factor
            ZEROS=zeros, MAXIMIZE=maximize, FROM_END=sums.share >= 0.5,
            FORWARD=side is not None, TRANSPOSED=side_t is not None, ORDER=int(side.orders[0]) if side else 0,
            ORDER_T=int(side_t.orders[0]) if side_t else 0, ALIGNED=are_aligned(*lists, *outputs),
            EMULATE_ROUNDING=interpreted(), ROWS=rows, COLUMNS=columns, num_warps=warps,
            enable_fp_fusion=False,  # the reference rounds products
        )  # fmt: skip


@triton.jit(do_not_specialize=["clock"])
def adamw_kernel(
    weight_base, weight_offsets, gradient_base, gradient_offsets, average_base, average_offsets, square_base,
    square_offsets, code_base, code_offsets, values_base, values_offsets, meta_base, meta_offsets, table_base,
    table_offsets, values_t_base, values_t_offsets, meta_t_base, meta_t_offsets, table_t_base, table_t_offsets, numbers,
    clock, shrink, share, fading, square_share, correction, epsilon, step_size, decay, tile_rows, tile_columns,
    word_rows, word_columns, weight_stride, gradient_stride, moment_stride, DTYPE: tl.constexpr, RULE: tl.constexpr,
    ZEROS: tl.constexpr, MAXIMIZE: tl.constexpr, FROM_END: tl.constexpr, FORWARD: tl.constexpr,
    TRANSPOSED: tl.constexpr, ORDER: tl.constexpr, ORDER_T: tl.constexpr, ALIGNED: tl.constexpr,
    EMULATE_ROUNDING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Update ROWS × COLUMNS tiles of the program's weight, a row of the tiles at a time.

    W is packed if FORWARD, Wᵀ if TRANSPOSED, metadata in ORDER and ORDER_T.
    """
    tensor = tl.program_id(1)
    top, left, row, column = tiles_of_program(tile_columns, ROWS, COLUMNS)
    element = left * 4 + tl.arange(0, 4 * COLUMNS)[None, :]
    within = (row < tile_rows) & (element < tile_columns * 4)  # [ROWS, 4·COLUMNS] entries of one row of every tile
    codes = tensor_pointer(code_base, code_offsets, tensor, ALIGNED)
    if (RULE != 0) or ZEROS:
        kept = load_code(codes + row * tile_columns + element // 4, within) >> (element % 4)
    else:
        kept = tl.full((ROWS, 4 * COLUMNS), 0, tl.int32)
    weights = tensor_pointer(weight_base, weight_offsets, tensor, ALIGNED) + row * 4 * weight_stride + element
    gradients = tensor_pointer(gradient_base, gradient_offsets, tensor, ALIGNED) + row * 4 * gradient_stride + element
    averages = tensor_pointer(average_base, average_offsets, tensor, ALIGNED) + row * 4 * moment_stride + element
    squares = tensor_pointer(square_base, square_offsets, tensor, ALIGNED) + row * 4 * moment_stride + element
    pointers, strides = (weights, gradients, averages, squares), (weight_stride, gradient_stride, moment_stride)
    sums = (shrink, share, fading, square_share, correction, epsilon, step_size, decay)
    if (RULE == 1 or RULE == 2) and weights.dtype.element_ty != tl.float32:
        place = (row * (4 * tile_columns) + element).to(tl.uint32)
        number = tl.load(numbers + tensor).to(tl.uint32)
        above = (kept >> 16).to(tl.uint32)  # zeros, which have every thread draw for its own entries
        draws = tl.philox(SEED, place, number, tl.cast(clock, tl.uint32), above)
    else:
        draws = (kept, kept, kept, kept)  # not read
    row_a = updated(0, pointers, strides, kept, within, draws, sums, RULE, ZEROS, MAXIMIZE, FROM_END, EMULATE_ROUNDING)
    row_b = updated(1, pointers, strides, kept, within, draws, sums, RULE, ZEROS, MAXIMIZE, FROM_END, EMULATE_ROUNDING)
    row_c = updated(2, pointers, strides, kept, within, draws, sums, RULE, ZEROS, MAXIMIZE, FROM_END, EMULATE_ROUNDING)
    row_d = updated(3, pointers, strides, kept, within, draws, sums, RULE, ZEROS, MAXIMIZE, FROM_END, EMULATE_ROUNDING)
    if FORWARD or TRANSPOSED:
        inside = (row < tile_rows) & (column < tile_columns)
        a, b, c, d = nibbles_of(load_code(codes + row * tile_columns + column, inside))
        a0, a1, a2, a3 = split_columns(row_a, ROWS, COLUMNS)  # [ROWS, COLUMNS] each
        b0, b1, b2, b3 = split_columns(row_b, ROWS, COLUMNS)
        c0, c1, c2, c3 = split_columns(row_c, ROWS, COLUMNS)
        d0, d1, d2, d3 = split_columns(row_d, ROWS, COLUMNS)
        store_sides(
            (a, b, c, d), ((a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3)),
            (values_base, values_offsets, meta_base, meta_offsets, table_base, table_offsets),
            (values_t_base, values_t_offsets, meta_t_base, meta_t_offsets, table_t_base, table_t_offsets),
            tensor, top, left, tile_rows, tile_columns, word_rows, word_columns, FORWARD, TRANSPOSED, ORDER, ORDER_T,
            DTYPE, ALIGNED, EMULATE_ROUNDING, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def updated(
    line: tl.constexpr, pointers, strides, kept, within, draws, sums, RULE: tl.constexpr, ZEROS: tl.constexpr,
    MAXIMIZE: tl.constexpr, FROM_END: tl.constexpr, EMULATE_ROUNDING: tl.constexpr,
):  # fmt: skip
    """Update a row of each tile in memory, and return its weights in float32; rounded after every sum, as torch's."""
    weight_stride, gradient_stride, moment_stride = strides
    weights, gradients = pointers[0] + line * weight_stride, pointers[1] + line * gradient_stride
    averages, squares = pointers[2] + line * moment_stride, pointers[3] + line * moment_stride
    shrink, share, fading, square_share, correction, epsilon, step_size, decay = sums
    weight = tl.load(weights, mask=within, other=0.0).to(tl.float32)
    gradient = tl.load(gradients, mask=within, other=0.0).to(tl.float32)
    average = tl.load(averages, mask=within, other=0.0).to(tl.float32)
    square = tl.load(squares, mask=within, other=0.0).to(tl.float32)
    own = (kept >> (4 * line)) & 1
    if RULE == 1:
        total = gradient + tl.where(own != 0, 0.0, weight) * decay
        gradient = at_random(total, draws[line], weights.dtype.element_ty)
    elif RULE == 2:
        total = weight + tl.where(own != 0, 0.0, weight) * decay
        weight = at_random(total, draws[line], weights.dtype.element_ty)
    elif RULE == 3:
        gradient = tl.where(own != 0, gradient, 0.0)
    if MAXIMIZE:
        gradient = -gradient
    weight = narrowed(weight * shrink, weights.dtype.element_ty, EMULATE_ROUNDING)
    average = gradient - (gradient - average) * (1.0 - share) if FROM_END else average + share * (gradient - average)
    average = narrowed(average, weights.dtype.element_ty, EMULATE_ROUNDING)
    square = narrowed(square * fading, weights.dtype.element_ty, EMULATE_ROUNDING)
    square = narrowed(square + square_share * gradient * gradient, weights.dtype.element_ty, EMULATE_ROUNDING)
    divisor = narrowed(tl.sqrt_rn(square), weights.dtype.element_ty, EMULATE_ROUNDING)
    divisor = narrowed(tl.div_rn(divisor, correction), weights.dtype.element_ty, EMULATE_ROUNDING)
    divisor = narrowed(divisor + epsilon, weights.dtype.element_ty, EMULATE_ROUNDING)
    weight = narrowed(weight + tl.div_rn(step_size * average, divisor), weights.dtype.element_ty, EMULATE_ROUNDING)
    if ZEROS:
        weight = tl.where(own != 0, weight, 0.0)
    tl.store(weights, rounded(weight, weights.dtype.element_ty, EMULATE_ROUNDING), mask=within)
    tl.store(averages, rounded(average, weights.dtype.element_ty, EMULATE_ROUNDING), mask=within)
    tl.store(squares, rounded(square, weights.dtype.element_ty, EMULATE_ROUNDING), mask=within)
    return weight


@triton.jit
def at_random(total, draw, DTYPE: tl.constexpr):
    """Float32 sums in DTYPE; 16 bits are rounded by a word of Philox for each, four of a tile's column at a time."""
    if DTYPE == tl.float32:
        return total
    else:
        return rounded_at_random(total, draw >> 16, DTYPE).to(tl.float32)


@triton.jit
def narrowed(value, DTYPE: tl.constexpr, EMULATE_ROUNDING: tl.constexpr):
    """A float32 value rounded to DTYPE, in float32."""
    if DTYPE == tl.float32:
        return value
    else:
        return rounded(value, DTYPE, EMULATE_ROUNDING).to(tl.float32)
