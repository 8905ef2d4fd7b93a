"""The teacher of a distillation: which module it is like, how it is copied, where it is."""

import copy
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ..distributed.wrappers import plain_model
from ..kernels.torch_internals import COMPILED_CALL, COMPILED_FROM
from ..layers.sparsify import export_dense_


def student_in(model: nn.Module, logits_from: str) -> nn.Module:
    """Return the module that gives the logits, without wrappers, which have no copies of their own."""
    try:
        student = model.get_submodule(logits_from)
    except AttributeError:
        children = ", ".join(repr(name) for name, _ in model.named_children())
        raise ValueError(
            f"logits_from is {logits_from!r} but the model has no such submodule: it must be '' (the model itself) or "
            f"a name such as {children}."
        ) from None
    return plain_model(student)


def require_apart(teacher: nn.Module, model: nn.Module) -> None:
    """Raise ``ValueError`` if a teacher has parameters of the model that is trained."""
    trained = {id(parameter) for parameter in model.parameters()}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in trained:
            raise ValueError(f"teacher shares {name!r} with the model: it would be trained too, so pass a deep copy.")


def require_copyable(student: nn.Module) -> None:
    """Raise ``ValueError`` if a copy of the student would run the student itself."""
    for name, module in student.named_modules():
        forward = vars(module).get("forward")
        # a copy would run the original
        if isinstance(forward, FunctionType) and not hasattr(forward, COMPILED_FROM):
            raise ValueError(
                f"module {name!r} has a function in place of its forward, which has no copy: pass a dense model as "
                "teacher."
            )


def copy_of(student: nn.Module) -> nn.Module:
    """Return the student as a dense module in evaluation mode that is not trained.

    Raises:
        RuntimeError: If it cannot be copied.
    """
    try:
        teacher = copy.deepcopy(student)
    except Exception as error:
        raise RuntimeError(
            f"the model cannot be copied to be the teacher ({error}): pass a dense model as teacher."
        ) from error
    for copied, original in zip(teacher.modules(), student.modules(), strict=True):
        vars(copied).pop(COMPILED_CALL, None)  # these two would run the original
        if isinstance(vars(copied).get("forward"), FunctionType) and copied.forward is vars(original).get("forward"):
            del copied.forward
    export_dense_(teacher, zeros=False)
    return teacher.eval().requires_grad_(False)


def follow_(teacher: nn.Module, student: nn.Module) -> None:
    """Move a teacher that is on one device to where the student is."""
    here, there = next(student.parameters(), None), next(teacher.parameters(), None)
    if here is None or there is None or here.device == there.device:
        return
    if len({parameter.device for parameter in teacher.parameters()}) == 1:  # otherwise it was placed by hand
        teacher.to(here.device)


def host_copies(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Copy to the host; what is tied stays tied, so that it is saved once."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            found[name] = copy.deepcopy(value)
            continue
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in copies:
            copies[key] = value.detach().cpu().clone()
        found[name] = copies[key]
    return found
