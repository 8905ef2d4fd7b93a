"""What arithmetic expects of FSDP2 training with 2:4 weights on many GPUs: a model that no run has confirmed.

A step computes, and gathers weights and scatters gradients over the network between nodes; the longer of both hides
the share ``overlap`` of the shorter. Products are ``6 · parameters · tokens`` operations: attention's own products are
not counted. Sparse products are faster, and packing their operands passes over the gathered weights.
"""

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .scale_inputs import PRODUCTS, REDUCE_BYTES, Inputs, Model, read_flags

WIRES = ("dense", "masked", "packed")
DISCLAIMER = "These are figures of a model, from its inputs alone: nothing here was measured."


@dataclass(frozen=True)
class Cost:
    """What one way of training costs a GPU and step.

    Args:
        model: Its name.
        gpus: That share one copy of the weights.
        wire: What is gathered.
        gathered_gb: That a GPU receives in the all-gathers of a step, GB of 10⁹ bytes.
        communication_s: Gathers and reduce-scatter over the network, seconds.
        compute_s: Products and passes over weights, seconds.
        step_s: Both, with what overlaps, seconds.
        speed_up: Step of the dense wire over this one.
        bound: Which of both is longer.
    """

    model: str
    gpus: int
    wire: str
    gathered_gb: float
    communication_s: float
    compute_s: float
    step_s: float
    speed_up: float
    bound: str


def compute_seconds(model: Model, wire: str, inputs: Inputs) -> float:
    """Return the seconds of all products of a step, and of the passes that pack their operands."""
    dense = 6 * model.parameters * inputs.tokens / (inputs.dense_tflops * 1e12)
    if wire == "dense" or (wire == "masked" and inputs.masked_products == "dense"):
        return dense
    saved = len(set(inputs.sparse_products)) / len(PRODUCTS) * (1 - 1 / inputs.sparse_speed_up)
    moved = inputs.pack_bytes if wire == "masked" else inputs.unpack_bytes
    passes = moved * model.sparse_share * model.parameters / (inputs.memory_bandwidth * 1e9)
    return dense * (1 - model.sparse_share * saved) + passes


def gathered_bytes(model: Model, wire: str, inputs: Inputs) -> float:
    """Return the bytes of all weights in the gathers of a step, as they are on a wire."""
    relative = {"dense": inputs.dense_wire, "masked": inputs.masked_wire, "packed": inputs.packed_wire}[wire]
    weight = model.sparse_share * relative + 1 - model.sparse_share
    return model.parameters * weight * inputs.gather_bytes * inputs.gathers


def cost(model: Model, gpus: int, wire: str, inputs: Inputs) -> Cost:
    """Return what a step costs.

    Example:
        >>> cost(Model("made up", 1e9, 1.0), 16, "dense", Inputs()).gathered_gb
        3.75
    """
    gathered = gathered_bytes(model, wire, inputs)
    entering = (gathered + model.parameters * REDUCE_BYTES[inputs.reduce_dtype]) * (1 - inputs.gpus_per_node / gpus)
    network, compute = entering / (inputs.node_bandwidth * 1e9), compute_seconds(model, wire, inputs)
    step = network + compute - inputs.overlap * min(network, compute)
    dense = step if wire == "dense" else cost(model, gpus, "dense", inputs).step_s
    bound = "compute" if compute >= network else "network"
    return Cost(model.name, gpus, wire, gathered * (1 - 1 / gpus) / 1e9, network, compute, step, dense / step, bound)


def chunk(rows: int, ranks: int) -> int:
    """Return the rows of a rank's shard, all but the last: ``ceil(rows / ranks)``."""
    return -(-rows // ranks)


def aligned_up_to(rows: int) -> int:
    """Return how many ranks, powers of two, a layer can be cut among so that no 4×4 tile is cut.

    Example:
        >>> [aligned_up_to(rows) for rows in (1024, 11008, 14336)]
        [256, 64, 512]
    """
    return next(2**power // 2 for power in range(math.ceil(math.log2(rows)) + 1) if chunk(rows, 2**power) % 4)


def table(costs: Sequence[Cost]) -> str:
    """Return the costs in Markdown."""
    lines = [
        "| model | GPUs | wire | gathered GB | communication s | compute s | step s | speed-up | bound by |",
        "|---" * 9 + "|",
    ]
    lines += [
        f"| {one.model} | {one.gpus} | {one.wire} | {one.gathered_gb:.1f} | {one.communication_s:.2f} "
        f"| {one.compute_s:.2f} | {one.step_s:.2f} | {one.speed_up:.2f} | {one.bound} |"
        for one in costs
    ]
    return "\n".join(lines)


def alignment_table(heights: Sequence[int], ranks: Sequence[int]) -> str:
    """Return the rows of a shard for each height and number of ranks, ❌ where they cut a tile, in Markdown."""
    lines = ["| rows of the layer | powers of two up to | " + " | ".join(f"on {one}" for one in ranks) + " |"]
    lines.append("|---" * (2 + len(ranks)) + "|")
    for rows in heights:
        cells = [f"{chunk(rows, one)}" + (" ❌" if chunk(rows, one) % 4 else "") for one in ranks]
        lines.append(f"| {rows} | {aligned_up_to(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def misaligned(models: Sequence[Model], ranks: Sequence[int]) -> list[str]:
    """Return a sentence for every model with layers that some of these numbers of ranks cut through tiles."""
    found = []
    for model in models:
        cut = {rows: [one for one in ranks if chunk(rows, one) % 4] for rows in model.rows}
        places = [f"{rows} rows on {', '.join(map(str, where))} GPUs" for rows, where in cut.items() if where]
        if places:
            what = " and ".join(places)
            found.append(f"{model.name}: shards of layers with {what} cut through 4×4 tiles; shard over fewer (HSDP).")
    return found


def run(options: argparse.Namespace) -> int:
    """Print both tables, or JSON, and write the rows of the first; 2 if flags do not go together."""
    try:
        models, gpus, inputs = read_flags(options)
    except ValueError as error:
        print(error)
        return 2
    costs = [cost(model, one, wire, inputs) for model in models for one in gpus for wire in WIRES]
    if options.csv:
        _write(costs, options.csv)
    if options.json:
        shards = [
            {"rows": rows, "aligned_up_to": aligned_up_to(rows), "chunks": {one: chunk(rows, one) for one in gpus}}
            for rows in options.rows
        ]
        parts = {"models": [asdict(model) for model in models], "inputs": asdict(inputs)}
        rows = {"costs": [asdict(one) for one in costs], "shards": shards}
        print(json.dumps({"measured": False, "note": DISCLAIMER, **parts, **rows}, indent=2))
        return 0
    notes = misaligned(models, gpus)
    print("\n\n".join([DISCLAIMER, table(costs), *notes, alignment_table(options.rows, gpus)]))
    return 0


def _write(costs: Sequence[Cost], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [one.name for one in fields(Cost)])
        writer.writeheader()
        writer.writerows(asdict(one) for one in costs)
