"""How a run is made: layers become sparse, and what trains them is put together."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..criteria import resolve_criterion
from ..distributed.agreement import anywhere, device_of
from ..distributed.equal_codes import Groups
from ..distributed.peers import everyone_with, fsdp_modules, peers_of, reshard_
from ..distributed.shards import placement_of
from ..distributed.wrappers import plain_model, plain_optimizer, require_torch_training, require_whole_weights
from ..layers.layer_group import LayerGroups
from ..layers.masked_layer import MaskedLayer
from ..layers.options import LayerOptions, check_run_options
from ..layers.selection.pretrained import is_pretrained
from ..layers.selection.report import SelectionReport
from ..layers.selection.select_layers import select_layers, sparse_layers
from ..layers.sparsify import sparsify_
from ..masks.patterns import resolve_pattern
from ..methods.method import Method
from ..modifiers.base import Modifier, Run, Setup
from ..modifiers.registry import modifiers_of
from .mask_search import MaskSearch
from .mask_state import MaskState
from .masters import Masters
from .phases import Phases
from .setup_checks import check_setup, check_statistics
from .shard_checks import check_late_shards
from .step_hooks import owned_parameters
from .steps import Steps


def looked_at(model: Any, group: Any) -> tuple[Groups, bool]:
    """Return the groups of all processes that make a run together, and whether its model is pretrained in any of them.

    Args:
        model: As the user has passed it, and so is the group.
        group: Of processes that hold the same weights.
    """
    everyone = everyone_with(model, group if isinstance(group, ProcessGroup) else None)
    pretrained = isinstance(model, nn.Module) and is_pretrained(model)
    return everyone, anywhere(everyone, pretrained, device_of(model))


def setup_of(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    method: Method,
    lr_schedulers: Sequence[LRScheduler],
    **options: Any,
) -> Setup:
    """Return what a run is to be made of: plain models and optimizers, phases in steps.

    Args:
        model: As the user has passed it, and so are optimizer and schedulers.
        optimizer: One or several.
        method: Of the run.
        lr_schedulers: That change rates of the optimizers.
        options: The other fields of a setup, by name.

    Raises:
        ValueError: If a value is not allowed.
    """
    check_run_options(**options)
    given = [optimizer] if isinstance(optimizer, Optimizer) or not isinstance(optimizer, Sequence) else optimizer
    require_whole_weights(model)
    require_torch_training(model, given)
    optimizers = [*map(plain_optimizer, given)]
    timeline = method.schedule.resolve(options["total_steps"])
    return Setup(plain_model(model), method, timeline, optimizers, lr_schedulers, **options)


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
    reshard_(fsdp_modules(model))  # an evaluation leaves the root's weights gathered
    report = select_layers(model, options.targets, options.exclude, method.pattern)
    check_setup(setup, report, options.backend)
    if not resumes:
        check_statistics(report, method)
    report = sparsify_(
        model,
        **asdict(options),
        pattern=method.pattern,
        weight_product=method.weight_product,
        phase="dense",
        verbose=False,
    )
    layers = dict(sparse_layers(model))
    return report, {choice.name: layers[choice.name] for choice in report.sparse}


def facts_of(setup: Setup, layers: Mapping[str, MaskedLayer]) -> dict[str, Any]:
    """Return what has to be the same in all processes that make a run together.

    Args:
        setup: What the run is made of.
        layers: By name.
    """
    return {
        "method": setup.method.describe(),
        "total_steps": setup.total_steps,
        "watch_dense": setup.watch_dense,
        "track_age": setup.track_age,
        "gather": setup.gather,
        "layers": {name: [*layer.weight.shape] for name, layer in layers.items()},
        "placement of the weights": {name: placement_of(layer.weight) for name, layer in layers.items()},
    }


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
    peers = peers_of(setup.model, [layer.weight for layer in layers.values()], setup.group)
    masks = MaskState(layers, search, setup.track_age, peers)
    weights = {id(layer.weight) for layer in layers.values()}
    own = [entry for entry in setup.optimizers if owned_parameters(entry) & weights] or list(setup.optimizers)
    masters = Masters(setup.model, layers, own, partial(check_late_shards, setup, layers))
    run = Run(method, masks.layers, own, criterion, LayerGroups(), peers, setup.timeline, setup.total_steps)
    modifiers: list[Modifier] = []
    for modifier in modifiers_of(run, setup):
        modifiers.append(modifier)
        removals.callback(modifier.detach)
        modifier.attach()
    run.groups.number_draws_(run.layers, run.clock)
    phases = Phases(run, masks, modifiers, setup)
    steps = Steps(phases, masters)
    removals.callback(steps.hooks.remove)
    return phases, steps
