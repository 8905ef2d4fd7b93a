"""``MatrixLayer``: a layer's weight as a matrix, whole or the part of it that lies in this process."""

from typing import ClassVar

from torch import Tensor, nn

from ..distributed.shards import is_spread, part_like
from ..masks.matrices import matrix_of, weight_of
from .sharded.alignment import require_even, require_shardable
from .sharded.shard import Shard


class MatrixLayer(nn.Module):
    """A layer whose weight is seen as a matrix ``[O, K]``, in which K is kernel positions times input features."""

    transposed: ClassVar[bool] = False  # the weight is stored [I, O]

    weight: Tensor
    shard: Shard | None = None  # of a weight that is spread over processes

    @property
    def parameter(self) -> Tensor:
        """The weight that optimizers own, also where FSDP2 has put what it gathered into its place."""
        return self.weight if self.shard is None else self.shard.weight

    @property
    def master(self) -> Tensor:
        """The weight, or the part of it that lies in this process."""
        if self.shard is not None:
            return self.shard.part
        found = self._parameters.get("weight")  # in half the time
        return self.weight if found is None else found

    @property
    def matrix(self) -> Tensor:
        """The master as a matrix ``[O, K]``, in which K is kernel positions times input features."""
        weight = self.master
        return matrix_of(weight, self.transposed) if self.transposed or weight.dim() != 2 else weight

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """O and K of the whole weight."""
        weight = self.parameter
        rows = weight.shape[1 if self.transposed else 0]
        return rows, weight.numel() // rows

    def part_of(self, matrix: Tensor) -> Tensor:
        """Return the part that lies here of a whole matrix ``[O, K]``."""
        assert self.shard is not None
        weight = self.shard.weight
        return self.as_matrix(part_like(weight_of(matrix, weight.shape, self.transposed).contiguous(), weight))

    @property
    def input_features(self) -> int:
        """I, the input features or channels."""
        return self.weight.shape[0 if self.transposed else 1]

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor shaped like the weight as a matrix ``[O, K]``, differentiably; a view where it can be one."""
        return matrix_of(tensor, self.transposed)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix ``[O, K]`` as a view shaped like the master."""
        return weight_of(matrix, self.master.shape, self.transposed)

    def note_weight(self, weight: Tensor | None) -> None:
        """Take note of a weight that may be another, or spread over processes now."""
        if weight is None or not is_spread(weight):
            self.shard = None
        elif self.shard is not None and self.shard.weight is weight:
            if self.shard.attach() and not self.shard.is_followed:
                require_even(self.shard.name, self, weight)
        else:
            name = "" if self.shard is None else self.shard.name
            require_shardable(name, self, weight)
            is_followed = self.shard is not None and self.shard.is_followed
            self.shard = Shard(self, weight)  # type: ignore[arg-type]  # what is mixed in sends its parts
            self.shard.name, self.shard.is_followed = name, is_followed
