"""``verify``: the model as it runs against the same model with plain masked weights."""

import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..kernels.torch_internals import is_compiler_loaded, remove_global_hook
from .masked_layer import MaskedLayer
from .selection.select_layers import sparse_layers

Run = Callable[[], Any]


@dataclass(frozen=True)
class VerificationReport:
    """What :func:`verify` found; ``str()`` is one sentence.

    Args:
        ok: Whether all outputs are alike, to the square root of their dtype's rounding.
        largest_difference: Between outputs, relative to the largest magnitude of the output.
        mode: In which it was found: ``"eval under no_grad"``, ``"eval under inference_mode"`` or ``"as it is"``.
        modules: Names of the modules whose outputs differ first; empty if ``ok``.
        uncalled: Names of masked layers that were not called although the module that holds them was: it read their
            weights itself, or had no use for them.
        masked: Layers whose masks are in force.
    """

    ok: bool
    largest_difference: float
    mode: str
    modules: tuple[str, ...] = ()
    uncalled: tuple[str, ...] = ()
    masked: int = 0

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            return (
                f"the model computes what plain masked weights give: the largest relative difference is "
                f"{self.largest_difference:.1e} with {self.masked} masked layers."
            )
        return (
            f"the model does not compute what plain masked weights give: outputs differ by a relative "
            f"{self.largest_difference:.1e} in {self.mode}, {blame(self.modules, self.uncalled)}."
        )


def blame(modules: Sequence[str], uncalled: Sequence[str]) -> str:
    """Say which module is to blame and what to do about it."""
    first = ", ".join(repr(name) or "the model itself" for name in modules[:3]) or "no module alone"
    text = f"first in {first}"
    if uncalled:
        named = ", ".join(map(repr, uncalled[:3])) + (", …" if len(uncalled) > 3 else "")
        return f"{text}, where {named} is never called because its parent reads its weight: add it to exclude"
    return f"{text}: add the layers inside to exclude"


def verify(model: nn.Module, example: Any) -> VerificationReport:
    """Compare the model as it runs with the same model whose layers have plain masked weights.

    Finds what passes a mask by: a module that reads ``layer.weight`` instead of calling the layer, a fused or compiled
    path, a backend that is wrong. Soft thresholds and adapters are part of the plain weights. It runs in evaluation
    under ``no_grad`` and ``inference_mode``, and with the training flags as they are; afterwards flags, buffers,
    attributes and random generators are what they were, and no mask, counter or statistic has changed.

    Args:
        model: Any module with masked layers, on its device.
        example: What to call it with, copied before each run: a tensor, a tuple of arguments, or a mapping of keywords.

    Returns:
        A report, true if all is well.

    Raises:
        TypeError: If there is nothing in the outputs to compare.
        ValueError: If weights are sharded.

    Example:
        >>> from sparsetrain import sparsify_
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> _ = sparsify_(layer, verbose=False)
        >>> verify(layer, torch.randn(2, 3, 8)).ok
        True
    """
    require_unsharded(model)
    worst = VerificationReport(True, 0.0, "as it is", masked=sum(layer.is_masked for _, layer in sparse_layers(model)))
    with unchanged(model):
        for mode, evaluate, gradients in (
            ("as it is", False, nullcontext if not model.training else torch.no_grad),
            ("eval under no_grad", True, torch.no_grad),
            ("eval under inference_mode", True, torch.inference_mode),
        ):
            if evaluate:
                model.eval()
            with gradients():
                found = compare(model, caller(model, example), mode)
            if not found.ok:
                return found
            worst = max(found, worst, key=lambda report: report.largest_difference)
    return worst


def require_unsharded(model: nn.Module) -> None:
    """Raise ``ValueError`` if a masked layer is sharded: plain weights cannot be put in place of what is gathered."""
    for name, layer in sparse_layers(model):
        if layer.shard is not None:
            raise ValueError(
                f"layer {name!r} is sharded, and verify() needs whole weights: call it in one process, on a model with "
                "the same weights and masks."
            )


def compare(model: nn.Module, run: Run, mode: str) -> VerificationReport:
    """Run twice, as it is and with plain masked weights, and name the module to blame if the outputs differ."""
    masked = sum(layer.is_masked for _, layer in sparse_layers(model))
    state = random_state(model)
    with unchanged(model, state):
        real = tensors_of(run())
    if not real:
        raise TypeError("the model's output holds no tensor: verify a module that returns tensors.")
    with unchanged(model, state), plain_weights(model):
        expected = tensors_of(run())
    largest, ok = difference(real, expected)
    if ok:
        return VerificationReport(True, largest, mode, masked=masked)
    modules, uncalled = find_first(model, run, state)
    return VerificationReport(False, largest, mode, modules, uncalled, masked)


def find_first(model: nn.Module, run: Run, state: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the first module that makes another output of the same input, and the masked layers not called."""
    with unchanged(model, state), watched(model) as real:
        run()
    with unchanged(model, state), plain_weights(model), watched(model) as expected:
        run()
    seen = {name for name, _ in real}
    first: tuple[str, ...] = ()
    for (name, count), (inputs, outputs) in real.items():  # inner modules come before those around them
        inputs_then, outputs_then = expected.get((name, count), ([], []))
        if difference(inputs, inputs_then)[1] and not difference(outputs, outputs_then)[1]:
            first = (name,)
            break
    uncalled = tuple(
        name
        for name, layer in sparse_layers(model)
        if layer.is_masked and name not in seen and name.rpartition(".")[0] in seen
    )
    inside = tuple(name for name in uncalled if first and name.startswith(f"{first[0]}." if first[0] else ""))
    return first, inside or uncalled


def caller(module: nn.Module, example: Any) -> Run:
    """Return a function that calls a module with a copy of an example."""

    def run() -> Any:
        arguments = copied(example)
        if isinstance(arguments, Mapping):
            return module(**arguments)
        return module(*arguments) if isinstance(arguments, tuple) else module(arguments)

    return run


def copied(example: Any) -> Any:
    """Copy a structure with its tensors, which may belong to a graph, and objects such as caches; modules stay."""
    memo: dict[int, Any] = {}
    todo = [example]
    while todo:
        value = todo.pop()
        if id(value) in memo:
            continue
        if isinstance(value, Tensor):
            memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        elif isinstance(value, nn.Module):
            memo[id(value)] = value
        elif isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, list | tuple | set):
            todo += value
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            todo += vars(value).values()
    return copy.deepcopy(example, memo)


def uncompiled() -> AbstractContextManager[Any]:
    """Run what is compiled as it was written."""
    return torch.compiler.set_stance("force_eager") if is_compiler_loaded() else nullcontext()


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """Put the effective weights into masked layers and have them multiply densely; masters are not written to."""
    kept: list[tuple[MaskedLayer, Any, Any]] = []
    with uncompiled():
        for _, layer in sparse_layers(model):
            if layer.is_masked:
                master = layer.weight
                weight = nn.Parameter(layer.effective_weight(master.detach(), with_adapter=True), master.requires_grad)
                kept.append((layer, master, layer.phase))
                layer._parameters["weight"], layer.phase = weight, "dense"
        try:
            yield
        finally:
            for layer, master, phase in kept:
                layer._parameters["weight"], layer.phase = master, phase


@contextmanager
def unchanged(model: nn.Module, state: Any = None) -> Iterator[None]:
    """Take back what runs change: attributes of modules, buffers and random generators; start from a random state."""
    before = random_state(model)
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    tensors = [value for held in (*attributes, *buffers) for value in held.values() if isinstance(value, Tensor)]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    if state is not None:
        set_random_state(state)
    try:
        yield
    finally:
        for module, attribute, own in zip(modules, attributes, buffers, strict=True):
            for held, kept in ((vars(module), attribute), (module._buffers, own)):
                for name in set(held) - set(kept):
                    del held[name]
                held.update(kept)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        set_random_state(before)


Calls = dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]]
"""Name of a module and number of its call, and the tensors that went in and came out, on the host."""


@contextmanager
def watched(model: nn.Module) -> Iterator[Calls]:
    """Gather the calls of all submodules in the order in which they end.

    By a global hook, because PyTorch's fused encoder is not taken where a module has hooks of its own.
    """
    names = {id(module): name for name, module in model.named_modules()}
    calls: Calls = {}
    counts: Counter[str] = Counter()

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if id(module) in names:
            name = names[id(module)]
            calls[name, counts[name]] = _on_host([args, kwargs]), _on_host(output)
            counts[name] += 1

    with uncompiled():
        handle = module_hooks.register_module_forward_hook(note, with_kwargs=True)
        try:
            yield calls
        finally:
            remove_global_hook(handle)


def _on_host(value: Any) -> list[Tensor]:
    return [tensor.detach().cpu().clone() for tensor in tensors_of(value)]


def difference(real: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, bool]:
    """Return the largest difference, relative to the largest magnitude of its tensor, and whether it is rounding."""
    if [tensor.shape for tensor in real] != [tensor.shape for tensor in expected]:
        return float("inf"), False
    largest, ok = 0.0, True
    for one, other in zip(real, expected, strict=True):
        if not one.is_floating_point():
            continue
        dtype = torch.promote_types(one.dtype, torch.float32)
        one, other = one.detach().to(dtype), other.detach().to(dtype)
        apart = (one != other) & ~(one.isnan() & other.isnan())
        distance = torch.where(apart, (one - other).abs().nan_to_num(float("inf"), float("inf")), 0)
        size = other[other.isfinite()].abs()
        scale = float(size.max()) if size.numel() else 0.0
        relative = float(distance.max()) / (scale or 1.0) if distance.numel() else 0.0
        largest = max(largest, relative)
        ok = ok and relative <= tolerance(real)
    return largest, ok


def tolerance(tensors: Sequence[Tensor]) -> float:
    """Return what rounding may do: the square root of the coarsest epsilon, of autocast's dtype if it is on."""
    dtypes = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    for device in {tensor.device.type for tensor in tensors}:
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
    return max((float(torch.finfo(dtype).eps) ** 0.5 for dtype in dtypes), default=0.0)


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of a nested structure of mappings, sequences and data classes; nested ones padded."""
    if isinstance(value, Tensor):
        return [value.to_padded_tensor(0.0) if value.is_nested else value]
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, list | tuple):
        inside = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        return []
    return [tensor for part in inside for tensor in tensors_of(part)]


def random_state(model: nn.Module) -> tuple[Any, ...]:
    """Return the state of Python's and torch's generators, of the devices that the model is on."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return random.getstate(), torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}


def set_random_state(state: tuple[Any, ...]) -> None:
    """Take back what :func:`random_state` returned."""
    random.setstate(state[0])
    torch.set_rng_state(state[1])
    for device, value in state[2].items():
        torch.cuda.set_rng_state(value, device)
