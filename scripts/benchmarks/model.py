"""What arithmetic expects of sparse training on a GPU: a model that no run has confirmed.

A dense step takes ``flops / (UTILISATION · peak)``. A sparse one saves the part of the forward and the input-gradient
products that a GEMM ratio says, and adds passes over the weights at the memory's speed, once an optimizer step.
"""

from dataclasses import dataclass

from .peaks import GPUS, Gpu

UTILISATION = 0.6  # of the peak, by a dense step compiled as a whole
GEMM_SHARE = 0.8  # of the peak, by large dense products on random numbers
COPY_SHARE = 0.9  # of the data sheet's bandwidth, by a copy
REFRESH_EVERY = 40  # optimizer steps

SEPARATE = {
    "masked decay: gradient, weight and mask read, gradient written": 4 + 4 + 1 / 8 + 4,
    "pack: weight and mask read, both operands written": 4 + 1 / 8 + 2 * (2 / 2 + 2 / 16),
    f"search every {REFRESH_EVERY} steps: weight read, mask written": (4 + 1 / 8) / REFRESH_EVERY,
}
"""Bytes for each sparse weight (float32 masters, 16-bit products) and optimizer step, in passes of their own."""
ONE_PASS = {
    "in the optimizer's own pass: mask read, both operands written": 1 / 8 + 2 * (2 / 2 + 2 / 16),
    f"search every {REFRESH_EVERY} steps: weight read, mask written": (4 + 1 / 8) / REFRESH_EVERY,
}
"""The same where one kernel updates, decays and packs."""

RATIOS = {
    "A100 SXM 80 GB": (1.2, 1.6),
    "H100 PCIe": (1.4, 1.6),
    "H100 SXM": (1.2, 1.5),
    "H200 SXM": (1.2, 1.5),
    "B200": (1.3, 1.6),
    "RTX 4090": (1.5, 1.8),
    "RTX 5090": (1.5, 1.8),
}
"""GEMM ratios that are assumed, low and high: dense time / sparse time of one product, 4096 tokens and more."""


@dataclass(frozen=True)
class Training:
    """A training step, as far as the model sees it.

    Args:
        name: In the table.
        sparse_weights: In layers with masks.
        flops: Of a dense step.
        tokens: Of an optimizer step.
    """

    name: str
    sparse_weights: float
    flops: float
    tokens: int


def training_of(name: str, width: int, depth: int, hidden: int, vocabulary: int, context: int, batch: int) -> Training:
    """Return a GPT with SwiGLU whose blocks are sparse; attention counts below the diagonal alone."""
    sparse, tokens = float(depth * width * (4 * width + 3 * hidden)), batch * context
    attention = 6.0 * tokens * context * width * depth
    return Training(name, sparse, 6.0 * tokens * (sparse + width * vocabulary) + attention, tokens)


TRAININGS = (
    training_of("350M, 16k tokens", 1024, 24, 2816, 50304, 1024, 16),
    training_of("1.3B, 8k tokens", 2048, 24, 5632, 50304, 1024, 8),
    training_of("1.3B, 64k tokens", 2048, 24, 5632, 50304, 1024, 64),
)


def speed_up(gpu: Gpu, training: Training, ratio: float, bytes_per_weight: float) -> float:
    """Return the expected time of a dense step over that of a sparse one.

    Args:
        gpu: Its data sheet.
        training: What is trained.
        ratio: Dense time over sparse time of one product.
        bytes_per_weight: That passes over a sparse weight read and write in an optimizer step.

    Example:
        >>> speed_up(GPUS[0], TRAININGS[0], ratio=1.0, bytes_per_weight=0.0)
        1.0
    """
    dense = training.flops / (UTILISATION * gpu.tflops * 1e12)
    products = 4.0 * training.sparse_weights * training.tokens / (GEMM_SHARE * gpu.tflops * 1e12)
    passes = bytes_per_weight * training.sparse_weights / (COPY_SHARE * gpu.gigabytes * 1e9)
    return dense / (dense - products * (1 - 1 / ratio) + passes)


def table() -> str:
    """Return the table in Markdown, for a low and a high ratio each."""
    ways = (("passes of their own", sum(SEPARATE.values())), ("one pass", sum(ONE_PASS.values())))
    columns = [(training, way, size) for training in TRAININGS for way, size in ways]
    heads = ["GPU", "TFLOP/s", "GB/s", "GEMM ratio", *(f"{training.name}, {way}" for training, way, _ in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for gpu in GPUS:
        if gpu.name not in RATIOS:
            continue
        low, high = RATIOS[gpu.name]
        cells = [gpu.name, f"{gpu.tflops:g}", f"{gpu.gigabytes:g}", f"{low:g} to {high:g}"]
        for training, _, size in columns:
            found = [speed_up(gpu, training, ratio, size) for ratio in (low, high)]
            cells.append(f"{found[0]:.2f} to {found[1]:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines.append("| bytes a sparse weight and optimizer step | passes of their own | one pass |")
    lines.append("|---|---|---|")
    for name in dict.fromkeys([*SEPARATE, *ONE_PASS]):
        cells = [f"{found[name]:.2f}" if name in found else "–" for found in (SEPARATE, ONE_PASS)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| together | " + " | ".join(f"{size:.2f}" for _, size in ways) + " |")
    return "\n".join(lines)
