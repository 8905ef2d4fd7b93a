"""The classes of layers that can be sparse."""

from torch import nn

Candidate = nn.Linear | nn.Conv1d | nn.Conv2d

LAYERS: dict[type[Candidate], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
}
"""The classes of layers that can be sparse, with the names of their sizes."""

GROUPS: dict[str, tuple[type[nn.Module], ...]] = {"all-linear": (nn.Linear,), "all-conv": (nn.Conv1d, nn.Conv2d)}
"""Targets that stand for every layer of some classes."""


def base_class(layer: Candidate) -> type[Candidate]:
    """Return the class in ``LAYERS`` that a layer is an instance of.

    Example:
        >>> base_class(nn.LazyLinear(4)).__name__
        'Linear'
    """
    return next(base for base in LAYERS if isinstance(layer, base))


def layer_sizes(layer: Candidate) -> tuple[int, int]:
    """Return output and input features or channels.

    Example:
        >>> layer_sizes(nn.Linear(8, 4))
        (4, 8)
    """
    output, input = (getattr(layer, dimension) for dimension in LAYERS[base_class(layer)])
    return output, input
