"""What a run does to all its sparse layers together: masks on weights, packed weights, numbers of random draws."""

import time
from collections.abc import Collection, Mapping

import torch

from .estimated_gradient import renumber_
from .kernels.masked_update.operator import apply_masks_now_
from .masked_layer import MaskedLayer, weight_in, written_as_matrices
from .matrices import by_device
from .operands import renew_


def write_masks_(layers: Mapping[str, MaskedLayer], active: Collection[str]) -> None:
    """Write zeros into what the masks of some layers prune, all of a device together.

    Example:
        >>> import torch
        >>> from sparsetrain import SparseLinear
        >>> layer = SparseLinear(8, 8)
        >>> layer.set_codes_(torch.full((2, 2), 0x3C3C, dtype=torch.int16))
        >>> write_masks_({"fc": layer}, ["fc"])
        >>> int((layer.weight == 0).sum())
        32
    """
    for weights in by_device({name: weight_in(layer) for name, layer in layers.items() if name in active}):
        wanted = [layers[name] for name in weights]
        with written_as_matrices(wanted, [*weights.values()]) as matrices:
            apply_masks_now_(matrices, [layer.mask_codes for layer in wanted])


def repack_(layers: Mapping[str, MaskedLayer]) -> float:
    """Renew packed weights now, all of a device together, so that captured graphs and compiled steps find them.

    Returns:
        Milliseconds of host time.

    Example:
        >>> repack_({}) >= 0
        True
    """
    start = time.perf_counter()
    packed: dict[torch.device, list[MaskedLayer]] = {}
    for layer in layers.values():
        if layer.operands.is_packed and layer.soft_scale is None:
            packed.setdefault(layer.mask_codes.device, []).append(layer)
    for together in packed.values():
        renew_(together)
    return 1e3 * (time.perf_counter() - start)


def number_draws_(layers: Mapping[str, MaskedLayer], clock: int) -> None:
    """Have every layer's random estimates depend on the clock, so that there is nothing to save of them.

    Example:
        >>> number_draws_({}, 3)
    """
    for number, layer in enumerate(layers.values()):
        if layer.draws is not None:
            renumber_(layer.draws, number, clock)
