"""The classes of layers that can be sparse."""

from torch import nn

from ..transposed_linear import TransposedLinear, is_conv1d

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


def base_class(layer: Candidate) -> type:
    """Return the class in ``LAYERS`` that a layer is an instance of.

    Example:
        >>> base_class(nn.LazyLinear(4)).__name__
        'Linear'
    """
    return next(base for base in LAYERS if isinstance(layer, base))


def why_subclass(layer: Candidate) -> str:
    """Return what a layer is a subclass of, as a reason to stay dense; empty if it is of a class in ``LAYERS`` itself.

    Example:
        >>> why_subclass(nn.Linear(8, 4)), why_subclass(nn.LazyLinear(4))
        ('', 'subclass of nn.Linear (LazyLinear)')
    """
    base = base_class(layer)
    if type(layer) is base or is_conv1d(type(layer)):
        return ""
    known = "transformers' Conv1D" if base is TransposedLinear else f"nn.{base.__name__}"
    return f"subclass of {known} ({type(layer).__name__})"


def layer_sizes(layer: Candidate) -> tuple[int, int]:
    """Return output and input features or channels.

    Example:
        >>> layer_sizes(nn.Linear(8, 4))
        (4, 8)
    """
    output, input = (getattr(layer, dimension) for dimension in LAYERS[base_class(layer)])
    return output, input
