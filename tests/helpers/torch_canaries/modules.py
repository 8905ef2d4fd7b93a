"""Canaries: modules, those that are compiled or sharded too."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules import module as module_hooks

from .registry import canary


@canary(
    "_parameters",
    "Module._parameters holds what attributes of a module return",
    "torch/nn/modules/module.py, Module.__getattr__",
    "plain_weights, masters and the layers' own reads of their weights",
)
def _() -> None:
    layer, other = nn.Linear(2, 2), nn.Parameter(torch.ones(2, 2))
    layer._parameters["weight"] = other
    assert layer.weight is other
    assert next(layer.parameters()) is other


@canary(
    "_modules",
    "Module._modules holds the children of a module in their order",
    "torch/nn/modules/module.py, Module.named_children",
    "the selection of layers and the names that wrappers hide",
)
def _() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model._modules["1"] = nn.ReLU()
    assert [*model._modules.items()] == [*model.named_children()] == [("0", model[0]), ("1", model[1])]


@canary(
    "_buffers",
    "Module._buffers holds what attributes of a module return",
    "torch/nn/modules/module.py, Module.register_buffer",
    "verify, which could not take back what a second run writes",
)
def _() -> None:
    module, other = nn.BatchNorm1d(2), torch.ones(2)
    module._buffers["running_mean"] = other
    assert module.running_mean is other


@canary(
    "_orig_mod",
    "torch.compile(module)._orig_mod is the module, and stands in the names of its parameters",
    "torch/_dynamo/eval_frame.py, OptimizedModule",
    "plain_model and the names of layers in compiled models",
)
def _() -> None:
    layer = nn.Linear(2, 2)
    compiled = torch.compile(layer, backend="eager")
    assert compiled._orig_mod is layer
    assert "_orig_mod" in compiled._modules


@canary(
    "_compiled_call_impl",
    "Module.compile() puts into the module's own _compiled_call_impl what is called instead of the module",
    "torch/nn/modules/module.py, Module.compile and Module.__call__",
    "the copy of a teacher, which would run the student, and the check of validation",
)
def _() -> None:
    layer = nn.Identity()
    layer.compile(backend="eager")
    assert vars(layer)["_compiled_call_impl"] is not None
    vars(layer)["_compiled_call_impl"] = lambda x: x + 1
    assert layer(torch.zeros(())) == 1


@canary(
    "_torchdynamo_orig_callable",
    "a function that torch.compile made keeps the one it was made of",
    "torch/_dynamo/eval_frame.py, _TorchDynamoContext.__call__",
    "require_copyable, which would refuse students whose forward is compiled",
)
def _() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x

    assert torch.compile(forward, backend="eager")._torchdynamo_orig_callable is forward
    assert not hasattr(forward, "_torchdynamo_orig_callable")


@canary(
    "_is_fsdp_managed_module",
    "FSDP1 sets _is_fsdp_managed_module on the modules inside it, whose weights are no DTensors",
    "torch/distributed/fsdp/_dynamo_utils.py, _annotate_modules_for_dynamo",
    "the reason that refuses FSDP1, whose flat parameters would be masked across their cuts",
)
def _() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Sequential(nn.Linear(2, 2))
    FullyShardedDataParallel(
        model, sharding_strategy=ShardingStrategy.NO_SHARD, use_orig_params=True, device_id=torch.device("cpu")
    )
    assert model[0]._is_fsdp_managed_module
    assert type(model[0].weight) is nn.Parameter


@canary(
    "_reversed_padding_repeated_twice",
    "a convolution's _reversed_padding_repeated_twice is its padding as F.pad takes it, that of 'same' too",
    "torch/nn/modules/conv.py, _ConvNd.__init__",
    "convolutions with backward masks, whose outputs would have another size",
)
def _() -> None:
    input = torch.randn(1, 2, 5, 6)
    for padding in ("same", (1, 2)):
        layer = nn.Conv2d(2, 2, (2, 3), padding=padding)
        padded = F.pad(input, layer._reversed_padding_repeated_twice)
        torch.testing.assert_close(F.conv2d(padded, layer.weight, layer.bias), layer(input))


@canary(
    "_conv_forward",
    "layer._conv_forward(input, weight, bias) convolves with any weight as the layer does with its own",
    "torch/nn/modules/conv.py, Conv2d.forward",
    "every masked convolution that is no linear layer",
)
def _() -> None:
    layer = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    weight, input = torch.randn(2, 2, 3, 3), torch.randn(1, 2, 4, 4)
    expected = F.conv2d(F.pad(input, (1, 1, 1, 1), mode="circular"), weight)
    torch.testing.assert_close(layer._conv_forward(input, weight, None), expected)


@canary(
    "_apply",
    "moving or casting a module calls _apply(fn, recurse) of every module inside, which hands fn to tensors",
    "torch/nn/modules/module.py, Module._apply, .to and .double",
    "masks, which would stay on the device that the layer came from",
)
def _() -> None:
    seen = []

    class Layer(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            seen.append(fn(torch.zeros(1)).dtype)
            return super()._apply(fn, recurse)

    assert nn.Sequential(Layer(2, 2)).double()[0].weight.dtype == torch.float64
    assert seen == [torch.float64]


@canary(
    "_replicate_for_data_parallel",
    "nn.DataParallel copies a module by its _replicate_for_data_parallel()",
    "torch/nn/parallel/replicate.py, replicate",
    "the error of masked layers under nn.DataParallel, which would train without masks",
)
def _() -> None:
    class Layer(nn.Module):
        def _replicate_for_data_parallel(self) -> nn.Module:
            raise KeyError("asked")

    with pytest.raises(KeyError, match="asked"):
        nn.parallel.replicate(Layer(), [0])


@canary(
    "_load_state_dict_pre_hooks",
    "Module._load_state_dict_pre_hooks holds an entry for every hook of register_load_state_dict_pre_hook",
    "torch/nn/modules/module.py, Module.register_load_state_dict_pre_hook",
    "may_rename_keys, so that checkpoints whose keys a hook renames would be refused",
)
def _() -> None:
    layer = nn.Linear(2, 2)
    handles = [layer.register_load_state_dict_pre_hook(lambda *_: None) for _ in range(2)]
    assert len(layer._load_state_dict_pre_hooks) == 2
    handles[0].remove()
    assert len(layer._load_state_dict_pre_hooks) == 1
    assert not nn.Linear(2, 2)._load_state_dict_pre_hooks


@canary(
    "_load_from_state_dict",
    "load_state_dict goes through _load_from_state_dict, and plain layers have that of nn.Module",
    "torch/nn/modules/module.py, Module.load_state_dict",
    "may_rename_keys, so that checkpoints whose keys a module renames would be refused",
)
def _() -> None:
    class Layer(nn.Linear):
        def _load_from_state_dict(self, *_: Any) -> None:
            raise KeyError("asked")

    assert nn.Linear._load_from_state_dict is nn.Module._load_from_state_dict
    with pytest.raises(KeyError, match="asked"):
        nn.Sequential(Layer(2, 2)).load_state_dict({})


@canary(
    "_global_forward_hooks_with_kwargs",
    "_global_forward_hooks_with_kwargs notes by the handle's id which global forward hooks take keywords",
    "torch/nn/modules/module.py, register_module_forward_hook; if its handle now removes the note, drop our removal",
    "remove_global_hook, so that every call of a module after verify takes torch's slow path",
)
def _() -> None:
    noted = module_hooks._global_forward_hooks_with_kwargs
    before = dict(noted)
    handle = module_hooks.register_module_forward_hook(lambda *_: None, with_kwargs=True)
    assert {*noted} - {*before} == {handle.id}
    handle.remove()
    noted.pop(handle.id)  # fails where the handle does it
    assert noted == before


@canary(
    "_checkpoint_wrapped_module",
    "checkpoint_wrapper keeps the module that it wraps under this name, which state_dict leaves out of its keys",
    "torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py, _CHECKPOINT_PREFIX",
    "sparse checkpoints of models with activation checkpointing, which would hold dense weights",
)
def _() -> None:
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)))
    assert "0._checkpoint_wrapped_module.weight" in dict(model.named_parameters())
    assert "0.weight" in model.state_dict()
