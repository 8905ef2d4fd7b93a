"""Sparse tensor core instructions in plain torch, from the PTX ISA: what every lane holds, and what comes out.

``mma.sp.m16n8k32`` and ``wgmma.mma_async.sp.m64nNk32`` with float16 or bfloat16 operands and float32 sums, and
``stmatrix``. Sections are those of PTX ISA 9; the figures of the metadata are in words at :func:`metadata_words`. Sums
are exact, then rounded to float32: a GPU may round in between.
"""

import functools

import torch
from torch import Tensor

LANES = 32
ROWS, COLUMNS, CHUNKS = 16, 32, 8  # of A, of which a row has eight chunks of four columns
INVALID = "0b0000, 0b0101, 0b1010 and 0b1111 are undefined, and the first of two indices must be the smaller one"


class MetadataError(ValueError):
    """A nibble for which the instruction's result is undefined."""


def group_and_thread() -> tuple[Tensor, Tensor]:
    """``groupID = %laneid >> 2`` and ``threadID_in_group = %laneid % 4`` of the 32 lanes."""
    lanes = torch.arange(LANES)
    return lanes >> 2, lanes % 4


def fragment_a() -> tuple[Tensor, Tensor]:
    """Row of A, and place among the row's 16 nonzeros, of ``a0 … a7`` of every lane: two ``[32, 8]``.

    9.7.14.6.2.2: ``row = groupID`` for a0, a1, a4, a5, else ``groupID + 8``; the pair is what is not zero in the chunk
    of four columns from ``4·threadID_in_group``, and from 16 columns further for a4 … a7.
    """
    group, thread = group_and_thread()
    i = torch.arange(8)
    rows = group[:, None] + 8 * (i % 4 >= 2)
    chunks = thread[:, None] + 4 * (i >= 4)
    return rows, 2 * chunks + i % 2


def fragment_b() -> tuple[Tensor, Tensor]:
    """Row and column of B ``[32, 8]`` of ``b0 … b7`` of every lane (figure of 9.7.14.6.2.2): two ``[32, 8]``."""
    group, thread = group_and_thread()
    i = torch.arange(8)
    return 2 * thread[:, None] + i % 2 + 8 * (i // 2), group[:, None].expand(LANES, 8)


def fragment_c() -> tuple[Tensor, Tensor]:
    """Row and column of C and D ``[16, 8]`` of ``c0 … c3`` of every lane (9.7.14.5.8): two ``[32, 4]``."""
    group, thread = group_and_thread()
    i = torch.arange(4)
    return group[:, None] + 8 * (i >= 2), 2 * thread[:, None] + i % 2


@functools.cache
def fragment_d_of_wgmma(columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of D ``[64, N]`` of ``d0 …`` of every thread of a warpgroup: two ``[128, N/2]``.

    9.7.15.5.1: a warp has 16 rows, which it holds as D of ``mma``, eight columns after the other.
    """
    rows, places = fragment_c()
    warps, eights = torch.arange(4)[:, None, None, None], torch.arange(columns // 8)[:, None]
    shape = (4, LANES, columns // 8, 4)
    return (
        (16 * warps + rows[:, None]).expand(shape).reshape(128, -1),
        (8 * eights + places[:, None]).expand(shape).reshape(128, -1),
    )


def metadata_words(metadata: Tensor, selector: int) -> Tensor:
    """Return the 16 bits for every row's 16 left and 16 right columns, ``[16, 2]``, from a register of every lane.

    Figure "metadata layout" of 9.7.14.6.2.2, and 9.7.14.6.1: for a selector F of 0 or 1 the lanes ``2F`` and ``2F + 1``
    of every four contribute, the first for columns 0 … 15, the second for 16 … 31; the low half of a register is that
    of row ``groupID``, the high half that of row ``groupID + 8``. CUTLASS's ``ELayout_64x32`` says the same.
    """
    if selector not in (0, 1):
        raise ValueError(f"selector is {selector}: for m16n8k32 it must be 0 or 1.")
    if metadata.dtype != torch.int32 or metadata.shape != (LANES,):
        raise ValueError(f"metadata is {metadata.dtype} {tuple(metadata.shape)}: it must be torch.int32 ({LANES},).")
    registers = metadata.long().view(8, 4)[:, 2 * selector : 2 * selector + 2] & 0xFFFFFFFF
    return torch.cat([registers & 0xFFFF, registers >> 16])


def positions(words: Tensor) -> Tensor:
    """Return the two kept positions of every chunk, ``[rows, 8, 2]``, from 16-bit words ``[rows, 2]``.

    9.7.14.6.1: four bits for a chunk, from bit 0 up, the index of the first nonzero in the lower two.

    Raises:
        MetadataError: If a nibble does not name two different positions in order.
    """
    nibbles = (words[..., None] >> torch.tensor([0, 4, 8, 12]) & 15).flatten(1)
    first, last = nibbles & 3, nibbles >> 2
    wrong = (first >= last).nonzero()
    if len(wrong):
        row, chunk = wrong[0].tolist()
        raise MetadataError(f"metadata of row {row}, chunk {chunk} is {int(nibbles[row, chunk]):#06b}: {INVALID}.")
    return torch.stack([first, last], dim=-1)


def expanded(nonzeros: Tensor, words: Tensor) -> Tensor:
    """Return the dense float64 ``[rows, 32]`` of nonzeros ``[rows, 16]`` and words ``[rows, 2]``."""
    pairs = nonzeros.double().view(-1, CHUNKS, 2)
    dense = torch.zeros(len(nonzeros), CHUNKS, 4, dtype=torch.float64)
    return dense.scatter_(2, positions(words), pairs).view(-1, COLUMNS)


def mma_sp(a: Tensor, b: Tensor, c: Tensor, metadata: Tensor, selector: int) -> Tensor:
    """``mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32``: D of every lane.

    Args:
        a: float16 or bfloat16 ``[32, 8]``, the fragment of every lane.
        b: The same dtype, ``[32, 8]``.
        c: float32 ``[32, 4]``.
        metadata: int32 ``[32]``, a register of every lane.
        selector: Which pair of lanes contributes metadata.

    Raises:
        MetadataError: If what contributes is undefined.
        ValueError: If a dtype, a shape or the selector is not the instruction's.
    """
    _check("a", a, (LANES, 8), (torch.float16, torch.bfloat16))
    _check("b", b, (LANES, 8), (a.dtype,))
    _check("c", c, (LANES, 4), (torch.float32,))
    nonzeros, dense = torch.empty(ROWS, COLUMNS // 2, dtype=a.dtype), torch.empty(COLUMNS, 8, dtype=b.dtype)
    nonzeros[fragment_a()], dense[fragment_b()] = a, b
    product = expanded(nonzeros, metadata_words(metadata, selector)) @ dense.double()
    return (c.double() + product[fragment_c()]).float()


def wgmma_sp(a: Tensor, b: Tensor, d: Tensor, metadata: Tensor, selector: int) -> Tensor:
    """``wgmma.mma_async.sp.sync.aligned.m64nNk32.f32``, A and B in shared memory: D of every thread.

    9.7.15.6.2: each of the four warps holds the metadata of its 16 rows, as for ``mma.sp``.

    Args:
        a: float16 or bfloat16 ``[64, 16]``: what the descriptor of A points to, nonzeros alone.
        b: The same dtype, ``[32, N]``, N a multiple of 8 up to 256.
        d: float32 ``[128, N/2]``, the sums of every thread so far.
        metadata: int32 ``[128]``, a register of every thread.
        selector: Which pair of lanes contributes metadata.

    Raises:
        MetadataError: If what contributes is undefined.
        ValueError: If a dtype, a shape or the selector is not the instruction's.
    """
    columns = b.shape[1]
    if columns % 8 or not 8 <= columns <= 256:
        raise ValueError(f"b has {columns} columns: they must be a multiple of 8, up to 256.")
    _check("a", a, (64, COLUMNS // 2), (torch.float16, torch.bfloat16))
    _check("b", b, (COLUMNS, columns), (a.dtype,))
    _check("d", d, (128, columns // 2), (torch.float32,))
    if metadata.shape != (128,):
        raise ValueError(f"metadata is {tuple(metadata.shape)}: it must be (128,).")
    words = torch.cat([metadata_words(of_warp, selector) for of_warp in metadata.view(4, LANES)])
    product = expanded(a, words) @ b.double()
    return (d.double() + product[fragment_d_of_wgmma(columns)]).float()


def stmatrix_x4_trans(memory: Tensor, addresses: Tensor, registers: Tensor) -> None:
    """``stmatrix.sync.aligned.m8n8.x4.trans.shared.b16``: a warp stores four matrices of 8 by 8, transposed.

    Lanes ``8i`` to ``8i + 7`` name the rows of matrix i. Without ``.trans``, a lane's register i holds two entries that
    follow each other in row ``lane / 4`` of it; with it, in that column.

    Args:
        memory: 16-bit ``[n]``, written.
        addresses: int ``[32]``, of every lane, in entries; rows are aligned to 16 bytes.
        registers: ``[32, 8]`` of the memory's dtype: four registers of every lane, two entries in each.

    Raises:
        ValueError: If an address is not aligned.
    """
    _check("registers", registers, (LANES, 8), (memory.dtype,))
    if bool((addresses % 8 != 0).any()):
        raise ValueError(f"addresses are {addresses.tolist()}: they must be multiples of 8 entries.")
    group, thread = group_and_thread()
    for i in range(4):
        matrix = torch.empty(8, 8, dtype=memory.dtype)
        for half in range(2):
            matrix[2 * thread + half, group] = registers[:, 2 * i + half]
        memory[addresses[8 * i : 8 * i + 8, None] + torch.arange(8)] = matrix


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: it must be {dtypes[0]} {shape}.")
