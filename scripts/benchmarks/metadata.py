"""Which order cuSPARSELt's metadata has for each dtype and shape, with raw buffers from which it can be found later."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsetrain.backends import CuSparseLtBackend
from sparsetrain.hardware.machine import cache_folder
from sparsetrain.kernels.layouts import LayoutError, learn_layout

from . import gemm, stand_in
from .grid import first_line

SHAPES = ((128, 128), (128, 256), (256, 128), (64, 96), (512, 768), (768, 512), (2048, 5632), (5632, 2048))
SMALL_SHAPES = ((32, 48), (48, 32))  # of stand-ins
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ALWAYS_KEPT = 1 << 15  # entries of a matrix whose recording is written even if its order was learned
MOST_BYTES = 6 << 20  # of a recording, before it is compressed


class Recording:
    """What a compressor made of matrices; played back, it stands for the compressor.

    Args:
        compress: Takes an exactly 2:4 ``[R, C]`` and returns one contiguous buffer of 16-bit elements; None if it is
            only played back.
    """

    def __init__(self, compress: Callable[[Tensor], Tensor] | None = None) -> None:
        self.compress = compress
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []  # int16 bits of matrix [R, C] and buffer

    def __call__(self, matrix: Tensor) -> Tensor:
        """Return the buffer of a matrix, and remember both."""
        bits = matrix.contiguous().view(torch.int16).cpu().numpy()
        if self.compress is None:
            for known, buffer in self.pairs:
                if np.array_equal(known, bits):
                    return torch.from_numpy(buffer.copy()).view(matrix.dtype)
            raise LookupError("the recording has no such matrix: more was compressed than was kept.")
        result = self.compress(matrix)
        if sum(one.nbytes + two.nbytes for one, two in self.pairs) < MOST_BYTES:
            self.pairs.append((bits.copy(), result.flatten().view(torch.int16).cpu().numpy().copy()))
        return result

    def save(self, path: Path) -> None:
        """Write ``matrices [n, R, C]`` and ``buffers [n, size]`` as int16 bits."""
        sizes = [buffer.size for _, buffer in self.pairs]
        buffers = np.zeros((len(sizes), max(sizes)), dtype=np.int16)
        for place, (_, buffer) in enumerate(self.pairs):
            buffers[place, : buffer.size] = buffer
        np.savez_compressed(path, matrices=np.stack([bits for bits, _ in self.pairs]), buffers=buffers, sizes=sizes)

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Read what :meth:`save` wrote."""
        recording = cls()
        with np.load(path) as file:
            for bits, buffer, size in zip(file["matrices"], file["buffers"], file["sizes"], strict=True):
                recording.pairs.append((bits, buffer[:size]))
        return recording


def main() -> int:
    """Decide and record; returns 1 if the decision of no shape could be taken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of decisions.jsonl and of recordings")
    parser.add_argument("--stand-in", action="store_true", help="on a CPU, with stand-ins for the libraries")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / "decisions.jsonl"
    lines.write_text("")
    device = torch.device("cpu") if options.stand_in else torch.device("cuda", 0)
    ways = stand_in.backends() if options.stand_in else gemm.WAYS
    decided = 0
    for label, backend in ways.items():
        if not isinstance(backend, CuSparseLtBackend):
            continue
        for dtype in DTYPES:
            for shape in SMALL_SHAPES if options.stand_in else SHAPES:
                found = {"way": label, "dtype": dtype, "shape": shape}
                found |= decide(backend, shape, DTYPES[dtype], device, options.out, f"{label} {dtype}")
                decided += "layout" in found
                print(json.dumps(found), flush=True)
                with lines.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    print(f"learned orders are in {cache_folder() / 'layouts'}")
    return int(not decided)


def decide(
    backend: CuSparseLtBackend, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, out: Path, name: str
) -> dict[str, Any]:
    """Return the library's decision, what learning alone says, and the name of the recording that was kept."""
    try:
        reason = backend.why_not(device, dtype, shape)
        if reason is not None:
            return {"not_here": reason}
        # both operands of a weight: the shapes come with their transposes
        layout = getattr(backend.allocate(shape, dtype, device), "layout", None)
        found = {"layout": getattr(layout, "name", None), "reason": getattr(layout, "reason", None)}
    except Exception as error:  # a vendor's library raises what it likes
        found = {"fails": f"{type(error).__name__}: {first_line(error)}"}
    recording = Recording(lambda matrix: backend.provider.compress(matrix).contiguous())
    try:
        learned = learn_layout(recording, *shape, dtype, device)
        found["learned"] = f"units of {learned.unit_bits} bits, {len(learned.padding)} of padding"
        kept = shape[0] * shape[1] <= ALWAYS_KEPT
    except LayoutError as error:
        found["learned"], kept = f"not learned: {error}", True
    except Exception as error:
        found["learned"], kept = f"fails with {type(error).__name__}: {first_line(error)}", True
    if kept and recording.pairs:
        path = out / f"{name.replace(' ', '_')}_{shape[0]}x{shape[1]}.npz"
        recording.save(path)
        found["recording"] = path.name
    return found


if __name__ == "__main__":
    sys.exit(main())
