"""A stand-in for ``nvmath.bindings.cusparseLt`` on the CPU: it computes, counts, and complains about misuse.

Every call is bound to the signature of the real function and its arguments are checked against the C types in the
``.pxd`` beside it. Opaque structs are numbers; memory is read and written through the addresses that come in.
"""

import ctypes
import inspect
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nvmath.bindings.cusparseLt as real  # noqa: N813
import torch
from torch import Tensor

PXD = Path(real.__file__).with_name("cusparseLt.pxd")
DTYPES = {2: torch.float16, 14: torch.bfloat16}
COLUMNS, ROWS = 1, 2
PADDING = 47  # bytes behind the compressed matrix, so that no formula for its size is right by chance
RANGES = {"int": (-(2**31), 2**31), "int32_t": (-(2**31), 2**31), "uint32_t": (0, 2**32)}


class FakeError(Exception):
    """What the real library would refuse, or would not notice."""


class FakeDevices:
    """Several devices on the CPU: tensors are on ``where``, those in ``elsewhere`` (by ``id``) somewhere else."""

    def __init__(self) -> None:
        self.now = 0
        self.where = 0
        self.elsewhere: dict[int, int] = {}
        self.streams: dict[int, int] = {}
        self.capturing = False

    def index(self, tensor: Tensor) -> int:
        return self.elsewhere.get(id(tensor), self.where)

    def current(self) -> int:
        return self.now

    @contextmanager
    def guard(self, index: int) -> Iterator[None]:
        before, self.now = self.now, index
        try:
            yield
        finally:
            self.now = before

    def stream(self, index: int) -> int:
        return self.streams.get(index, 0)

    def is_capturing(self) -> bool:
        return self.capturing


@dataclass
class Thing:
    """An opaque struct: what it was made from, and what was set on it."""

    kind: str
    uses: list[int]
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """What a product was given beside its operands."""

    stream: int
    workspace: int
    config_id: int | None
    split: tuple[int, int]


class FakeCuSparseLt:
    """Functions of the real module under the same names; ``calls`` counts them."""

    def __init__(self, devices: FakeDevices | None = None, workspace: int = 1024) -> None:
        self.devices = devices or FakeDevices()
        self.workspace = workspace
        self.calls: Counter[str] = Counter()
        self.destroyed: list[str] = []
        self.launches: list[Launch] = []
        self.compress_streams: list[int] = []
        self.things: dict[int, Thing] = {}
        self._next, self._lock = 0x1000, threading.Lock()
        for name in [name for name in dir(type(self)) if name.startswith("do_")]:
            setattr(self, name[3:], checked(name[3:], getattr(self, name), self.calls))
        for enum in ("ComputeType", "MatmulAlg", "MatmulAlgAttribute", "MatmulDescAttribute", "Sparsity"):
            setattr(self, enum, getattr(real, enum))

    def assert_clean(self) -> None:
        assert not self.things, f"leaked: {sorted(thing.kind for thing in self.things.values())}"

    # library and matrices

    def do_init(self) -> int:
        return self._make("handle", [], device=self.devices.now)

    def do_destroy(self, handle: int) -> None:
        self._handle(handle)
        self._destroy(handle, "handle")

    def do_get_property(self, property_type: int) -> int:
        return (0, 8, 1)[property_type]

    def do_structured_descriptor_init(
        self, handle: int, rows: int, cols: int, ld: int, alignment: int, value_type: int, order: int, sparsity: int
    ) -> int:
        require(order == ROWS and sparsity == 0 and not (rows % 16 or cols % 16 or ld % 16), "structured matrix")
        return self._matrix(handle, rows, cols, ld, alignment, value_type, order, sparse=True)

    def do_dense_descriptor_init(
        self, handle: int, rows: int, cols: int, ld: int, alignment: int, value_type: int, order: int
    ) -> int:
        require(not (rows % 8 or cols % 8 or ld % 8), "dense matrix")
        return self._matrix(handle, rows, cols, ld, alignment, value_type, order, sparse=False)

    def do_mat_descriptor_destroy(self, mat_descr: int) -> None:
        self._destroy(mat_descr, "matrix")

    # products

    def do_matmul_descriptor_init(
        self, handle: int, op_a: int, op_b: int, mat_a: int, mat_b: int, mat_c: int, mat_d: int, compute_type: int
    ) -> int:
        self._handle(handle)
        a, b, d = (self._get(matrix, "matrix").values for matrix in (mat_a, mat_b, mat_d))
        require(op_a == op_b == 0 and compute_type == real.ComputeType.COMPUTE_32F, "operations")
        require(mat_c == mat_d and a["sparse"] and not b["sparse"] and not d["sparse"], "operands")
        require((a["rows"], a["cols"], b["cols"]) == (d["rows"], b["rows"], d["cols"]), "shapes")
        require(a["dtype"] == b["dtype"] == d["dtype"], "types")
        return self._make("product", [handle, mat_a, mat_b, mat_d], a=a, b=b, d=d, BIAS_POINTER=0)

    def do_matmul_descriptor_destroy(self, matmul_descr: int) -> None:
        self._destroy(matmul_descr, "product")

    def do_get_matmul_desc_attribute_dtype(self, attr: int) -> Any:
        return real.get_matmul_desc_attribute_dtype(attr)

    def do_matmul_desc_set_attribute(
        self, handle: int, matmul_descr: int, matmul_attribute: int, data: int, data_size: int
    ) -> None:
        self._handle(handle)
        product = self._get(matmul_descr, "product")
        require(not self._used(matmul_descr), "an attribute is set after the selection was made")
        value = read(data, real.get_matmul_desc_attribute_dtype(matmul_attribute), data_size)
        product.values[real.MatmulDescAttribute(matmul_attribute).name] = value

    def do_matmul_alg_selection_init(self, handle: int, matmul_descr: int, alg: int) -> int:
        self._handle(handle)
        product = self._get(matmul_descr, "product").values
        return self._make("selection", [handle, matmul_descr], alg=alg, count=6 + product["b"]["order"])

    def do_matmul_alg_selection_destroy(self, alg_selection: int) -> None:
        self._destroy(alg_selection, "selection")

    def do_get_matmul_alg_attribute_dtype(self, attr: int) -> Any:
        return real.get_matmul_alg_attribute_dtype(attr)

    def do_matmul_alg_set_attribute(
        self, handle: int, alg_selection: int, attribute: int, data: int, data_size: int
    ) -> None:
        self._handle(handle)
        selection = self._get(alg_selection, "selection")
        value = read(data, real.get_matmul_alg_attribute_dtype(attribute), data_size)
        name = real.MatmulAlgAttribute(attribute).name
        require(name != "CONFIG_ID" or 0 <= value < selection.values["count"], f"CONFIG_ID {value}")
        selection.values[name] = value

    def do_matmul_alg_get_attribute(
        self, handle: int, alg_selection: int, attribute: int, data: int, data_size: int
    ) -> None:
        self._handle(handle)
        require(attribute == real.MatmulAlgAttribute.CONFIG_MAX_ID and data_size == 4, "attribute")
        ctypes.c_int32.from_address(data).value = self._get(alg_selection, "selection").values["count"]

    def do_matmul_plan_init(self, handle: int, matmul_descr: int, alg_selection: int) -> int:
        self._handle(handle)
        product, selection = self._get(matmul_descr, "product"), self._get(alg_selection, "selection")
        values = {**product.values, **selection.values}
        return self._make("plan", [handle, matmul_descr, alg_selection, *product.uses], **values)

    def do_matmul_plan_destroy(self, plan: int) -> None:
        self._destroy(plan, "plan")

    def do_matmul_get_workspace(self, handle: int, plan: int) -> int:
        self._handle(handle)
        return self.workspace and self.workspace + self._get(plan, "plan").values["d"]["cols"]

    def do_matmul(
        self, handle: int, plan: int, alpha: int, d_a: int, d_b: int, beta: int, d_c: int, d_d: int,
        workspace: int, streams: int, num_streams: int,
    ) -> None:  # fmt: skip
        self._handle(handle)
        values = self._get(plan, "plan").values
        require(num_streams == 1 and not (d_a | d_b | d_c | d_d) % 16, "streams or alignment")
        size = self.workspace and self.workspace + values["d"]["cols"]
        require(bool(workspace) == bool(size), "workspace")
        a, b, d = values["a"], values["b"], values["d"]
        result = scalar(alpha) * (self.read(d_a, a).float() @ view(d_b, b).float())
        if scalar(beta):
            result += scalar(beta) * view(d_c, d).float()
        if values["BIAS_POINTER"]:
            result += vector(values["BIAS_POINTER"], d["dtype"], d["rows"]).float()[:, None]
        if size:
            ctypes.memset(workspace, 0xAB, size)
        view(d_d, d).copy_(result)
        split = values.get("SPLIT_K", 1), values.get("SPLIT_K_MODE", 0)
        stream = ctypes.c_void_p.from_address(streams).value or 0
        self.launches.append(Launch(stream, workspace, values.get("CONFIG_ID"), split))

    # compression

    def do_sp_mma_compressed_size2(self, handle: int, sparse_mat_descr: int) -> tuple[int, int]:
        self._handle(handle)
        matrix = self._get(sparse_mat_descr, "matrix").values
        return self.size(matrix["rows"], matrix["cols"]), self.workspace

    def do_sp_mma_compress2(
        self, handle: int, sparse_mat_descr: int, is_sparse_a: int, op: int, d_dense: int, d_compressed: int,
        d_compressed_buffer: int, stream: int,
    ) -> None:  # fmt: skip
        self._handle(handle)
        matrix = self._get(sparse_mat_descr, "matrix").values
        require(matrix["sparse"] and is_sparse_a == 1 and op == 0, "operand")
        require(not (d_dense | d_compressed) % 16 and bool(d_compressed_buffer) == bool(self.workspace), "memory")
        self.write(view(d_dense, matrix), d_compressed)
        if self.workspace:
            ctypes.memset(d_compressed_buffer, 0xCD, self.workspace)
        self.compress_streams.append(stream)

    def size(self, rows: int, columns: int) -> int:
        """Bytes of a compressed matrix."""
        return rows * columns * 5 // 4 + PADDING

    def write(self, dense: Tensor, address: int) -> None:
        compress(dense, address)

    def read(self, address: int, matrix: dict[str, Any]) -> Tensor:
        return decompress(address, matrix)

    # life of things

    def _make(self, kind: str, uses: list[int], **values: Any) -> int:
        for used in uses:
            self._get(used)
        with self._lock:
            self._next += 512
            self.things[self._next] = Thing(kind, uses, values)
            return self._next

    def _matrix(
        self, handle: int, rows: int, cols: int, ld: int, alignment: int, value_type: int, order: int, sparse: bool
    ) -> int:
        self._handle(handle)
        require(alignment == 16 and ld >= (cols if order == ROWS else rows) and order in (ROWS, COLUMNS), "matrix")
        values = {"rows": rows, "cols": cols, "ld": ld, "dtype": DTYPES[value_type], "order": order, "sparse": sparse}
        return self._make("matrix", [handle], **values)

    def _handle(self, handle: int) -> None:
        device = self._get(handle, "handle").values["device"]
        require(device == self.devices.now, f"a handle of device {device} on device {self.devices.now}")

    def _get(self, number: int, kind: str | None = None) -> Thing:
        thing = self.things.get(number)
        require(thing is not None, f"{kind} {number:#x} is used but does not live")
        assert thing is not None
        require(kind in (None, thing.kind), f"a {thing.kind} is used as a {kind}")
        return thing

    def _used(self, number: int) -> list[str]:
        return [thing.kind for thing in self.things.values() if number in thing.uses]

    def _destroy(self, number: int, kind: str) -> None:
        self._get(number, kind)
        require(not self._used(number), f"a {kind} is destroyed before {self._used(number)}")
        del self.things[number]
        self.destroyed.append(kind)


def require(condition: bool, what: str) -> None:
    if not condition:
        raise FakeError(what)


def c_types() -> dict[str, list[str]]:
    """Types of the arguments of every function that the ``.pxd`` declares."""
    found = {}
    for name, arguments in re.findall(r"^cpdef [^(]*?(\w+)\(([^)]*)\)", PXD.read_text(), flags=re.M):
        found[name] = [argument.split()[0] for argument in arguments.split(",") if argument.strip()]
    return found


C_TYPES = c_types()


def check_arguments(name: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what the real function would not take, and values that its C types do not hold."""
    bound = inspect.signature(getattr(real, name)).bind(*arguments)
    for value, type_ in zip(bound.args, C_TYPES[name], strict=True):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: {value!r} is no {type_}")
        low, high = RANGES.get(type_, (0, 2**63))
        if not low <= value < high:
            raise OverflowError(f"{name}: {value} does not fit into {type_}")


def checked(name: str, function: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        calls[name] += 1
        check_arguments(name, arguments)
        return function(*arguments)

    return call


def vector(address: int, dtype: torch.dtype, count: int) -> Tensor:
    """The memory at an address; writing to it writes there."""
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)


def view(address: int, matrix: dict[str, Any]) -> Tensor:
    rows, cols, ld = matrix["rows"], matrix["cols"], matrix["ld"]
    lines, line, strides = (rows, cols, (ld, 1)) if matrix["order"] == ROWS else (cols, rows, (1, ld))
    return vector(address, matrix["dtype"], (lines - 1) * ld + line).as_strided((rows, cols), strides)


def scalar(address: int) -> float:
    return ctypes.c_float.from_address(address).value


def read(address: int, dtype: Any, size: int) -> int:
    require(size == dtype().nbytes, f"an attribute of {dtype().nbytes} bytes is given {size}")
    return int.from_bytes(ctypes.string_at(address, size), "little", signed=True)


def compress(dense: Tensor, address: int) -> None:
    """Write values first, then one byte for every four, in reverse."""
    quads = dense.reshape(-1, 4)
    require(bool((quads != 0).sum(1).le(2).all()), "the matrix is not 2:4")
    places = (quads != 0).byte().argsort(dim=1, descending=True, stable=True)[:, :2].sort(1).values  # [quads, 2]
    vector(address, dense.dtype, 2 * len(quads)).copy_(quads.gather(1, places).flatten())
    meta = places[:, 0] + 4 * places[:, 1]
    vector(address + 4 * len(quads), torch.uint8, len(quads)).copy_(meta.flip(0))


def decompress(address: int, matrix: dict[str, Any]) -> Tensor:
    count = matrix["rows"] * matrix["cols"] // 4
    values = vector(address, matrix["dtype"], 2 * count).view(-1, 2)
    meta = vector(address + 4 * count, torch.uint8, count).flip(0).long()
    quads = torch.zeros(count, 4, dtype=matrix["dtype"])
    quads.scatter_(1, torch.stack([meta % 4, meta // 4], 1), values)
    return quads.view(matrix["rows"], matrix["cols"])
