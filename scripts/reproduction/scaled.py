"""The GPT with its training loss times a factor, to see what depends on the scale of the loss."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsetrain.recipes.gpt import GPTModule


class ScaledGPTModule(GPTModule):
    """:class:`GPTModule` whose training loss, but not its validation, is multiplied.

    Args:
        loss_factor: By what.
        options: Of the GPT.
    """

    def __init__(self, loss_factor: float, **options: Any) -> None:
        super().__init__(**options)
        self.loss_factor = loss_factor

    def training_step(self, batch: Tensor | Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, times the factor."""
        return self.loss_factor * super().training_step(batch, batch_idx)
