"""Packing as torch operators: Triton on CUDA, the reference elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..mask_search.reference import search_transposable
from . import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("sparsetrain::pack_tiles", mutates_args=())
def pack_tiles(weight: Tensor, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack a weight and its transpose by tile codes, for the products with W and with Wᵀ.

    Args:
        weight: ``[O, I]`` in float32, float16 or bfloat16, any strides; O and I multiples of 4.
        codes: int16 ``[O/4, I/4]`` on the weight's device, transposable 2:4.
        dtype: Of the values: float32, float16 or bfloat16, rounded to nearest even.

    Returns:
        ``values [O, I/2]``, ``meta`` int16 ``[O, ceil(I/16)]``, and ``values_t [I, O/2]``, ``meta_t`` int16
        ``[I, ceil(O/16)]`` of the transpose. A word of ``meta`` holds a nibble ``i0 | i1 << 2`` for each of four fours
        of columns, from bit 0 up: the positions i0 < i1 that were kept; zero where no columns are left.

    Raises:
        ValueError: If a shape, dtype or device does not fit.

    Example:
        >>> codes = torch.full((1, 4), 0x5A5A, dtype=torch.int16)
        >>> [tuple(part.shape) for part in pack_tiles(torch.randn(4, 16), codes, torch.bfloat16)]
        [(4, 8), (4, 1), (16, 2), (16, 1)]
    """
    _check(weight, codes, dtype)
    values, meta, values_t, meta_t = reference.pack(weight, codes, dtype)
    return values, meta, values_t, meta_t


@torch.library.custom_op("sparsetrain::search_and_pack", mutates_args=())
def search_and_pack(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Find the transposable mask of largest ``Σ|w|`` and pack by it, reading the weight once.

    Args:
        weight: ``[O, I]`` in float32, float16 or bfloat16, any strides; O and I multiples of 4.
        dtype: Of the values: float32, float16 or bfloat16.

    Returns:
        int16 codes ``[O/4, I/4]``, then what :func:`pack_tiles` returns.

    Raises:
        ValueError: If a shape or dtype does not fit.

    Example:
        >>> codes, values, *_ = search_and_pack(torch.randn(8, 16), torch.bfloat16)
        >>> codes.shape, values.shape
        (torch.Size([2, 4]), torch.Size([8, 8]))
    """
    _check(weight, None, dtype)
    codes = search_transposable(weight, magnitude=True)
    values, meta, values_t, meta_t = reference.pack(weight, codes, dtype)
    return codes, values, meta, values_t, meta_t


@torch.library.custom_op("sparsetrain::pack_tiles_", mutates_args={"values", "meta", "values_t", "meta_t"})
def pack_tiles_(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor],
) -> None:  # fmt: skip
    """Pack several weights by their codes into existing operands; on CUDA, one launch for each layout among them.

    Args:
        weights: As in :func:`pack_tiles`, each.
        codes: As in :func:`pack_tiles`, contiguous, each; where they keep two of four along columns alone, what is
            written for W itself means nothing.
        values: Contiguous, shaped as :func:`pack_tiles` returns it, all of one dtype; overwritten.
        meta: The same.
        values_t: The same; or an empty list, to leave the transposes out (masks may then be row-wise).
        meta_t: The same.

    Raises:
        ValueError: If the lists or their entries do not fit; nothing is written then.

    Example:
        >>> weight, codes = torch.randn(4, 16), torch.full((1, 4), 0x5A5A, dtype=torch.int16)
        >>> parts = [[torch.empty_like(part)] for part in pack_tiles(weight, codes, torch.bfloat16)]
        >>> pack_tiles_([weight], [codes], *parts)
    """
    _check_targets(weights, codes, values, meta, values_t, meta_t)
    for position, (weight, code) in enumerate(zip(weights, codes, strict=True)):
        targets = [column[position] for column in (values, meta, values_t, meta_t) if column]
        packed = reference.pack(weight, code, targets[0].dtype, transposed=bool(values_t))
        for target, part in zip(targets, packed, strict=True):
            target.copy_(part)


@torch.library.custom_op(
    "sparsetrain::search_and_pack_", mutates_args={"codes", "values", "meta", "values_t", "meta_t"}
)
def search_and_pack_(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor],
) -> None:  # fmt: skip
    """Search and pack several weights into existing codes and operands; see :func:`pack_tiles_`.

    Example:
        >>> weight = torch.randn(4, 16)
        >>> parts = [[torch.empty_like(part)] for part in search_and_pack(weight, torch.bfloat16)]
        >>> search_and_pack_([weight], *parts)
    """
    _check_targets(weights, codes, values, meta, values_t, meta_t)
    for weight, code in zip(weights, codes, strict=True):
        code.copy_(search_transposable(weight, magnitude=True))
    pack_tiles_(weights, codes, values, meta, values_t, meta_t)


@torch.library.custom_op("sparsetrain::unpack_rows", mutates_args=())
def unpack_rows(values: Tensor, meta: Tensor) -> Tensor:
    """Return the dense matrix of packed rows, of W or of Wᵀ.

    Args:
        values: ``[R, C/2]`` in float32, float16 or bfloat16.
        meta: int16 ``[R, ceil(C/16)]``, in the order of :func:`pack_tiles`.

    Returns:
        ``[R, C]`` in the values' dtype; zero where nothing was kept.

    Raises:
        ValueError: If a shape, dtype or device does not fit.

    Example:
        >>> unpack_rows(torch.tensor([[2.0, 4.0]]), torch.tensor([[0xD]], dtype=torch.int16)).tolist()
        [[0.0, 2.0, 0.0, 4.0]]
    """
    _check_packed(values, meta)
    return reference.unpack_rows(values, meta)


@unpack_rows.register_fake
def _(values: Tensor, meta: Tensor) -> Tensor:
    _check_packed(values, meta)
    return values.new_empty(values.shape[0], 2 * values.shape[1])


@unpack_rows.register_kernel("cuda")
def _(values: Tensor, meta: Tensor) -> Tensor:
    from .triton_kernel import unpack_into

    _check_packed(values, meta)
    dense = values.new_empty(values.shape[0], 2 * values.shape[1])
    if dense.numel():
        unpack_into(values.contiguous(), meta.contiguous(), dense)
    return dense


@pack_tiles.register_fake
def _(weight: Tensor, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(weight, codes, dtype)
    values, meta, values_t, meta_t = reference.empty_packed(weight, dtype)
    return values, meta, values_t, meta_t


@search_and_pack.register_fake
def _(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(weight, None, dtype)
    values, meta, values_t, meta_t = reference.empty_packed(weight, dtype)
    return _empty_codes(weight), values, meta, values_t, meta_t


@pack_tiles_.register_fake
@search_and_pack_.register_fake
def _(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor],
) -> None:  # fmt: skip
    _check_targets(weights, codes, values, meta, values_t, meta_t)


@pack_tiles.register_kernel("cuda")
def _(weight: Tensor, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(weight, codes, dtype)
    values, meta, values_t, meta_t = reference.empty_packed(weight, dtype)
    _pack_on_cuda([weight], [codes.contiguous()], [[values], [meta], [values_t], [meta_t]], search=False)
    return values, meta, values_t, meta_t


@search_and_pack.register_kernel("cuda")
def _(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(weight, None, dtype)
    codes = _empty_codes(weight)
    values, meta, values_t, meta_t = reference.empty_packed(weight, dtype)
    _pack_on_cuda([weight], [codes], [[values], [meta], [values_t], [meta_t]], search=True)
    return codes, values, meta, values_t, meta_t


@pack_tiles_.register_kernel("cuda")
def _(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor],
) -> None:  # fmt: skip
    _check_targets(weights, codes, values, meta, values_t, meta_t)
    _pack_on_cuda(weights, codes, [column for column in (values, meta, values_t, meta_t) if column], search=False)


@search_and_pack_.register_kernel("cuda")
def _(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor],
) -> None:  # fmt: skip
    _check_targets(weights, codes, values, meta, values_t, meta_t)
    _pack_on_cuda(weights, codes, [column for column in (values, meta, values_t, meta_t) if column], search=True)


def _pack_on_cuda(
    weights: Sequence[Tensor], codes: Sequence[Tensor], packed: Sequence[Sequence[Tensor]], search: bool
) -> None:
    from .triton_kernel import pack_into

    filled = [i for i, weight in enumerate(weights) if weight.numel()]
    if filled:
        sources = [weights[i] if weights[i].stride(1) == 1 else weights[i].contiguous() for i in filled]
        pack_into(sources, [codes[i] for i in filled], [[column[i] for i in filled] for column in packed], search)


def _empty_codes(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0] // 4, weight.shape[1] // 4, dtype=torch.int16)


def _check(weight: Tensor, codes: Tensor | None, dtype: torch.dtype) -> None:
    if weight.dim() != 2 or weight.shape[0] % 4 or weight.shape[1] % 4 or weight.dtype not in DTYPES:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}: it must be a float32, float16 or bfloat16 matrix whose "
            "sizes are multiples of 4, so convert or pad it."
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}: values are packed in torch.float32, torch.float16 or torch.bfloat16.")
    if codes is None:
        return
    shape = (weight.shape[0] // 4, weight.shape[1] // 4)
    if codes.dtype != torch.int16 or tuple(codes.shape) != shape or codes.device != weight.device:
        raise ValueError(
            f"codes is {codes.dtype} {tuple(codes.shape)} on {codes.device}: it must be torch.int16 {shape} on "
            f"{weight.device}, as for a weight {tuple(weight.shape)}."
        )


def _check_packed(values: Tensor, meta: Tensor) -> None:
    if values.dim() != 2 or values.shape[1] % 2 or values.dtype not in DTYPES:
        raise ValueError(
            f"values is {values.dtype} {tuple(values.shape)}: it must be [R, C/2] in float32, float16 or bfloat16, C a "
            "multiple of 4."
        )
    shape = (values.shape[0], -(-values.shape[1] // 8))
    if meta.dtype != torch.int16 or tuple(meta.shape) != shape or meta.device != values.device:
        raise ValueError(
            f"meta is {meta.dtype} {tuple(meta.shape)} on {meta.device}: with values {tuple(values.shape)} it must be "
            f"torch.int16 {shape} on {values.device}."
        )


def _check_targets(weights: Sequence[Tensor], codes: Sequence[Tensor], *columns: Sequence[Tensor]) -> None:
    values, meta, values_t, meta_t = columns
    sizes = [len(column) for column in (weights, codes, *columns)]
    transposed = bool(values_t) or bool(meta_t)
    if len(set(sizes if transposed else sizes[:4])) != 1:
        raise ValueError(
            f"weights, codes, values, meta, values_t, meta_t have {sizes} entries: pass one of each for every weight, "
            "and of the last two also none."
        )
    for position, (weight, code) in enumerate(zip(weights, codes, strict=True)):
        dtype = values[0].dtype
        _check(weight, code, dtype)
        shapes = [(rows, size // 2) for rows, size in (weight.shape, weight.shape[::-1])]
        words = [(rows, -(-size // 16)) for rows, size in (weight.shape, weight.shape[::-1])]
        expected = {"values": (values, shapes[0], dtype), "meta": (meta, words[0], torch.int16)}
        if transposed:
            expected |= {"values_t": (values_t, shapes[1], dtype), "meta_t": (meta_t, words[1], torch.int16)}
        expected["codes"] = (codes, (weight.shape[0] // 4, weight.shape[1] // 4), torch.int16)
        for name, (column, shape, kind) in expected.items():
            target = column[position]
            fits = target.dtype == kind and tuple(target.shape) == shape and target.is_contiguous()
            if not fits or target.device != weight.device:
                raise ValueError(
                    f"{name}[{position}] is {target.dtype} {tuple(target.shape)} on {target.device}: it must be "
                    f"contiguous {kind} {shape} on {weight.device}."
                )
