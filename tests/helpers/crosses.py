"""Crosses of cases of which every run of the tests has some, and the sweep the rest."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

ON_FOUR = ("fst", "s_ste", "slope")
"""Presets that every run tries on four ranks: one a search, one a soft threshold, one two masks a layer."""


def crossed(cases: Iterable[tuple[Any, ...]], is_short: Callable[..., bool]) -> list[Any]:
    """Return cases as parameters, of which those that ``is_short`` denies are in the sweep."""
    return [pytest.param(*case, marks=[] if is_short(*case) else pytest.mark.sweep) for case in cases]
