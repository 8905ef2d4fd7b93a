"""Selection: which linear and convolutional layers become sparse, and why the others stay dense."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy

from ...checks.rules import require
from ..claims import run_of
from ..masked_layer import MaskedLayer
from ..options import MODULE
from .heads import output_heads
from .layer_classes import LAYERS, Candidate, base_class, why_subclass
from .report import LayerChoice as LayerChoice
from .report import SelectionReport as SelectionReport
from .surroundings import Surroundings
from .targets import Match, as_list, match, no_match
from .weight_reads import weight_readers


def select_layers(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    pattern: str = "transposable",
) -> SelectionReport:
    r"""Decide for every linear and convolutional layer of a model whether it becomes sparse; changes nothing.

    An entry of ``targets`` or ``exclude`` is a group, or else what it matches first of these, each tried on the names
    of layers and then on those of submodules, which stand for every layer inside:

    1. a name or its end after a dot: ``"fc1"``, ``"mlp.up"``, ``"encoder"``, ``"model.layers.0"``;
    2. a glob that matches a name or its end after a dot: ``"layers.*.mlp.*"``, in which ``*`` spans dots;
    3. a regular expression that matches a whole name: ``r"layers\.[0-3]\..*"``.

    What ``torch.compile``, data parallelism and peft put into names may be left out: ``base_model.model.`` in front,
    ``.base_layer`` behind.

    Args:
        model: Any module.
        targets: One or several entries. The groups are ``"all-linear"`` (every linear layer, transformers' ``Conv1D``
            among them), ``"all-conv"`` (every 1-D and 2-D convolution) and ``"mlp"`` (the layers of feed-forward
            blocks); a group takes no output head. All other entries mean linear layers and convolutions alike.
        exclude: Entries that win over targets.
        pattern: Named in the report.

    Raises:
        ValueError: If a target matches no layer, is no regular expression, or no layer is left to be sparse.
        TypeError: If an entry is no string.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> [choice.name for choice in select_layers(model, targets=["2"]).sparse]
        ['2']
    """
    require("model", model, MODULE)
    wanted = as_list("targets", targets)
    unwanted = as_list("exclude", exclude)
    surroundings = Surroundings(model)
    matches = {target: match(target, surroundings) for target in wanted}
    for target, found in matches.items():
        if not found.names:
            raise ValueError(no_match(target, surroundings))
    excluded: set[str] = set()
    for entry in unwanted:
        found = match(entry, surroundings, "exclude")
        excluded |= found.names
        if not found.names:
            warnings.warn(f"exclude: {entry!r} matches no layer of the model.", stacklevel=2)
    heads = output_heads(surroundings)
    owners = _parameter_owners(model)
    readers = weight_readers(model)
    choices = []
    for name in surroundings.in_order():
        hits = [found for found in matches.values() if name in found.names]
        if not hits:
            reason = "not in targets"
        elif name in excluded:
            reason = "excluded"
        else:
            reason = _why_dense(name, surroundings, owners, readers)
            role = "output head" if name in heads else "low-rank adapter" if surroundings.is_low_rank(name) else ""
            by_group = all(found.kind == "group" for found in hits)
            if role and by_group and name not in surroundings.peft_reasons:
                reason = f"{role}, {reason}" if reason else f"{role} (name it in targets to make it sparse)"
        is_named = reason != "excluded" and any(found.kind == "name" for found in hits)
        is_frozen = name in surroundings.layers and not surroundings.layers[name].weight.requires_grad
        choices.append(LayerChoice(name, surroundings.shape(name), reason, is_named=is_named, is_frozen=is_frozen))
    report = SelectionReport(_with_fruitless(choices, matches), pattern)
    if not report.sparse:
        reasons = "; ".join(
            f"{choice.name}: {choice.reason}" for choice in choices if choice.reason != "not in targets"
        )
        raise ValueError(f"targets: {targets!r} leaves no layer to make sparse ({reasons}); change targets or exclude.")
    return report


def _why_dense(
    name: str, surroundings: Surroundings, owners: dict[int, list[str]], readers: dict[int, str]
) -> str:  # fmt: skip
    if name in surroundings.experts:
        return "3-D expert weights, which have no masks yet"
    if name in surroundings.peft_reasons:
        return surroundings.peft_reasons[name]
    return _why_not(name, surroundings.layers[name], owners, readers)


def _with_fruitless(choices: list[LayerChoice], matches: Mapping[str, Match]) -> tuple[LayerChoice, ...]:
    """Return the choices; where nothing that a submodule or pattern stands for is sparse, its layers count as named."""
    sparse = {choice.name for choice in choices if choice.is_sparse}
    fruitless = [found.names for found in matches.values() if found.kind == "several" and not found.names & sparse]
    named = set().union(*fruitless)
    return tuple(
        replace(choice, is_named=True) if choice.name in named and choice.reason != "excluded" else choice
        for choice in choices
    )


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append(f"{name}.{key}" if name else key)
    return owners


def _why_not(name: str, layer: Candidate, owners: dict[int, list[str]], readers: dict[int, str]) -> str:
    if isinstance(layer, MaskedLayer):
        if run_of(layer) is not None:
            return "already sparse: another SparseTraining trains it, so call its finish() first"
        return "already sparse: call finish() of the run that made it, or export_dense_(model, zeros=False), first"
    if id(layer) in readers:
        return f"{readers[id(layer)]} reads its weight itself"
    if reason := why_subclass(layer):
        return reason
    if getattr(layer, "_is_fsdp_managed_module", False) and type(layer.weight).__name__ != "DTensor":
        return "FSDP1 (FullyShardedDataParallel) cuts weights anywhere, through 4×4 tiles: use DistributedDataParallel"
    if layer._parameters.get("weight") is None:
        return "weight is no parameter (weight_norm, spectral_norm or prune): remove that first"
    if type(layer.weight).__name__ == "DTensor":
        return "sharded weight (DTensor of FSDP2 or tensor parallelism): use DistributedDataParallel"
    if (groups := getattr(layer, "groups", 1)) != 1:
        return f"groups is {groups}, and a mask needs 1"
    for dimension in LAYERS[base_class(layer)]:
        size = getattr(layer, dimension)
        if size % 4:
            return f"{dimension} {size} is not a multiple of 4"
    others = [owner for owner in owners[id(layer.weight)] if owner != f"{name}.weight".lstrip(".")]
    return f"tied to {others[0]}" if others else ""


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLayer]]:
    """Yield the name and module of every :class:`MaskedLayer` of a model."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer):
            yield name, module


def weight_count(modules: Iterable[nn.Module]) -> int:
    """Count the weights of all linear and convolutional layers."""
    weights = (module.weight for module in modules if isinstance(module, Candidate))
    return sum(weight.numel() for weight in weights if not is_lazy(weight))
