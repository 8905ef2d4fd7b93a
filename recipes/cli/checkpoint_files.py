"""Checkpoint files as they are given on the command line, read without running what is in them."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsetrain.checks.suggestions import did_you_mean


def read_checkpoint(path: str, argument: str, *, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint of Lightning, or the weights alone.

    Args:
        path: A file of ``torch.save`` that holds plain values and tensors, or a ``.safetensors`` file.
        argument: What the path was given for; the subject of the error's sentence.
        mapped: Leave tensors in the file, if it has torch's present format; nothing may write to it meanwhile.

    Returns:
        The checkpoint; weights alone are under ``state_dict``.

    Raises:
        ValueError: If there is no such file, or it cannot be read, or holds no weights; the message names it.
    """
    import torch

    subject = f"{argument} {path!r}"
    _require_file(path, subject)
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        try:
            return {"state_dict": load_file(path)}
        except Exception as error:  # its own class is no part of its interface
            raise ValueError(f"{subject} is no safetensors file, or a damaged one: save it again.") from error
    try:
        in_file = mapped and zipfile.is_zipfile(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=in_file)
    except Exception as error:  # unpickling damaged bytes fails in any way
        raise ValueError(f"{subject} {_why_unreadable(error)}") from error
    if _is_state_dict(loaded):
        return {"state_dict": loaded}
    if not isinstance(loaded, dict) or not _is_state_dict(loaded.get("state_dict")):
        held = f"the keys {', '.join(map(repr, list(loaded)[:5]))}" if isinstance(loaded, dict) else _article(loaded)
        raise ValueError(
            f"{subject} has no 'state_dict' of tensors but {held}: pass a checkpoint that Lightning wrote, or what "
            "torch.save(model.state_dict(), path) wrote."
        )
    return loaded


def require_resumable(path: str) -> None:
    """Refuse a file that no fit can go on from.

    Raises:
        ValueError: As :func:`read_checkpoint`, and if Lightning did not write it.
    """
    if "pytorch-lightning_version" not in read_checkpoint(path, "ckpt_path", mapped=True):
        raise ValueError(
            f"ckpt_path {path!r} holds weights and nothing else, so no fit can go on from it: pass a checkpoint that "
            "Lightning wrote."
        )


def _require_file(path: str, subject: str) -> None:
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{subject} is a folder: pass the path of a checkpoint file.")
    if not file.is_file():
        beside = sorted(entry.name for entry in file.parent.iterdir()) if file.parent.is_dir() else []
        near = did_you_mean(file.name, beside)
        raise ValueError(f"{subject} is no file{near}: pass the path of a checkpoint file.")
    if file.stat().st_size == 0:
        raise ValueError(f"{subject} is empty: its save was interrupted, so pass another checkpoint.")


def _is_state_dict(value: Any) -> bool:
    from torch import Tensor

    return isinstance(value, Mapping) and bool(value) and any(isinstance(entry, Tensor) for entry in value.values())


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
        return (
            f"holds an object of {found[1]}, and only plain values and tensors are read, because anything else may run "
            "code: save the weights with torch.save(model.state_dict(), path)."
        )
    if isinstance(error, PermissionError):
        return "cannot be read: check its permissions."
    return "is no checkpoint, or a damaged one: save it again, or pass another."


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
