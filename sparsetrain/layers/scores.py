"""What a criterion scores the weight of a layer, whole or the part of it that lies in this process."""

import torch
from torch import Tensor

from ..criteria.criterion import Criterion, scores_of
from .matrix_layer import MatrixLayer


@torch.no_grad()
def scores_of_layer(criterion: Criterion, layer: MatrixLayer, *, name: str, clock: int) -> Tensor:
    """Return the scores of a layer's matrix ``[O, K]``; of a sharded one, of the part that lies here.

    Args:
        criterion: What ranks the entries.
        layer: Whose matrix it is.
        name: Of the layer, in the model.
        clock: Successful optimizer steps so far.

    Raises:
        TypeError: If the criterion returns no dense floating-point tensor.
        ValueError: If it returns one of another shape.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> from ..criteria import Magnitude
        >>> scores_of_layer(Magnitude(), SparseLinear(8, 4), name="fc", clock=0).shape
        torch.Size([4, 8])
    """
    if layer.shard is None or not criterion.of_shape:
        return scores_of(criterion, layer.matrix, layer=name, clock=clock).detach()
    whole = layer.matrix.new_zeros(()).expand(layer.matrix_shape)
    return layer.part_of(scores_of(criterion, whole, layer=name, clock=clock)).contiguous()
