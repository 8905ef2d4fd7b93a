"""PyTorch's fused encoder layer reads the weights of its linear layers itself; it is declined where they are masked."""

from torch import nn

from .masked_layer import MaskedLayer

HELD = "_fused_activation"
"""Attribute of an encoder layer that declines: what its ``activation_relu_or_gelu`` was."""


def settle_fused_encoders_(model: nn.Module) -> None:
    """Decline the fused path of every encoder layer that holds masked layers; give it back to those that hold none.

    ``nn.TransformerEncoderLayer`` takes the path in evaluation, without gradients, if it knows its activation. Said to
    know none, it calls its layers; that is a plain attribute, so it is copied, saved and compiled with the layer.
    ``nn.TransformerEncoder`` may still hand it nested tensors, which masked layers take.

    Example:
        >>> from .sparsify import sparsify_
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> _ = sparsify_(layer, verbose=False)  # settles
        >>> layer.activation_relu_or_gelu
        0
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer):
            continue
        masked = any(isinstance(inner, MaskedLayer) for inner in module.modules())
        if masked and HELD not in vars(module):
            setattr(module, HELD, module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0
        elif not masked and HELD in vars(module):
            module.activation_relu_or_gelu = vars(module).pop(HELD)
