"""``SparseAdamW``: AdamW that decays, updates and packs weights with masks in one pass over them."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from .backends.packing import Targets
from .kernels.adamw.operator import DTYPES, sparse_adamw_
from .layers.masked_layer import MaskedLayer
from .layers.masked_step import MaskedStep, TakesMaskedSteps
from .layers.one_pass import Sides, operands_to_write

UNABLE = ("amsgrad", "capturable", "differentiable", "fused")
"""Options of torch's AdamW that this one does not support."""


class SparseAdamW(AdamW, TakesMaskedSteps):
    """``torch.optim.AdamW`` whose weights with masks are decayed, updated and packed in one pass.

    With a :class:`~sparsetrain.SparseTraining` (or the callback), the optimizer's kernel does to sparse layers' weights
    what takes three otherwise: the masked decay (or the masked gradient of frozen masks), AdamW's update, and packing
    for the sparse products. It does so for float32 and bfloat16 weights of linear layers; everything else is updated by
    torch's own AdamW, and so is everything without such a run. On CUDA all weights of a layout share one launch; on a
    CPU, sums are those of torch, bit for bit.

    States are those of ``torch.optim.AdamW``: either optimizer takes the other's ``state_dict``. Gradients stay as
    backward left them: the masked decay is not in ``weight.grad`` after a step.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate; a scheduler may change it.
        betas: Of the first and of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, of all entries.
        amsgrad: Must be False.
        maximize: Follow gradients upwards.
        foreach: Of torch's AdamW, for the other parameters.
        capturable: Must be False.
        differentiable: Must be False.
        fused: Must be False or None, as the kernel is this optimizer's own.

    Raises:
        ValueError: If a value is not allowed.

    Example:
        >>> from sparsetrain import SparseTraining
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> optimizer = SparseAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> training = SparseTraining(model, optimizer, total_steps=12, verbose=False)
        >>> for _ in range(12):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> training.clock, training.phase
        (12, 'sparse')
        >>> torch.optim.AdamW(model.parameters()).load_state_dict(optimizer.state_dict())

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv 1711.05101.
    """

    masked_step: MaskedStep | None = None
    """Of the step that comes; a run sets it before every step and takes it back after it."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        options = {"amsgrad": amsgrad, "capturable": capturable, "differentiable": differentiable, "fused": fused}
        _require_able(options, "is given")
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, foreach=foreach)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as of ``torch.optim.Optimizer``.

        Raises:
            ValueError: If it has an option that this optimizer does not support.
        """
        if isinstance(param_group, dict):
            _require_able(param_group, "has a group with")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this optimizer or of ``torch.optim.AdamW``, fused and capturable ones too.

        Raises:
            ValueError: If it is one with ``amsgrad``; nothing is changed then.
        """
        for group in state_dict.get("param_groups", ()):
            _require_able({"amsgrad": group.get("amsgrad")}, "is given a state with")
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            group.update(capturable=False, differentiable=False, fused=None)
            for parameter in group["params"]:
                if "step" in (own := self.state.get(parameter, {})):
                    own["step"] = own["step"].to("cpu", torch.float32)  # that of a fused AdamW is on the device

    def takes(self, layer: MaskedLayer) -> bool:
        """Say whether the kernel can update a layer's weight: a float32 or bfloat16 matrix with its rows in memory."""
        weight, state = layer.weight, self.state.get(layer.weight, {})
        gradient = weight.grad
        plain = gradient is not None and all(type(one) in (Tensor, nn.Parameter) for one in (weight, gradient))
        moments = [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
        return (
            plain
            and not layer.transposed
            and weight.dim() == 2
            and weight.dtype in DTYPES
            and gradient is not None
            and not gradient.is_sparse
            and all(one.dtype == weight.dtype and one.device == weight.device for one in (gradient, *moments))
        )

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Update what a run wants of the group, and give torch the rest; here, so that hooks see one step."""
        if self.masked_step is None:
            return bool(super()._init_group(group, *lists))  # type: ignore[no-untyped-call]
        every: list[list[Any]] = [[] for _ in lists]
        complex_ones = super()._init_group(group, *every)  # type: ignore[no-untyped-call]
        wanted = {id(layer.weight) for layer in self.masked_step.layers.values()}
        masked = [id(parameter) in wanted for parameter in every[0]]
        own = [[entry for entry, ours in zip(column, masked, strict=True) if ours] for column in every if column]
        if any(masked):
            update_(self.masked_step, group, *own)
        for column, full in zip(lists, every, strict=True):
            column += [entry for entry, ours in zip(full, masked, strict=True) if not ours] if full else []
        return bool(complex_ones)


@torch.no_grad()
def update_(
    step: MaskedStep,
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    counts: Sequence[Tensor],
) -> None:
    """Update weights with masks, their moments and their counts, and pack what is to be packed.

    Args:
        step: What the masks do.
        group: AdamW's options.
        parameters: The weights, of layers of the step.
        gradients: Of each.
        averages: First moments.
        squares: Second moments.
        counts: Steps of each until now, scalars on the CPU; 1 is added.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> layer = SparseLinear(8, 8)
        >>> optimizer = SparseAdamW(layer.parameters())
        >>> moments, count = torch.zeros(2, 8, 8), torch.tensor(2.0)
        >>> lists = [layer.weight], [torch.ones(8, 8)], [moments[0]], [moments[1]], [count]
        >>> update_(MaskedStep({"fc": layer}), optimizer.param_groups[0], *lists)
        >>> int(count)
        3
    """
    names = {id(layer.weight): name for name, layer in step.layers.items()}
    group = {**group, "lr": float(group["lr"]) * step.lr_factor}
    for count in counts:
        count += 1
    alike: dict[tuple[Any, ...], dict[str, list[Tensor]]] = {}
    for parameter, *tensors, count in zip(parameters, gradients, averages, squares, counts, strict=True):
        key = (parameter.device, parameter.dtype, float(count))
        alike.setdefault(key, {})[names[id(parameter)]] = [parameter.detach(), *tensors]
    for (*_, count), entries in alike.items():
        _update_alike(step, group, entries, float(count))


def _update_alike(
    step: MaskedStep, group: Mapping[str, Any], entries: Mapping[str, list[Tensor]], count: float
) -> None:
    """Update weights of one device and dtype in their step number ``count``, those of equal targets at once."""
    batches: dict[tuple[object, ...], dict[str, Sides]] = {}
    decay = step.decay / step.lr_factor if step.rule == "decay_weight" else step.decay  # times the longer rate
    for name in entries:
        sides = (operands_to_write(step.layers[name]) if step.pack else None) or (None, None)
        kinds = {operand.values.dtype for operand in sides if operand is not None and operand.values is not None}
        batches.setdefault((*kinds, sides[0] is None, sides[1] is None), {})[name] = sides
    for batch in batches.values():
        targets, layers = Targets(list(batch.values())), [step.layers[name] for name in batch]
        weights, gradients, averages, squares = (
            list(column) for column in zip(*(entries[name] for name in batch), strict=True)
        )
        sparse_adamw_(
            weights, gradients, averages, squares, [layer.mask_codes for layer in layers], *targets.columns,
            targets.tables, group["lr"], *map(float, group["betas"]), group["eps"], group["weight_decay"], count,
            targets.orders, step.rule, decay, step.zeros, group["maximize"],
            [zlib.crc32(name.encode()) for name in batch], step.clock,
        )  # fmt: skip
        if targets.orders:
            for name, layer in zip(batch, layers, strict=True):
                layer.operands.written(layer.matrix.detach(), layer.mask_codes)
                step.packed.add(name)


def _require_able(options: Mapping[str, Any], verb: str) -> None:
    for name in UNABLE:
        if options.get(name):
            raise ValueError(
                f"SparseAdamW {verb} {name}={options[name]!r} but must have {name}=False: leave it out, or use "
                "torch.optim.AdamW."
            )
