"""Whether a model has been trained already, by the gains of its norms."""

import torch
from torch import Tensor, nn

from ...distributed.shards import local


@torch.no_grad()
def is_pretrained(model: nn.Module) -> bool:
    """Say whether the gains of a norm are no longer alike, as those of every norm are before the first step.

    Models without gains, and weights that are not on a device yet, say nothing: the answer is False. Of sharded gains,
    the part that lies here is looked at.

    Args:
        model: Any module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> is_pretrained(model)
        False
        >>> model[1].weight.data[3] = 1.01
        >>> is_pretrained(model)
        True
    """
    return any(_differ(local(gain)) for gain in map(_gain, model.modules()) if gain is not None)


def _gain(module: nn.Module) -> Tensor | None:
    gain = module._parameters.get("weight")
    return gain if gain is not None and gain.dim() == 1 and "norm" in type(module).__name__.lower() else None


def _differ(gain: Tensor) -> bool:
    return gain.numel() > 1 and not gain.is_meta and bool((gain != gain[0]).any())
