"""Which metadata layout a vendor's compressor uses: proven on this machine, never assumed."""

import contextlib
import hashlib
import logging
import os
import re
import threading
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...kernels.layouts import Compressor, LayoutError, LearnedLayout, known_layout, learn_layout, verify_layout
from ...kernels.metadata_order import Order, metadata_words
from ...kernels.pack import pack_tiles_
from ...kernels.tile_codes import unpack_codes
from ..interface import SPARSE_DTYPES
from ..packing import Packed

KNOWN = {
    "cusparselt_sm80": Order.CUSPARSELT_SM80,
    "cutlass_sm90_4": Order.CUTLASS_SM90_4,
    "cutlass_sm90_2": Order.CUTLASS_SM90_2,
    "cutlass_sm90_1": Order.CUTLASS_SM90_1,
}
"""Orders that are tried, in this order, before one is learned."""

_FORMAT = "sparsetrain metadata layout 1"
_ROWS_OF_A_TILE = (0x3, 0x5, 0x6, 0x9, 0xA, 0xC)  # two of four bits
_CHECKS = 2

_log = logging.getLogger("sparsetrain")
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class MetadataLayout:
    """What was decided about the metadata of one shape in one environment.

    Args:
        name: One of ``KNOWN``, ``"learned"``, or ``"vendor"``: then compress with the vendor's own call.
        reason: One sentence.
        environment: Architecture and library version.
        rows: R of the matrix ``[R, C]``.
        columns: C.
        dtype: Of the values.
        table: The order, unless it is ``"vendor"``.

    Example:
        >>> MetadataLayout("vendor", "Nothing was learned.", "sm_90", 64, 64, torch.float16).table is None
        True
    """

    name: str
    reason: str
    environment: str
    rows: int
    columns: int
    dtype: torch.dtype
    table: LearnedLayout | None = None

    @property
    def order(self) -> Order:
        """What the packer is told; without a table there is nothing to tell."""
        return KNOWN.get(self.name, Order.TABLE)

    def arrange_(self, meta: Tensor, tail: Tensor) -> None:
        """Write natural metadata behind the values of a vendor's buffer; never waits for the device.

        Args:
            meta: int16 ``[R, C/16]``, natural order.
            tail: The buffer behind its R·C/2 values: contiguous, of any 16-bit dtype; overwritten.

        Raises:
            ValueError: If the layout is ``"vendor"``, or a shape, dtype or device does not fit.
        """
        if self.table is None:
            raise ValueError(
                f"layout is {self.name!r} for {self.rows} × {self.columns}: only a proven layout can be written, so "
                "compress with the vendor's call."
            )
        self.table.arrange_(meta, tail)


class LayoutKey(NamedTuple):
    """What an order of metadata may depend on.

    Args:
        environment: Architecture and library version, such as ``"sm_90 cuSPARSELt 0.8.1"``.
        rows: R of the matrix ``[R, C]``.
        columns: C.
        dtype: Of the values: float16 or bfloat16.
    """

    environment: str
    rows: int
    columns: int
    dtype: torch.dtype


_decisions: dict[LayoutKey, dict[torch.device, MetadataLayout]] = {}


def prove_layout(
    compress: Compressor, key: LayoutKey, device: torch.device, folder: Path | None = None
) -> MetadataLayout:
    """Find the layout in which packed rows equal the buffers of a vendor's compressor; decided once in a process.

    Known orders are compared byte by byte, padding aside. Where they differ, the order is read from ``folder`` or
    learned, and verified on random matrices. Where that fails too, the answer is ``"vendor"``.

    Args:
        compress: Takes an exactly 2:4 ``[R, C]`` and returns one contiguous buffer, values first.
        key: Of the matrices and where they are compressed.
        device: Of the matrices, and of the tables returned.
        folder: Where learned orders are kept, in ``layouts/``; None keeps them in memory alone.

    Raises:
        ValueError: If the dtype is another one.

    Example:
        >>> def compress(matrix):  # another nibble code than any known one
        ...     return torch.cat([matrix[matrix != 0], matrix.new_ones(matrix.numel() // 16)])
        >>> key = LayoutKey("an example", 16, 32, torch.float16)
        >>> prove_layout(compress, key, torch.device("cpu")).name
        'vendor'
    """
    if key.dtype not in SPARSE_DTYPES:
        raise ValueError(f"dtype is {key.dtype}: metadata layouts are proven for torch.float16 and torch.bfloat16.")
    device = torch.empty(0, device=device).device  # with its index
    with _lock:
        if key not in _decisions:
            name, reason, table = _decide(compress, key, device, folder)
            environment, *matrix = key
            _log.info("metadata of %d × %d %s on %s: %s: %s", *matrix, environment, name, reason)
            _decisions[key] = {device: MetadataLayout(name, reason, *key, table)}
        known = _decisions[key]
        if device not in known:
            layout = next(iter(known.values()))
            known[device] = replace(layout, table=layout.table.to(device) if layout.table else None)
        return known[device]


def known_layouts() -> list[MetadataLayout]:
    """Return what was decided in this process, in the order of the decisions.

    Example:
        >>> all(layout.reason for layout in known_layouts())
        True
    """
    return [next(iter(by_device.values())) for by_device in list(_decisions.values())]


_Decision = tuple[str, str, LearnedLayout | None]


@torch.no_grad()
def _decide(compress: Compressor, key: LayoutKey, device: torch.device, folder: Path | None) -> _Decision:
    try:
        return _compare_or_learn(compress, key, device, folder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the vendor's, whatever it raises
        return "vendor", f"The vendor's compressor failed: {_first_line(error)}", None


def _compare_or_learn(compress: Compressor, key: LayoutKey, device: torch.device, folder: Path | None) -> _Decision:
    _, rows, columns, dtype = key
    known, difference = _known(compress, key, device)
    if known is not None:
        reason = f"The packer's buffers in this order equal the vendor's in every byte for {_CHECKS} matrices."
        return known, reason, known_layout(KNOWN[known], rows, columns, device)
    path = None if folder is None else _path(folder, key)
    table = None if path is None else _read(path, key, compress, device)
    if table is not None:
        return "learned", f"{difference}; its order was read from {path} and agrees for a random matrix.", table
    try:
        table = learn_layout(compress, rows, columns, dtype, device)
        dense, packed = _packed(key, device, seed=_CHECKS)
        verify_layout(table, compress, dense, *packed)
    except LayoutError as error:
        return "vendor", f"{difference}, and its order cannot be learned: {error}", None
    if path is not None:
        _write(path, key, table)
    unit = {16: "words of 16 bits", 8: "bytes", 4: "nibbles"}[table.unit_bits]
    return "learned", f"{difference}; it is a fixed order of {unit}, verified on random matrices.", table


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".") + "."


def _packed(key: LayoutKey, device: torch.device, seed: int, order: Order = Order.NATURAL) -> tuple[Tensor, Packed]:
    """Return a random 2:4 matrix without zeros among the kept, and what the packer makes of it, in an order."""
    _, rows, columns, dtype = key
    generator = torch.Generator(device).manual_seed(seed)  # the training's own stays as it is
    whole = torch.randint(-255, 255, (rows, columns), dtype=torch.int16, device=device, generator=generator)
    weight = (whole + (whole >= 0)).to(dtype)
    choices = torch.tensor(_ROWS_OF_A_TILE, dtype=torch.int16, device=device)
    codes = torch.zeros(rows // 4, columns // 4, dtype=torch.int16, device=device)
    for row in range(4):
        choice = torch.randint(0, 6, (codes.numel(),), dtype=torch.int32, device=device, generator=generator)
        codes |= choices.index_select(0, choice).view_as(codes) << 4 * row
    values = torch.empty(rows, columns // 2, dtype=dtype, device=device)
    size = metadata_words(rows, columns, order)
    meta = torch.zeros((rows, columns // 16) if order == Order.NATURAL else (size,), dtype=torch.int16, device=device)
    pack_tiles_([weight], [codes], [values], [meta], [], [], [], [order])
    return weight.masked_fill_(~unpack_codes(codes), 0), Packed(values, meta)


def _known(compress: Compressor, key: LayoutKey, device: torch.device) -> tuple[str | None, str]:
    """Return the known order that the vendor's buffers have, and say without a full stop how they differ from all."""
    buffers: dict[int, Tensor] = {}  # of the vendor
    differences = {}
    for name, order in KNOWN.items():
        size = metadata_words(key.rows, key.columns, order)
        differences[name] = None if size else "sizes that do not fit"
        for seed in range(_CHECKS if size else 0):
            dense, packed = _packed(key, device, seed, order)
            if seed not in buffers:
                buffers[seed] = compress(dense)
            differences[name] = differences[name] or _difference(packed, buffers[seed], order)
        if differences[name] is None:
            return name, ""
    listed = ", ".join(f"{name}: {difference}" for name, difference in differences.items())
    return None, f"The vendor's buffer has none of the known orders ({listed})"


def _difference(packed: Packed, theirs: Tensor, order: Order) -> str | None:
    """Say how a vendor's buffer differs from a packed matrix, padding aside, or return None."""
    values, meta = packed
    ours = torch.cat([values.view(-1).view(torch.int16), meta])
    if theirs.dtype.itemsize != 2 or theirs.numel() != ours.numel():
        return f"it is {theirs.dtype} {tuple(theirs.shape)} for {ours.numel()} elements"
    wrong = theirs.flatten().view(torch.int16) != ours
    rows, columns = values.shape[0], 2 * values.shape[1]
    if meta.numel() > rows * columns // 16:
        wrong[values.numel() :] &= known_layout(order, rows, columns, meta.device).source >= 0
    different = int(wrong.sum())
    return f"{different} of {ours.numel()} elements differ" if different else None


def _header(key: LayoutKey) -> dict[str, str]:
    environment, rows, columns, dtype = key
    sizes = {"rows": str(rows), "columns": str(columns), "dtype": str(dtype).removeprefix("torch.")}
    return {"format": _FORMAT, "environment": environment} | sizes


def _path(folder: Path, key: LayoutKey) -> Path:
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", key.environment)[:60]
    digest = hashlib.sha256(repr(sorted(_header(key).items())).encode()).hexdigest()[:12]
    return folder / "layouts" / f"{readable}_{key.rows}x{key.columns}_{digest}.safetensors"


def _read(path: Path, key: LayoutKey, compress: Compressor, device: torch.device) -> LearnedLayout | None:
    """Return the order in a file if it holds for a random matrix, or None."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            unit_bits = int(header.pop("unit_bits", 0))
            if header != _header(key):
                raise LayoutError(f"its header is {header}, and should be {_header(key)}.")
            source, padding = (file.get_tensor(name).to(device) for name in ("source", "padding"))
        table = LearnedLayout(key.rows, key.columns, unit_bits, source, padding)
        dense, packed = _packed(key, device, seed=_CHECKS)
        verify_layout(table, compress, dense, *packed)
    except (OSError, SafetensorError, ValueError) as error:
        _log.warning("%s is ignored, and its layout learned again: %s", path, error)
        return None
    return table


def _write(path: Path, key: LayoutKey, table: LearnedLayout) -> None:
    """Keep an order on disk; another process sees the whole file or none."""
    content = save(
        {"source": table.source.cpu(), "padding": table.padding.cpu()},
        metadata=_header(key) | {"unit_bits": str(table.unit_bits)},
    )
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _log.warning("%s cannot be written, so its layout will be learned again: %s", path, error)
