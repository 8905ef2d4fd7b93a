"""The private names of torch that are used, each with why no public one does; ``test_torch_internals.py`` tries each.

Functions of torch stand here themselves, not called by another, so that they cost what they did. Private names
elsewhere are of two kinds, and the test lists them: attributes that are read in place, because a call takes longer
(``Tensor._version``, ``Module._parameters``, ``_modules`` and ``_buffers``), and methods of torch's classes that
subclasses override or call (``_apply``, ``_conv_forward``, ``_init_group``, ``_replicate_for_data_parallel``).
"""

import inspect
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module_hooks
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

# -- what follows the operations that are written -------------------------------------------------------------------

count_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""Returns how many dispatch modes are on; public are the modes, not the question whether there is one."""

is_tracing: Callable[[], bool] = torch._C._is_tracing
"""Returns whether ``torch.jit.trace`` is at work; ``torch.jit.is_tracing`` takes several times as long."""

_are_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def is_transformed() -> bool:
    """Return whether a function transform or forward-mode differentiation is at work; torch tells neither publicly.

    Example:
        >>> is_transformed(), torch.func.vmap(lambda x: x + is_transformed())(torch.zeros(1)).item()
        (False, 1.0)
    """
    return _are_transforms_active() or forward_ad._current_level >= 0


def is_compiler_loaded() -> bool:
    """Return whether anything may have been compiled; asking ``torch.compiler`` would import the compiler.

    Example:
        >>> is_compiler_loaded() in (True, False)
        True
    """
    return "torch._dynamo" in sys.modules


# -- tensors --------------------------------------------------------------------------------------------------------

storage_address: Callable[[Tensor], int] = torch._C._storage_address  # type: ignore[attr-defined]
"""Returns what tells a tensor's storage, as long as that is held; ``data_ptr`` is the same for storages that share
memory and for empty ones, and ``untyped_storage`` makes an object in every call."""

unsafe_view: Callable[[Tensor, Sequence[int]], Tensor] = torch.ops.aten._unsafe_view
"""Returns a tensor of another shape that is no view to autograd, as ``F.linear`` does: FSDP2 warns of views that it
hangs hooks on."""

foreach_add = torch._foreach_add
"""This and the next are torch's operators on lists, of which public optimizers alone make use."""
foreach_add_ = torch._foreach_add_
foreach_addcdiv_ = torch._foreach_addcdiv_
foreach_div_ = torch._foreach_div_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul_ = torch._foreach_mul_
foreach_neg = torch._foreach_neg
foreach_pow = torch._foreach_pow
foreach_sqrt_ = torch._foreach_sqrt_
foreach_sub_ = torch._foreach_sub_


after_backward: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
"""Has something called when the backward that is at work ends; data-parallel modules of torch do the same."""

# -- modules --------------------------------------------------------------------------------------------------------

COMPILED_MODULE = "_orig_mod"
"""Where what ``torch.compile`` makes of a module keeps the module; no function takes the wrapper off."""

COMPILED_CALL = "_compiled_call_impl"
"""Where ``Module.compile`` keeps what is called instead of the module; no function tells or undoes it."""

COMPILED_FROM = "_torchdynamo_orig_callable"
"""Where a function that ``torch.compile`` made keeps the one that was written; no function tells it from others."""

RECOMPUTED_MODULE = "_checkpoint_wrapped_module"
"""Where torch's ``checkpoint_wrapper`` keeps the module that it wraps; ``state_dict`` leaves the name out of keys."""

SHARDED_MODULE = "_is_fsdp_managed_module"
"""What both FSDPs set on modules whose parameters they shard; FSDP1 leaves no other trace on an inner module."""


def explicit_padding(convolution: nn.Module) -> list[int]:
    """Return a convolution's padding as ``F.pad`` takes it; torch works it out of ``"same"`` for itself alone.

    Example:
        >>> explicit_padding(nn.Conv2d(4, 4, (3, 2), padding="same"))
        [0, 1, 1, 1]
    """
    return convolution._reversed_padding_repeated_twice  # type: ignore[return-value]


def may_rename_keys(module: nn.Module) -> bool:
    """Return whether a module that has one hook of ours loads states otherwise than by names; there is no asking.

    Example:
        >>> may_rename_keys(nn.Linear(4, 4))
        False
    """
    children = [child for child in module.modules() if child is not module]
    own_hooks = len(module._load_state_dict_pre_hooks) > 1 or any(
        child._load_state_dict_pre_hooks for child in children
    )
    plain = nn.Module._load_from_state_dict
    return own_hooks or any(type(child)._load_from_state_dict is not plain for child in children)


def remove_global_hook(handle: RemovableHandle) -> None:
    """Remove a global forward hook with keywords, for which torch 2.11 to 2.13 keep a note after its handle is removed.

    Example:
        >>> remove_global_hook(nn.modules.module.register_module_forward_hook(print, with_kwargs=True))
    """
    handle.remove()
    _module_hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)


# -- optimizers -----------------------------------------------------------------------------------------------------

INIT_GROUP = "_init_group"
"""Where Adam collects what it updates in a group; what takes place there is inside the one step that hooks see."""


def register_first_post_hook(optimizer: Optimizer, hook: Callable[..., None]) -> RemovableHandle:
    """Register a hook that runs after an optimizer's step before those that are there, for which there is no option.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        >>> handles = [optimizer.register_step_post_hook(lambda *_: print("second"))]
        >>> handles += [register_first_post_hook(optimizer, lambda *_: print("first"))]
        >>> optimizer.step()
        first
        second
    """
    handle = optimizer.register_step_post_hook(hook)
    hooks: Any = optimizer._optimizer_step_post_hooks  # an OrderedDict, in the order of calls
    hooks.move_to_end(handle.id, last=False)
    return handle


def makes_optimizer_state() -> bool:
    """Return whether ``torch.distributed.checkpoint`` is making an optimizer's state, by a step of zeros, in this call.

    It does so where an optimizer has none yet, to have room for what it loads; hooks see a step like any other.

    Example:
        >>> makes_optimizer_state()
        False
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back
    return False


# -- distributed ----------------------------------------------------------------------------------------------------

local_tensor: Callable[[Tensor], Tensor] = attrgetter("_local_tensor")
"""Returns the part of a DTensor that lies here; ``to_local`` returns another view of a parameter's each time."""


def fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    """Yield what FSDP2 keeps of every parameter that it shards, which no public function tells.

    Of that, read are ``mp_policy``, ``padded_sharded_param_size``, and what the functions below use.

    Example:
        >>> list(fsdp_parameters(nn.Linear(4, 4)))
        []
    """
    seen = set()
    for module in model.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        state = module._get_fsdp_state()  # type: ignore[operator]
        if id(state) in seen:
            continue
        seen.add(id(state))
        groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 has one at most
        for group in [state._fsdp_param_group] if groups is None else groups:
            yield from () if group is None else group.fsdp_params


def module_of(parameter: Any) -> tuple[nn.Module, str]:
    """Return the module that has a parameter which :func:`fsdp_parameters` yields, and its name there."""
    return parameter._module_info.module, parameter._module_info.param_name


def gathered_size(parameter: Any) -> tuple[int, ...]:
    """Return the size of what FSDP2 gathers: of the part that tensor parallelism leaves, where there is one."""
    return tuple(parameter._orig_size)


def gather_afresh(parameter: Any, sent: Sequence[Tensor] = ()) -> None:
    """Have FSDP2 make the buffers of a parameter's next gathering again, as what travels has another size.

    It makes them once, of what the first gathering sends: of no use to training if that is under ``inference_mode``.

    Args:
        parameter: What :func:`fsdp_parameters` yields, not gathered.
        sent: What will be sent, for buffers that are made now, without memory; empty if that may be left to FSDP2.
    """
    parameter.all_gather_outputs = []
    parameter.__dict__.pop("_unsharded_param", None)
    parameter._init_extensions()
    count = parameter.shard_mesh.size()
    own = sent if count > 1 else sent[:1]
    if own:
        with torch.inference_mode(False):
            sizes, dtypes = [one.numel() for one in own], [one.dtype for one in own]
            parameter.init_all_gather_outputs(sizes, dtypes, count, parameter.device)
        parameter.free_unsharded_param()


def follow_resets(parameter: Any, act: Callable[[], None]) -> None:
    """Have something called each time that FSDP2 has taken note of another local tensor; there is no hook.

    It does after conversions and after loading, and may replace that tensor to pad it.

    Args:
        parameter: What :func:`fsdp_parameters` yields.
        act: Is called then.
    """
    reset = type(parameter).reset_sharded_param

    def reset_and_act() -> None:
        reset(parameter)
        act()

    parameter.reset_sharded_param = reset_and_act


def leave_resets(parameter: Any) -> None:
    """Undo :func:`follow_resets`, if it was called."""
    parameter.__dict__.pop("reset_sharded_param", None)


# -- CUDA and operators ---------------------------------------------------------------------------------------------


def _public_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)
"""Returns the handle of a device's current stream, in builds for CUDA; the public way builds an object for several
microseconds, so Triton's launcher asks in this way too."""

cuda_sleep: Callable[[int], None] = torch.cuda._sleep
"""Keeps the current stream busy for so many cycles; no public operator takes a time that is known."""


def _operator(name: str) -> Any:
    """Return an operator of ``torch.ops.aten``, or None where torch has it no longer."""
    return getattr(torch.ops.aten, name, None)


# the public way is a tensor subclass, which compresses by itself and takes no metadata that others made
cslt_compress = _operator("_cslt_compress")
cslt_sparse_mm = _operator("_cslt_sparse_mm")
semi_structured_mm = _operator("_sparse_semi_structured_mm")
semi_structured_tile = _operator("_sparse_semi_structured_tile")

scaled_mm: Callable[..., Tensor] = torch._scaled_mm
"""The product of 8-bit matrices that torchao calls; ``F.scaled_mm`` is another operator."""


def kernels_of(operator: Any) -> MutableMapping[str | None, Callable[..., Any]]:
    """Return the kernels of an operator of ``torch.library.custom_op`` by device, None for all others, to exchange.

    Example:
        >>> operator = torch.library.custom_op("internals::nothing", lambda: None, mutates_args=(), schema="() -> ()")
        >>> list(kernels_of(operator))
        [None]
    """
    kernels: MutableMapping[str | None, Callable[..., Any]] = operator._backend_fns
    return kernels
