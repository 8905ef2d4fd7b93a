"""``Masters``: which tensor every layer's weight is and which optimizer owns it, although both may be replaced."""

from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed.shards import gradient_here, is_spread
from ..layers.masked_layer import MaskedLayer
from .step_hooks import owned_parameters

_GRADIENT, _REQUIRES_GRAD = attrgetter("grad"), attrgetter("requires_grad")
_found_in = dict.get


class Masters:
    """The weights that a run trains; before every optimizer step it looks whether they still are those of the layers.

    ``layer.weight = nn.Parameter(...)``, ``load_state_dict(assign=True)`` and a few conversions put other tensors into
    layers, and optimizers may be given other parameter groups. What fits is followed; what does not is refused.

    Args:
        model: Whose layers they are.
        layers: Layer name to layer.
        optimizers: Those whose steps are counted.
        check_shards: Raises if the run cannot go on with weights that were sharded since it began.

    Example:
        >>> import torch
        >>> from sparsetrain import SparseLinear
        >>> model = nn.Sequential(SparseLinear(8, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> masters = Masters(model, {"0": model[0]}, [optimizer])
        >>> model[0].weight = nn.Parameter(torch.zeros(4, 8))
        >>> optimizer.param_groups[0]["params"][0] = model[0].weight
        >>> list(masters.follow(optimizer)), masters.weights["0"] is model[0].weight
        (['0'], True)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, MaskedLayer],
        optimizers: Sequence[Optimizer],
        check_shards: Callable[[], None] | None = None,
    ) -> None:
        self.weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}
        self.owned = {id(optimizer): owned_parameters(optimizer) for optimizer in optimizers}
        self._model, self._layers, self._optimizers = model, dict(layers), list(optimizers)
        self._check_shards = check_shards
        self._paths = {name: name.split(".") if name else [] for name in layers}
        self._listed: tuple[list[dict[str, Any]], list[Tensor]] = ([], [])  # where weights are looked for, and they
        self._edges: tuple[list[dict[str, Any]], list[str], list[Any]] = [], [], []  # of the tree: paths to all layers
        self._groups: dict[int, list[list[Tensor]]] = {}  # parameters of every optimizer
        self._own: dict[int, tuple[tuple[str, ...], list[Tensor]]] = {}  # of every optimizer
        self._layers_of: dict[int, dict[str, MaskedLayer]] = {}
        self._list()

    def follow(self, optimizer: Optimizer) -> dict[str, tuple[Tensor, Tensor]]:
        """Take over what was replaced since the last step; no weight may be gathered.

        Args:
            optimizer: The one that is about to step.

        Returns:
            Layer name to the weight until now and the new one.

        Raises:
            RuntimeError: If a new weight does not fit or no optimizer owns it, or a layer is no longer in the model;
                nothing is changed then.
        """
        parents, names, children = self._edges
        if not all(map(is_, map(_found_in, parents, names), children)):
            for name in [name for name, path in self._paths.items() if self._found_at(path) is not self._layers[name]]:
                self._require_elsewhere(name, self._layers[name])
                del self._paths[name]
            self._list()
        parameters, weights = self._listed
        # nn.Module would find each weight in half a microsecond or more
        same = all(map(is_, [own.get("weight") for own in parameters], weights))
        if same and (self._has_same_groups(optimizer) or owned_parameters(optimizer) == self.owned[id(optimizer)]):
            return {}
        replaced = {
            name: (self.weights[name], layer.weight)
            for name, layer in self._layers.items()
            if layer._parameters.get("weight") is not self.weights[name]
        }
        self._take_over(replaced)
        return replaced

    def _take_over(self, replaced: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Note new weights and what optimizers own now; an error if that does not fit, and nothing is noted then."""
        now = {id(entry): owned_parameters(entry) for entry in self._optimizers}
        before, after = set().union(*self.owned.values()), set().union(*now.values())
        for name, layer in self._layers.items():
            if name in replaced:
                self._require_fit(name, *replaced[name])
            had_owner = name in replaced or id(layer.weight) in before
            if had_owner and layer.weight.requires_grad and id(layer.weight) not in after:
                raise RuntimeError(
                    f"layer {name!r} has a {'new ' * (name in replaced)}weight that none of the run's optimizers owns, "
                    "so it would stay as it is: write into the old one (with torch.no_grad(): weight.copy_(...)), or "
                    "put the new one into the optimizer's param_groups."
                )
        if self._check_shards is not None and any(is_spread(new) for _, new in replaced.values()):
            self._check_shards()
        self.owned.update(now)
        self.weights.update({name: new for name, (_, new) in replaced.items()})
        self._list()

    def gradients(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return the gradients that there are of an optimizer's layers, or of their parts here, by layer name."""
        names, weights = self.of(optimizer)
        gradients = [*map(_GRADIENT, weights)]
        if self._is_spread:
            gradients = [*map(gradient_here, weights)]
        if not any(map(is_, gradients, repeat(None))) and not any(map(_REQUIRES_GRAD, gradients)):
            return dict(zip(names, gradients, strict=True))
        return {
            name: gradient.detach() if gradient.requires_grad else gradient
            for name, gradient in zip(names, gradients, strict=True)
            if gradient is not None
        }

    def of(self, optimizer: Optimizer) -> tuple[tuple[str, ...], list[Tensor]]:
        """Return the names of an optimizer's layers, and their weights."""
        return self._own[id(optimizer)]

    def layers_of(self, optimizer: Optimizer) -> dict[str, MaskedLayer]:
        """Return an optimizer's layers; the same object as long as they are the same."""
        return self._layers_of[id(optimizer)]

    def _list(self) -> None:
        """List what every step looks at."""
        self._is_spread = any(map(is_spread, self.weights.values()))
        self._listed = [layer._parameters for layer in self._layers.values()], [*self.weights.values()]
        for optimizer, owned in self.owned.items():
            own = {name: weight for name, weight in self.weights.items() if id(weight) in owned}
            self._own[optimizer] = tuple(own), [*own.values()]
            self._layers_of[optimizer] = {name: self._layers[name] for name in own}
        edges: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        for name, path in self._paths.items():
            module: Any = self._model
            for part in path:
                children = {} if module is None else module._modules
                module = children.get(part)
                edges[id(children), part] = children, part, module
            if module is not self._layers[name]:
                edges[0, name] = {}, name, self._layers[name]  # is looked for at the next step
        found = [*edges.values()]
        self._edges = [edge[0] for edge in found], [edge[1] for edge in found], [edge[2] for edge in found]
        for entry in self._optimizers:
            same = owned_parameters(entry) == self.owned[id(entry)]
            self._groups[id(entry)] = [[*group["params"]] for group in entry.param_groups] if same else []

    def _has_same_groups(self, optimizer: Optimizer) -> bool:
        """Say whether an optimizer has the parameters that it had, in the same groups."""
        seen, groups = self._groups[id(optimizer)], optimizer.param_groups
        return len(seen) == len(groups) and all(
            len(own) == len(group["params"]) and all(map(is_, own, group["params"]))
            for own, group in zip(seen, groups, strict=True)
        )

    def _found_at(self, path: Sequence[str]) -> Any:
        module: Any = self._model
        for part in path:
            module = None if module is None else module._modules.get(part)
        return module

    def _require_elsewhere(self, name: str, layer: MaskedLayer) -> None:
        if not any(module is layer for module in self._model.modules()):  # if it is, something was put around it
            raise RuntimeError(
                f"layer {name!r} is not in the model any more, so its mask would have no effect: call finish() before "
                "layers are replaced, and make a new SparseTraining."
            )

    @staticmethod
    def _require_fit(name: str, old: Tensor, new: Tensor) -> None:
        if new.shape != old.shape or new.dtype != old.dtype:
            raise RuntimeError(
                f"layer {name!r} has a new weight {tuple(new.shape)} in {new.dtype} but the run began with "
                f"{tuple(old.shape)} in {old.dtype}: keep both, or call finish() and make a new SparseTraining."
            )
