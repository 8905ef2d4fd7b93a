"""What went wrong on the command line or in a recipe, in one sentence with the nearest right word.

jsonargparse reports every type that an option may have had, as an indented tree. :func:`explain` reads the branch that
says most, and looks up what would have been right.
"""

import inspect
import pkgutil
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from sparsetrain.checks.suggestions import did_you_mean

UNION = "Does not validate against any of the Union subtypes"
NO_CLASS = "Expected a dot import path string"
PREFIXES = ("class_path", "init_args", "dict_kwargs")
"""What stands beside a class in a recipe."""


@dataclass(frozen=True)
class _Complaint:
    """The keys that lead to a value, the class whose argument it is, the complaint, and the value as text."""

    keys: tuple[str, ...] = ()
    owner: str = ""
    text: str = ""
    value: str = ""

    @property
    def key(self) -> str:
        return ".".join(self.keys)

    @property
    def weight(self) -> int:
        """How much it says: a type that was expected least, a wrong name or value inside a class most."""
        if re.match("Expected a path|Not a valid subclass|.* is not accepted by Callback", self.text):
            return 0
        is_type = self.text.startswith("Expected a ") and not self.text.startswith(NO_CLASS)
        return 1 if is_type else 2 + len(self.keys)


def explain(message: str, options: Collection[str] = ()) -> str:
    r"""Reduce an error's message to one sentence.

    Args:
        message: Of an exception, in any number of lines.
        options: Keys of the command line, such as ``"trainer.max_steps"``.

    Example:
        >>> explain("Subcommand 'fit' does not accept option 'trainer.max_step'", ["trainer.max_steps"])
        "option 'trainer.max_step' is not accepted (did you mean 'trainer.max_steps'?)."
        >>> explain('Parser key "model":\n  Parser key "width":\n    Expected a <class \'int\'>. Got value: wide')
        "model.width is 'wide': it must be int."
    """
    found = _read([line for line in message.splitlines() if line.strip()])
    text = found.text
    if match := re.search(r"(?:does not accept option|[Oo]ption) '(.+?)'(?: is not accepted)?$", text):
        return _not_accepted(match[1], found, options)
    if not text.endswith(".") and (match := re.match(r"unrecognized arguments: (--?)([^\s=]+)", text)):
        near = did_you_mean(match[2], options).replace("mean '", f"mean '{match[1]}")
        return f"{text}{near}."
    if match := re.match(r"module '(.+?)' has no attribute '(.+?)'$", text):
        return f"{_class_path(found)}: {text}{did_you_mean(match[2], _names_in(match[1]))}."
    if match := re.match(r"No module named '(.+?)'", text):
        package, _, name = match[1].rpartition(".")
        return f"{_class_path(found)}: {text}{did_you_mean(name, _names_in(package))}."
    if match := re.match(NO_CLASS + r": (\S+)$", text):
        near = did_you_mean(match[1], _class_names())
        return f"{found.key}: {match[1]!r} is no known class{near}: pass a class path, such as package.module.Class."
    if text.startswith("Expected a "):
        return _wrong_type(found)
    where = f"{found.key}: " if found.key and not text.startswith(found.key) else ""
    return where + text


def _read(lines: Sequence[str]) -> _Complaint:
    """Return the complaint that says most of a report, or of an indented part of it."""
    if not lines:
        return _Complaint()
    first = lines[0].strip()
    if first.startswith("- Expected a path but ") and len(lines) > 1:
        return _read([lines[1].replace("- ", "", 1), *lines[2:]])
    if match := re.fullmatch(r'Parser key "(.+?)"(?: element \d+)?:', first):
        inner = _read(lines[1:])
        return replace(inner, keys=(match[1], *inner.keys))
    if match := re.fullmatch(r"Problem with given class_path '(.+)':", first):
        inner = _read(lines[1:])
        return replace(inner, owner=inner.owner or match[1])
    if first == UNION:
        return _of_union(lines)
    text, _, value = " ".join(line.strip() for line in lines).partition(". Got value: ")
    return _Complaint(text=text, value=value)


def _of_union(lines: Sequence[str]) -> _Complaint:
    start = next((index for index, line in enumerate(lines) if line.strip() == "Errors:"), len(lines) - 1) + 1
    given = [line.split(": ", 1)[1] for line in lines if line.strip().startswith("Given value: ")]
    depth = len(lines[start]) - len(lines[start].lstrip()) if start < len(lines) else 0
    blocks: list[list[str]] = []
    for line in lines[start:]:
        indent = len(line) - len(line.lstrip())
        if indent < depth:
            break
        if indent == depth and line.strip().startswith("- "):
            blocks.append([" " * depth + line.strip()[2:]])
        elif blocks:
            blocks[-1].append(line)
    complaints = [_read(block) for block in blocks]
    best = max(complaints, key=lambda complaint: complaint.weight, default=_Complaint())
    if best.weight == 1 and not best.keys:
        types = [complaint.text.removeprefix("Expected a ") for complaint in complaints if complaint.weight == 1]
        best = replace(best, text="Expected a " + " | ".join(types))
    return best if best.value or not given else replace(best, value=given[-1])


def _not_accepted(word: str, found: _Complaint, options: Collection[str]) -> str:
    known = [*_arguments_of(found.owner), *PREFIXES] if found.owner else options
    head, dot, rest = word.partition(".")
    near = "" if found.owner and dot else did_you_mean(word, known)
    near = near or did_you_mean(head, known).replace("'?", f"{dot}{rest}'?")
    by = f" by {found.owner.rpartition('.')[2]}" if found.owner else ""
    where = f"{found.key}: " if found.key else ""
    return f"{where}option {word!r} is not accepted{by}{near}."


def _class_path(found: _Complaint) -> str:
    return f"{found.key}: class_path {found.owner!r} names no class" if found.owner else found.key or "class_path"


def _wrong_type(found: _Complaint) -> str:
    types = found.text.removeprefix("Expected a ")
    words = [word for group in re.findall(r"Literal\[(.*?)\]", types) for word in re.findall(r"'(.*?)'", group)]
    types = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", types).replace("typing.", "").replace("NoneType", "null")
    value = f" is {found.value!r}{did_you_mean(found.value, words)}" if found.value else ""
    allowed = re.sub(r"Literal\[(.*?)\]", r"\1", types).replace(" | ", " or ")
    return f"{found.key or 'a value'}{value}: it must be {allowed}."


def _arguments_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def _names_in(module: str) -> list[str]:
    """Return what may stand after a module's name and a dot; modules that can be imported, for no name."""
    if not module:
        return [found.name for found in pkgutil.iter_modules()]
    try:
        package: Any = import_module(module)
    except ImportError:
        return []
    inside = [found.name for found in pkgutil.iter_modules(getattr(package, "__path__", []))]
    return [*inside, *(name for name in dir(package) if not name.startswith("_"))]


def _class_names() -> Iterable[str]:
    """Return the names of the classes that a recipe may name without their module."""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from lightning.pytorch.loggers import Logger
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    pending: list[type] = [Callback, LightningDataModule, LightningModule, Logger, Optimizer, LRScheduler]
    names = set()
    while pending:
        found = pending.pop()
        pending += found.__subclasses__()
        if not found.__name__.startswith("_") and found.__module__ in sys.modules:
            names.add(found.__name__)
    return sorted(names)
