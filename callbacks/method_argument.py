"""How configuration files and command lines of jsonargparse, and so of LightningCLI, hold a ``Method``."""

from typing import Any

from sparsetrain.criteria import CRITERIA, resolve_criterion
from sparsetrain.methods import Method


def register_method() -> None:
    """Have jsonargparse keep methods as mappings; does nothing where it is not installed.

    A preset's name becomes ``{"preset": name}``, so that ``--trainer.callbacks.method.decay=0.01`` changes one value of
    that preset, and that what is printed and saved is what was given. Without this, a ``Method`` is a dataclass to
    jsonargparse, and one field on the command line replaces the preset by a new ``Method``.
    """
    try:
        from jsonargparse.typing import register_type
    except ImportError:
        return
    register_type(Method, as_mapping, _from_config)


def as_mapping(method: Method) -> dict[str, Any]:
    """Return the mapping of plain values that :func:`sparsetrain.methods.resolve_method` makes the method of.

    Raises:
        ValueError: If the criterion is none of the library's with its default values.

    Example:
        >>> as_mapping(Method(decay=0.01))["schedule"][0]
        {'kind': 'sparse', 'length': None, 'share': 1.0, 'earliest': None, 'kept': 2}
    """
    criterion = resolve_criterion(method.criterion)
    name = criterion.name
    if name not in CRITERIA or repr(CRITERIA[name]()) != repr(criterion):
        raise ValueError(
            f"method.criterion is {criterion!r}, which has no plain name: give one of {sorted(CRITERIA)} in a "
            "configuration, or the method as a mapping with the criterion's class_path."
        )
    return {**method.describe(), "criterion": name}


def _from_config(value: Any) -> dict[str, Any]:
    if not isinstance(value, str):  # mappings, and single keys of them, are the next type's
        raise TypeError(f"{value!r} is no preset's name")
    return {"preset": value}
