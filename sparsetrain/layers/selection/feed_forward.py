"""Which layers are the feed-forward blocks that the target ``"mlp"`` means."""

from torch import nn

from .layer_classes import layer_sizes
from .surroundings import EXPERTS, Surroundings

BLOCKS = frozenset(
    {"mlp", "ffn", "ffns", "ff", "feed_forward", "feedforward", "ffwd", "moe", "experts", "densereludense"}
    | {"intermediate"}
)
"""Components of a layer's name that put it into ``"mlp"``, with or without a number after it."""

LAYER_NAMES = frozenset(
    {"fc1", "fc2", "linear1", "linear2", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "ffn_output"}
    | {"w1", "w2", "w3", "wi", "wi_0", "wi_1", "wo", "pwconv1", "pwconv2", "dense_h_to_4h", "dense_4h_to_h"}
)
"""Own names of layers that put them into ``"mlp"``."""

NOT_BLOCKS = ("squeezeex", "squeezeandex", "semodule", "selayer", "seblock")
"""Parts of the class names of blocks that weigh channels, whose layers have the names of an MLP's."""


def feed_forward(surroundings: Surroundings) -> set[str]:
    """Return the layers and stacked experts of feed-forward blocks, outside of attention.

    They are known by name (a block called ``mlp`` or ``ffn``, a layer called ``up_proj`` or ``fc1``), as the ``output``
    beside an ``intermediate``, or by shape: two linear layers of one module, of which the first widens and the second
    takes its output back to the first one's input size. Routers are none.

    Example:
        >>> sorted(feed_forward(Surroundings(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))))
        ['0', '2']
    """
    mirrored = _mirrored(surroundings)
    return {
        name
        for name in (*surroundings.layers, *surroundings.experts)
        if (name in mirrored or _is_named(surroundings, name))
        and not _is_router(surroundings, name)
        and not surroundings.attends(name)
        and not _weighs_channels(surroundings, name)
    }


def _is_named(surroundings: Surroundings, name: str) -> bool:
    parts = surroundings.parts(name)
    lower = [part.lower() for part in parts]
    if lower[-1] in LAYER_NAMES or any(part in BLOCKS or part.rstrip("_0123456789") in BLOCKS for part in lower):
        return True
    places = [place for place, part in enumerate(lower) if part == "output"]
    return any(surroundings.child(".".join([*parts[:place], "intermediate"])) is not None for place in places)


def _weighs_channels(surroundings: Surroundings, name: str) -> bool:
    classes = [type(module).__name__.lower() for _, module in surroundings.ancestors(name)]
    return any(word in written for word in NOT_BLOCKS for written in classes)


def _mirrored(surroundings: Surroundings) -> set[str]:
    by_parent: dict[str, list[str]] = {}
    for name, layer in surroundings.own.items():
        if not isinstance(layer, nn.Conv1d | nn.Conv2d):
            by_parent.setdefault(surroundings.plain[name].rpartition(".")[0], []).append(name)
    found = set()
    for names in by_parent.values():
        sizes = {name: layer_sizes(surroundings.layers[name]) for name in names}
        for place, first in enumerate(names):
            for second in names[place + 1 :]:
                wide, narrow = sizes[first]
                if wide > narrow and sizes[second] == (narrow, wide):
                    found |= {first, second}
    return found


def _is_router(surroundings: Surroundings, name: str) -> bool:
    parts = [part.lower() for part in surroundings.parts(name)]
    if any("router" in part for part in parts):
        return True
    beside_experts = any(EXPERTS in child.lower() for child in surroundings.parent(name)._modules if child != parts[-1])
    return beside_experts and "gat" in parts[-1]
