from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cusparselt_bench import Bench


@pytest.fixture
def bench() -> Iterator["Bench"]:
    from cusparselt_bench import Bench  # which skips who imports it without nvmath

    bench = Bench()
    yield bench
    bench.lt.close()
    bench.fake.assert_clean()
