"""How many processes train together."""

import torch.distributed as dist


def world_size() -> int:
    """Return the processes of the default group; 1 where there is none.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
