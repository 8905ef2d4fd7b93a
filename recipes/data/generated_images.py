"""Generated images: shapes and textures with jittered position, scale, angle and colour, on clutter and noise."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32

CHUNK = 500  # images drawn from one random stream, so that a longer set begins with a shorter one
CLUTTER = 2  # blobs of colour behind every shape
EDGE = 12.0  # steepness of a shape's edge


def generate_images(count: int, seed: int, size: int = 32) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images of :data:`CLASSES` and their labels, which repeat 0, 1, … in order.

    Args:
        count: Images.
        seed: Any integer; image ``i`` depends on it, on ``i`` and on the size alone.
        size: Height and width.

    Returns:
        uint8 ``[count, size, size, 3]``, int64 ``[count]``.

    Raises:
        ValueError: If a size is too small.

    Example:
        >>> images, labels = generate_images(12, seed=0)
        >>> images.shape, labels.tolist()
        ((12, 32, 32, 3), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    """
    if count < 1 or size < 8:
        raise ValueError(f"count is {count} and size {size}: they must be at least 1 and 8.")
    chunks = [_chunk(seed, chunk, size) for chunk in range(-(-count // CHUNK))]
    return np.concatenate(chunks)[:count], np.arange(count, dtype=np.int64) % len(CLASSES)


def _chunk(seed: int, chunk: int, size: int) -> NDArray[np.uint8]:
    """Return ``CHUNK`` images uint8 ``[CHUNK, size, size, 3]``."""
    random = np.random.default_rng([zlib.crc32(str(seed).encode()), chunk])

    def uniform(low: float, high: float, *shape: int) -> Floats:
        return random.uniform(low, high, (CHUNK, 1, 1, *shape)).astype(np.float32)

    line = np.linspace(-1, 1, size, dtype=np.float32)
    rows, columns = line[:, None], line[None, :]
    scale, angle = uniform(0.5, 0.9), uniform(-0.6, 0.6)
    dx, dy = columns - uniform(-0.3, 0.3), rows - uniform(-0.3, 0.3)
    x = (np.cos(angle) * dx + np.sin(angle) * dy) / scale  # [CHUNK, size, size]
    y = (np.cos(angle) * dy - np.sin(angle) * dx) / scale
    coverage = np.empty_like(x)
    labels = np.arange(CHUNK) % len(CLASSES)
    for label, inside in enumerate(CLASSES.values()):
        mine = labels == label
        coverage[mine] = 1 / (1 + np.exp(-EDGE * inside(x[mine], y[mine])))

    back = uniform(0.25, 0.75, 3) * np.ones((size, size, 1), np.float32)
    for _ in range(CLUTTER):
        distance = (columns - uniform(-1, 1)) ** 2 + (rows - uniform(-1, 1)) ** 2
        back += np.exp(-distance / uniform(0.05, 0.4))[..., None] * uniform(-0.15, 0.15, 3)
    # lighter or darker than the background, and of another hue
    direction = random.standard_normal((CHUNK, 1, 1, 3), dtype=np.float32)
    direction += 1.5 * random.choice(np.array([-1, 1], np.float32), (CHUNK, 1, 1, 1))
    direction /= np.sqrt((direction**2).sum(-1, keepdims=True))
    image = back + coverage[..., None] * direction * uniform(0.2, 0.6, 1)
    image += random.standard_normal(image.shape, dtype=np.float32) * uniform(0.03, 0.12, 1)
    pixels: NDArray[np.uint8] = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels


def _disk(x: Floats, y: Floats) -> Floats:
    return 0.8 - np.hypot(x, y)


def _ring(x: Floats, y: Floats) -> Floats:
    return 0.22 - np.abs(np.hypot(x, y) - 0.65)


def _square(x: Floats, y: Floats) -> Floats:
    return 0.7 - np.maximum(np.abs(x), np.abs(y))


def _frame(x: Floats, y: Floats) -> Floats:
    return 0.2 - np.abs(np.maximum(np.abs(x), np.abs(y)) - 0.6)


def _triangle(x: Floats, y: Floats) -> Floats:
    return 0.45 - np.maximum(np.maximum(0.866 * x - 0.5 * y, -0.866 * x - 0.5 * y), y)


def _cross(x: Floats, y: Floats) -> Floats:
    across, along = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    inside: Floats = np.minimum(0.25 - across, 0.85 - along)
    return inside


def _stripes(x: Floats, y: Floats) -> Floats:
    return _in_patch(np.sin(9 * x), x, y)


def _waves(x: Floats, y: Floats) -> Floats:
    return _in_patch(np.sin(9 * x + 1.8 * np.sin(6 * y)), x, y)


def _checks(x: Floats, y: Floats) -> Floats:
    return _in_patch(np.sin(6 * x) * np.sin(6 * y), x, y)


def _targets(x: Floats, y: Floats) -> Floats:
    return _in_patch(np.sin(9 * np.hypot(x, y)), x, y)


def _in_patch(pattern: Floats, x: Floats, y: Floats) -> Floats:
    inside: Floats = np.minimum(0.3 * pattern, 1 - np.hypot(x, y))
    return inside


CLASSES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "disk": _disk,
    "ring": _ring,
    "square": _square,
    "frame": _frame,
    "triangle": _triangle,
    "cross": _cross,
    "stripes": _stripes,
    "waves": _waves,
    "checks": _checks,
    "targets": _targets,
}
"""Name of each class, in the order of the labels: how far inside a shape of size 1 the points ``(x, y)`` lie."""
