from collections.abc import Iterator

import pytest
from poisoned import Margins


@pytest.fixture
def margins(kernel_device: str) -> Iterator[Margins]:
    """Memory for kernels, whose surroundings are checked after the test."""
    memory = Margins(kernel_device)
    yield memory
    memory.check()
