"""The library's operators on a CPU by their Triton kernels, in the interpreter, instead of by plain torch."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch._library.custom_ops import OPDEFS


def use_kernels(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Give CPU tensors to what every operator does on CUDA; return a counter of the calls, by the operator's name."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **named)

        return call

    for name, operator in list(OPDEFS.items()):
        space, _, short = name.partition("::")
        implementations = operator._backend_fns
        if space == "sparsetrain" and "cuda" in implementations:
            patch.setitem(implementations, None, counted(short, implementations["cuda"]))
    return calls
