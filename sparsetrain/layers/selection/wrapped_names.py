"""Modules that wrap others: the names layers would have without them, and peft's adapters, which are left alone.

Wrappers are known by what they have, so that no library is imported for it.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from ...kernels.torch_internals import COMPILED_MODULE

CALLS_ITS_BASE = frozenset(
    {"adalora", "delora", "gralora", "ia3", "lily", "loha", "lokr", "lora", "oft", "randlora", "vera"}
)
"""peft's methods that add to, or scale, what the base layer computes; others compute with its weight themselves."""

WRAPPED = (COMPILED_MODULE, "_forward_module", "_original_module")
"""Where ``torch.compile`` and Lightning's Fabric keep what they wrap."""


def plain_names(model: nn.Module) -> dict[str, str]:
    """Return the name of every module without what compiling, data parallelism and peft put into it.

    Example:
        >>> class Wrapper(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.base_layer, self.adapter_layer_names = nn.Linear(4, 4), ("lora_A",)
        >>> plain_names(nn.ModuleDict({"up": Wrapper()}))["up.base_layer"]
        'up'
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    hidden = {f"{name}.{child}".lstrip(".") for name, module in modules.items() for child in _inner(module)}
    plain = {"": ""}
    for name in modules:
        if name:
            parent, _, last = name.rpartition(".")
            plain[name] = plain[parent] if name in hidden else f"{plain[parent]}.{last}".lstrip(".")
    return plain


def _inner(module: nn.Module) -> list[str]:
    """Return the names below a wrapper, dots included, that stand for the wrapper itself."""
    if is_tuner(module):
        return ["base_layer"]
    if is_copying(module):
        copies = module._modules["modules_to_save"]
        return ["modules_to_save", *(f"modules_to_save.{name}" for name in getattr(copies, "_modules", ()))]
    if hasattr(module, "peft_config") and "base_model" in module._modules:
        return ["base_model"]
    if "inject_adapter" in dir(type(module)):  # a tuner around the whole model
        return ["model"]
    if type(module).__name__ in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        return ["module"]
    return [name for name in WRAPPED if name in module._modules]


def is_tuner(module: nn.Module) -> bool:
    """Return whether a module is one of peft's layers around a base layer."""
    return "base_layer" in module._modules and hasattr(module, "adapter_layer_names")


def is_copying(module: nn.Module) -> bool:
    """Return whether a module is peft's wrapper that trains a copy (``modules_to_save``)."""
    return "original_module" in module._modules and "modules_to_save" in module._modules


def peft_reasons(model: nn.Module) -> dict[str, str]:
    """Return why layers in peft's hands are left alone, by module name.

    Example:
        >>> class Wrapper(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.base_layer, self.lora_A = nn.Linear(4, 4), nn.Linear(4, 2)
        ...         self.adapter_layer_names = ("lora_A",)
        >>> peft_reasons(nn.ModuleDict({"up": Wrapper()}))["up.lora_A"]
        'peft adapter'
    """
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if is_tuner(module):
            reasons.update(dict.fromkeys(_below(name, module, {"base_layer"}), "peft adapter"))
            if (method := _method(module)) not in CALLS_ITS_BASE:
                why = f"peft's {method} computes with its weight itself: merge the adapter first"
                reasons[f"{name}.base_layer".lstrip(".")] = why
        elif is_copying(module):
            why = "peft keeps it as it was and trains a copy"
            reasons.update(dict.fromkeys(_below(name, module, {"modules_to_save"}), why))
        elif hasattr(module, "peft_config") and "base_model" in module._modules:
            reasons.update(dict.fromkeys(_below(name, module, {"base_model"}), "peft adapter"))
    return reasons


def _below(name: str, module: nn.Module, without: Collection[str]) -> Iterator[str]:
    for child, part in module.named_children():
        if child not in without:
            for inner, _ in part.named_modules():
                yield ".".join(piece for piece in (name, child, inner) if piece)


def _method(module: nn.Module) -> str:
    """Return the name of the method a wrapper is of; of a layer that is not peft's own, its class's name."""
    if module._modules.get("lora_magnitude_vector"):
        return "dora"
    for base in type(module).__mro__:
        parts = base.__module__.split(".")
        if parts[:2] == ["peft", "tuners"] and len(parts) > 2 and parts[2] != "tuners_utils":
            return parts[2]
    return type(module).__name__


def warn_of_unmerged(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Warn if peft's adapters on these layers are not merged, and would fill the zeros if they were later.

    Example:
        >>> warn_of_unmerged(nn.Linear(4, 4), {})
    """
    names = {id(layer): name for name, layer in layers.items()}
    unmerged = []
    for module in model.modules():
        fills_zeros = is_tuner(module) and _method(module) != "ia3"  # which scales rows or columns
        if fills_zeros and not getattr(module, "merged_adapters", ()):
            unmerged += [names[id(inner)] for inner in module.modules() if id(inner) in names]
    if unmerged:
        shown = ", ".join(map(repr, unmerged[:2])) + (f" and {len(unmerged) - 2} more" if len(unmerged) > 2 else "")
        warnings.warn(
            f"peft's adapters on {shown} are not merged, and merging them fills the zeros of their masks: call "
            "merge_and_unload() before finish(), or apply_masks_() after merging.",
            stacklevel=3,
        )
