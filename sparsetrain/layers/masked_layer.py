"""``MaskedLayer``: what sparse linear layers and sparse convolutions share: codes, phase, and how products are made."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..distributed.layouts import matrix_layout
from ..distributed.shards import local, spread_like
from ..kernels.tile_codes import unpack_codes
from ..kernels.torch_internals import is_transformed
from ..masks.gradient_rules import GradientRule, resolve_gradient_rule
from ..masks.soft_threshold import SoftThreshold, soft_thresholded
from ..masks.tile_codes import KEEP_ALL
from ..matmul.choices import backend_on, describe
from ..matmul.estimated_weight_gradient import draw_counter
from ..matmul.execution import Execution
from ..matmul.operands import Operands
from ..matmul.registry import register
from ..matmul.transforms import with_gradient_of
from ..types import PhaseKind
from .matrix_layer import MatrixLayer
from .sharded.alignment import parallel_too_late

STATE = (
    "mask_codes", "draws", "backward_codes", "adapter", "soft_scale", "phase", "scheduled", "is_2_4",
    "gradient", "execution", "operands", "eager_call", "shard",
)  # fmt: skip
"""What a masked layer has beside its dense class."""

READ_IN_GROUPS = ("mask_codes", "backward_codes", "soft_scale", "operands", "draws")
"""Of those, what a run's groups of layers keep from step to step until another is set."""


class MaskedLayer(MatrixLayer):
    """A layer whose weight, seen as a matrix ``[O, K]``, has a 2:4 mask; the mask is held as tile codes beside it.

    Mixed into a dense layer class, whose instances become masked ones in place and back.
    """

    _dynamo_marked_static = True  # sizes of codes are no dynamic dimensions, as those of a dense layer's weight are not

    dense_class: ClassVar[type[nn.Module]]

    bias: Any  # a parameter or None; the dense classes declare it differently
    mask_codes: Tensor
    draws: Tensor | None
    backward_codes: Tensor | None  # the input gradient's product sees what they keep too
    adapter: tuple[Tensor, Tensor] | None  # down [r, K] and up [O, r]
    soft_scale: Tensor | None  # β of the soft threshold; None for a hard mask
    phase: PhaseKind
    refits_soon: bool  # inputs are gathered for the re-fit of its weight
    scheduled: bool  # a run made it sparse, whose schedule says in which phase it is
    is_2_4: bool  # False if the mask keeps more somewhere, which no sparse product can use
    gradient: GradientRule
    execution: Execution
    operands: Operands
    eager_call: object  # what the last quick product has found out

    @property
    def mask(self) -> Tensor:
        """The mask as bool, shaped and spread like the weight, whether or not it is in force."""
        mask = self.as_weight(unpack_codes(self.mask_codes))
        return mask if self.shard is None else spread_like(mask, self.shard.weight, self.weight.shape)

    @property
    def has_sparse_products(self) -> bool:
        """Whether its products with the mask have the form of a sparse GEMM."""
        return self.is_2_4

    @property
    def backend(self) -> str:
        """The matmul backend: a name, ``"auto"`` where there is a choice, or ``"masked"``."""
        return backend_on(self.weight.device.type, self.execution.backend) if self.is_2_4 else "masked"

    @property
    def is_masked(self) -> bool:
        """Whether the mask is in force."""
        return self.phase != "dense"

    @torch.no_grad()
    def set_codes_(self, codes: Tensor) -> None:
        """Copy tile codes ``[O/4, K/4]`` in place, so that compiled graphs stay valid."""
        self.mask_codes.copy_(codes)

    @torch.no_grad()
    def set_backward_codes_(self, codes: Tensor) -> None:
        """Give the input gradient's product codes ``[O/4, K/4]`` of its own; in place, if it has some."""
        if self.backward_codes is None:
            self.backward_codes = torch.empty_like(self.mask_codes)
        self.backward_codes.copy_(codes)

    def features_last(self, input: Tensor) -> Tensor:
        """Return the layer's input with its features in the last dimension."""
        return input

    def thresholded_matrix(self, matrix: Tensor | None = None) -> Tensor:
        """Return the matrix, or what the soft threshold leaves of it; the mask is still to be applied."""
        matrix = self.matrix if matrix is None else matrix
        if self.soft_scale is None:
            return matrix
        if is_transformed():
            values = soft_thresholded(matrix.detach(), self.mask_codes, self.execution.transposable)
            return with_gradient_of(values * self.soft_scale, matrix)
        soft = SoftThreshold.apply(matrix, self.mask_codes, self.soft_scale, self.execution.transposable)  # type: ignore[no-untyped-call]
        return cast(Tensor, soft)

    @torch.no_grad()
    def effective_weight(self, master: Tensor, with_adapter: bool = False) -> Tensor:
        """Return the weight that the products see when the mask is in force, for a master at hand.

        Args:
            master: Shaped like the weight, on any device; of a sharded one, the part that lies here.
            with_adapter: Add the adapter, if there is one.
        """
        matrix, codes = self.as_matrix(master), self.mask_codes.to(master.device)
        if self.soft_scale is not None:
            soft = soft_thresholded(matrix, codes, self.execution.transposable)
            matrix = soft * self.soft_scale.to(master.device)
        matrix = matrix.masked_fill(~unpack_codes(codes), 0)
        if with_adapter and self.adapter is not None:
            down, up = map(local, self.adapter)
            added = self.part_of(up @ down) if self.shard is not None else up @ down
            matrix = matrix + added.to(matrix)
        return self.as_weight(matrix)

    @torch.no_grad()
    def seen_matrix(self) -> Tensor:
        """Return the matrix of the part that lies here whose kept entries products see."""
        if self.soft_scale is None:
            return self.matrix.detach()
        return soft_thresholded(self.matrix, self.mask_codes, self.execution.transposable) * self.soft_scale

    @torch.no_grad()
    def sent_part(self, dtype: torch.dtype) -> Tensor:
        """Return what products see of the part that lies here, in a dtype; pruned entries are -0, kept ones never."""
        if not self.is_masked:
            return self.master.to(dtype)
        kept = self.seen_matrix().to(dtype) + 0.0  # -0 + 0 is 0
        return self.as_weight(torch.where(unpack_codes(self.mask_codes), kept, -0.0))

    def train(self, mode: bool = True) -> "MaskedLayer":
        """Switch between training and evaluation; weights may be swapped around it, so operands are made again."""
        if mode != self.training:
            self.operands.invalidate()
        return super().train(mode)

    def describe_products(self) -> str:
        """Name the backend of each product, as far as it has been decided."""
        if not self.is_2_4:
            return "masked: its mask keeps more than 2:4"
        undecided = self.execution.backend == "auto" and self.backend == "masked"
        return "masked" if undecided else describe(self.operands)

    def extra_repr(self) -> str:
        """Describe the layer as its dense class does, and its phase."""
        return f"{super().extra_repr()}, phase={self.phase}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "MaskedLayer":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # no buffers: data-parallel modules cannot broadcast int16, and averages of codes mean nothing
        self.mask_codes = fn(self.mask_codes)
        self.draws = None if self.draws is None else fn(self.draws)
        self.soft_scale = None if self.soft_scale is None else fn(self.soft_scale)
        self.backward_codes = None if self.backward_codes is None else fn(self.backward_codes)
        self.eager_call = None
        self.note_weight(self._parameters.get("weight"))
        register(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register(self)  # copied or loaded

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.shard is not None and self.shard.takes(value):
            self._parameters["weight"] = value
            return
        super().__setattr__(name, value)
        if name in READ_IN_GROUPS:
            Operands.changed()

    def __delattr__(self, name: str) -> None:
        if name in self._parameters:
            raise RuntimeError(_foreign_weight(name))
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, unless the weight would be computed from it."""
        if name.startswith(("weight_", "bias_")):
            raise RuntimeError(_foreign_weight(name))
        super().register_parameter(name, param)
        if name == "weight":
            self.note_weight(param)
        if "operands" in self.__dict__:  # another parameter may have the memory and the version of the last
            self.operands.invalidate()
            self.eager_call = None
            Operands.changed()

    def note_weight(self, weight: Tensor | None) -> None:
        """Take note of a weight that may be another, or spread over processes now; codes are cut with it."""
        before = self.shard
        super().note_weight(weight)
        for name in ("mask_codes", "backward_codes") if self.shard is not None else ():
            codes, (rows, columns) = self.__dict__.get(name), self.matrix.shape
            if weight is not None and codes is not None and codes.shape != (rows // 4, columns // 4):
                if before is not None:
                    raise RuntimeError(parallel_too_late(before.name))
                setattr(self, name, matrix_layout(weight, codes.dtype, self.transposed, 4).part(codes))

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "torch.jit.script cannot compile a masked layer: script a plain copy, after "
            "export_dense_(copy.deepcopy(model)), or use torch.jit.trace, torch.export or torch.compile."
        )

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError(
            "nn.DataParallel copies layers in every forward but not their masks: use DistributedDataParallel or one "
            "device."
        )

    def _add_mask(self, phase: PhaseKind, execution: Execution) -> None:
        self.note_weight(self._parameters.get("weight"))
        rows, columns = self.matrix.shape
        device = self.weight.device
        self.mask_codes = torch.full((rows // 4, columns // 4), KEEP_ALL, dtype=torch.int16, device=device)
        self.phase = phase
        self.scheduled = False
        self.is_2_4 = True
        self.gradient = resolve_gradient_rule("ste")
        self.execution = execution
        self.draws = draw_counter(0, device=device) if execution.weight_product == "mvue" else None
        self.soft_scale = None
        self.backward_codes = None
        self.adapter = None
        self.operands = Operands(execution)
        self.eager_call = None
        register(self)

    def _remove_mask(self) -> None:
        if self.shard is not None:
            self.shard.detach()
        for name in STATE:
            self.__dict__.pop(name, None)


def weight_in(layer: MaskedLayer) -> Tensor:
    """Return ``layer.master``, in a fraction of the time that modules take to find it.

    Example:
        >>> from .conversion import to_sparse_
        >>> layer = to_sparse_(nn.Linear(8, 8))
        >>> weight_in(layer) is layer.weight
        True
    """
    weight = layer._parameters.get("weight")
    return layer.master if weight is None or layer.shard is not None else weight


@contextmanager
def written_as_matrices(layers: Sequence[MaskedLayer], tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give tensors that are shaped like layers' weights as matrices to write to, whatever their order in memory.

    Args:
        layers: Whose weights they are shaped like.
        tensors: One for each.

    Example:
        >>> from .conversion import to_sparse_
        >>> layer, weight = to_sparse_(nn.Conv2d(8, 4, 2)), torch.zeros(4, 8, 2, 2)
        >>> with written_as_matrices([layer], [weight]) as (matrix,):
        ...     matrix[0, 9] = 5
        >>> weight[0, 1, 0, 1].item()
        5.0
    """
    sources = [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]
    if all(source.dim() == 2 for source in sources) and not any(layer.transposed for layer in layers):
        yield sources
        return
    matrices = [layer.as_matrix(source) for layer, source in zip(layers, sources, strict=True)]
    yield matrices
    for layer, source, matrix in zip(layers, sources, matrices, strict=True):
        if matrix is not source and matrix.data_ptr() != source.data_ptr():  # was a copy
            source.copy_(layer.as_weight(matrix))


def _foreign_weight(name: str) -> str:
    return (
        f"{name!r} cannot be added to or taken from a masked layer, as weight_norm, spectral_norm, parametrize, prune "
        "and FSDP1 do, because masks need the weight itself: call finish() or export_dense_() first."
    )
