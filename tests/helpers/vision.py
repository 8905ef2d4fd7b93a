"""torchvision and timm for tests of their models, from a folder of their own where the environment has none.

torchvision's published wheels are built for CUDA. Beside a torch for CPUs its operators do not load, and then every
library that looks for torchvision fails on import, Lightning among them. Its models need no operators, so the tests
alone see it, with that part left out.
"""

import sys
import types
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

FOLDER = Path(sys.prefix) / "vision"
"""Where ``scripts/test`` installs them."""


class VisionFinder(MetaPathFinder):
    """Finds the two packages in the folder; not on ``sys.path``, which processes started by a test would inherit."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the packages themselves; what is inside of them is found as usual."""
        return PathFinder.find_spec(fullname, [str(FOLDER)]) if fullname in ("torchvision", "timm") else None


def make_importable() -> None:
    """Let ``import torchvision`` and ``import timm`` find what the folder holds, after the environment's own."""
    if FOLDER.is_dir() and PathFinder.find_spec("torchvision") is None:
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
        sys.meta_path.append(VisionFinder())
