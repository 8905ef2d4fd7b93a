"""``LateParameters``: parameters that optimizers own while there are gradients of them, and not between steps."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Adagrad, Optimizer

from ..checks.rules import Rule, optional
from ..checks.states import by_layer, is_plain
from ..checks.tensors import why_not_plain
from ..distributed.shards import local, replicated_like
from ..distributed.wrappers import is_zero
from ..layers.masked_layer import MaskedLayer

Pair = tuple[Tensor, Tensor]
"""Two parameters that are trained in the same steps."""


class LateParameters:
    """Has parameters join the optimizers of weights as their gradients arrive, and leave them after the step.

    So what unscales, clips and clears gradients by an optimizer's groups finds them when there is something to find.
    Between steps an optimizer is that of a run without them, for its ``state_dict`` and for what names its state by the
    parameters of the model, such as ``torch.distributed.checkpoint``; what it knows of them is kept here meanwhile.

    Args:
        optimizers: Those that own the layers' weights.
        layers: Layer name to layer.
        parts: Layer name to parameters, which join the group of the layer's weight, at its end.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> layer, parts = SparseLinear(8, 4), tuple(torch.nn.Parameter(torch.zeros(size)) for size in (2, 3))
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> late = LateParameters([optimizer], {"fc": layer}, {"fc": parts})
        >>> parts[0].sum().backward()
        >>> len(optimizer.param_groups[0]["params"]), len(optimizer.state_dict()["param_groups"][0]["params"])
        (4, 2)
        >>> late.leave()
        >>> len(optimizer.param_groups[0]["params"])
        2
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], layers: Mapping[str, MaskedLayer], parts: Mapping[str, Pair]
    ) -> None:
        self._optimizers, self._layers, self._parts = optimizers, layers, parts
        every = [part for pair in parts.values() for part in pair]
        self._own = {id(part) for part in every}
        self._kept: dict[Tensor, dict[str, Any]] = {}
        self.joined = False
        """Whether optimizers own them now."""
        self._handles: list[Any] = [part.register_post_accumulate_grad_hook(self.join) for part in every]  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            self._handles.append(optimizer.register_state_dict_pre_hook(self._leave_without_gradients))
            self._handles.append(optimizer.register_state_dict_post_hook(self._left_out))
            self._handles.append(optimizer.register_load_state_dict_pre_hook(self._taken_out))

    def join(self, *_: Tensor) -> None:
        """Have the optimizers own them, with what they knew of them."""
        if self.joined:
            return
        self.joined = True
        for optimizer, group, parts in self._places():
            group["params"].extend(parts)
            optimizer.state.update({part: self._kept.pop(part) for part in parts if part in self._kept})

    def leave(self) -> None:
        """Take them and what the optimizers know of them out again; gradients stay."""
        if not self.joined:
            return
        self.joined = False
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [entry for entry in group["params"] if id(entry) not in self._own]
            for part in [entry for entry in optimizer.state if id(entry) in self._own]:
                self._kept[part] = optimizer.state.pop(part)

    def remove(self) -> None:
        """Leave for good."""
        self.leave()
        self._kept.clear()
        for handle in self._handles:
            handle.remove()

    def start_state(self, optimizer: Optimizer) -> None:
        """Give those that begin now the state that an optimizer would not make for them.

        A fused SGD wants momentum of all parameters or of none; Adagrad, before torch 2.13, makes its sums when it is
        constructed, for the parameters that it has then. Those whose gradients no backward brought join here.
        """
        if not self.joined and self._has_gradients():
            self.join()
        for group in optimizer.param_groups:
            if isinstance(optimizer, Adagrad):
                for part in group["params"]:
                    if id(part) in self._own and part.grad is not None and not optimizer.state.get(part):
                        device = part.device if group.get("fused") else None
                        optimizer.state[part]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                        optimizer.state[part]["sum"] = torch.full_like(part, group["initial_accumulator_value"])
            if not (group.get("fused") and group.get("momentum")):
                continue
            states = {entry: optimizer.state.get(entry, {}) for entry in group["params"] if entry.grad is not None}
            if any(state.get("momentum_buffer") is not None for state in states.values()):
                for part in (entry for entry in states if id(entry) in self._own and not states[entry]):
                    optimizer.state[part]["momentum_buffer"] = torch.zeros_like(part)

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Return copies of what the optimizers know of them, by layer; the parts that lie here."""
        known = {part: state for one in self._optimizers for part, state in one.state.items() if id(part) in self._own}
        known |= self._kept
        return {name: [_copied(known.get(part, {})) for part in pair] for name, pair in self._parts.items()}

    @property
    def rule(self) -> Rule:
        """What :meth:`load_state_dict` takes."""
        layers = by_layer({name: _of_pair(pair) for name, pair in self._parts.items()}, needed=None)

        def inside(name: str, value: Any) -> Iterator[str]:
            if complaint := layers.complaint(name, self._by_layer(value)):
                yield complaint

        return optional(Rule("a dict", lambda value: isinstance(value, Mapping | list | tuple), inside))

    def load_state_dict(self, state: Any) -> None:
        """Take back what :meth:`state_dict` returned; nothing is changed by None."""
        self.leave()
        if state is None:
            return
        self._kept.clear()
        found = self._by_layer(state)
        groups = {id(part): group for _, group, parts in self._places() for part in parts}
        for name, pair in self._parts.items():
            for part, own in zip(pair, found[name], strict=True):
                self._keep(part, groups.get(id(part), {}), own)

    def _by_layer(self, state: Any) -> Any:
        """Return states that a trainer's checkpoint of an earlier version had in the order of the groups by layer."""
        order = [id(part) for _, _, parts in self._places() for part in parts]
        if not isinstance(state, list | tuple) or len(state) != len(order):
            return state
        found = {part: {} if own is None else own for part, own in zip(order, state, strict=True)}
        return {name: [found.get(id(part), {}) for part in pair] for name, pair in self._parts.items()}

    def _keep(self, part: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Keep a saved state as torch's own optimizers would load it, but in the dtypes that it has."""
        moves = group.get("capturable") or group.get("fused")
        found = _copied(state)
        for key, value in found.items():
            if isinstance(value, Tensor):
                value = value.to(part.device) if key != "step" or moves else value
                found[key] = replicated_like(value, part) if value.dim() else value
        if found:
            self._kept[part] = found

    def _leave_without_gradients(self, optimizer: Optimizer) -> None:
        """Leave where a step was skipped, so that nothing was left after it."""
        if not self._has_gradients():
            self.leave()

    def _has_gradients(self) -> bool:
        return any(part.grad is not None for pair in self._parts.values() for part in pair)

    def _left_out(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
        """Have an optimizer save the state of a run without them, while they have gradients too."""
        if not self.joined:
            return None
        pairs = [*zip(optimizer.param_groups, saved["param_groups"], strict=True)]
        numbers = [number for group, packed in pairs for number in zip(group["params"], packed["params"], strict=True)]
        out = {number for part, number in numbers if id(part) in self._own}
        groups = [
            {**packed, "params": [number for number in packed["params"] if number not in out]} for _, packed in pairs
        ]
        state = {number: state for number, state in saved["state"].items() if number not in out}
        return {**saved, "state": state, "param_groups": groups}

    def _taken_out(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        """Have an optimizer load the state of a run without them, or of an earlier version, where it owned them."""
        self.leave()
        places = [(group, parts) for owner, group, parts in self._places() if owner is optimizer]
        groups = state["param_groups"]
        wide = [len(group["params"]) + len(parts) for group, parts in places]
        if not any(parts for _, parts in places) or [len(group["params"]) for group in groups] != wide:
            return None
        states = dict(state["state"])
        for (group, parts), packed in zip(places, groups, strict=True):
            for part, number in zip(parts, packed["params"][len(group["params"]) :], strict=True):
                self._keep(part, group, states.pop(number, {}))
        narrow = [
            {**packed, "params": packed["params"][: len(group["params"])]}
            for (group, _), packed in zip(places, groups, strict=True)
        ]
        return {**state, "state": states, "param_groups": narrow}

    def _places(self) -> Iterator[tuple[Optimizer, dict[str, Any], list[Tensor]]]:
        """Yield the groups of all optimizers, with those that belong into them, in the order of the layers."""
        left = {name: id(layer.parameter) for name, layer in self._layers.items()}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                weights = {id(entry) for entry in group["params"]}
                here = [name for name, weight in left.items() if weight in weights]
                yield optimizer, group, [part for name in here for part in self._parts[name]]
                left = {name: weight for name, weight in left.items() if weight not in weights}


def require_late_start(optimizers: Sequence[Optimizer]) -> None:
    """Raise ``ValueError`` unless parameters that begin in mid-run are updated as from the start.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> require_late_start([torch.optim.SGD([weight], momentum=0.9, fused=True)])
    """
    for optimizer in optimizers:
        if is_zero(optimizer):
            raise ValueError(
                "optimizer is ZeroRedundancyOptimizer but adapters join its parameters later than it deals them out: "
                "use the optimizer inside itself, or adapter_rank=0."
            )
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "optimizer is LBFGS but adapters join its parameters in mid-run, and its vectors have a length by "
                "then: use another optimizer, or adapter_rank=0."
            )
        for group in optimizer.param_groups:
            if group.get("fused") and group.get("momentum") and group.get("dampening"):
                raise ValueError(
                    f"optimizer is {type(optimizer).__name__} with fused=True and dampening={group['dampening']} but "
                    "adapters begin in mid-run, without momentum: set fused=False, dampening=0 or adapter_rank=0."
                )


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: local(value).detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in state.items()
    }


def _of_pair(pair: Pair) -> Rule:
    """Allow what an optimizer can know of two parameters that it has updated in the same steps: the same of both."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(own, Mapping) for own in value):
            return False
        first, second = value
        return first.keys() == second.keys() and all(_agree(pair, key, first[key], second[key]) for key in first)

    return Rule("a list of 2 states of an optimizer, as they are after the same steps", accepts)


def _agree(pair: Pair, key: Any, first: Any, second: Any) -> bool:
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return type(first) is type(second) and is_plain([first, second])
    if any(map(why_not_plain, (first, second))) or (first.dtype, first.dim()) != (second.dtype, second.dim()):
        return False
    if key == "step" and not (torch.equal(first, second) and bool((first >= 0).all())):
        return False
    if first.dim() != pair[0].dim():
        return True
    sizes = zip(first.shape, pair[0].shape, second.shape, pair[1].shape, strict=True)
    return all(
        one in (1, whole) and other in (1, all_) and (1 in (whole, all_) or (one == whole) == (other == all_))
        for one, whole, other, all_ in sizes
    )
