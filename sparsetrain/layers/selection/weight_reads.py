"""Which weights are read by other modules than their layer, and so past the layer's forward and its mask.

The sources of forwards are read, with the functions and methods that they call. What Python cannot show of itself
(compiled extensions, weights found by name at run time) is left to :func:`sparsetrain.verify`.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

ENTRIES = ("forward", "training_step", "validation_step", "test_step", "predict_step")
"""Methods that others call."""

PROPERTIES = frozenset(
    {"dtype", "device", "layout", "shape", "size", "ndim", "dim", "numel", "nelement", "stride", "requires_grad"}
    | {"grad", "is_cuda", "is_meta", "is_contiguous", "data_ptr", "element_size", "itemsize", "type", "get_device"}
    | {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "untyped_storage"}
)
"""What may be asked of a weight without reading its values."""

ASKING = frozenset(
    {"isinstance", "hasattr", "type", "id", "len", "to", "type_as"}
    | {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
)
"""Functions and methods that take a weight without reading its values."""

DECLINED: tuple[Any, ...] = (nn.TransformerEncoderLayer.forward, nn.TransformerEncoder.forward)
"""Forwards whose reading path is declined where a mask is (:mod:`sparsetrain.layers.fused_encoders`)."""

EACH = object()
"""Step of a path: every child."""

Path = tuple[Any, ...]
"""Name of a parameter of the function, then attributes, indices and ``EACH``."""


@dataclass(frozen=True)
class Call:
    """A call, or the use of a property: of ``function`` if it is known, otherwise of a method of what ``owner`` gives.

    Args:
        owner: Path of the object; ``("super",)`` for the next class.
        name: Of the method.
        function: A function of the same module.
        arguments: Position or keyword, and the path that is passed.
    """

    owner: Path
    name: str
    function: FunctionType | None
    arguments: tuple[tuple[int | str, Path], ...]


def weight_readers(model: nn.Module) -> dict[int, str]:
    """Return for every layer whose weight another module reads, by ``id``, the class that reads it.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2)
        >>> weight_readers(attention)[id(attention.out_proj)]
        'nn.MultiheadAttention'
    """
    found: dict[int, str] = {}
    seen: set[tuple[Any, ...]] = set()
    for module in model.modules():
        for entry in ENTRIES:
            todo = list(_methods(module, entry, type(module).__mro__))
            while todo:
                function, bound, home = todo.pop()
                key = (function, home, *sorted((name, id(value)) for name, value in bound.items()))
                if key in seen or function in DECLINED:
                    continue
                seen.add(key)
                reads, calls = _analyze(function)
                own = next(iter(bound.values())) if home else None  # a layer's own method may read its weight
                for path in reads:
                    for layer in _resolve(bound, path[:-1]):
                        if isinstance(layer, nn.Module) and layer is not own:
                            found.setdefault(id(layer), _class_name(module))
                for call in calls:
                    todo += _callees(call, bound, home)
    return found


Callee = tuple[FunctionType, dict[str, Any], type | None]
"""A function, what its parameters are as far as that is known, and the class it is a method of."""


def _methods(owner: Any, name: str, classes: tuple[type, ...]) -> Iterator[Callee]:
    for home in classes:
        if home is nn.Module:
            return
        method = vars(home).get(name)
        if method is not None:
            method = method.fget if isinstance(method, property) else inspect.unwrap(method)
            if isinstance(method, FunctionType) and (names := _parameters(method)):
                yield method, {names[0]: owner}, home
            return


def _callees(call: Call, bound: dict[str, Any], home: type | None) -> Iterator[Callee]:
    found: list[Callee] = []
    if call.function is not None:
        found.append((call.function, {}, None))
    elif call.owner == ("super",):
        owner = next(iter(bound.values()), None)  # a method's first parameter
        after = type(owner).__mro__
        if home in after:
            found += _methods(owner, call.name, after[after.index(home) + 1 :])
    else:
        for owner in _resolve(bound, call.owner):
            if isinstance(owner, nn.Module):
                found += _methods(owner, call.name, type(owner).__mro__)
    for function, known, where in found:
        names = _parameters(function)[len(known) :]
        for place, path in call.arguments:
            name = place if isinstance(place, str) else names[place] if place < len(names) else None
            passed = [value for value in _resolve(bound, path) if isinstance(value, nn.Module)]
            if name is not None and len(passed) == 1:
                known = {**known, name: passed[0]}
        if known:
            yield function, known, where


def _resolve(bound: dict[str, Any], path: Path) -> list[Any]:
    if not path or path[0] not in bound:
        return []
    values = [bound[path[0]]]
    for step in path[1:]:
        values = [inner for value in values for inner in _step(value, step)]
    return values


def _step(value: Any, step: Any) -> list[Any]:
    """Follow one step without running a property."""
    if isinstance(value, nn.Module):
        children = value._modules
        if step is EACH:
            return list(children.values())
        if isinstance(step, int):
            return list(children.values())[step:][:1] if -len(children) <= step else []
        inner = children[step] if step in children else vars(value).get(step)
        return [] if inner is None else [inner]
    if isinstance(value, list | tuple | dict):
        inside = list(value.values()) if isinstance(value, dict) else list(value)
        return inside if step is EACH or isinstance(value, dict) else inside[step:][:1] if isinstance(step, int) else []
    return []


@functools.cache
def _analyze(function: FunctionType) -> tuple[tuple[Path, ...], tuple[Call, ...]]:
    """Return the paths of the weights whose values a function reads, and the calls it makes."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return (), ()
    reading = _Reading(function)
    reading.visit(tree)
    return tuple(dict.fromkeys(reading.reads)), tuple(dict.fromkeys(reading.calls))


def _parameters(function: FunctionType) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[: code.co_argcount]


class _Reading(ast.NodeVisitor):
    """Follows what comes from a function's parameters through attributes, indices, assignments and loops."""

    def __init__(self, function: FunctionType) -> None:
        self.globals = function.__globals__
        self.paths: dict[str, Path] = {name: (name,) for name in _parameters(function)}
        self.reads: list[Path] = []
        self.calls: list[Call] = []

    def path(self, node: ast.AST) -> Path | None:
        """Return where an expression comes from, or None."""
        if isinstance(node, ast.Name):
            return self.paths.get(node.id)
        if isinstance(node, ast.NamedExpr):
            return self.path(node.value)
        if isinstance(node, ast.Call):
            return self._path_of_call(node)
        if not isinstance(node, ast.Attribute | ast.Subscript) or (inside := self.path(node.value)) is None:
            return None
        if isinstance(node, ast.Attribute):
            return (*inside, node.attr)
        if isinstance(node.slice, ast.Slice):
            return inside
        constant = node.slice.value if isinstance(node.slice, ast.Constant) else None
        return (*inside, constant if isinstance(constant, int | str) else EACH)

    def _path_of_call(self, node: ast.Call) -> Path | None:
        """Follow ``getattr(x, "name")``."""
        named = isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1
        if not named or (inside := self.path(node.args[0])) is None:
            return None
        name = node.args[1].value if isinstance(node.args[1], ast.Constant) else EACH
        return (*inside, name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Note a read of a weight, or the use of what may be a property."""
        path = self.path(node)
        if path is None:
            self.generic_visit(node)
        elif not isinstance(node.ctx, ast.Load):
            return
        elif _is_weight(path):
            self.reads.append(path)
        elif _is_weight(path[:-1]) and path[-1] in PROPERTIES:
            return
        elif any(map(_is_weight, (path[:end] for end in range(2, len(path))))):
            self.reads.append(path[: path.index("weight") + 1])
        else:
            self.calls += [Call(path[:-1], path[-1], None, ())] if len(path) > 1 and isinstance(path[-1], str) else []

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """Go on inside: a part of a weight is a read of it."""
        self.visit(node.value)
        self.visit(node.slice)

    def visit_Name(self, node: ast.Name) -> None:
        """Note the use of a weight that has a name of its own."""
        path = self.paths.get(node.id)
        if path is not None and _is_weight(path) and isinstance(node.ctx, ast.Load):
            self.reads.append(path)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Give names to what is assigned."""
        if len(node.targets) == 1 and not self._name(node.targets[0], node.value):
            self.visit(node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        """Give a name to what is assigned within an expression."""
        if not self._name(node.target, node.value):
            self.visit(node.value)

    def _name(self, target: ast.expr, value: ast.expr) -> bool:
        """Follow an assignment; return whether the value was only named."""
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                if not self._name(one, other):
                    self.visit(other)
            return True
        path = self.path(value)
        if not isinstance(target, ast.Name):
            return False
        self.paths.pop(target.id, None)
        if path is not None:
            self.paths[target.id] = path
            self.visit(value.value) if isinstance(value, ast.Subscript) else None
            if not _is_weight(path) and isinstance(value, ast.Attribute):
                self.visit(value)  # it may be a property
        return path is not None

    def visit_For(self, node: ast.For) -> None:
        """Give names to what a loop runs over."""
        self._name_each(node.target, node.iter)
        self.generic_visit(node)

    def visit(self, node: ast.AST) -> None:
        """Give names to what a comprehension runs over before its expression, which comes first."""
        for generator in getattr(node, "generators", ()):
            self._name_each(generator.target, generator.iter)
        super().visit(node)

    def _name_each(self, target: ast.expr, over: ast.expr) -> None:
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        function = over.func if isinstance(over, ast.Call) else None
        if isinstance(over, ast.Call) and isinstance(function, ast.Name) and function.id in ("enumerate", "zip"):
            if function.id == "enumerate":
                names = names[1:]
            for name, each in zip(names, over.args, strict=False):
                self._name_each(name, each)
        elif isinstance(function, ast.Attribute) and function.attr in ("items", "named_children", "values", "children"):
            self._name_each(names[-1], function.value)
        elif isinstance(target, ast.Name):
            path = self.path(over)
            self.paths.pop(target.id, None)
            if path is not None:
                self.paths[target.id] = (*path, EACH)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Look inside, except where a weight is compared with None."""
        if not all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Note who is called, and with what."""
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        passed = [(place, self.path(value)) for place, value in enumerate(node.args)]
        passed += [(word.arg, self.path(word.value)) for word in node.keywords if word.arg]  # type: ignore[misc]
        arguments = tuple((place, path) for place, path in passed if path is not None and not _is_weight(path))
        whole = self._path_of_call(node)
        if whole is not None and _is_weight(whole):
            self.reads.append(whole)
        elif isinstance(function, ast.Attribute) and _is_super(function.value):
            self.calls.append(Call(("super",), name, None, arguments))
        elif isinstance(function, ast.Attribute) and (owner := self.path(function.value)) is not None:
            if not _is_weight(owner):
                self.calls.append(Call(owner, name, None, arguments))
        elif arguments and isinstance(callee := self._global(function), FunctionType):
            self.calls.append(Call((), name, inspect.unwrap(callee), arguments))
        for part in ast.iter_child_nodes(node):
            path = self.path(part.value if isinstance(part, ast.keyword) else part)
            if not (name in ASKING and path is not None and _is_weight(path)):
                self.visit(part)

    def _global(self, node: ast.AST) -> Any:
        """Return what a name means outside of the function."""
        if isinstance(node, ast.Name):
            return self.globals.get(node.id)
        if isinstance(node, ast.Attribute):
            return getattr(self._global(node.value), node.attr, None)
        return None


def _is_weight(path: Path) -> bool:
    return len(path) > 1 and path[-1] == "weight"


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _class_name(module: nn.Module) -> str:
    name = type(module).__name__
    return f"nn.{name}" if type(module).__module__.startswith("torch.nn.") else name
