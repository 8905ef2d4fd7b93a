"""What a fit of Lightning's trainer refuses: trainers that cannot train sparse, and checkpoints of another model."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from sparsetrain.checkpoint import require_same_weights
from sparsetrain.kernels.torch_internals import may_rename_keys

REFUSED = {
    "FSDPStrategy": "FSDP1 cuts flat parameters anywhere, through the tiles of masks",
    "DeepSpeedStrategy": "its optimizer steps flat partitions, which are none of the model's weights",
}
"""Strategies of which there are no masks, and why."""


def check_trainer(trainer: Trainer, callback: type[Callback]) -> None:
    """Raise an error if a trainer cannot train with sparse masks.

    Args:
        trainer: In ``setup``.
        callback: The class of the callback, of which there may be one.

    Raises:
        MisconfigurationException: If there are more, or the trainer shards weights in a way that masks cannot follow.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(entry, callback) for entry in callbacks) > 1:
        raise MisconfigurationException(
            f"trainer has more than one {callback.__name__}: use one, with all targets, so that one clock runs."
        )
    for name in (kind.__name__ for kind in type(trainer.strategy).__mro__):
        if name in REFUSED:
            raise MisconfigurationException(
                f"strategy is {name}, but {REFUSED[name]}: use ModelParallelStrategy, and fully_shard in the module's "
                "configure_model() (docs/scaling.md has the lines)."
            )


def refuse_foreign_weights(module: LightningModule) -> RemovableHandle:
    """Have a module refuse a checkpoint of another model before any of its weights is copied.

    Args:
        module: Before a checkpoint is loaded into it.

    Returns:
        What ends it.
    """
    register: Any = module.register_load_state_dict_pre_hook
    handle: RemovableHandle = register(_check_weights)
    return handle


def _check_weights(module: LightningModule, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # the hook's own argument is True whatever load_state_dict was given, which is strict_loading
    require_same_weights(module, state_dict, module.strict_loading and not may_rename_keys(module))
