"""What products with a masked layer must see, computed from its mask by definition."""

import torch
from torch import Tensor

from sparsetrain.kernels.tile_codes.reference import unpack_codes
from sparsetrain.layers.masked_layer import MaskedLayer


def masked_by_hand(layer: MaskedLayer) -> Tensor:
    """W⊙M, or β·sign(w)·(|w| - t) with t the largest pruned magnitude of the four, plus U·D of an adapter."""
    transposed = any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)  # of transformers: [I, O]
    weight, mask = layer.weight.detach(), unpack_codes(layer.mask_codes)
    weight = weight.mT if transposed else weight
    matrix = weight.flatten(1) if weight.dim() == 2 else weight.flatten(2).mT.reshape(weight.shape[0], -1)
    seen = torch.where(mask, matrix, 0)
    if layer.soft_scale is not None:
        threshold = torch.where(mask, 0, matrix.abs()).unflatten(1, (-1, 4)).amax(2).repeat_interleave(4, 1)  # type: ignore[no-untyped-call]
        seen = torch.where(mask, matrix.sign() * (matrix.abs() - threshold).clamp(min=0), 0) * layer.soft_scale
    if layer.adapter is not None:
        seen = seen + layer.adapter[1].detach() @ layer.adapter[0].detach()
    seen = seen.reshape(weight.shape[0], -1, weight.shape[1]).mT.reshape(weight.shape)
    return seen.mT if transposed else seen
