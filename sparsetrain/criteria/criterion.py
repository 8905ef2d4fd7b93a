"""``Criterion``: the one interface of everything that ranks the entries of a weight."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..checks.rules import DICT
from ..checks.states import refuse, require_state
from ..checks.tensors import require_floating


class Criterion:
    """What ranks the entries of a weight when masks are searched.

    Subclass it, implement :meth:`scores`, and pass an instance as ``Method(criterion=...)``. A criterion that gathers
    statistics names in ``needs`` what it wants to see, notes it in the ``observe_*`` methods, counts it in
    :meth:`observe_step`, and keeps it in :meth:`state_dict`, as plain numbers and tensors, so that a run resumes bit
    for bit. None of these methods may read a number from the device.
    """

    name: ClassVar[str] = "custom"
    needs: ClassVar[frozenset[str]] = frozenset()
    """Any of ``"gradient"`` and ``"input"``; what is not needed is not computed."""
    of_shape: ClassVar[bool] = False
    """Whether scores follow from the weight's shape, the layer and the clock alone, as numbers that are drawn do; of a
    weight that is spread over processes, the whole shape is scored, and each takes its part."""

    def scores(self, weight: Tensor, *, layer: str, clock: int) -> Tensor:
        """Score a weight.

        Args:
            weight: ``[O, I]``, the master.
            layer: The layer's name in the model.
            clock: Successful optimizer steps so far.

        Returns:
            ``[O, I]``, floating point; larger is kept.
        """
        raise NotImplementedError

    def missing(self, layers: Iterable[str]) -> list[str]:
        """Return the layers whose scores need statistics that are not there, so that something else stands in.

        Asked when masks are searched, and may read from the device. Masks are never searched so before the first step,
        and later with a warning.

        Args:
            layers: Names of the layers whose masks are searched.
        """
        return []

    def observe_gradient(self, layer: str, weight: Tensor, gradient: Tensor, scale: Tensor | None) -> None:
        """Note the final gradient of a step that may still be skipped; a later note of the layer replaces it.

        Args:
            layer: The layer's name in the model.
            weight: ``[O, I]``, the master before the step.
            gradient: ``[O, I]``, clipped, with nothing added.
            scale: What the gradient is multiplied by, a scalar tensor; None for 1.
        """

    def summarize_input(self, input: Tensor) -> Tensor:
        """Reduce a layer's input to what is counted of it.

        Args:
            input: ``[..., I]``, as it enters the layer.

        Returns:
            A float32 tensor whose shape depends on I alone and whose sum over micro-batches and ranks means something.
        """
        raise NotImplementedError

    def observe_input(self, layer: str, summary: Tensor) -> None:
        """Note a step's sum of :meth:`summarize_input`; the step may still be skipped, and a later note replaces it.

        Args:
            layer: The layer's name in the model.
            summary: The sum over the step's micro-batches and all data-parallel ranks.
        """

    def observe_step(self) -> None:
        """Count what was noted: the step succeeded."""

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as plain numbers and tensors."""
        return {}

    def check_state_dict(self, state: Any, sizes: Mapping[str, tuple[int, int, int]]) -> None:
        """Raise ``ValueError`` if a state cannot be loaded; changes nothing.

        A copy of the criterion tries to load it, unless a subclass knows better.

        Args:
            state: What :meth:`state_dict` returned, or what has become of it.
            sizes: Layer name to rows O and columns of the weight that is scored, and the layer's input features I.
        """
        require_state("criterion", state, DICT)
        try:
            copy.deepcopy(self).load_state_dict(dict(state))
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            refuse(f"state['criterion'] cannot be loaded by criterion {self.name!r} ({reason})")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""


def scores_of(criterion: Criterion, weight: Tensor, *, layer: str, clock: int) -> Tensor:
    """Return what a criterion scores a weight, once it is known to be scores.

    Raises:
        TypeError: If it is no dense floating-point tensor.
        ValueError: If its shape is not the weight's.

    Example:
        >>> import torch
        >>> from .stateless import Magnitude
        >>> scores_of(Magnitude(), torch.tensor([[-2.0, 1.0]]), layer="fc", clock=0).tolist()
        [[2.0, 1.0]]
    """
    scores = criterion.scores(weight, layer=layer, clock=clock)
    name = f"what criterion {criterion.name!r} returns as scores of layer {layer!r}"
    require_floating(name, scores)
    if scores.shape != weight.shape:
        raise ValueError(f"{name} has shape {tuple(scores.shape)}: it must have the weight's, {tuple(weight.shape)}.")
    return scores
