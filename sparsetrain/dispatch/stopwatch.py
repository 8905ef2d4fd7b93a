"""The stopwatch: how long a call keeps the device busy."""

from collections.abc import Callable


def median_milliseconds(call: Callable[[], object], warmup_ms: int = 5, repeat_ms: int = 25) -> float:
    """Return the median time of one call on the current CUDA device, with its cache emptied before each.

    Args:
        call: What is timed; it may launch several kernels.
        warmup_ms: How long to call it before.
        repeat_ms: How long to call it altogether.

    Raises:
        RuntimeError: If there is no CUDA device.
    """
    from triton.testing import do_bench

    return float(do_bench(call, warmup=warmup_ms, rep=repeat_ms, return_mode="median"))
