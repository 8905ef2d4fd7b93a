"""Data-sheet figures of GPUs: dense 16-bit matrix rate and memory bandwidth, for utilisation and for the model."""

import re
from dataclasses import dataclass

OTHERS = {"laptop", "mobile", "d", "mig", "super", "ti"}
"""Words in the names of GPUs, or of parts of one, that are slower than their namesakes."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it.

    Args:
        name: As users call it.
        words: All of them are in the name that the driver gives, in lower case.
        tflops: Dense bfloat16 products with float32 sums, TFLOP/s; half of the figure "with sparsity".
        gigabytes: Memory bandwidth, GB/s.
        source: Document of NVIDIA that says so.
    """

    name: str
    words: tuple[str, ...]
    tflops: float
    gigabytes: float
    source: str


# the more specific name first
GPUS = (
    Gpu("A100 PCIe 40 GB", ("a100", "pcie", "40gb"), 312, 1555, "A100 Tensor Core GPU data sheet"),
    Gpu("A100 SXM 40 GB", ("a100", "40gb"), 312, 1555, "A100 Tensor Core GPU data sheet"),
    Gpu("A100 PCIe 80 GB", ("a100", "80gb", "pcie"), 312, 1935, "A100 Tensor Core GPU data sheet"),
    Gpu("A100 SXM 80 GB", ("a100",), 312, 2039, "A100 Tensor Core GPU data sheet"),
    Gpu("H100 NVL", ("h100", "nvl"), 835, 3900, "H100 NVL data sheet"),
    Gpu("H100 PCIe", ("h100", "pcie"), 756, 2000, "H100 Tensor Core GPU data sheet, first edition"),
    Gpu("H100 SXM", ("h100",), 989, 3350, "H100 Tensor Core GPU data sheet"),
    Gpu("H200 NVL", ("h200", "nvl"), 835, 4800, "H200 Tensor Core GPU data sheet"),
    Gpu("H200 SXM", ("h200",), 989, 4800, "H200 Tensor Core GPU data sheet"),
    Gpu("B200", ("b200",), 2250, 8000, "DGX B200 data sheet, an eighth of its figures"),
    Gpu("RTX 5090", ("rtx", "5090"), 209.5, 1792, "RTX Blackwell GPU architecture white paper"),
    Gpu("RTX 4090", ("rtx", "4090"), 165.2, 1008, "Ada GPU architecture white paper"),
    Gpu("RTX 3090", ("rtx", "3090"), 71, 936, "Ampere GA102 GPU architecture white paper"),
    Gpu("L40S", ("l40s",), 362, 864, "L40S data sheet"),
)  # fmt: skip


def find(device_name: str) -> Gpu | None:
    """Return the GPU of a name that the driver gives, or None.

    Example:
        >>> find("NVIDIA H100 80GB HBM3").name
        'H100 SXM'
    """
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if words & OTHERS:
        return None
    return next((gpu for gpu in GPUS if words.issuperset(gpu.words)), None)
