"""Every way in which a nested state of dicts, lists, numbers, strings and tensors can be damaged in one place."""

import copy
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]

STRANGERS: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: False, lambda: "x", lambda: "", lambda: b"x", lambda: 0, lambda: 1, lambda: 2,
    lambda: -1, lambda: 10**6, lambda: 10**30, lambda: 10**5000, lambda: 0.5, lambda: -0.5, lambda: float("nan"),
    lambda: float("inf"), lambda: float("-inf"), lambda: [], lambda: [None], lambda: [0, 0], lambda: ["x"],
    lambda: [[]], lambda: (), lambda: {}, lambda: {"x": 1}, lambda: {None: None}, object, lambda: torch,
    lambda: torch.zeros(()), lambda: torch.zeros(3), lambda: torch.zeros(2, 2, dtype=torch.int16),
    lambda: torch.full((8, 4), float("nan")), lambda: torch.zeros(4, 4).to_sparse(),
    lambda: torch.empty(4, 4, device="meta"), lambda: torch.zeros(2, dtype=torch.complex64), lambda: 1j,
]  # fmt: skip
"""What may stand where something else belongs."""


def nodes(state: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every value with its path, the whole first."""
    yield path, state
    children = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, value in children:
        yield from nodes(value, (*path, key))


def mutations(state: Any) -> list[tuple[str, Callable[[], Any]]]:
    """Return a description of every damage and what makes the damaged state, which shares nothing with ``state``."""
    found: list[tuple[str, Callable[[], Any]]] = []
    for path, value in nodes(state):
        where = "/".join(map(str, path)) or "."
        for number, stranger in enumerate(STRANGERS):
            found.append((f"{where} replaced by stranger {number}", lambda p=path, s=stranger: _with(state, p, s())))  # type: ignore[misc]
        for name, change in _changes(value):
            found.append((f"{where} {name}", lambda p=path, v=value, c=change: _with(state, p, c(copy.deepcopy(v)))))  # type: ignore[misc]
    return found


def sampled(state: Any, count: int, seed: int) -> list[tuple[str, Callable[[], Any]]]:
    """Return so many of the mutations under every key, or all if there are fewer, the same every time."""
    by_key: dict[str, list[tuple[str, Callable[[], Any]]]] = {}
    for mutation in mutations(state):
        by_key.setdefault(re.split("[/ ]", mutation[0])[0], []).append(mutation)
    draw = random.Random(seed)
    return [mutation for every in by_key.values() for mutation in draw.sample(every, min(count, len(every)))]


def _with(state: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(state)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    if isinstance(holder, tuple):
        return _with(state, path[:-1], tuple(value if i == path[-1] else entry for i, entry in enumerate(holder)))
    holder[path[-1]] = value
    return changed


def _changes(value: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    if isinstance(value, dict):
        for key in value:
            yield f"without {key}", lambda v, k=key: {name: entry for name, entry in v.items() if name != k}  # type: ignore[misc]
            yield f"with {key} renamed", lambda v, k=key: {f"{n}_" if n == k else n: e for n, e in v.items()}  # type: ignore[misc]
        yield "with a stranger", lambda v: {**v, "stranger": 1}
        yield "with a key that is no string", lambda v: {**v, 7: 1}
        if len(value) > 1:
            yield "with values moved on", lambda v: dict(zip([*v][1:] + [*v][:1], v.values(), strict=True))
    elif isinstance(value, list | tuple):
        if value:
            yield "truncated", lambda v: v[:-1]
            yield "reversed", lambda v: v[::-1]
            yield "doubled", lambda v: v + v
        yield "extended", lambda v: [*v, 3]
        yield "as a tuple", tuple
    elif isinstance(value, Tensor):
        yield from _tensor_changes(value)
    elif isinstance(value, bool):
        yield "turned", lambda v: not v
    elif isinstance(value, int | float):
        for name, change in (("plus one", 1), ("minus one", -1), ("plus many", 10**4)):
            yield name, lambda v, c=change: v + c  # type: ignore[misc]
        yield "as a float", float
        yield "as a string", str
        yield "negative", lambda v: -v
    elif isinstance(value, str):
        yield "longer", lambda v: v + "x"
        yield "upper", str.upper


def _tensor_changes(value: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    for dtype in (torch.float16, torch.float64, torch.int16, torch.int64, torch.uint8, torch.bool, torch.complex64):
        yield f"as {dtype}", lambda v, d=dtype: torch.zeros(v.shape, dtype=d)  # type: ignore[misc]
    yield "flat", lambda v: v.flatten()
    yield "nested", lambda v: v[None]
    yield "as a list", lambda v: v.tolist()
    yield "sparse", lambda v: torch.ones(v.shape, dtype=v.dtype).to_sparse()
    yield "meta", lambda v: v.to("meta")
    yield "random", lambda v: torch.randint(0, 127, v.shape, generator=torch.Generator().manual_seed(0)).to(v.dtype)
    yield "negative", lambda v: torch.full_like(v, -1) if v.dtype != torch.bool else ~v
    if value.dim():
        yield "truncated", lambda v: v[:-1]
        yield "longer", lambda v: torch.cat([v, v])
        yield "transposed", lambda v: v.movedim(0, -1)
        yield "empty", lambda v: v[:0]
    if value.is_floating_point():
        yield "with a NaN", lambda v: v.index_put((torch.tensor([0]),) * v.dim(), torch.tensor(float("nan")).to(v))
