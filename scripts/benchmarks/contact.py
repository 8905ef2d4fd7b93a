"""The first product of every matmul backend by every algorithm, in processes of their own.

An algorithm that faults takes the process's CUDA context along, and every later product with it. What is found is
written line by line; after a fault a new process goes on after it.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsetrain.backends import BACKENDS, Backend, CuSparseLtBackend
from sparsetrain.backends.packing import PackJob, fill_
from sparsetrain.dispatch import Decision, DispatchTable, describe_environment
from sparsetrain.dispatch.faults import FAULTS, device_works
from sparsetrain.hardware.machine import cache_folder
from sparsetrain.kernels.mask_search import search_tiles
from sparsetrain.kernels.tile_codes import unpack_codes

from . import gemm, stand_in
from .grid import first_line

SHAPE, TOKENS = (512, 768), 256
SMALL_SHAPE, SMALL_TOKENS = (64, 128), 32  # of stand-ins
LARGEST_ERROR = 1e-2  # relative, of sums of 16-bit products
SECONDS = 45.0  # a process; compiling is part of it
MOST_PROCESSES = 12  # of a way and dtype
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Task:
    """What a process tries: algorithms of a way from a place on."""

    way: str
    dtype: str
    first: int
    out: Path
    stand_in: bool
    shape: tuple[int, int]
    tokens: int


def main() -> int:
    """Try every way and return the exit code: 0 if the dense product ran, whatever the others did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the file of JSON lines")
    parser.add_argument("--way", action="append", default=[], help="repeatable (default: all)")
    parser.add_argument("--stand-in", action="store_true", help="on a CPU, with stand-ins for the libraries")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("")
    shape, tokens = (SMALL_SHAPE, SMALL_TOKENS) if options.stand_in else (SHAPE, TOKENS)
    try:
        for dtype in DTYPES:
            for way in ["masked", *(options.way or ways(options.stand_in))]:
                explore(Task(way, dtype, 0, options.out, options.stand_in, shape, tokens))
    finally:  # what is known when the time is over counts
        records = read(options.out)
        show(records)
        remember(records)
    return int(not any(record["way"] == "masked" and record.get("right") for record in records))


def ways(on_stand_in: bool) -> dict[str, Backend]:
    """Return the sparse ways by label."""
    return stand_in.backends() if on_stand_in else gemm.WAYS


def explore(task: Task) -> None:
    """Try algorithms in one process after the other, until there are no more."""
    # forks share nothing with a device on a CPU, and need no new imports
    start = (
        multiprocessing.get_context("fork").Process if task.stand_in else multiprocessing.get_context("spawn").Process
    )
    first = task.first
    for _ in range(MOST_PROCESSES):
        process = start(target=attempt, args=(Task(**{**vars(task), "first": first}),))
        process.start()
        process.join(SECONDS)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        mine = [r for r in read(task.out) if (r["way"], r["dtype"]) == (task.way, task.dtype)]
        tried = [record for record in mine if record.get("place", -1) >= first]
        if not tried:
            if late or process.exitcode:
                ended = f"gave no answer in {SECONDS:.0f} s" if late else f"ended with exit code {process.exitcode}"
                write(task.out, task, fault=f"the process {ended} before the first product")
            return
        last = tried[-1]
        if last["state"] == "begins":
            ended = f"no answer in {SECONDS:.0f} s" if late else f"ends the process with exit code {process.exitcode}"
            write(task.out, task, state="ends", algorithm=last["algorithm"], place=last["place"], fault=ended)
        elif process.exitcode == 0:
            return
        first = last["place"] + 1
    write(task.out, task, fault=f"the rest is not tried: {MOST_PROCESSES} processes ended")


def attempt(task: Task) -> None:
    """Multiply by every algorithm from ``task.first`` on; in a process of its own."""
    device = torch.device("cpu") if task.stand_in else torch.device("cuda", 0)
    dtype = DTYPES[task.dtype]
    backend = BACKENDS["masked"] if task.way == "masked" else ways(task.stand_in)[task.way]
    reason = backend.why_not(device, dtype, task.shape)
    if reason is not None:
        write(task.out, task, not_here=reason)
        return
    if task.first == 0:
        write(task.out, task, environment=describe_environment(device), also=also(backend))
    torch.manual_seed(0)
    weight = torch.randn(task.shape, device=device)
    rows = torch.randn(task.tokens, task.shape[1], device=device, dtype=dtype)
    codes = search_tiles(weight, True)
    exact = rows.double() @ weight.to(dtype).masked_fill(~unpack_codes(codes), 0).double().t()
    names = list(backend.algorithms(task.shape, task.tokens, dtype, device))
    operand = backend.allocate(task.shape, dtype, device)
    fill_([PackJob(weight, codes, backend, dtype, operand)])
    for place, name in list(enumerate(names))[task.first :]:
        found: dict[str, Any] = {"algorithm": name, "place": place}
        write(task.out, task, state="begins", **found)
        try:
            result = backend.product(operand, rows, None, name).double()
            error = float((result - exact).norm() / exact.norm())
            found |= {"error": error, "right": error <= LARGEST_ERROR}
        except Exception as caught:  # what a vendor's library raises is not known
            found |= {"right": False, "raises": f"{type(caught).__name__}: {first_line(caught)}"}
        works = device_works(device)
        if not works:
            found["fault"] = found.get("raises", "the device does not work after it")
        write(task.out, task, state="ends", **found)
        if not works:
            sys.exit(3)


def also(backend: Backend) -> str | None:
    """Return the name under which training uses a way, if it does."""
    known = BACKENDS.get(backend.name)
    if isinstance(backend, CuSparseLtBackend) and isinstance(known, CuSparseLtBackend):
        return backend.name if type(known.provider) is type(backend.provider) else None
    return backend.name


def write(path: Path, task: Task, **found: object) -> None:
    """Append a line; it is on disk before the next product begins."""
    with path.open("a") as file:
        file.write(json.dumps({"way": task.way, "dtype": task.dtype, **found}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def show(records: Sequence[dict[str, Any]]) -> None:
    """Print a line for each way and dtype, and what went wrong."""
    for way, dtype in dict.fromkeys((record["way"], record["dtype"]) for record in records):
        mine = [record for record in records if (record["way"], record["dtype"]) == (way, dtype)]
        closed = [record["not_here"] for record in mine if "not_here" in record]
        ended = [record for record in mine if record.get("state") == "ends"]
        right = [record for record in ended if record.get("right")]
        print(f"{way}, {dtype}: {closed[0] if closed else f'{len(right)} of {len(ended)} algorithms are right'}")
        for record in mine:
            if "fault" in record or record.get("right") is False:
                what = record.get("fault") or record.get("raises") or f"wrong by {record['error']:.2g}"
                print(f"  {record.get('algorithm') or 'default'}: {what}")


def remember(records: Sequence[dict[str, Any]]) -> None:
    """Record the algorithms that fault where the library's tuner looks, so that no later stage tries them."""
    names = {record["way"]: record["also"] for record in records if "also" in record}
    environments = {record["environment"] for record in records if "environment" in record}
    faults = {}
    for record in records:
        if "fault" in record and record.get("algorithm"):
            for name in {record["way"], names.get(record["way"])} - {None}:
                faults[f"{name}:{record['algorithm']}"] = record["fault"]
    table = DispatchTable(cache_folder() / "dispatch.json")
    for environment in environments if faults else ():
        table.record(environment, FAULTS, Decision("masked", {}, faults))


if __name__ == "__main__":
    sys.exit(main())
