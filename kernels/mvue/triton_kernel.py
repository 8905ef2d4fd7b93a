"""Unbiased 2:4 estimates as a Triton kernel; draws and arithmetic are those of ``reference.py``, bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import rounded_bits
from ..launch import interpreted, on_device_of

# one program: metadata words, features, warps. It reads runs of 128 bytes and writes runs of 256 and 32.
BLOCKS = {torch.float32: (16, 32, 4), torch.float16: (16, 64, 8), torch.bfloat16: (16, 64, 8)}
TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def estimate_into(
    gradient: Tensor, counter: Tensor, seed: int, layer: int, estimator: str, values: Tensor, meta: Tensor
) -> None:
    """Estimate a gradient into packed operands.

    Args:
        gradient: float32, float16 or bfloat16 ``[T, O]``, features contiguous, rows at any stride; T a multiple of 4.
        counter: int64 ``[2]``, contiguous: clock and micro-batch.
        seed: The key of the random numbers.
        layer: Their second counter word.
        estimator: ``"exact"`` or ``"two_draw"``.
        values: The gradient's dtype, ``[O, T/2]``, contiguous; overwritten.
        meta: int16 ``[O, ceil(T/16)]``, contiguous; overwritten.
    """
    tokens, features = gradient.shape
    words, columns, warps = BLOCKS[gradient.dtype]
    grid = (triton.cdiv(meta.shape[1], words) * triton.cdiv(features, columns),)
    with on_device_of(gradient):
        mvue_kernel[grid](
            gradient, counter, values, meta, seed, layer, tokens // 4, meta.shape[1],
            features, gradient.stride(0), DTYPE=TRITON[gradient.dtype], EXACT=estimator == "exact",
            EMULATE_ROUNDING=interpreted(), WORDS=words, FEATURES=columns, num_warps=warps,
            enable_fp_fusion=False,  # the reference rounds every product
        )  # fmt: skip


@triton.jit
def least(x, y):
    """The smaller, or NaN."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, y):
    """The larger, or NaN."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def uniform(bits):
    """float32 in (0, 1) from the upper 23 bits, by way of [1, 2)."""
    return ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375


@triton.jit
def signed(magnitude, entry):
    """The magnitude with the sign of an entry."""
    bits = magnitude.to(tl.int32, bitcast=True) & 0x7FFFFFFF | (entry.to(tl.int32, bitcast=True) & -2147483648)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def draw_exact(x0, x1, x2, x3, u, SHIFT: tl.constexpr):
    """Two of four with inclusion probabilities ``min(|x|, limit) / half``: first, last, nibble at bit SHIFT."""
    a0, a1, a2, a3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    high, high_last = largest(a0, a1), largest(a2, a3)
    rest = (least(a0, a1) + least(a2, a3)) + least(high, high_last)
    top = largest(high, high_last)
    scale = least(rest, (rest + top) * 0.5)
    limit = tl.where(rest == 0, top, rest)
    half = least(tl.where(rest == 0, top, scale), 3.4028234663852886e38)  # an infinity less itself would be NaN
    end0 = least(a0, limit)
    end1 = end0 + least(a1, limit)
    end2 = end1 + least(a2, limit)
    start = u * half
    # every comparison next to its uses: a thread has few predicates
    past = end0 < start
    first, low = tl.where(past, x1, x0), tl.where(past, 1 << SHIFT, 0)
    past = end1 < start
    first, low = tl.where(past, x2, first), tl.where(past, 2 << SHIFT, low)
    # one half further, and behind the first whatever is rounded
    past = tl.minimum(end1 - half, end0) < start
    last, high = tl.where(past, x2, x1), tl.where(past, 8 << SHIFT, 4 << SHIFT)
    past = tl.minimum(end2 - half, end1) < start
    last, high = tl.where(past, x3, last), tl.where(past, 12 << SHIFT, high)
    nibble = low | high
    return signed(largest(tl.abs(first), scale), first), signed(largest(tl.abs(last), scale), last), nibble


@triton.jit
def pick(a0, a1, a2, a3, u):
    """The position of four, drawn in proportion to the magnitudes."""
    end1 = a0 + a1
    end2 = end1 + a2
    point = u * (end2 + a3)
    return tl.where(end2 < point, 3, tl.where(end1 < point, 2, tl.where(a0 < point, 1, 0)))


@triton.jit
def others(x0, x1, x2, x3):
    """The sums of the other three."""
    pair, last_pair = x0 + x1, x2 + x3
    return x1 + last_pair, x0 + last_pair, x3 + pair, x2 + pair


@triton.jit
def select(index, x0, x1, x2, x3):
    """One of four."""
    return tl.where(index >= 2, tl.where(index == 3, x3, x2), tl.where(index == 1, x1, x0))


@triton.jit
def draw_two(x0, x1, x2, x3, u, v, SHIFT: tl.constexpr):
    """Two of four by two draws without replacement: first, last, nibble at bit SHIFT."""
    a0, a1, a2, a3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    one = pick(a0, a1, a2, a3, u)
    left0, left1 = tl.where(one == 0, 0.0, a0), tl.where(one == 1, 0.0, a1)
    left2, left3 = tl.where(one == 2, 0.0, a2), tl.where(one == 3, 0.0, a3)
    two = pick(left0, left1, left2, left3, v)
    two = tl.where(two == one, (one + 1) & 3, two)
    low, high = tl.minimum(one, two), tl.maximum(one, two)
    total = ((a0 + a1) + a2) + a3
    t0, t1, t2, t3 = others(a0, a1, a2, a3)
    w0, w1, w2, w3 = others(tl.div_rn(a0, t0), tl.div_rn(a1, t1), tl.div_rn(a2, t2), tl.div_rn(a3, t3))
    first, last = select(low, x0, x1, x2, x3), select(high, x0, x1, x2, x3)
    scale = tl.div_rn(total, select(low, w0, w1, w2, w3) + 1.0)
    scale_last = tl.div_rn(total, select(high, w0, w1, w2, w3) + 1.0)
    # a product, so that a group with NaN has NaN where its zeros are kept
    first = tl.where(first == 0, first * total, signed(scale, first))
    last = tl.where(last == 0, last * total, signed(scale_last, last))
    return first, last, (low | (high << 2)) << SHIFT


@triton.jit
def estimate_four(pointers, stride, inside, bits, more_bits, SHIFT: tl.constexpr, EXACT: tl.constexpr,
                  DTYPE: tl.constexpr, EMULATE_ROUNDING: tl.constexpr):  # fmt: skip
    """Four tokens of every feature to a pair of values ``[FEATURES, WORDS, 2]`` and a nibble ``[WORDS, FEATURES]``."""
    x0 = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(pointers + stride, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(pointers + 2 * stride, mask=inside, other=0.0).to(tl.float32)
    x3 = tl.load(pointers + 3 * stride, mask=inside, other=0.0).to(tl.float32)
    if EXACT:
        first, last, nibble = draw_exact(x0, x1, x2, x3, uniform(bits), SHIFT)
    else:
        first, last, nibble = draw_two(x0, x1, x2, x3, uniform(bits), uniform(more_bits), SHIFT)
    pair = tl.permute(tl.join(first, last), (1, 0, 2))  # [WORDS, FEATURES, 2] turned
    if EMULATE_ROUNDING and DTYPE == tl.bfloat16:
        return rounded_bits(pair, DTYPE, EMULATE_ROUNDING).to(tl.int16).to(DTYPE, bitcast=True), nibble
    else:
        return pair.to(DTYPE), nibble


@triton.jit(do_not_specialize=["seed", "layer"])
def mvue_kernel(
    gradient, counter, values, meta, seed, layer, quads, words, features, stride, DTYPE: tl.constexpr,
    EXACT: tl.constexpr, EMULATE_ROUNDING: tl.constexpr, WORDS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Estimate 16·WORDS tokens of FEATURES features; writes values ``[O, T/2]``, meta ``[O, words]``."""
    blocks = tl.cdiv(features, FEATURES)
    top, left = (tl.program_id(0) // blocks) * WORDS, (tl.program_id(0) % blocks) * FEATURES
    word, feature = top + tl.arange(0, WORDS)[:, None], left + tl.arange(0, FEATURES)[None, :]
    clock = tl.load(counter).to(tl.uint32)
    batch = tl.load(counter + 1).to(tl.uint32) & 0x7FFFFFFF
    place = (word.to(tl.int64) * features + feature).to(tl.uint32)
    layer = tl.cast(layer, tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, place, layer, clock, batch)
    if EXACT:
        s0, s1, s2, s3 = r0, r1, r2, r3
    else:
        s0, s1, s2, s3 = tl.philox(seed, place, layer, clock, batch | 0x80000000)
    pointers = gradient + word.to(tl.int64) * 16 * stride + feature
    quad, within = word * 4, feature < features
    p0, n0 = estimate_four(pointers, stride, within & (quad < quads), r0, s0, 0, EXACT, DTYPE, EMULATE_ROUNDING)
    pointers += 4 * stride
    p1, n1 = estimate_four(pointers, stride, within & (quad + 1 < quads), r1, s1, 4, EXACT, DTYPE, EMULATE_ROUNDING)
    pointers += 4 * stride
    p2, n2 = estimate_four(pointers, stride, within & (quad + 2 < quads), r2, s2, 8, EXACT, DTYPE, EMULATE_ROUNDING)
    pointers += 4 * stride
    p3, n3 = estimate_four(pointers, stride, within & (quad + 3 < quads), r3, s3, 12, EXACT, DTYPE, EMULATE_ROUNDING)
    row = (left + tl.arange(0, FEATURES)[:, None]).to(tl.int64)
    column, place = top * 8 + tl.arange(0, 8 * WORDS)[None, :], top + tl.arange(0, WORDS)[None, :]
    fours = tl.join(tl.join(p0, p2), tl.join(p1, p3))  # [FEATURES, WORDS, entry of a pair, half, quad of a half]
    written = tl.reshape(tl.permute(fours, (0, 1, 3, 4, 2)), (FEATURES, 8 * WORDS))
    tl.store(values + row * (2 * quads) + column, written, mask=(row < features) & (column < 2 * quads))
    used = (1 << 4 * tl.minimum(quads - quad, 4)) - 1  # no nibbles for tokens that are not there
    code = tl.trans((n0 | n1 | n2 | n3) & used).to(tl.int16)  # [FEATURES, WORDS]
    tl.store(meta + row * words + place, code, mask=(row < features) & (place < words))
