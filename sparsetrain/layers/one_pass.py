"""A refresh in one pass: masks searched, operands packed and sums measured while a weight is read once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Operand
from ..backends.packing import Targets
from ..kernels.dtypes import KERNEL_DTYPES
from ..kernels.pack import search_and_pack_
from .masked_layer import MaskedLayer

Sides = tuple[Operand | None, Operand | None]


def fits_one_pass(layers: Sequence[MaskedLayer]) -> bool:
    """Say whether weights have a dtype that is packed.

    Example:
        >>> fits_one_pass([])
        True
    """
    return all(layer.weight.dtype in KERNEL_DTYPES for layer in layers)


@torch.no_grad()
def search_in_one_pass_(layers: Sequence[MaskedLayer], pack: bool) -> Tensor:
    """Search the transposable masks of largest magnitude into the codes of layers on one device.

    Args:
        layers: At least one.
        pack: Pack operands where the packer writes them whole; the others are left to the next renewal.

    Returns:
        float64 ``[layers, 6]`` on their device: what ``tile_statistics`` measures, against the codes that were there.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> layer = SparseLinear(8, 4)
        >>> search_in_one_pass_([layer], pack=False)[0, 2:].tolist()
        [16.0, 32.0, 0.0, 16.0]
    """
    groups: dict[tuple[object, ...], list[tuple[int, Sides]]] = {}
    for position, layer in enumerate(layers):
        sides = operands_to_write(layer) if pack else None
        found = [operand for operand in sides or () if operand is not None]
        dtype = found[0].values.dtype if found and found[0].values is not None else None
        first, second = sides or (None, None)
        key = (dtype, first is None, second is None)
        groups.setdefault(key, []).append((position, (first, second)))
    with torch.inference_mode(False):
        rows = torch.empty(len(layers), 6, dtype=torch.float64, device=layers[0].weight.device)
        for group in groups.values():
            targets = Targets([sides for _, sides in group])
            own = [layers[position] for position, _ in group]
            weights, codes = [layer.matrix.detach() for layer in own], [layer.mask_codes for layer in own]
            measured = search_and_pack_(weights, codes, *targets.columns, targets.tables, targets.orders)
            if len(groups) == 1:
                rows = measured
            else:
                for (position, _), row in zip(group, measured, strict=True):
                    rows[position] = row
            if targets.orders:
                for layer, weight in zip(own, weights, strict=True):
                    layer.operands.written(weight, layer.mask_codes)
    return rows


def operands_to_write(layer: MaskedLayer) -> Sides | None:
    """Return W's and Wᵀ's operand of a layer, if who writes its weight or its mask can pack all there is.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> operands_to_write(SparseLinear(8, 4)) is None  # nothing asked for any yet
        True
    """
    if layer.soft_scale is not None or layer.backward_codes is not None:
        return None
    return layer.operands.packed_alone() if layer.operands.bytes else None
