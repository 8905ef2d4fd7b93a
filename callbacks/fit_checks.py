"""What a fit of Lightning's trainer refuses: trainers that cannot train sparse, and checkpoints of another model."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from sparsetrain.checkpoint import require_same_weights
from sparsetrain.kernels.torch_internals import may_rename_keys

SHARDED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def check_trainer(trainer: Trainer, callback: type[Callback]) -> None:
    """Raise an error if a trainer cannot train with sparse masks.

    Args:
        trainer: In ``setup``.
        callback: The class of the callback, of which there may be one.

    Raises:
        MisconfigurationException: If there are more, or the trainer shards weights.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(entry, callback) for entry in callbacks) > 1:
        raise MisconfigurationException(
            f"trainer has more than one {callback.__name__}: use one, with all targets, so that one clock runs."
        )
    strategy = type(trainer.strategy).__name__
    if strategy in SHARDED_STRATEGIES:
        raise MisconfigurationException(
            f"strategy is {strategy}: {callback.__name__} needs whole weights on every rank, "
            "so use 'ddp' or one device."
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
