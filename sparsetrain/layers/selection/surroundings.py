"""``Surroundings``: a model's modules under plain names, and what a layer's neighbours say about it."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..transposed_linear import TransposedLinear
from .layer_classes import Candidate
from .wrapped_names import peft_reasons, plain_names

ATTENTION_CHILDREN = frozenset(
    {"q", "k", "v", "q_proj", "k_proj", "v_proj", "q_lin", "query", "key", "value", "qkv", "qkv_proj", "c_attn"}
    | {"to_q", "to_k", "to_v", "to_qkv", "query_key_value", "Wqkv"}
)
"""Children by which a module is known as an attention block."""

EXPERTS = "expert"
"""What the name or class of a module that holds stacked experts has in it."""


class Surroundings:
    """What targets and heads are found from: layers, stacked experts and modules of a model, by name.

    Args:
        model: Any module.

    Example:
        >>> Surroundings(nn.Sequential(nn.Linear(4, 8), nn.ReLU())).layers
        {'0': Linear(in_features=4, out_features=8, bias=True)}
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.plain = plain_names(model)
        self._by_plain: dict[str, nn.Module] = {}
        for name, module in self.modules.items():
            self._by_plain[self.plain[name]] = module  # the innermost, where wrappers share a plain name
        self.layers: dict[str, Candidate] = {
            name: module for name, module in self.modules.items() if isinstance(module, Candidate)
        }
        self.peft_reasons = peft_reasons(model)
        self.own = {name: layer for name, layer in self.layers.items() if name not in self.peft_reasons}
        self.experts = dict(self._stacked_experts())
        for name in self.experts:
            self.plain[name] = f"{self.plain[_parent(name)]}.{name.rpartition('.')[2]}".lstrip(".")

    def _stacked_experts(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self.modules.items():
            known = EXPERTS in name.lower() or EXPERTS in type(module).__name__.lower()
            if known and not isinstance(module, Candidate):
                for key, parameter in module._parameters.items():
                    if parameter is not None and parameter.dim() == 3:
                        yield f"{name}.{key}".lstrip("."), parameter

    def in_order(self) -> list[str]:
        """Return the names of layers and stacked experts in the model's order."""
        order = {name: place for place, name in enumerate(self.modules)}
        return sorted((*self.layers, *self.experts), key=lambda name: order.get(name, order.get(_parent(name), 0)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a layer's weight, or of stacked experts; empty if it is not known yet."""
        weight = self.experts[name] if name in self.experts else self.layers[name].weight
        shape = () if is_lazy(weight) else tuple(weight.shape)
        return shape[::-1] if isinstance(self.layers.get(name), TransposedLinear) else shape

    def is_low_rank(self, name: str) -> bool:
        """Return whether a layer's name is that of a low-rank adapter."""
        return any(part.lower().startswith("lora_") for part in self.parts(name))

    def parts(self, name: str) -> list[str]:
        """Return the components of a layer's plain name."""
        return self.plain[name].split(".")

    def ancestors(self, name: str) -> list[tuple[str, nn.Module]]:
        """Return the component and module of everything above a layer but the model, from the inside out."""
        parts = self.parts(name)
        found = []
        for end in range(len(parts) - 1, 0, -1):
            module = self._by_plain.get(".".join(parts[:end]))
            if module is not None:
                found.append((parts[end - 1], module))
        return found

    def parent(self, name: str) -> nn.Module:
        """Return the module that holds a layer, or the wrapper around it."""
        above = self.ancestors(name)
        return above[0][1] if above else self.model

    def child(self, plain: str) -> nn.Module | None:
        """Return the module with a plain name; None if there is none."""
        return self._by_plain.get(plain)

    def attends(self, name: str) -> bool:
        """Return whether a layer is inside an attention block: by names, by the block's class or by its children."""
        above = self.ancestors(name)
        words = [word.lower() for part, module in above for word in (part, type(module).__name__)]
        if any(word.rstrip("_0123456789").endswith(("attn", "attention")) for word in words):
            return True
        return bool(ATTENTION_CHILDREN.intersection(self.parent(name)._modules))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
