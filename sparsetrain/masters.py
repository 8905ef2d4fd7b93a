"""``Masters``: which tensor every layer's weight is and which optimizer owns it, although both may be replaced."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .masked_layer import MaskedLayer
from .optimizer_hooks import owned_parameters


class Masters:
    """The weights that a run trains; before every optimizer step it looks whether they still are those of the layers.

    ``layer.weight = nn.Parameter(...)``, ``load_state_dict(assign=True)`` and a few conversions put other tensors into
    layers, and optimizers may be given other parameter groups. What fits is followed; what does not is refused.

    Args:
        model: Whose layers they are.
        layers: Layer name to layer.
        optimizers: Those whose steps are counted.

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

    def __init__(self, model: nn.Module, layers: Mapping[str, MaskedLayer], optimizers: Sequence[Optimizer]) -> None:
        self.weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}
        self.owned = {id(optimizer): owned_parameters(optimizer) for optimizer in optimizers}
        self._model, self._layers, self._optimizers = model, dict(layers), list(optimizers)
        self._paths = {name: name.split(".") if name else [] for name in layers}

    def follow(self, optimizer: Optimizer) -> dict[str, tuple[Tensor, Tensor]]:
        """Take over what was replaced since the last step.

        Args:
            optimizer: The one that is about to step.

        Returns:
            Layer name to the weight until now and the new one.

        Raises:
            RuntimeError: If a new weight does not fit or no optimizer owns it, or a layer is no longer in the model;
                nothing is changed then.
        """
        for name in [name for name, path in self._paths.items() if self._found_at(path) is not self._layers[name]]:
            self._require_elsewhere(name, self._layers[name])
            del self._paths[name]
        # nn.Module would find each weight in half a microsecond or more
        replaced = {
            name: (self.weights[name], layer.weight)
            for name, layer in self._layers.items()
            if layer._parameters.get("weight") is not self.weights[name]
        }
        owned = owned_parameters(optimizer)
        if not replaced and owned == self.owned[id(optimizer)]:
            return {}
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
        self.owned.update(now)
        self.weights.update({name: new for name, (_, new) in replaced.items()})
        return replaced

    def gradients(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return the gradients that there are of an optimizer's layers, by layer name."""
        owned, found = self.owned[id(optimizer)], {}
        for name, weight in self.weights.items():
            if id(weight) in owned and (gradient := weight.grad) is not None:
                found[name] = gradient.detach() if gradient.requires_grad else gradient
        return found

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
