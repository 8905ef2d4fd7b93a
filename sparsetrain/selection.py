"""Selection: which linear and convolutional layers become sparse, and why the others stay dense."""

import difflib
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parameter import is_lazy

from .masked_layer import MaskedLayer
from .transposed_linear import TransposedLinear, is_conv1d

MLP_PARTS = frozenset(
    {"mlp", "ffn", "ff", "feed_forward", "feedforward", "ffwd", "moe", "experts", "densereludense", "intermediate"}
    | {"fc1", "fc2", "linear1", "linear2", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc"}
    | {"w1", "w2", "w3", "wi", "wi_0", "wi_1", "wo"}
)
"""Components of a layer's name that put it into the target ``"mlp"``."""

ATTENTION_PARTS = frozenset(["attn", "attention", "self_attn", "self_attention", "cross_attn", "cross_attention"])
"""Components of a layer's name that keep it out of the target ``"mlp"``."""

HEAD_PARTS = frozenset(["head", "lm_head", "classifier", "output_head", "embed_out", "score"])
"""Last components of a layer's name that keep it out of the targets that name no layer."""

Candidate = nn.Linear | nn.Conv1d | nn.Conv2d | TransposedLinear

LAYERS: dict[type, tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
    TransposedLinear: ("nf", "nx"),
}
"""The classes of layers that can be sparse, with the names of their sizes."""

GROUPS: dict[str, tuple[type, ...]] = {"all-linear": (nn.Linear, TransposedLinear), "all-conv": (nn.Conv1d, nn.Conv2d)}
"""Targets that stand for every layer of some classes."""


@dataclass(frozen=True)
class LayerChoice:
    """One layer's fate.

    Args:
        name: The layer's name in the model.
        shape: ``(O, I)``, or ``(O, I, *kernel)`` of a convolution.
        reason: Why it stays dense; empty for a sparse layer.
        products: Who computes a sparse layer's products; empty if that is not known yet.
    """

    name: str
    shape: tuple[int, ...]
    reason: str = ""
    products: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether the layer becomes sparse."""
        return not self.reason

    @property
    def count(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape) if len(self.shape) >= 2 else 0


@dataclass(frozen=True)
class SelectionReport:
    """Every linear and convolutional layer of a model: sparse, or dense with the reason.

    Args:
        choices: One per layer, in the model's order.
        pattern: The pattern of the sparse layers.

    Example:
        >>> report = select_layers(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))
        >>> print(report.summary())
        sparse layers: 1 of 2 || sparse weights: 64 of 88 (72.7 %) || pattern: transposable 2:4
    """

    choices: tuple[LayerChoice, ...]
    pattern: str = "transposable"

    @property
    def sparse(self) -> tuple[LayerChoice, ...]:
        """The layers that become sparse."""
        return tuple(choice for choice in self.choices if choice.is_sparse)

    @property
    def dense(self) -> tuple[LayerChoice, ...]:
        """The layers that stay dense."""
        return tuple(choice for choice in self.choices if not choice.is_sparse)

    def summary(self) -> str:
        """Return one line that counts layers and weights."""
        sparse, total = (sum(choice.count for choice in group) for group in (self.sparse, self.choices))
        return (
            f"sparse layers: {len(self.sparse)} of {len(self.choices)} || "
            f"sparse weights: {sparse:,} of {total:,} ({100 * sparse / max(total, 1):.1f} %) || "
            f"pattern: {self.pattern.replace('_', '-')} 2:4"
        )

    def with_products(self, layers: Mapping[str, MaskedLayer]) -> "SelectionReport":
        """Return the report with who computes the products of these layers, as decided by now."""
        choices = (
            replace(choice, products=layers[choice.name].describe_products()) if choice.name in layers else choice
            for choice in self.choices
        )
        return replace(self, choices=tuple(choices))

    def with_dense(self, names: Collection[str], reason: str) -> "SelectionReport":
        """Return the report with more layers that stay dense."""
        choices = (replace(choice, reason=reason) if choice.name in names else choice for choice in self.choices)
        return replace(self, choices=tuple(choices))

    def print_table(self, console: Console | None = None) -> None:
        """Print every layer with its shape and, where it stays dense, the reason."""
        table = Table("layer", "shape", "weights", title=self.summary())
        for choice in self.choices:
            shape = " × ".join(map(str, choice.shape))
            sparse = f"sparse: {choice.products}" if choice.products else "sparse"
            table.add_row(choice.name, shape, sparse if choice.is_sparse else f"dense: {choice.reason}")
        (console or Console()).print(table)

    def __str__(self) -> str:
        return self.summary()


def select_layers(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    pattern: str = "transposable",
) -> SelectionReport:
    """Decide for every linear and convolutional layer of a model whether it becomes sparse; changes nothing.

    Args:
        model: Any module.
        targets: One or several of: ``"all-linear"`` (every linear layer, ``Conv1D`` of transformers among them, but an
            output head), ``"all-conv"`` (every 1-D and 2-D convolution but an output head), ``"mlp"`` (the layers of
            feed-forward blocks), the end of a layer's name (``"fc1"``, ``"mlp.up"``), or a regular expression that
            matches the whole name; all but the first two mean linear layers and convolutions alike.
        exclude: Ends of names or regular expressions, as in ``targets``; they win over targets.
        pattern: Named in the report.

    Raises:
        ValueError: If a target matches no layer, is no regular expression, or no layer is left to be sparse.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> [choice.name for choice in select_layers(model, targets=["2"]).sparse]
        ['2']
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Candidate)}
    wanted = _as_list("targets", targets)
    unwanted = _as_list("exclude", exclude)
    matches = {
        target: {name for name, layer in layers.items() if _matches(target, name, layer, "targets")}
        for target in wanted
    }
    for target, names in matches.items():
        if not names:
            raise ValueError(_no_match(target, list(layers)))
    for entry in unwanted:
        if not any(_matches(entry, name, layer, "exclude") for name, layer in layers.items()):
            warnings.warn(f"exclude: {entry!r} matches no layer of the model.", stacklevel=2)
    heads = _output_heads(model, layers)
    owners = _parameter_owners(model)
    choices = []
    for name, layer in layers.items():
        hits = [target for target in wanted if name in matches[target]]
        if not hits:
            reason = "not in targets"
        elif any(_matches(entry, name, layer, "exclude") for entry in unwanted):
            reason = "excluded"
        elif name in heads and all(target in (*GROUPS, "mlp") for target in hits):
            reason = "output head (name it in targets to make it sparse)"
        else:
            reason = _why_not(name, layer, owners)
        shape = () if is_lazy(layer.weight) else tuple(layer.weight.shape)
        shape = shape[::-1] if isinstance(layer, TransposedLinear) else shape
        choices.append(LayerChoice(name, shape, reason))
    report = SelectionReport(tuple(choices), pattern)
    if not report.sparse:
        reasons = "; ".join(
            f"{choice.name}: {choice.reason}" for choice in choices if choice.reason != "not in targets"
        )
        raise ValueError(f"targets: {targets!r} leaves no layer to make sparse ({reasons}); change targets or exclude.")
    return report


def _as_list(argument: str, value: str | Sequence[str]) -> list[str]:
    entries = [value] if isinstance(value, str) else list(value)
    if argument == "targets" and not entries:
        raise ValueError(
            "targets is empty: pass 'all-linear', 'all-conv', 'mlp', the ends of layer names, or regular expressions."
        )
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"{argument} holds {entry!r}: its entries must be strings, so pass names of layers.")
    return entries


def _matches(entry: str, name: str, layer: Candidate, argument: str) -> bool:
    if entry in GROUPS:
        return isinstance(layer, GROUPS[entry])
    parts = name.lower().split(".")
    if entry == "mlp":
        # an explicit component "mlp" is enough; otherwise a familiar name outside an attention block
        return bool(MLP_PARTS.intersection(parts)) and not ATTENTION_PARTS.intersection(parts)
    if name == entry or name.endswith("." + entry):
        return True
    try:
        return re.fullmatch(entry, name) is not None
    except re.error as error:
        raise ValueError(
            f"{argument}: {entry!r} is no regular expression ({error}): pass the end of a layer's name or escape it."
        ) from None


def _no_match(target: str, names: list[str]) -> str:
    if not names:
        return f"targets: {target!r} matches nothing, because the model has no linear or convolutional layer."
    close = difflib.get_close_matches(target, [*names, *{name.rpartition(".")[2] for name in names}], n=3, cutoff=0.5)
    shown = ", ".join(map(repr, close or names[:5])) + ("" if close or len(names) <= 5 else ", …")
    return (
        f"targets: {target!r} matches no layer; allowed are 'all-linear', 'all-conv', 'mlp', the end of a name or a "
        f"regular expression, and the model has {shown}."
    )


def _output_heads(model: nn.Module, layers: dict[str, Candidate]) -> set[str]:
    heads = {name for name in layers if name.rpartition(".")[2].lower() in HEAD_PARTS}
    for module in model.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        heads.update(name for name, layer in layers.items() if layer is head)
    return heads


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append(f"{name}.{key}" if name else key)
    return owners


def _why_not(name: str, layer: Candidate, owners: dict[int, list[str]]) -> str:
    if isinstance(layer, MaskedLayer):
        return "already sparse (call finish() or export_dense_() first)"
    kind = TransposedLinear if is_conv1d(type(layer)) else type(layer)
    if kind not in LAYERS:
        base = next(base for base in LAYERS if isinstance(layer, base))
        known = "transformers' Conv1D" if base is TransposedLinear else f"nn.{base.__name__}"
        return f"subclass of {known} ({type(layer).__name__})"
    if layer._parameters.get("weight") is None:
        return "weight is no parameter (weight_norm, spectral_norm or prune): remove that first"
    if type(layer.weight).__name__ == "DTensor":
        return "sharded weight (DTensor)"
    if (groups := getattr(layer, "groups", 1)) != 1:
        return f"groups is {groups}, and a mask needs 1"
    for dimension in LAYERS[kind]:
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
