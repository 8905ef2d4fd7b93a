"""``SparseLinear``: a linear layer whose products see the masked weight."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..masks.tile_codes import require_tiles
from ..matmul.execution import Execution
from ..matmul.transforms import as_leaf
from .masked_layer import MaskedLayer
from .products import multiply
from .sharded.tensor_parallel import sharded_linear


class SparseLinear(MaskedLayer, nn.Linear):
    """An ``nn.Linear`` with a mask: same parameters, same ``state_dict``, and tile codes beside them.

    Usually made in place by :func:`sparsetrain.sparsify_`. A forward never changes the mask.

    Args:
        in_features: I, a multiple of 4.
        out_features: O, a multiple of 4.
        bias: Whether there is a bias.
        device: As in ``nn.Linear``.
        dtype: As in ``nn.Linear``.

    Raises:
        ValueError: If a size is not a multiple of 4.

    Example:
        >>> layer = SparseLinear(8, 4)
        >>> layer.set_codes_(torch.full((1, 2), 0x3C3C, dtype=torch.int16))
        >>> layer.mask.sum().item(), sorted(layer.state_dict())
        (16, ['bias', 'weight'])
    """

    dense_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_tiles("weight", (out_features, in_features))
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_mask("sparse", Execution())

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: ``[..., I]`` to ``[..., O]``."""
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        if self.phase == "dense":
            return F.linear(input, self.weight, self.bias)
        if self.shard is not None:
            return sharded_linear(self, input)
        return multiply(self, input)
