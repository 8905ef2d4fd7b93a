"""Processes that must all go on, or all stop: what one of them refuses, every one does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from ..masked_layer import MaskedLayer
from .totals import mesh_of


@contextmanager
def refused_together(layers: Mapping[str, MaskedLayer]) -> Iterator[list[Any]]:
    """Have every process of a mesh raise what one of them raises in here, and compare what must be the same.

    Nothing is sent where weights are whole.

    Args:
        layers: By name; the processes are those that their weights are spread over.

    Yields:
        A list for what must be the same in every process.

    Raises:
        ValueError: If another process has raised an error, or has put something else into its list.

    Example:
        >>> with refused_together({}) as same:
        ...     same.append("clock 3")
    """
    error: Exception | None = None
    same: list[Any] = []
    try:
        yield same
    except Exception as raised:
        error = raised
    if (mesh := mesh_of(layers)) is not None:
        words = _gathered((dist.get_rank(), "" if error is None else str(error) or repr(error), repr(same)), mesh)
        refused = [(rank, text) for rank, text, _ in words if text]
        if error is None and refused:
            error = ValueError(f"rank {refused[0][0]} refused the state: {refused[0][1]}")
        others = [rank for rank, _, own in words if own != repr(same)]
        if error is None and others:
            error = ValueError(
                f"the state of rank {others[0]} differs from that of rank {dist.get_rank()}: load the same checkpoint "
                "in every process."
            )
    if error is not None:
        raise error


def _gathered(word: Any, mesh: Any) -> list[Any]:
    """Return what every process of a mesh says."""
    words = [word]
    for dimension in range(mesh.ndim):
        group = mesh.get_group(dimension)
        said: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(said, words, group=group)
        words = [one for own in said for one in own]
    return words
