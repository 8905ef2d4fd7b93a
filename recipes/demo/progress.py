"""A progress bar for training alone."""

import sys

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class TrainingBar(TQDMProgressBar):
    """Lightning's bar on standard error, without one more bar per validation."""

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar of training."""
        return Tqdm(desc="Training", disable=self.is_disabled, file=sys.stderr, smoothing=0, bar_format=self.BAR_FORMAT)

    def init_validation_tqdm(self) -> Tqdm:
        """Return a bar that is never drawn."""
        return Tqdm(disable=True)
