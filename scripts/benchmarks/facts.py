"""What GPU and which software this is, how many algorithms there are, and the device's own speed."""

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsetrain.backends import Backend
from sparsetrain.dispatch import describe_environment

from . import gemm, stand_in
from .grid import first_line
from .measure import cuda_milliseconds, quantiles

PACKAGES = (
    "torch", "triton", "nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12", "nvmath-python", "cuda-bindings",
    "cuda-core", "cuda-pathfinder", "tilelang", "torchao", "lightning", "transformers", "numpy", "pytest",
    "pytest-xdist", "pytest-timeout", "nvidia-cuda-nvcc", "nvidia-cuda-nvrtc",
)  # fmt: skip
SHAPES = ((4096, 4096), (768, 3072), (5632, 2048), (2048, 5632))
TOKENS = (512, 8192)
COPY_ENTRIES = 1 << 29
SQUARE = 8192


def main() -> int:
    """Write what is found as JSON, fact by fact, so that one that fails loses no other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--stand-in", action="store_true", help="on a CPU, with stand-ins for the libraries")
    options = parser.parse_args()
    device = torch.device("cpu") if options.stand_in else torch.device("cuda", 0)
    questions: dict[str, Callable[[], Any]] = {
        "environment": lambda: describe_environment(device),
        "python": platform.python_version,
        "packages": packages,
        "cuda of torch": lambda: torch.version.cuda,
        "cuSPARSELt of torch": lambda: torch.backends.cusparselt.version(),
        "device": lambda: properties(device),
        "algorithms": lambda: algorithms(stand_in.backends() if options.stand_in else gemm.WAYS, device),
        "copy, GB/s": lambda: copy_speed(device),
        "bfloat16 product, TFLOP/s": lambda: product_speed(device),
    }
    answers: dict[str, Any] = {}
    for name, question in questions.items():
        try:
            answers[name] = question()
        except Exception as error:  # each library fails in its own way
            answers[name] = f"fails with {type(error).__name__}: {first_line(error)}"
        print(f"{name}: {json.dumps(answers[name])}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(answers, indent=1) + "\n")
    return 0


def packages() -> dict[str, str | None]:
    """Return versions by the names of packages; None of those that are not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def properties(device: torch.device) -> dict[str, Any] | None:
    """Return what torch knows of the GPU."""
    if device.type == "cpu":
        return None
    known = torch.cuda.get_device_properties(device)
    names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size", "warp_size",
             "shared_memory_per_block_optin", "regs_per_multiprocessor", "clock_rate", "memory_clock_rate",
             "memory_bus_width")  # fmt: skip
    return {name: getattr(known, name) for name in names if hasattr(known, name)}


def algorithms(ways: dict[str, Backend], device: torch.device) -> dict[str, Any]:
    """Return the number of algorithms by way, dtype, shape and tokens, or why there are none."""
    found: dict[str, Any] = {}
    for label, backend in ways.items():
        counts: dict[str, Any] = {}
        for dtype in (torch.bfloat16, torch.float16):
            for shape in SHAPES:
                for tokens in TOKENS:
                    key = f"{str(dtype).removeprefix('torch.')} {shape[0]}x{shape[1]} {tokens} tokens"
                    try:
                        reason = backend.why_not(device, dtype, shape)
                        counts[key] = reason or len(backend.algorithms(shape, tokens, dtype, device))
                    except Exception as error:
                        counts[key] = f"fails with {type(error).__name__}: {first_line(error)}"
        answers = list(counts.values())
        found[label] = answers[0] if answers.count(answers[0]) == len(answers) else counts
    return found


def copy_speed(device: torch.device) -> float | None:
    """Return the GB a second that a copy of 2 GiB reads and writes."""
    if device.type == "cpu":
        return None
    source = torch.empty(COPY_ENTRIES, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    median = quantiles(cuda_milliseconds(target.copy_, [source], 20))[1]
    return round(2 * source.numel() * 4 / (median / 1e3) / 1e9, 1)


def product_speed(device: torch.device) -> float | None:
    """Return the TFLOP/s of a large dense product of random numbers."""
    if device.type == "cpu":
        return None
    one, two = (torch.randn(SQUARE, SQUARE, device=device, dtype=torch.bfloat16) for _ in range(2))
    median = quantiles(cuda_milliseconds(lambda matrix: matrix @ two, [one], 20))[1]
    return round(2 * SQUARE**3 / (median / 1e3) / 1e12, 1)


if __name__ == "__main__":
    sys.exit(main())
