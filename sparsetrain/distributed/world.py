"""How many processes train together."""

import torch.distributed as dist


def world_size() -> int:
    """Return the processes of the default group; 1 where there is none.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size() if has_group() else 1


def has_group() -> bool:
    """Return whether there is a default group of processes, be it of one.

    Example:
        >>> has_group()
        False
    """
    return dist.is_available() and dist.is_initialized()
