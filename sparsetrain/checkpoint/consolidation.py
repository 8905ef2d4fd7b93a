"""A checkpoint folder of ``torch.distributed.checkpoint`` as one dense safetensors file, tensor by tensor."""

import hashlib
import json
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ..kernels.tile_codes import unpack_codes
from ..masks.matrices import matrix_of, weight_of
from ..masks.patterns import TRANSPOSABLE
from ..masks.soft_threshold import soft_thresholded
from ..masks.tile_codes import KEEP_ALL
from .pruned_entries import PLAIN_KEY, PRUNED_KEY, plain_key, weight_key

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Of dtypes in safetensors files."""


@dataclass(frozen=True)
class Consolidated:
    """What was written of one weight whose mask is in force.

    Args:
        name: Of the weight.
        shape: Likewise.
        zeros: Where the mask prunes.
        pruned: How many entries the mask prunes.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    pruned: int


class Checkpoint:
    """A checkpoint folder, read tensor by tensor without a process group.

    Args:
        folder: What ``torch.distributed.checkpoint`` wrote.
        model: The key under which the model's state was saved.

    Raises:
        ValueError: If there is none, it is damaged, or holds no state of sparse training or no such model.
    """

    def __init__(self, folder: str | Path, model: str = "model") -> None:
        self._folder = str(folder)
        try:
            self.entries: Mapping[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
        except Exception:
            self.refuse("is no checkpoint of torch.distributed.checkpoint: pass the folder that dcp.save wrote")
        plain = [key for key in self.entries if key.split(".")[-1] == PLAIN_KEY]
        if not plain:
            self.refuse("holds no state of sparse training: save training.sharded_state_dict() beside the model")
        self._prefix = plain[0][: -len(PLAIN_KEY)]
        self.state = self._state(plain[0])
        cut = len(model) + 1 if model else 0
        self._saved = {
            plain_key(key[cut:]): key
            for key, entry in self.entries.items()
            if key.startswith(f"{model}." if model else "") and isinstance(entry, TensorStorageMetadata)
            and not (self._prefix and key.startswith(self._prefix))
        }  # fmt: skip
        for name in map(self.key, self.state["active"]):
            if name not in self._saved:
                self.refuse(f"has no {f'{model}.{name}' if model else name!r}: name the key of the model's state")

    @property
    def weights(self) -> dict[str, TensorStorageMetadata]:
        """The model's tensors, by the names of the dense model: what is known without reading them."""
        return {name: self.entries[key] for name, key in self._saved.items()}

    @cached_property
    def masked(self) -> dict[str, str]:
        """Weights whose mask is in force, with their layers; one that equals a master is of a module that is shared."""
        found = {self.key(layer): layer for layer in self.state["active"]}
        kinds = {name: (entry.size, entry.properties.dtype) for name, entry in self.weights.items()}
        like = {kinds[name] for name in found} & {kind for name, kind in kinds.items() if name not in found}
        masters = {_digest(self.master(layer)): layer for name, layer in found.items() if kinds[name] in like}
        for name, kind in kinds.items():
            if kind in like and name not in found and (layer := masters.get(_digest(self.weight(name)))) is not None:
                found[name] = layer
        return found

    def key(self, layer: str) -> str:
        """Return the name of a layer's weight in the dense model."""
        return plain_key(weight_key(layer))

    def weight(self, name: str) -> Tensor:
        """Read one of the model's tensors."""
        return self._read(self._saved[name])

    def master(self, layer: str) -> Tensor:
        """Read a layer's dense weight, which Lightning's callback saves apart from the weight that is evaluated."""
        apart = f"{self._prefix}{PRUNED_KEY}.{layer}"
        return self._read(apart if apart in self.entries else self._saved[self.key(layer)])

    def codes(self, layer: str) -> Tensor:
        """Read the int16 tile codes of a layer."""
        return self._read(f"{self._prefix}codes.{layer}")

    def refuse(self, reason: str) -> NoReturn:
        """Raise ``ValueError`` for this folder."""
        raise ValueError(f"checkpoint folder {self._folder!r} {reason}.")

    def _state(self, key: str) -> dict[str, Any]:
        try:
            (plain,) = self._load(key, None)
            state: dict[str, Any] = plain["state"]
            for name in ("active", "kept", "pattern", "transposed", "modifiers"):
                state[name]
        except ValueError:
            raise
        except Exception:
            self.refuse("is damaged: its state of sparse training cannot be read")
        return state

    def _read(self, key: str) -> Tensor:
        entry = self.entries.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            self.refuse(f"is damaged: it has no tensor {key!r}")
        found = self._load(key, torch.empty(entry.size, dtype=entry.properties.dtype))
        assert isinstance(found, Tensor)
        return found

    def _load(self, key: str, room: Any) -> Any:
        state = {key: room}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is no process group
                load(state, storage_reader=FileSystemReader(self._folder), no_dist=True)
        except BaseException as error:  # torch's CheckpointException is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            self.refuse(f"is damaged: {key!r} cannot be read from it")
        return state[key]


def consolidate(folder: str | Path, path: str | Path, model: str = "model") -> list[Consolidated]:
    """Write the model of a checkpoint folder as dense weights, with zeros where masks are in force, and check it.

    Args:
        folder: What ``torch.distributed.checkpoint`` wrote: a model beside
            :meth:`sparsetrain.SparseTraining.sharded_state_dict`.
        path: Of the safetensors file to write; it has the names and shapes of the dense model.
        model: The key under which the model's state was saved.

    Returns:
        What became of every weight whose mask is in force.

    Raises:
        ValueError: If the folder cannot be read, holds no state of sparse training, or its model has adapters in use;
            or if the file cannot be written, or a weight is not what its mask says. No file is left then.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        raise ValueError(f"output is {str(path)!r}, but {what}: name a file in a folder that is there.")
    saved = Checkpoint(folder, model)
    if saved.state["modifiers"].get("adapters"):
        saved.refuse("is of a method with adapters, which fill what masks prune: load it, and use sparse_state_dict")
    written = path.with_name(path.name + ".part")
    try:
        _write(written, saved.weights, _evaluated(saved))
        found = _checked(written, saved)
        written.replace(path)
    except OSError as error:
        raise ValueError(f"output {str(path)!r} cannot be written: {error.strerror}; name another file.") from error
    finally:
        written.unlink(missing_ok=True)
    return found


def _evaluated(saved: Checkpoint) -> Iterator[Tensor]:
    """Yield the model's tensors as they are evaluated."""
    state = saved.state
    for name in saved.weights:
        if name not in saved.masked:
            yield saved.weight(name)
            continue
        layer = saved.masked[name]
        weight = saved.master(layer)
        matrix, codes = matrix_of(weight, layer in state["transposed"]), saved.codes(layer)
        if tuple(codes.shape) != (matrix.shape[0] // 4, matrix.shape[1] // 4):
            shapes = f"{tuple(codes.shape)}, its weight {tuple(weight.shape)}"
            saved.refuse(f"is damaged: codes of layer {layer!r} have shape {shapes}")
        scale = state["modifiers"].get("soft_scales", {}).get(layer)
        if scale is not None:
            soft = soft_thresholded(matrix, codes, state["pattern"] == TRANSPOSABLE.name)
            matrix = soft * matrix.new_tensor(scale)
        yield weight_of(matrix.masked_fill(~unpack_codes(codes), 0), weight.shape, layer in state["transposed"])


def _checked(path: Path, saved: Checkpoint) -> list[Consolidated]:
    """Read a file again, and return what its masked weights are if they are what their masks say."""
    state, found = saved.state, list[Consolidated]()
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(saved.weights):
            saved.refuse("was not written as a whole: try again")
        for key, layer in saved.masked.items():
            codes, weight = saved.codes(layer), file.get_tensor(key)
            matrix, pruned = matrix_of(weight, layer in state["transposed"]), ~unpack_codes(codes)
            most = _most_kept(matrix, codes, state["pattern"] == TRANSPOSABLE.name)
            if most > state["kept"] or bool(matrix[pruned].any()):
                saved.refuse(f"is damaged: weight {key!r} keeps {most} of four where its mask keeps {state['kept']}")
            zeros, kept_zeros = int((matrix == 0).sum()), int((matrix[~pruned] == 0).sum())
            found.append(Consolidated(key, tuple(weight.shape), zeros - kept_zeros, int(pruned.sum())))
    return found


def _most_kept(matrix: Tensor, codes: Tensor, transposable: bool) -> int:
    """Return the most entries of a group of four that are not zero; tiles that stay dense do not count."""
    kept = (matrix != 0).masked_fill(unpack_codes(codes.masked_fill(codes != KEEP_ALL, 0)), False)
    most = kept.reshape(len(kept), -1, 4).sum(2).amax()
    if transposable:
        most = torch.maximum(most, kept.view(-1, 4, kept.shape[1]).sum(1).amax())
    return int(most)


def _write(path: Path, entries: Mapping[str, TensorStorageMetadata], tensors: Iterator[Tensor]) -> None:
    """Write a safetensors file, one tensor after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        dtype, start = entry.properties.dtype, end
        if dtype not in NAMES:
            raise ValueError(f"weight {name!r} is {dtype}: a safetensors file holds none of these.")
        end += entry.size.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": [*entry.size], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()
