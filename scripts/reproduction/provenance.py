"""What a run depends on beside its task, method and seed: the sources, their commit, and the environment."""

import contextlib
import hashlib
import subprocess
from pathlib import Path

import torch

from sparsetrain import __version__
from sparsetrain.dispatch import describe_environment

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("sparsetrain", "kernels", "callbacks", "recipes")


def commit(root: Path = ROOT) -> str:
    """Return the commit that is checked out, with ``+`` if anything but documents differs from it, or ``"unknown"``."""
    top = _git(root, "rev-parse", "--show-toplevel")
    head = _git(root, "rev-parse", "--short", "HEAD")
    if not head or not top or Path(top).resolve() != root.resolve():
        return "unknown"
    return head + ("+" if _git(root, "status", "--porcelain", "--", ".", ":(exclude)docs") else "")


def sources_digest(root: Path = ROOT) -> str:
    """Return a digest of all code that a run executes, committed or not."""
    paths = [path for folder in SOURCES for path in (root / folder).rglob("*.py")]
    paths.append(root / "scripts" / "reproduction" / "training.py")
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def environment(threads: int) -> str:
    """Return GPU, versions and threads in one line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counted = f"{threads} thread{'s' if threads > 1 else ''}" if threads else "default threads"
    return f"{describe_environment(device)}, sparsetrain {__version__}, {counted}"


def _git(root: Path, *arguments: str) -> str:
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=root)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""
