"""How a run is made: layers become sparse, and what trains them is put together."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from ..criteria import resolve_criterion
from ..layers.layer_group import LayerGroups
from ..layers.masked_layer import MaskedLayer
from ..layers.selection.report import SelectionReport
from ..layers.selection.select_layers import select_layers, sparse_layers
from ..layers.sparsify import sparsify_
from ..masks.patterns import resolve_pattern
from ..modifiers.base import Modifier, Run, Setup
from ..modifiers.registry import modifiers_of
from .mask_search import MaskSearch
from .mask_state import MaskState
from .masters import Masters
from .phases import Phases
from .setup_checks import check_setup, check_statistics
from .step_hooks import owned_parameters
from .steps import Steps


class LayerOptions(NamedTuple):
    """Which layers become sparse and how their products run, as :class:`sparsetrain.SparseTraining` takes it."""

    targets: str | Sequence[str]
    exclude: str | Sequence[str]
    backend: str
    deterministic: bool
    keep_transposed: bool


def make_sparse_(setup: Setup, options: LayerOptions, resumes: bool) -> tuple[SelectionReport, dict[str, MaskedLayer]]:
    """Make a run's layers sparse, without masks; return what became of all layers, and the sparse ones by name.

    Args:
        setup: What the run is to be made of.
        options: Of its layers.
        resumes: Whether it goes on from a state, so that it needs no statistics to begin with.

    Raises:
        ValueError: If the run cannot be set up in this way; nothing is changed then.
    """
    model, method = setup.model, setup.method
    report = select_layers(model, options.targets, options.exclude, method.pattern)
    check_setup(setup, report, options.backend)
    if not resumes:
        check_statistics(report, method)
    report = sparsify_(
        model,
        **options._asdict(),
        pattern=method.pattern,
        weight_product=method.weight_product,
        phase="dense",
        verbose=False,
    )
    layers = dict(sparse_layers(model))
    return report, {choice.name: layers[choice.name] for choice in report.sparse}


def assemble(setup: Setup, layers: Mapping[str, MaskedLayer], removals: ExitStack) -> tuple[Phases, Steps]:
    """Put together what trains sparse layers.

    Args:
        setup: What the run is made of.
        layers: By name.
        removals: Gets what takes everything off the model and the optimizers again.
    """
    method = setup.method
    criterion = copy.deepcopy(resolve_criterion(method.criterion))  # its statistics are this run's
    tile_budget = method.dense_budget if method.mixes_tiles else 0.0
    search = MaskSearch(resolve_pattern(method.pattern), criterion, method.hysteresis, tile_budget)
    masks = MaskState(layers, search, setup.track_age)
    weights = {id(layer.weight) for layer in layers.values()}
    own = [entry for entry in setup.optimizers if owned_parameters(entry) & weights] or list(setup.optimizers)
    masters = Masters(setup.model, layers, own)
    run = Run(method, masks.layers, own, criterion, LayerGroups(), setup.timeline, setup.total_steps)
    modifiers: list[Modifier] = []
    for modifier in modifiers_of(run, setup):
        modifiers.append(modifier)
        removals.callback(modifier.detach)
        modifier.attach()
    run.groups.number_draws_(run.layers, run.clock)
    phases = Phases(run, masks, modifiers, setup.watch_dense)
    steps = Steps(phases, masters)
    removals.callback(steps.hooks.remove)
    return phases, steps
