"""Which layers are output heads, and so stay dense unless a target names them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .layer_classes import layer_sizes
from .surroundings import Surroundings

HEADS = frozenset(
    {"head", "heads", "lm_head", "classifier", "output_head", "embed_out", "unembed", "score", "logits", "to_logits"}
    | {"cls", "qa_outputs", "vocab_projector", "seq_relationship", "auxlogits", "aux1", "aux2"}
)
"""Names of output heads: of a layer, or of a module whose last layer is one."""

LAST = frozenset({"fc", "output", "out", "final"})
"""Names of a layer that is a head where the model, or a whole network inside it, ends with it."""

SIZES = ("num_classes", "num_labels", "vocab_size", "n_classes", "n_labels", "n_vocab")
"""Attributes of models and their configurations that say how wide the output is."""


def output_heads(surroundings: Surroundings) -> set[str]:
    """Return the layers that are output heads.

    They are what ``get_output_embeddings`` returns, what shares an embedding's weight, what is called a head, the last
    layer of a module that is called a head, a last layer called ``fc`` or the like and, in a model with none of these,
    a last layer that is as wide as the model has classes, labels or words. Layers inside attention blocks are none.

    Example:
        >>> classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> output_heads(Surroundings(nn.ModuleDict({"body": nn.Linear(8, 8), "classifier": classifier})))
        {'classifier.2'}
    """
    heads = _declared(surroundings) | _tied(surroundings) | _called(surroundings)
    return heads | _last(surroundings, heads)


def _declared(surroundings: Surroundings) -> set[str]:
    declared = set()
    for module in surroundings.modules.values():
        get_head = getattr(type(module), "get_output_embeddings", None)
        if callable(get_head):
            try:
                declared.add(id(get_head(module)))
            except (NotImplementedError, AttributeError):  # a backbone, which has none
                continue
    return {name for name, layer in surroundings.own.items() if id(layer) in declared}


def _tied(surroundings: Surroundings) -> set[str]:
    embeddings = {id(module.weight) for module in surroundings.modules.values() if isinstance(module, nn.Embedding)}
    return {name for name, layer in surroundings.layers.items() if id(layer._parameters.get("weight")) in embeddings}


def _is_head_name(part: str) -> bool:
    part = part.lower()
    if part in HEADS or part.startswith(("head_", "aux_head")):
        return True
    return part.endswith(("_head", "_classifier")) and part not in ("conv_head", "pre_classifier")


def _called(surroundings: Surroundings) -> set[str]:
    """Return layers that are called a head, and the last ones of modules that are, outside of attention."""
    heads = {name for name in surroundings.own if _is_head_name(surroundings.parts(name)[-1])}
    for name, module in surroundings.modules.items():
        if name in surroundings.layers or not _is_head_name(surroundings.parts(name)[-1]):
            continue
        several = isinstance(module, nn.ModuleList | nn.ModuleDict)
        for prefix in [f"{name}.{child}" for child in module._modules] if several else [name]:
            heads.update(_within(surroundings, prefix)[-1:])
    return {name for name in heads if not surroundings.attends(name)}


def _last(surroundings: Surroundings, heads: set[str]) -> set[str]:
    """Return last layers that their name or their width shows to be heads."""
    found = set()
    for prefix, widths in _networks(surroundings).items():
        within = _within(surroundings, prefix)
        if within and not heads.intersection(within):
            width, features = layer_sizes(surroundings.layers[within[-1]])
            if width in widths and width != features:
                found.add(within[-1])
    for name in surroundings.own:
        parts = surroundings.parts(name)
        if parts[-1].lower() in LAST and not any(part.isdecimal() for part in parts):
            parent = name.rpartition(".")[0]
            inside = _within(surroundings, parent)
            deepest = max(layer.count(".") for layer in inside) - name.count(".")
            if inside[-1] == name and (not parent or deepest >= 2):  # a network, not a block
                found.add(name)
    return {name for name in found if not surroundings.attends(name)}


def _within(surroundings: Surroundings, prefix: str) -> list[str]:
    return [name for name in surroundings.own if not prefix or name == prefix or name.startswith(prefix + ".")]


def _networks(surroundings: Surroundings) -> dict[str, set[int]]:
    """Return the name and the output widths of the outermost modules that say theirs."""
    networks: dict[str, set[int]] = {}
    for name, module in surroundings.modules.items():
        if not any(not outer or name.startswith(outer + ".") for outer in networks) and (widths := _widths(module)):
            networks[name] = widths
    if not networks:
        words = [module.num_embeddings for module in surroundings.modules.values() if isinstance(module, nn.Embedding)]
        return {"": {max(words)}} if words else {}
    return networks


def _widths(module: nn.Module) -> set[int]:
    own = vars(module)
    widths: set[int] = set()
    for source in (own, _as_mapping(own.get("config")), _as_mapping(own.get("_hparams"))):
        widths.update(source[name] for name in SIZES if isinstance(source.get(name), int))
        if isinstance(source.get("id2label"), Mapping):  # where transformers keeps the number of labels
            widths.add(len(source["id2label"]))
    return widths


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    return vars(value) if hasattr(value, "__dict__") else {}
