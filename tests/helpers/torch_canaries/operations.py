"""Canaries: what follows the operations that are written."""

import sys

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from .registry import canary


@canary(
    "_len_torch_dispatch_stack",
    "torch._C._len_torch_dispatch_stack() counts the dispatch modes that are on",
    "torch/utils/_python_dispatch.py, _get_current_dispatch_mode_stack",
    "is_eager and kernels_now, so products and kernels would run past a mode unseen",
)
def _() -> None:
    count = torch._C._len_torch_dispatch_stack
    assert count() == 0
    with FlopCounterMode(display=False), FlopCounterMode(display=False):
        assert count() == 2


@canary(
    "_is_tracing",
    "torch._C._is_tracing() is true inside torch.jit.trace",
    "torch/jit/_trace.py, is_tracing",
    "is_eager, so a trace would hold results that were kept instead of operations",
)
def _() -> None:
    seen = [torch._C._is_tracing()]
    torch.jit.trace(lambda x: (seen.append(torch._C._is_tracing()), x + 1)[1], torch.zeros(1), check_trace=False)
    assert seen == [False, True]


@canary(
    "_are_functorch_transforms_active",
    "torch._C._are_functorch_transforms_active() is true inside vmap, grad and jvp of torch.func",
    "torch/_functorch and torch/autograd/function.py, Function.apply, which asks the same",
    "is_transformed, so masked layers would meet torch.func with functions that it cannot take apart",
)
def _() -> None:
    active, seen = torch._C._are_functorch_transforms_active, []
    torch.func.vmap(lambda x: (seen.append(active()), x)[1])(torch.zeros(1))
    torch.func.grad(lambda x: (seen.append(active()), x)[1])(torch.zeros(()))
    assert [active(), *seen] == [False, True, True]


@canary(
    "_current_level",
    "torch.autograd.forward_ad._current_level is negative but inside dual_level()",
    "torch/autograd/forward_ad.py, enter_dual_level",
    "is_transformed, so forward-mode differentiation of masked layers would fail",
)
def _() -> None:
    before = forward_ad._current_level
    with forward_ad.dual_level():
        assert before < 0 <= forward_ad._current_level
    assert forward_ad._current_level == before


@canary(
    "_dynamo",
    "the module torch._dynamo is loaded once anything is compiled",
    "torch/__init__.py, compile",
    "is_compiler_loaded, so verify and the check of validation would run compiled code where they mean eager code",
)
def _() -> None:
    torch.compile(lambda x: x, backend="eager")
    assert "torch._dynamo" in sys.modules


@canary(
    "_execution_engine",
    "Variable._execution_engine.queue_callback(function), in a backward, has the function called when that ends",
    "torch/csrc/autograd/python_engine.cpp, THPEngine_queue_callback, which torch/nn/parallel and FSDP2 use",
    "adapters over several ranks, whose gradients would not be averaged",
)
def _() -> None:
    order: list[str] = []
    weights = [torch.ones(1, requires_grad=True) for _ in range(2)]

    def arrived(_: torch.Tensor) -> None:
        order.append("gradient")
        if len(order) == 1:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: order.append("end"))

    for weight in weights:
        weight.register_post_accumulate_grad_hook(arrived)
    (weights[0] * weights[1]).backward()
    assert order == ["gradient", "gradient", "end"]
