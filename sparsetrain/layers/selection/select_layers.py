"""Selection: which linear and convolutional layers become sparse, and why the others stay dense."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy

from ...checks.rules import require
from ..masked_layer import MaskedLayer
from ..options import MODULE
from .layer_classes import Candidate
from .reasons import Reasons
from .report import LayerChoice as LayerChoice
from .report import SelectionReport as SelectionReport
from .surroundings import Surroundings
from .targets import Match, as_list, match, no_match


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
    excluded = {entry: match(entry, surroundings, "exclude").names for entry in unwanted}
    for entry, names in excluded.items():
        if not names:
            warnings.warn(f"exclude: {entry!r} matches no layer of the model.", stacklevel=2)
    reasons, choices = Reasons(surroundings), []
    for name in surroundings.in_order():
        kinds = {found.kind for found in matches.values() if name in found.names}
        is_excluded = bool(kinds) and any(name in names for names in excluded.values())
        reason = "excluded" if is_excluded else reasons.of(name, kinds)
        is_named = "name" in kinds and not is_excluded
        is_frozen = name in surroundings.layers and not surroundings.layers[name].weight.requires_grad
        choices.append(LayerChoice(name, surroundings.shape(name), reason, is_named=is_named, is_frozen=is_frozen))
    report = SelectionReport(_with_fruitless(choices, matches), pattern)
    if not report.sparse:
        raise ValueError(
            f"targets: {targets!r} leaves no layer to make sparse ({report.why_dense()}); change targets or exclude."
        )
    return report


def _with_fruitless(choices: list[LayerChoice], matches: Mapping[str, Match]) -> tuple[LayerChoice, ...]:
    """Return the choices; where nothing that a submodule or pattern stands for is sparse, its layers count as named."""
    sparse = {choice.name for choice in choices if choice.is_sparse}
    fruitless = [found.names for found in matches.values() if found.kind == "several" and not found.names & sparse]
    named = set().union(*fruitless)
    return tuple(
        replace(choice, is_named=True) if choice.name in named and choice.reason != "excluded" else choice
        for choice in choices
    )


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLayer]]:
    """Yield the name and module of every :class:`MaskedLayer` of a model."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer):
            yield name, module


def weight_count(modules: Iterable[nn.Module]) -> int:
    """Count the weights of all linear and convolutional layers."""
    weights = (module.weight for module in modules if isinstance(module, Candidate))
    return sum(weight.numel() for weight in weights if not is_lazy(weight))
