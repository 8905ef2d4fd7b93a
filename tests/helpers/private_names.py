"""Private names in source, and which of them are torch's."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "sparsetrain", "callbacks", "recipes", "scripts")
INTERNALS = ROOT / "kernels" / "torch_internals.py"

PRIVATE = re.compile(r"_+(?!_)[A-Za-z]\w*(?<!__)")
PATH = re.compile(r"torch(\.\w+)+")

TORCH = {
    name
    for owner in (
        Tensor, nn.Conv2d(1, 1, 1), nn.TransformerEncoderLayer(1, 1, 1), torch.optim.AdamW([torch.zeros(1)]),
        torch.autograd.Function, LRScheduler,
    )
    for name in dir(owner)
    if PRIVATE.fullmatch(name)
}  # fmt: skip
"""Of what the sources use and derive from, whoever else defines them."""

IN_PLACE = {"_version", "_parameters", "_modules", "_buffers"}
"""Attributes of tensors and modules that are read where they are needed, because a call takes longer."""

INHERITED = {"_apply", "_conv_forward", "_init_group", "_replicate_for_data_parallel"}
"""Methods of torch's classes that subclasses override, or call on themselves."""


class Use(NamedTuple):
    """A private name in source; inherited: a method that is defined, or is asked of ``self`` or ``super()``."""

    name: str
    line: int
    kind: Literal["foreign", "inherited", "of torch"]


def _of_attribute(node: ast.Attribute) -> Use:
    base = node.value
    while isinstance(base, ast.Attribute):
        base = base.value
    if isinstance(base, ast.Name) and base.id == "torch":
        return Use(node.attr, node.lineno, "of torch")
    itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    parent = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
    return Use(node.attr, node.lineno, "inherited" if itself or parent else "foreign")


def uses(source: str) -> Iterator[Use]:
    """Yield every private name that is an attribute, an imported name, a method, or a whole string (a path too)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            yield _of_attribute(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = (getattr(node, "module", None) or "").split(".")
            for parts in (module + alias.name.split(".") for alias in node.names):
                kind: Literal["foreign", "of torch"] = "of torch" if "torch" in parts[:2] else "foreign"
                yield from (Use(part, node.lineno, kind) for part in parts if PRIVATE.fullmatch(part))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".") if PATH.fullmatch(node.value) else [node.value]
            kind = "of torch" if len(parts) > 1 else "foreign"
            yield from (Use(part, node.lineno, kind) for part in parts if PRIVATE.fullmatch(part))
        elif isinstance(node, ast.ClassDef):
            inside = [entry for entry in node.body if isinstance(entry, ast.FunctionDef)]
            yield from (Use(entry.name, entry.lineno, "inherited") for entry in inside if PRIVATE.fullmatch(entry.name))


def defined(source: str) -> set[str]:
    """Return the private names that a source gives to functions, classes, fields and attributes of its own."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if PRIVATE.fullmatch(name)}


def sources() -> Iterator[Path]:
    """Yield the sources, each once."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if not any(parent.is_symlink() for parent in path.parents if parent != ROOT):
                yield path


def foreign(source: str, own: set[str]) -> Iterator[Use]:
    """Yield the private names in a source that are torch's or another library's.

    Args:
        source: Of a module.
        own: Private names of all sources.
    """
    for use in uses(source):
        if use.kind == "of torch" or use.name in TORCH or use.name not in own:
            yield use
