"""``Reasons``: why a layer that targets match stays dense."""

from collections import defaultdict
from collections.abc import Set

from torch import nn

from ...distributed.shards import is_spread
from ...distributed.wrappers import FSDP1_REASON
from ...kernels.torch_internals import SHARDED_MODULE
from ..claims import run_of
from ..masked_layer import MaskedLayer
from ..sharded.alignment import is_root, require_no_root, require_shardable
from .heads import output_heads
from .layer_classes import LAYERS, base_class, why_subclass
from .report import NOT_IN_TARGETS
from .surroundings import Surroundings
from .weight_reads import weight_readers


class Reasons:
    """Why layers of a model stay dense.

    Args:
        surroundings: The model.

    Example:
        >>> Reasons(Surroundings(nn.Sequential(nn.Linear(3, 4)))).of("0", {"name"})
        'in_features 3 is not a multiple of 4'
    """

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._heads = output_heads(surroundings)
        self._owners = _parameter_owners(surroundings.model)
        self._readers = weight_readers(surroundings.model)

    def of(self, name: str, kinds: Set[str]) -> str:
        """Return why a layer stays dense; empty if it becomes sparse.

        Args:
            name: Of the layer, or of stacked experts.
            kinds: Of the targets that match it.

        Raises:
            ValueError: If its weight is spread over processes in a way that masks cannot follow.
        """
        if not kinds:
            return NOT_IN_TARGETS
        surroundings, reason = self._surroundings, self._of_itself(name)
        role = "output head" if name in self._heads else "low-rank adapter" if surroundings.is_low_rank(name) else ""
        if role and kinds == {"group"} and name not in surroundings.peft_reasons:
            return f"{role}, {reason}" if reason else f"{role} (name it in targets to make it sparse)"
        if not reason:
            layer = surroundings.layers[name]
            require_no_root(name, layer)
            if is_spread(layer.weight):
                require_shardable(name, layer, layer.weight)
        return reason

    def _of_itself(self, name: str) -> str:
        if name in self._surroundings.experts:
            return "3-D expert weights, which have no masks yet"
        if name in self._surroundings.peft_reasons:
            return self._surroundings.peft_reasons[name]
        layer = self._surroundings.layers[name]
        if isinstance(layer, MaskedLayer):
            if run_of(layer) is not None:
                return "already sparse: another SparseTraining trains it, so call its finish() first"
            return "already sparse: call finish() of the run that made it, or export_dense_(model, zeros=False), first"
        if id(layer) in self._readers:
            return f"{self._readers[id(layer)]} reads its weight itself"
        if not is_root(layer) and (reason := why_subclass(layer)):
            return reason
        if getattr(layer, SHARDED_MODULE, False) and not is_spread(layer.weight):
            return f"{FSDP1_REASON}: use fully_shard or DistributedDataParallel"
        if layer._parameters.get("weight") is None:
            return "weight is no parameter (weight_norm, spectral_norm or prune): remove that first"
        if (groups := getattr(layer, "groups", 1)) != 1:
            return f"groups is {groups}, and a mask needs 1"
        for dimension in LAYERS[base_class(layer)]:
            size = getattr(layer, dimension)
            if size % 4:
                return f"{dimension} {size} is not a multiple of 4"
        others = [owner for owner in self._owners[id(layer.weight)] if owner != f"{name}.weight".lstrip(".")]
        return f"tied to {others[0]}" if others else ""


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append(f"{name}.{key}" if name else key)
    return owners
