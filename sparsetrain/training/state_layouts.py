"""Where a run's state has tensors that are spread over processes: the parts here, DTensors and the whole."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.pruned_entries import PRUNED_KEY
from ..checks.rules import shown
from ..checks.states import refuse
from ..criteria.statistics import StatisticCriterion
from ..distributed.layouts import Layout, layout_of, matrix_layout
from ..distributed.shards import is_spread
from ..layers.masked_layer import MaskedLayer
from .phases import Phases

Path = tuple[str | int, ...]
"""Keys and indices, from the outside in."""

Layouts = Mapping[Path, Layout]


def layouts_in(phases: Phases) -> dict[Path, Layout]:
    """Return how tensors are spread that a run's state may have in any phase; ages also where nobody tracks them.

    Args:
        phases: Of the run.
    """
    masks, found = phases.masks, dict[Path, Layout]()
    criterion = masks.criterion
    for name, layer in masks.layers.items():
        codes, weight = _matrix(layer, torch.int16, 4), layout_of(layer.parameter)
        found["codes", name] = codes
        if masks.pattern.search_backward is not None:
            found["backward_codes", name] = codes
        found["ages", name] = weight._replace(dtype=torch.uint8)
        if isinstance(criterion, StatisticCriterion) and "input" not in criterion.needs:
            found["criterion", "running", name] = _matrix(layer, torch.float32)
    for modifier in phases.modifiers:
        found.update({("modifiers", modifier.name, *path): layout for path, layout in modifier.layouts().items()})
    return found


def spread(state: Mapping[str, Any], phases: Phases) -> dict[str, Any]:
    """Return a state whose parts of sharded tensors are DTensors; nothing is sent.

    Args:
        state: With the parts that lie here.
        phases: Of the run.
    """
    layouts = {**_of_statistics(state, phases.masks.layers, here=True), **layouts_in(phases)}
    parts = {path: tensor_at(state, path) for path, layout in layouts.items() if layout.mesh is not None}
    tensors = {path: layouts[path].spread(part) for path, part in parts.items() if part is not None}
    found: dict[str, Any] = replaced(state, tensors)
    return found


def required_layouts(state: Any, phases: Phases) -> dict[Path, Layout]:
    """Return the layouts of those tensors of a state that have to be cut or sent for this process to have its part.

    Args:
        state: With DTensors in any layout, or whole tensors.
        phases: Of the run that is to load it.

    Raises:
        ValueError: If one of them is of another size.
    """
    layouts = {**_of_statistics(state, phases.masks.layers, here=False), **layouts_in(phases)}
    for name, layer in phases.masks.layers.items():
        pruned = tensor_at(state, (PRUNED_KEY, name))
        if pruned is not None and pruned.dim() > 1:  # masters
            layouts[PRUNED_KEY, name] = layout_of(layer.parameter)
    found = {}
    for path, layout in layouts.items():
        value = tensor_at(state, path)
        if value is None or (layout.mesh is None and not is_spread(value)):
            continue
        if tuple(value.shape) != layout.shape or value.dtype != layout.dtype:
            refuse(f"{named(path)} is {shown(value)}: it must be {layout.dtype} {layout.shape}")
        found[path] = layout
    return found


def tensor_at(state: Any, path: Path) -> Tensor | None:
    """Return what a state holds at a path; None if that is no tensor.

    Example:
        >>> tensor_at({"codes": {"fc": torch.ones(1)}}, ("codes", "fc"))
        tensor([1.])
    """
    for key in path:
        entries = dict(enumerate(state)) if isinstance(state, list | tuple) else state
        state = entries.get(key) if isinstance(entries, Mapping) else None
    return state if isinstance(state, Tensor) else None


def tensors_in(state: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield the tensors of a state with their paths.

    Example:
        >>> [path for path, _ in tensors_in({"codes": [torch.ones(1), 3]})]
        [('codes', 0)]
    """
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, list | tuple):
        state = dict(enumerate(state))
    for key, value in state.items() if isinstance(state, Mapping) else ():
        yield from tensors_in(value, (*path, key))


def replaced(state: Any, values: Mapping[Path, Any]) -> Any:
    """Return a state with other values at some paths; what is on the way there is copied.

    Example:
        >>> replaced({"codes": [1, 2], "clock": 3}, {("codes", 1): 0})
        {'codes': [1, 0], 'clock': 3}
    """
    if () in values:
        return values[()]
    if not values or not isinstance(state, Mapping | list | tuple):
        return state
    inner: dict[Any, dict[Path, Any]] = {}
    for (key, *rest), value in values.items():
        inner.setdefault(key, {})[tuple(rest)] = value
    entries = state.items() if isinstance(state, Mapping) else enumerate(state)
    changed = {key: replaced(value, inner.get(key, {})) for key, value in entries}
    return changed if isinstance(state, Mapping) else [*changed.values()]


def named(path: Collection[str | int]) -> str:
    """Return a path as a message has it.

    Example:
        >>> named(("codes", "fc"))
        "state['codes']['fc']"
    """
    return "state" + "".join(f"[{key!r}]" for key in path)


def _of_statistics(state: Any, layers: Mapping[str, MaskedLayer], here: bool) -> dict[Path, Layout]:
    """Return layouts of a criterion's tensors that have an entry for every weight, or for every tile of a layer.

    Args:
        state: With parts that lie here, or with whole tensors and DTensors.
        layers: By name, which is one of the keys of each.
        here: Whether it has the parts that lie here.
    """
    found = {}
    for path, value in tensors_in(state.get("criterion") if isinstance(state, Mapping) else None, ("criterion",)):
        layer = next((layers[str(key)] for key in path if key in layers), None)
        if layer is None:
            continue
        for tile, part in ((1, layer.matrix), (4, layer.mask_codes)):
            layout = _matrix(layer, value.dtype, tile)
            if tuple(value.shape) == (tuple(part.shape) if here else layout.shape):
                found[path] = layout
                break
        if path not in found and is_spread(value):
            found[path] = Layout(tuple(value.shape), value.dtype)
    return found


def _matrix(layer: MaskedLayer, dtype: torch.dtype, tile: int = 1) -> Layout:
    return matrix_layout(layer.parameter, dtype, layer.transposed, tile)
