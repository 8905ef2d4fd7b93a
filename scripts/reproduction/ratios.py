"""The ratio of dense to sparse GEMM time that estimates use: published, given, or measured."""

import csv
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FEWEST_TOKENS = 4096
"""Of the products that count: training steps have as many."""

DENSE_PRODUCTS = ("dense", "masked")
"""Providers of ``scripts/bench gemm`` that compute dense products."""


@dataclass(frozen=True)
class Ratio:
    """Dense over sparse GEMM time.

    Args:
        value: How many times as fast a sparse GEMM is.
        source: ``"published"``, ``"given"`` or ``"measured on <GPU>"``.
        words: Where it is from, for the report.
    """

    value: float
    source: str
    words: str


PUBLISHED = Ratio(
    1.5,
    "published",
    "published, not measured by this project: median of 1.55 to 1.63 at 4096 tokens and more, bf16, on A100, H100 PCIe "
    "and B200 (SlideSparse, arXiv 2603.05232), less what 700 W parts lose",
)


def given(value: float) -> Ratio:
    """Return a ratio from the command line.

    Raises:
        ValueError: If it is not above 0.
    """
    if not 0 < value < float("inf"):
        raise ValueError(f"--ratio is {value}: it must be a finite number above 0.")
    return Ratio(value, "given", "given on the command line, not measured")


def measured(path: Path) -> Ratio:
    """Return the median over problems of the dense time over the fastest sparse one, from what the benchmark wrote.

    Args:
        path: The CSV of ``scripts/bench gemm``; its bf16 products of 4096 tokens and more on a GPU count, of several
            measurements of the same product the last.

    Raises:
        ValueError: If it holds no such product, or those of several GPUs.
        OSError: If it cannot be read.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if _counts(row)]
    devices = {row["device"] for row in rows}
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        problem = row["kernel_name"], int(row["x_value"])
        times.setdefault(problem, {})[row["kernel_provider"]] = float(row["y_value_50"])
    ratios = []
    for providers in times.values():
        sparse = [value for provider, value in providers.items() if provider not in DENSE_PRODUCTS]
        if "dense" in providers and sparse:
            ratios.append(providers["dense"] / min(sparse))
    if not ratios:
        raise ValueError(
            f"--measured is {str(path)!r}: it has no sparse and dense bf16 product of {FEWEST_TOKENS} tokens or more "
            f"on a GPU, so measure some with: scripts/bench gemm --csv {path.name}."
        )
    if len(devices) > 1:
        raise ValueError(
            f"--measured is {str(path)!r}: it has products of {', '.join(sorted(devices))}, so give the file "
            "of one GPU."
        )
    (device,) = devices
    value = statistics.median(ratios)
    words = (
        f"measured on {device} by `scripts/bench gemm` ({path.name}): median over {len(ratios)} bf16 products of "
        f"{FEWEST_TOKENS} tokens and more, {min(ratios):.2f} to {max(ratios):.2f}, each by its fastest sparse provider"
    )
    return Ratio(round(value, 3), f"measured on {device}", words)


def _counts(row: Mapping[str, str]) -> bool:
    """Whether a row is of a bf16 product of enough tokens on a GPU."""
    name = row.get("kernel_name") or ""
    is_product = name.startswith("gemm forward ") and name.endswith(" bfloat16")
    return is_product and row["metric_name"] == "device time" and int(row["x_value"]) >= FEWEST_TOKENS
