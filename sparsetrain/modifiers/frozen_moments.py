"""Frozen second moments: Adam goes on with its first moments, scaled as gradients were when the others froze."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from ..checks.rules import DICT, mapping, number, optional, sequence
from ..checks.states import refuse_missing, require_part, tensor
from ..distributed.layouts import Layout, layout_of
from ..distributed.shards import is_spread
from ..kernels.torch_internals import INIT_GROUP
from .adam_update import Frozen, nowhere, update_
from .base import Entry, Modifier, Resumed, Run, Setup

CORRECTION = number("a number above 0 and at most 1", lambda value: 0 < value <= 1)
"""What ``1 - β₂ᵀ`` can be."""

UNABLE = ("amsgrad", "fused", "differentiable")
"""Options of Adam that a frozen update does not support."""


class FrozenMoments(Modifier):
    """Updates every parameter with its running first and its frozen second moment, where that had settled.

    ``m_t = β₁·m_{t-1} + (1 - β₁)·g_t`` and ``w -= lr·m_t / (1 - β₁ᵗ) / (√v* + ε)``, where
    ``v* = v_T / (1 - β₂ᵀ)`` is the moment after the parameter's T steps until then. Weight decay is the optimizer's.

    A gradient of which an entry's moment knew nothing, ``|g_t| > 10·√v*``, shows that the moment had not settled: it
    is zero where there was no gradient until then, as in an embedding's unused rows and in dead units, and next to
    nothing where there was one long ago. From that step on Adam goes on for the entry, from ``v*``. So no entry moves
    by more than ``10·lr``, or by more than Adam would move it. A parameter that had no step until then has nothing to
    freeze, so Adam goes on for it as a whole.

    Args:
        optimizers: Those whose parameters are meant, all of them.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.0, 0.9), eps=0.0)
        >>> moments = FrozenMoments([optimizer])
        >>> for gradient in (2.0, 1.0):
        ...     weight.grad = torch.tensor([gradient])
        ...     optimizer.step()
        ...     moments.freeze()
        >>> weight.item()  # -2 / √4 - 1 / √4
        -1.5

    Source: Lu et al., "STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition", ICML 2023,
    arXiv 2302.01172, which freezes every entry.
    """

    name = "frozen_moments"

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._frozen: dict[Tensor, Frozen] | None = None

    @classmethod
    def check(cls, setup: Setup) -> None:
        """Raise ``ValueError`` unless moments form in a dense phase and can be frozen."""
        if not setup.method.freeze_second_moments:
            return
        if (first := setup.method.schedule.first_kind) != "dense":
            raise ValueError(
                f"freeze_second_moments is True but the first phase is {first}: begin with a dense phase, "
                "in which second moments form, or set it to False."
            )
        require_freezable(setup.optimizers)

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return it for methods with ``freeze_second_moments``."""
        return cls(setup.optimizers) if run.method.freeze_second_moments else None

    def enter_phase(self, run: Run, entry: Entry) -> None:
        """Freeze as the first masks come into force."""
        if run.phase != "dense" and not entry.resumed:
            self.freeze()

    def freeze(self) -> None:
        """Freeze the second moments that there are; does nothing if some are frozen already."""
        if self._frozen is not None:
            return
        found: dict[Tensor, Frozen] = {}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    count = float(optimizer.state.get(parameter, {}).get("step", 0.0))
                    if count:
                        found[parameter] = Frozen(1 - float(group["betas"][1]) ** count, nowhere(parameter))
        self._replace_updates(found)

    def detach(self) -> None:
        """Have Adam update everything again."""
        self._frozen = None
        for optimizer in self._optimizers:
            optimizer.__dict__.pop(INIT_GROUP, None)

    def follow(self, name: str, old: Tensor, new: Tensor) -> None:
        """Go on with a parameter in another's place; if its moments did not come along, Adam begins again."""
        if self._frozen is not None and old in self._frozen:
            self._frozen[new] = self._frozen.pop(old)

    def state_dict(self) -> list[list[dict[str, Any] | None]] | None:
        """Return what is frozen of every optimizer's parameters in their order; None before.

        Of a parameter: None if it is not frozen, or else ``correction``, and ``going``: bool, where Adam goes on, or
        None if it does so nowhere in a whole parameter.
        """
        if self._frozen is None:
            return None
        return [[_saved(entry, self._frozen.get(entry)) for entry in _parameters(one)] for one in self._optimizers]

    def layouts(self) -> Mapping[tuple[str | int, ...], Layout]:
        """Return how ``going`` of every parameter is spread: as the parameter is."""
        found: dict[tuple[str | int, ...], Layout] = {}
        for owner, optimizer in enumerate(self._optimizers):
            for index, parameter in enumerate(_parameters(optimizer)):
                shape, _, mesh, placements = layout_of(parameter)
                pairs = (2,) if parameter.is_complex() else ()
                found[owner, index, "going"] = Layout((*shape, *pairs), torch.bool, mesh, placements)
        return found

    def check_state(self, state: Any, resumed: Resumed) -> None:
        """Raise ``ValueError`` if a state is damaged or of other optimizers; changes nothing."""
        if state is None:
            if resumed.same and resumed.phase != "dense":
                refuse_missing(self.name)
            return
        here = [len(_parameters(optimizer)) for optimizer in self._optimizers]
        require_part(self.name, state, sequence(sequence(optional(DICT))))
        if (found := [len(entries) for entries in state]) != here:
            raise ValueError(
                f"state has frozen moments of {found} parameters but the optimizers have {here}: resume with the same "
                "optimizers."
            )
        for parameter, entry in self._pairs(state):
            going = optional(tensor(torch.bool, nowhere(parameter).shape))
            require_part(self.name, entry, optional(mapping({"correction": CORRECTION, "going": going})))

    def load_state_dict(self, state: Sequence[Sequence[Mapping[str, Any] | None]] | None) -> None:
        """Take back what :meth:`state_dict` returned; the moments themselves are in the optimizers' states."""
        self.detach()
        if state is None:
            return
        found: dict[Tensor, Frozen] = {}
        for parameter, entry in self._pairs(state):
            if entry is not None:
                frozen = found[parameter] = Frozen(float(entry["correction"]), nowhere(parameter))
                if entry["going"] is not None:
                    frozen.going.copy_(entry["going"])
        self._replace_updates(found)

    def _pairs(
        self, state: Sequence[Sequence[Mapping[str, Any] | None]]
    ) -> Iterator[tuple[Tensor, Mapping[str, Any] | None]]:
        for optimizer, entries in zip(self._optimizers, state, strict=True):
            yield from zip(_parameters(optimizer), entries, strict=True)

    def _replace_updates(self, frozen: dict[Tensor, Frozen]) -> None:
        self._frozen = frozen
        for optimizer in self._optimizers:
            optimizer.__dict__[INIT_GROUP] = functools.partial(self._init_group, optimizer)

    def _init_group(self, optimizer: Optimizer, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Update what is frozen, and give Adam the rest of the group."""
        assert self._frozen is not None
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        others = []
        for parameter in group["params"]:
            if not optimizer.state.get(parameter):
                self._frozen.pop(parameter, None)  # its moments were dropped
            if parameter.grad is None or parameter not in self._frozen:
                others.append(parameter)
            else:
                alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        for parameters in alike.values():
            states = [optimizer.state[parameter] for parameter in parameters]
            frozen = [self._frozen[parameter] for parameter in parameters]
            for parameter, entry in zip(parameters, frozen, strict=True):
                entry.going = entry.going.to(parameter.device)  # the model may have moved
            update_(parameters, states, frozen, {"decoupled_weight_decay": type(optimizer) is AdamW, **group})
        return bool(getattr(type(optimizer), INIT_GROUP)(optimizer, {**group, "params": others}, *lists))


def require_freezable(optimizers: Sequence[Optimizer]) -> None:
    """Raise ``ValueError`` unless second moments of every optimizer can be frozen.

    Example:
        >>> require_freezable([torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])])
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if type(optimizer) not in (Adam, AdamW) or not hasattr(optimizer, INIT_GROUP):
            raise ValueError(
                f"optimizer is {name} but freeze_second_moments needs torch.optim.Adam or AdamW itself: use one of "
                "them, or set freeze_second_moments=False."
            )
        for option in UNABLE:
            if any(group.get(option) for group in optimizer.param_groups):
                raise ValueError(
                    f"optimizer is {name} with {option}=True but freeze_second_moments needs {option}=False: turn one "
                    "of them off."
                )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _saved(parameter: Tensor, frozen: Frozen | None) -> dict[str, Any] | None:
    if frozen is None:
        return None
    going = frozen.going.cpu().clone() if is_spread(parameter) or frozen.going.any() else None
    return {"correction": frozen.correction, "going": going}
