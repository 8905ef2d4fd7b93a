"""A progress bar for training alone."""

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class TrainingBar(TQDMProgressBar):
    """Lightning's bar without one more bar per validation."""

    def init_validation_tqdm(self) -> Tqdm:
        """Return a bar that is never drawn."""
        return Tqdm(disable=True)
