"""Operands of a layer: its masked weight in the forms that backends multiply by, renewed after any write to it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .backends import BACKENDS, Backend, Operand
from .backends.filling import PARTS, Filling, fill_
from .backends.interface import WeightProduct
from .dispatch import Choice


@dataclass(frozen=True)
class Execution:
    """How a layer's products are computed.

    Args:
        backend: A backend's name, or ``"auto"``: the fastest of those that are right, by measurement.
        deterministic: With ``"auto"``, one verified algorithm a layer, the same in every run, whatever the clock says.
        keep_transposed: Keep Wᵀ packed between steps; False packs it anew in every backward, for 9/16 of a 16-bit
            weight less memory.
        transposable: Whether masks are transposable, so that the input gradient can run sparse.
        weight_product: ``"dense"``, or ``"mvue"``: the weight gradient from an unbiased 2:4 estimate of the output
            gradient, so that it can run sparse too.
        seed: Of the estimate's random numbers.

    Example:
        >>> Execution("masked").keep_transposed
        True
    """

    backend: str = "auto"
    deterministic: bool = False
    keep_transposed: bool = True
    transposable: bool = True
    weight_product: WeightProduct = "dense"
    seed: int = 0


MAX_IDLE = 8
"""Renewals that an operand outlives without being used."""

PRODUCT_NAMES = {False: "forward", True: "input gradient", None: "weight gradient"}

Key = tuple[str, bool, torch.dtype]
"""Backend, whether the operand is Wᵀ, dtype."""


class Operands:
    """The packed forms of one weight: made when a product first asks, renewed in place when the weight has changed.

    A change is seen by the version counters and addresses of weight and codes, and every optimizer's step counts as
    one, because fused optimizers leave the counters alone. Other writes without a trace, as those through
    ``weight.data``, have to be told by :meth:`expire`. Who sets ``managed`` calls :func:`renew_` after each step.
    """

    def __init__(self, execution: Execution | None = None) -> None:
        self.execution = execution or Execution()
        self.managed = False
        self.choices: dict[tuple[bool | None, int, torch.dtype, bool, str], Choice] = {}
        self._made: dict[Key, Operand] = {}
        self._idle: dict[Key, int] = {}  # renewals since the last use
        self._captured: set[Key] = set()
        self._stamp: tuple[int, ...] | None = None
        self._bias: dict[torch.dtype, tuple[tuple[int, ...] | None, Tensor]] = {}
        self._place: tuple[object, ...] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> "Operands":
        return Operands(self.execution)  # the copy has another weight

    def __reduce__(self) -> tuple[object, ...]:
        return Operands, (self.execution,)

    @property
    def bytes(self) -> int:
        """Bytes that the operands take on the device."""
        return sum(operand.bytes for operand in self._made.values())

    def get(self, weight: Tensor, codes: Tensor, backend: Backend, transposed: bool, dtype: torch.dtype) -> Operand:
        """Return W (or Wᵀ if ``transposed``), masked, as the backend reads it; up to date."""
        stamp = stamp_of(weight, codes)
        if stamp is None or stamp != self._stamp:
            renew_([self], [weight], [codes])
        if transposed and backend.symmetric:
            operand = self.get(weight, codes, backend, False, dtype)
            return Operand(operand.shape[::-1], (operand.tensors[0].t(),))
        key = (backend.name, transposed, dtype)
        self._idle[key] = 0
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured.add(key)
        if key in self._made:
            return self._made[key]
        made = backend.allocate((weight.shape[::-1] if transposed else weight.shape), dtype, weight.device)  # type: ignore[arg-type]
        fill_([Filling(weight, codes, backend, dtype, **{"transpose" if transposed else "operand": made})])
        if self.execution.keep_transposed or not transposed:
            self._made[key] = made
        return made

    def bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the bias in ``dtype``, at an address that stays."""
        if bias is None or bias.dtype == dtype:
            return bias
        stamp = stamp_of(bias)
        held = self._bias.get(dtype)
        if held is None or held[1].device != bias.device:
            held = None, torch.empty_like(bias, dtype=dtype)
        if stamp is None or held[0] != stamp:
            held[1].copy_(bias)
            self._bias[dtype] = stamp, held[1]
        return held[1]

    def describe(self) -> str:
        """Return who computes which product, as far as it has been decided."""
        texts: dict[str, None] = {}  # in order, once each
        for (transposed, tokens, *_), choice in sorted(self.choices.items(), key=lambda item: str(item[0])):
            product = PRODUCT_NAMES[transposed]
            texts[f"{product} {choice} at {tokens} tokens"] = None
        return ", ".join(texts) or ("masked" if self.execution.backend == "masked" else "not decided yet")

    def expire(self) -> None:
        """Have everything renewed before its next use."""
        self._stamp = None
        self._bias = {dtype: (None, held) for dtype, (_, held) in self._bias.items()}

    def release(self) -> None:
        """Free all memory."""
        self._made.clear()
        self._idle.clear()
        self._captured.clear()
        self._bias.clear()
        self._stamp = None

    def _stale(self) -> dict[Key, Operand]:
        """Forget what nobody used for long, and return the rest; captured graphs use theirs unseen."""
        for key in list(self._made):
            self._idle[key] = self._idle.get(key, 0) + 1
            if self._idle[key] > MAX_IDLE and key not in self._captured:
                del self._made[key]
        return self._made


_OPERANDS: WeakValueDictionary[tuple[object, ...], Operands] = WeakValueDictionary()


def register(operands: Operands, weight: Tensor) -> None:
    """Let products with this weight find these operands, and no longer those of an earlier address."""
    if type(weight) not in (Tensor, Parameter):
        return  # fake and distributed tensors have no address
    _watch_optimizers()
    place = (weight.device, weight.data_ptr())
    if operands._place != place:
        if operands._place is not None and _OPERANDS.get(operands._place) is operands:
            del _OPERANDS[operands._place]
        operands._place = place
    _OPERANDS[place] = operands


@functools.cache
def _watch_optimizers() -> None:
    def expire(optimizer: Optimizer, arguments: object, keywords: object) -> None:
        for group in optimizer.param_groups if _OPERANDS else ():
            for parameter in group["params"]:
                operands = operands_of(parameter) if type(parameter) is Parameter else None
                if operands is not None and not operands.managed:
                    operands.expire()

    register_optimizer_step_post_hook(expire)


def operands_of(weight: Tensor) -> Operands | None:
    """Return the operands registered for a weight."""
    return _OPERANDS.get((weight.device, weight.data_ptr()))


def stamp_of(*tensors: Tensor) -> tuple[int, ...] | None:
    """Return numbers that change when a tensor is written to or replaced; None if that cannot be known.

    Example:
        >>> weight = torch.zeros(4)
        >>> before = stamp_of(weight)
        >>> before == stamp_of(weight.add_(1))
        False
    """
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple(number for tensor in tensors for number in (tensor.data_ptr(), tensor._version))


def renew_(operands: Sequence[Operands], weights: Sequence[Tensor], codes: Sequence[Tensor]) -> None:
    """Fill the operands of several weights anew, in place; equal layouts share a launch."""
    fillings = []
    for entry, weight, code in zip(operands, weights, codes, strict=True):
        made = entry._stale()
        for name, dtype in {(name, dtype): None for name, _, dtype in made}:
            parts = {part: made.get((name, transposed, dtype)) for part, transposed in PARTS.items()}
            fillings.append(Filling(weight, code, BACKENDS[name], dtype, **parts))
    fill_(fillings)
    for entry, weight, code in zip(operands, weights, codes, strict=True):
        entry._stamp = stamp_of(weight, code)
