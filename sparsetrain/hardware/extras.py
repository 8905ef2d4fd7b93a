"""Optional dependencies: a missing one is answered by the command that installs it."""

import importlib
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Import name, such as ``"wandb"``.
        extra: The extra of sparsetrain that installs it.
        purpose: What needs it; the subject of the error's sentence.

    Raises:
        ImportError: If the module is not installed; the message holds the command that installs it.

    Example:
        >>> require("json", "all", "this example").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f'{purpose} needs {error.name}: pip install "sparsetrain[{extra}]"', name=error.name
        ) from None
