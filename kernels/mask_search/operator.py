"""The search as torch operators: Triton on CUDA, ``cpu.py`` elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tile_codes import unpack_codes
from .cpu import search_transposable


@torch.library.custom_op("sparsetrain::search_tiles", mutates_args=())
def search_tiles(scores: Tensor, magnitude: bool = False) -> Tensor:
    """Return the tile codes of the best transposable 2:4 mask: the optimum over all 90 patterns of every 4×4 tile.

    Args:
        scores: ``[O, I]``, any floating dtype and strides; O and I multiples of 4. Larger is kept.
        magnitude: Rank by ``|score|``, for a weight.

    Returns:
        int16 ``[O/4, I/4]``; bit ``4*row + col`` is set where the entry is kept. Every implementation gives the same
        bits.

    Raises:
        ValueError: If the scores are not a floating-point matrix of whole tiles.

    Example:
        >>> search_tiles(torch.randn(8, 16), magnitude=True).shape
        torch.Size([2, 4])

    Source: the complementary-pair identity, derived in this folder's README.
    """
    _check(scores)
    return search_transposable(scores, magnitude)


@torch.library.custom_op("sparsetrain::search_tiles_with_mask", mutates_args=())
def search_tiles_with_mask(scores: Tensor, magnitude: bool = False) -> tuple[Tensor, Tensor]:
    """Return what :func:`search_tiles` returns, and the same mask as bool ``[O, I]``, from one pass.

    Example:
        >>> codes, mask = search_tiles_with_mask(torch.randn(8, 16), magnitude=True)
        >>> mask.sum().item()
        64
    """
    codes = search_tiles(scores, magnitude)
    return codes, unpack_codes(codes)


@torch.library.custom_op("sparsetrain::search_tiles_", mutates_args={"codes"})
def search_tiles_(scores: Sequence[Tensor], codes: Sequence[Tensor], magnitude: bool = False) -> None:
    """Search masks of several matrices into their codes; on CUDA, one launch for each layout among them.

    Args:
        scores: ``[O, I]`` each, as in :func:`search_tiles`; dtypes and shapes may differ.
        codes: int16 ``[O/4, I/4]`` each, contiguous, on the scores' device; overwritten.
        magnitude: Rank by ``|score|``.

    Raises:
        ValueError: If the lists differ in length, or a pair does not fit; nothing is written then.

    Example:
        >>> codes = [torch.empty(2, 4, dtype=torch.int16)]
        >>> search_tiles_([torch.randn(8, 16)], codes, magnitude=True)
    """
    _check_targets(scores, codes)
    for source, target in zip(scores, codes, strict=True):
        target.copy_(search_transposable(source, magnitude))


@search_tiles.register_fake
def _(scores: Tensor, magnitude: bool = False) -> Tensor:
    _check(scores)
    return scores.new_empty(scores.shape[0] // 4, scores.shape[1] // 4, dtype=torch.int16)


@search_tiles_with_mask.register_fake
def _(scores: Tensor, magnitude: bool = False) -> tuple[Tensor, Tensor]:
    _check(scores)
    codes = scores.new_empty(scores.shape[0] // 4, scores.shape[1] // 4, dtype=torch.int16)
    return codes, torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)


@search_tiles_.register_fake
def _(scores: Sequence[Tensor], codes: Sequence[Tensor], magnitude: bool = False) -> None:
    _check_targets(scores, codes)


@search_tiles.register_kernel("cuda")
def _(scores: Tensor, magnitude: bool = False) -> Tensor:
    _check(scores)
    codes = scores.new_empty(scores.shape[0] // 4, scores.shape[1] // 4, dtype=torch.int16)
    _search_on_cuda([scores], [codes], magnitude)
    return codes


@search_tiles_with_mask.register_kernel("cuda")
def _(scores: Tensor, magnitude: bool = False) -> tuple[Tensor, Tensor]:
    _check(scores)
    codes = scores.new_empty(scores.shape[0] // 4, scores.shape[1] // 4, dtype=torch.int16)
    mask = torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    _search_on_cuda([scores], [codes], magnitude, [mask])
    return codes, mask


@search_tiles_.register_kernel("cuda")
def _(scores: Sequence[Tensor], codes: Sequence[Tensor], magnitude: bool = False) -> None:
    _check_targets(scores, codes)
    _search_on_cuda(scores, codes, magnitude)


def _search_on_cuda(
    scores: Sequence[Tensor], codes: Sequence[Tensor], magnitude: bool, masks: Sequence[Tensor] = ()
) -> None:
    from .triton_kernel import search_into

    # the kernel ranks in float32
    wide = [i for i, source in enumerate(scores) if source.dtype == torch.float64]
    for i in wide:
        codes[i].copy_(search_transposable(scores[i], magnitude))
        if masks:
            masks[i].copy_(unpack_codes(codes[i]))
    rest = [i for i, source in enumerate(scores) if i not in wide and source.numel()]
    if rest:
        sources = [scores[i] if scores[i].stride(1) == 1 else scores[i].contiguous() for i in rest]
        search_into(sources, [codes[i] for i in rest], magnitude, [masks[i] for i in rest] if masks else [])


def _check(scores: Tensor) -> None:
    if scores.dim() != 2 or scores.shape[0] % 4 or scores.shape[1] % 4 or not scores.is_floating_point():
        raise ValueError(
            f"scores is {scores.dtype} {tuple(scores.shape)}: it must be a floating-point matrix whose sizes are "
            "multiples of 4, so convert or pad it."
        )


def _check_targets(scores: Sequence[Tensor], codes: Sequence[Tensor]) -> None:
    if len(scores) != len(codes):
        raise ValueError(f"codes has {len(codes)} tensors but scores has {len(scores)}: pass one for each.")
    for position, (source, target) in enumerate(zip(scores, codes, strict=True)):
        _check(source)
        shape = (source.shape[0] // 4, source.shape[1] // 4)
        fits = target.dtype == torch.int16 and tuple(target.shape) == shape and target.is_contiguous()
        if not fits or target.device != source.device:
            raise ValueError(
                f"codes[{position}] is {target.dtype} {tuple(target.shape)} on {target.device}: it must be contiguous "
                f"torch.int16 {shape} on {source.device}."
            )
