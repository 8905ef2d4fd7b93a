"""The barriers of the TileLang program for compute capability 9.0, run without TileLang and without a GPU.

The program is Python that TileLang parses. Here, stand-ins for TileLang's words run it once for every warp and note
what the warp waits for, loads, multiplies, gives back and writes; the same is read from the CUDA source that TileLang
writes. Those notes are then played in many orders, with bulk copies and products that are as slow as they may be: what
reads or overwrites too early raises :class:`PipelineError`.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

from tilelang_source import Expressions, function_of

from sparsetrain.backends.experimental.tilelang import KernelKey

LOADING = 0
"""The warp that loads; those that multiply follow from 1."""

ARRIVING = "arriving"
"""What a slot holds while it is loaded."""

Event = tuple[Any, ...]
Slot = tuple[str, int]


class PipelineError(AssertionError):
    """Something was read before it was there, or overwritten while it was read, or nobody can go on."""


class _Named:
    """A buffer or an array of barriers; what is indexed remembers where."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, index: Any) -> tuple[str, Any]:
        return self.name, index

    def __setitem__(self, index: Any, value: Any) -> None:
        raise AssertionError(f"{self.name} is written entry by entry.")


def events_of(program: ModuleType, key: KernelKey, tokens: int, block: int, warp: int) -> tuple[list[Event], list[int]]:
    """Return what a warp of a block does, in order, and the arrivals that each barrier waits for, full ones first."""
    events: list[Event] = []
    arrivals: list[int] = []
    names = iter(("values", "meta", "x", "output"))
    barriers = iter(("full", "empty"))
    high, wide, deep = key.tile.rows, key.tile.tokens, key.tile.columns
    bytes_of = {"values": high * deep, "meta": high * 16, "x": wide * deep * 2}

    def note(*what: Any) -> Callable[..., None]:
        return lambda *_, **__: events.append(what)

    def alloc_barrier(counts: list[int]) -> _Named:
        arrivals.extend(counts)
        return _Named(next(barriers))

    def tma_copy(source: Any, target: Any, barrier: Any = None) -> None:
        if barrier is None:
            events.append(("store", *(part.start for part in target[1])))
        else:
            corner = tuple(part.start for part in source[1])
            events.append(("load", (target[0], target[1][0]), corner, barrier, bytes_of[target[0]]))

    def wgmma_gemm_sp(values: Any, meta: Any, x: Any, sums: Any, **_: Any) -> None:
        slots = [(name, index[0]) for name, index in (values, meta, x)]
        events.append(("multiply", slots, meta[1][2].start))

    def parallel(*_: int) -> tuple[()]:
        events.append(("read sums",))
        return ()

    @contextlib.contextmanager
    def kernel(blocks: int, threads: int) -> Iterator[int]:
        assert block < blocks
        yield block

    language = SimpleNamespace(
        GemmWarpPolicy=SimpleNamespace(FullRow=None), macro=lambda function: function, Kernel=kernel,
        alloc_shared=lambda *_: _Named(next(names)), alloc_fragment=lambda *_: _Named("fragment"),
        alloc_barrier=alloc_barrier, alloc_var=lambda *_: 0, alloc_local=lambda shape, _: [0] * shape[0],
        get_thread_binding=lambda: 128 + 32 * (warp - 1) if warp else 0,
        min=min, ceildiv=lambda a, b: -(-a // b), truncdiv=lambda a, b: a // b, truncmod=lambda a, b: a % b,
        serial=range, assume=lambda *_: None, annotate_layout=lambda *_: None, sync_warp=lambda: None,
        dec_max_nreg=note("registers", -1), inc_max_nreg=note("registers", 1), shuffle_elect=lambda threads: True,
        barrier_wait=lambda barrier, parity: events.append(("wait", barrier, parity)),
        barrier_arrive=lambda barrier: events.append(("arrive", barrier)),
        tma_copy=tma_copy, wgmma_gemm_sp=wgmma_gemm_sp, clear=note("write sums"), Parallel=parallel,
        wait_wgmma=lambda left: events.append(("drain", left)), warpgroup_fence_operand=note("fence sums"),
        tma_store_wait=lambda left: events.append(("stored",)), copy=note("write output"),
        sync_threads=lambda number, threads: events.append(("sync", threads // 32)),
        fence_proxy_async=note("fence output"),
    )  # fmt: skip
    tilelang = SimpleNamespace(language=language, layout=SimpleNamespace(Fragment=lambda *_, **__: None))
    product = program.blocks(tilelang, key)
    product(_Named("A"), _Named("E"), _Tokens(tokens), None, _Named("Y"))
    return events, arrivals


def events_in_source(
    listed: list[list[str]], found: Expressions, key: KernelKey, tokens: int, warp: int
) -> tuple[list[Event], list[int]]:
    """Return the same from the CUDA source: what ``statements`` and ``expressions`` of ``tilelang_source.py`` found.

    The first block's warp; corners of tiles, which are computed in statements that are left out, are numbers of waves.
    """
    index = {name: function_of(text) for name, text in found.items()}
    tile, thread = key.tile, 128 + 32 * (warp - 1) if warp else 0
    entries = {"values": tile.rows * tile.columns // 2, "meta": tile.rows * 8, "x": tile.tokens * tile.columns}
    events: list[Event] = []
    arrivals: list[int] = []
    expected = 0

    def multiplied(wave: int, step: int) -> Event:
        first = int(index["metadata_from"](wave=wave, step=step, ki=0, inst_i=0, j=0, thread=128))
        slots = [
            ("values", int(index["a_stage"](wave=wave, step=step)) // (2 * entries["values"])),
            ("meta", first // entries["meta"]),
            ("x", int(index["b_stage"](wave=wave, step=step)) // (2 * entries["x"])),
        ]
        return "multiply", slots, first % 8

    def run(at: int, variables: dict[str, int], active: bool) -> int:
        """Run statements up to the end of a body, or of its first half; returns where that is."""
        nonlocal expected

        def value(text: str) -> int:
            return int(function_of(text)(**variables, thread=thread, tokens=tokens))

        while at < len(listed) and listed[at][0] not in ("end", "otherwise"):
            kind, *rest = listed[at]
            at += 1
            if kind in ("for", "if", "alone", "block"):
                name, times = (rest[0], value(rest[1])) if kind == "for" and active else ("", 1)
                chosen = active and (kind != "if" or bool(value(rest[0])))
                start = at
                for i in range(times if name in ("wave", "step") else 1):
                    at = run(start, variables | {name: i} if name else variables, chosen)
                if listed[at][0] == "otherwise":
                    at = run(at + 1, variables, active and not chosen)
                at += 1
            elif not active:
                continue
            elif kind == "init":
                arrivals.append(int(rest[2]))
            elif kind == "wait":
                events.append(("wait", (rest[0], value(rest[1])), value(rest[2])))
            elif kind == "arrive":
                events.append(("arrive", (rest[0], value(rest[1]))))
            elif kind == "expect":
                expected += int(rest[2])
            elif kind == "load":
                places = {**variables, "row": 1000 + variables["wave"], "token": variables["wave"], "i": 0}
                to, row, column = (int(index[f"{rest[0]}_{part}"](**places)) for part in ("to", "row", "column"))
                slot = rest[0], to // entries[rest[0]]
                events.append(("load", slot, (row, column), (rest[1], value(rest[2])), expected))
                expected = 0
            elif kind == "commit":
                events.append(multiplied(variables["wave"], variables.get("step", 0)))  # one step is no loop
            elif kind == "drain":
                events.append(("drain", int(rest[0])))
            elif kind == "meet some":
                events.append(("sync", int(rest[1]) // 32))
            elif kind == "store":
                events.append(("store", variables["wave"], 1000 + variables["wave"]))
            elif kind in ("write sums", "read sums", "fence sums", "write output", "fence output", "stored"):
                events.append((kind,))
        return at

    end = run(0, {}, True)
    assert [kind for kind, *_ in listed[end:]] == ["end"], "the source is read to its end"
    return events, arrivals


class _Tokens(_Named):
    def __init__(self, tokens: int) -> None:
        super().__init__("X")
        self.shape = (tokens,)


@dataclass
class _Barrier:
    """An mbarrier: a phase ends when all have arrived and all expected bytes are there."""

    count: int
    phase: int = 0
    arrived: int = 0
    missing: int = 0

    def change(self, arrivals: int = 0, missing: int = 0) -> None:
        self.arrived += arrivals
        self.missing += missing
        if self.arrived > self.count:
            raise PipelineError("more arrive at a barrier than it waits for.")
        if self.arrived == self.count and not self.missing:
            self.phase, self.arrived = self.phase + 1, 0

    def is_over(self, parity: int) -> bool:
        return self.phase % 2 != parity


@dataclass
class _Warp:
    events: list[Event]
    at: int = 0
    reads: list[list[tuple[Slot, Any]]] = field(default_factory=list)  # of products that may not be done
    fenced: bool = True
    products: list[tuple[int, int, int]] = field(default_factory=list)  # row, token, column of this tile

    @property
    def next(self) -> Event | None:
        return self.events[self.at] if self.at < len(self.events) else None


class Block:
    """One block at work.

    Args:
        key: Of the kernel; without a bias and an epilogue.
        events: Returns what a warp does, and how many arrive at each barrier.
    """

    def __init__(self, key: KernelKey, events: Callable[[int], tuple[list[Event], list[int]]]) -> None:
        every = [events(warp) for warp in range(1 + key.tile.threads // 32)]
        counts = every[0][1]
        half = len(counts) // 2
        self.key, self.warps = key, [_Warp(events) for events, _ in every]
        # a loading warp's 32 threads all arrive, of a multiplying one a thread
        self.barriers = {("full", i): _Barrier(count) for i, count in enumerate(counts[:half])}
        self.barriers |= {("empty", i): _Barrier(count) for i, count in enumerate(counts[half:])}
        self.memory: dict[Slot, Any] = {}
        self.loads: list[tuple[Slot, Any, Any, int]] = []
        self.output: dict[int, tuple[int, int]] = {}
        self.unfenced: set[int] = set()
        self.stores: list[tuple[int, int]] = []
        self.tiles: list[tuple[int, int]] = []
        self.meeting: dict[int, set[int]] = {}

    def run(self, order: Callable[[list[tuple[str, int]]], tuple[str, int]]) -> list[tuple[int, int]]:
        """Run to the end and return the corners of the tiles that were written, in order.

        Args:
            order: Chooses what goes on, of ``("warp", i)``, ``("load", i)`` and ``("store", i)``.

        Raises:
            PipelineError: If something goes wrong in that order.
        """
        while True:
            ready = [("warp", i) for i in range(len(self.warps)) if self._can_go_on(i)]
            ready += [("load", i) for i in range(len(self.loads))] + [("store", i) for i in range(len(self.stores))]
            if not ready:
                break
            what, which = order(ready)
            if what == "warp":
                self._go_on(which)
            elif what == "load":
                slot, corner, barrier, size = self.loads.pop(which)
                self.memory[slot] = corner
                self.barriers[barrier].change(missing=-size)
            else:
                self.tiles.append(self.stores.pop(which))
        if any(warp.next for warp in self.warps):
            raise PipelineError(f"nobody can go on: {[warp.next for warp in self.warps]}.")
        return self.tiles

    def _can_go_on(self, which: int) -> bool:
        event = self.warps[which].next
        if event is None:
            return False
        if event[0] == "wait":
            return self.barriers[event[1]].is_over(int(event[2]))
        if event[0] == "stored":  # the warp that stores waits; others have nothing to wait for
            return which != 1 or not self.stores
        if event[0] == "sync":
            met = self.meeting.setdefault(0, set())
            met.add(which)
            return len(met) == int(event[1])
        return True

    def _go_on(self, which: int) -> None:
        warp = self.warps[which]
        event = warp.next
        assert event is not None
        warp.at += 1
        kind, rest = event[0], event[1:]
        if kind == "arrive":
            self.barriers[rest[0]].change(arrivals=32 if which == LOADING else 1)
        elif kind == "load":
            self._load(*rest)
        elif kind == "multiply":
            self._multiply(warp, *rest)
        elif kind == "drain":
            self._drain(warp, rest[0])
        elif kind in ("read sums", "write sums") and (warp.reads or not warp.fenced):
            raise PipelineError(f"sums are {kind.split()[0]} while products may still be added.")
        elif kind == "fence sums":
            warp.fenced = not warp.reads
        elif kind == "write output":
            self._write_output(which, warp)
        elif kind == "fence output":
            self.unfenced.discard(which)
        elif kind == "sync":  # everybody is here: all go on
            met = self.meeting.pop(0)
            for other in met - {which}:
                self.warps[other].at += 1
        elif kind == "store" and which == 1:  # one thread does
            if self.unfenced:
                raise PipelineError("the output is stored before a fence of what was written.")
            corner = (rest[0], rest[1])
            if set(self.output) != set(range(1, len(self.warps))) or set(self.output.values()) != {corner}:
                raise PipelineError("the output is stored before everybody has written it.")
            self.stores.append(corner)

    def _load(self, slot: Slot, corner: Any, barrier: Any, size: int) -> None:
        if any(slot == read for warp in self.warps for group in warp.reads for read, _ in group):
            raise PipelineError(f"{slot[0]} of slot {slot[1]} are overwritten while products may read them.")
        self.memory[slot] = ARRIVING
        self.barriers[barrier].change(missing=size)
        self.loads.append((slot, corner, barrier, size))

    def _multiply(self, warp: _Warp, slots: list[Slot], words: int) -> None:
        found: list[Any] = [self.memory.get(slot, ARRIVING) for slot in slots]
        if ARRIVING in found:
            raise PipelineError(f"{slots} are multiplied before they have arrived.")
        (row, column), (metadata_row, metadata_column), (token, x_column) = found
        place = (row, token, x_column)
        before = warp.products[-1] if warp.products else (row, token, -self.key.tile.columns)
        expected = (*before[:2], before[2] + self.key.tile.columns)
        if (2 * column, metadata_row, 16 * (metadata_column + words)) != (x_column, row, x_column) or place != expected:
            raise PipelineError(f"{slots} hold {found}: they are not what is multiplied at {expected}.")
        warp.products.append(place)
        warp.reads.append(list(zip(slots, found, strict=True)))
        warp.fenced = False

    def _drain(self, warp: _Warp, left: int) -> None:
        count = max(0, len(warp.reads) - left)
        done, warp.reads = warp.reads[:count], warp.reads[count:]
        for group in done:
            if any(self.memory[slot] != held for slot, held in group):
                raise PipelineError("a slot has changed while products read it.")

    def _write_output(self, which: int, warp: _Warp) -> None:
        if self.stores:
            raise PipelineError("the output is overwritten while it is stored.")
        if len(warp.products) * self.key.tile.columns != self.key.columns:
            raise PipelineError("the output is written before all columns were multiplied.")
        self.output[which] = warp.products[0][1::-1]
        self.unfenced.add(which)
        warp.products.clear()


def orders(seeds: int) -> Iterator[Callable[[list[tuple[str, int]]], tuple[str, int]]]:
    """Yield ways to choose what goes on: who loads first or last, copies at once or late, and at random."""
    yield lambda ready: ready[0]
    yield lambda ready: ready[-1]
    yield lambda ready: next((one for one in ready if one[0] == "warp"), ready[-1])
    yield lambda ready: next((one for one in reversed(ready) if one[0] == "warp"), ready[0])
    for seed in range(seeds):
        yield random.Random(seed).choice
