"""Processes that train together: started once for each number of them, and used by many tests."""

import atexit
import functools
import importlib
import multiprocessing as mp
import os
import tempfile
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch
import torch.distributed as dist

PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint",
             "sparsetrain", "sparsetrain.training"]  # fmt: skip

TIMEOUT = 120
"""Seconds that a task may take: what hangs fails."""


class RankError(AssertionError):
    """What a task raised on some ranks."""


class Ranks:
    """Gloo processes with one default group, which run functions of helper modules together.

    Args:
        world: How many.
    """

    def __init__(self, world: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        folder = tempfile.mkdtemp()
        pairs = [context.Pipe() for _ in range(world)]
        self._pipes = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(theirs, rank, world, folder), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()
        atexit.register(self.stop)

    def __call__(self, function: str, *args: Any, **options: Any) -> list[Any]:
        """Run ``module.function(*args, **options)`` on every rank and return what each returned, by rank.

        Raises:
            RankError: If it failed on any; with the messages of all that did.
        """
        for pipe in self._pipes:
            pipe.send((function, args, options))
        answers: dict[int, Any] = {}
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            for ready in wait([*waiting], TIMEOUT) or self._end(next(iter(waiting.values())), "hangs", function):
                rank = waiting.pop(ready)
                try:
                    answers[rank] = self._pipes[rank].recv()
                except EOFError:
                    self._end(rank, "died", function)
        if failed := [f"rank {rank}: {error}" for rank, (error, _) in sorted(answers.items()) if error]:
            raise RankError("\n".join(failed))
        return [answers[rank][1] for rank in range(len(answers))]

    def _end(self, rank: int, what: str, function: str) -> NoReturn:
        self.stop()
        raise RankError(f"rank {rank} of {len(self._pipes)} {what} in {function}")

    def stop(self) -> None:
        """End the processes; the next test starts others."""
        ranks.cache_clear()
        for process in self._processes:
            process.kill()


@functools.cache
def ranks(world: int) -> Ranks:
    """Return the processes that stand by, started if there are none yet."""
    return Ranks(world)


def failure(function: Any, *args: Any, **options: Any) -> str:
    """Return the message of the TypeError, ValueError or RuntimeError that a call raises; "" if it raises none."""
    try:
        function(*args, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _serve(pipe: Connection, rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody wrote is NaN, as in other tests
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    while True:
        try:
            name, args, options = pipe.recv()
        except EOFError:
            os._exit(0)
        module, _, function = name.rpartition(".")
        try:
            answer = "", getattr(importlib.import_module(module), function)(*args, **options)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send(answer)
