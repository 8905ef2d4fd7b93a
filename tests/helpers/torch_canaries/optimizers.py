"""Canaries: optimizers."""

import sys
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from .registry import canary


@canary(
    "_init_group",
    "Adam and AdamW ask _init_group(group, parameters, gradients, averages, squares, maxima, steps) to fill the lists",
    "torch/optim/adam.py, Adam._init_group and Adam.step",
    "SparseAdamW and FrozenMoments, whose updates take place there",
)
def _() -> None:
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        weight = nn.Parameter(torch.ones(1))
        weight.grad = torch.ones(1)
        optimizer, seen = kind([weight], foreach=False), []

        def collect(group: Any, *lists: Any, adam: Any = optimizer, kind: Any = kind, seen: Any = seen) -> bool:
            answer = kind._init_group(adam, group, *lists)
            seen.append([len(column) for column in lists])
            state = adam.state[group["params"][0]]
            found = [column[0] for column in lists if column]
            wanted = [group["params"][0], group["params"][0].grad, state["exp_avg"], state["exp_avg_sq"], state["step"]]
            assert all(one is other for one, other in zip(found, wanted, strict=True))
            for column in lists:
                column.clear()
            return answer

        vars(optimizer)["_init_group"] = collect
        optimizer.step()
        assert seen == [[1, 1, 1, 1, 0, 1]]
        assert weight == 1  # what is not in the lists is not updated


@canary(
    "_optimizer_step_post_hooks",
    "hooks behind a step run in the order of an OrderedDict, whose keys are the ids of their handles",
    "torch/optim/optimizer.py, Optimizer.profile_hook_step and register_step_post_hook",
    "lr_factor with averages of weights that hooks make: they would see half of every change",
)
def _() -> None:
    optimizer, seen = torch.optim.SGD([nn.Parameter(torch.zeros(1))]), list[int]()
    handles = [optimizer.register_step_post_hook(lambda *_, place=place: seen.append(place)) for place in range(3)]
    optimizer._optimizer_step_post_hooks.move_to_end(handles[2].id, last=False)
    optimizer.step()
    assert seen == [2, 0, 1]
    handles[2].remove()
    optimizer.step()
    assert seen[3:] == [0, 1]


@canary(
    "_init_optim_state",
    "torch.distributed.checkpoint makes an optimizer's state by a step of zeros inside _init_optim_state",
    "torch/distributed/checkpoint/state_dict.py, _init_optim_state",
    "runs whose state is loaded, whose clock would count that step and whose frozen masks would be written by it",
)
def _() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, callers = torch.optim.Adam([weight], lr=1.0), set[str]()

    def note(*_: object) -> None:
        frame = sys._getframe()
        while frame is not None:
            callers.add(frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]

    optimizer.register_step_pre_hook(note)
    get_optimizer_state_dict(torch.nn.ParameterList([weight]), optimizer)
    assert "_init_optim_state" in callers
