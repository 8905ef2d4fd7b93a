"""``BiasCopy``: a bias in the dtype of a product, renewed after any write to it."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .tensor_state import Stamp, hold, stamp_of


class BiasCopy:
    """A bias in another dtype, at an address that stays.

    Example:
        >>> bias = torch.ones(4)
        >>> copy = BiasCopy(bias, torch.bfloat16)
        >>> copy.follow_(bias.mul_(2), managed=False)
        >>> copy.tensor.tolist()
        [2.0, 2.0, 2.0, 2.0]
    """

    def __init__(self, bias: Tensor, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            self.tensor = torch.empty_like(bias, dtype=dtype)
        self.stamp: Stamp | None = None
        self._held: StorageWeakRef | None = None

    def follow_(self, bias: Tensor, managed: bool) -> None:
        """Copy the bias if it was written to, or if a CUDA graph is captured that has to do so in every replay."""
        stamp = stamp_of(bias)
        capturing = bias.is_cuda and torch.cuda.is_current_stream_capturing()
        if stamp is None or self.stamp != stamp or (capturing and not managed):
            self.repack_(bias)
            self.stamp = None if capturing else stamp

    @torch.no_grad()
    def repack_(self, bias: Tensor) -> None:
        """Copy the bias."""
        with torch.inference_mode(False):
            self.tensor.copy_(bias)
        self.stamp, self._held = stamp_of(bias), hold(bias)
