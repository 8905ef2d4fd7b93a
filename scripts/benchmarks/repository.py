"""The checkout that a result belongs to; imports nothing heavy."""

import contextlib
import subprocess


def commit() -> str:
    """Return the commit that is checked out, or ``"unknown"``."""
    with contextlib.suppress(OSError):
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"
