"""What method cards say was measured stands in the published table."""

import re
from pathlib import Path

import pytest
from script_modules import REPRODUCTION, importable

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "docs" / "methods").glob("*.md"))
CLAIM = re.compile(r"[-+]?(\d+\.(\d+))\s±\s(\d+\.\d+)")


def claims_in(text: str) -> list[tuple[str, str]]:
    """Return the sizes of gaps, as they are written, with their deviations."""
    return [(found[1], found[3]) for found in CLAIM.finditer(text)]


@pytest.fixture(scope="module")
def gaps() -> list[tuple[float, float]]:
    """Return mean and deviation of every row's gap."""
    found = []
    with importable(REPRODUCTION) as load:
        summary = load("summary")
        runs = load("table").read_csv(ROOT / "docs" / "results" / "methods.csv")
        for task in {run.task for run in runs}:
            rows = summary.summarise([run for run in runs if run.task == task], 1.5)
            found += [summary.mean_and_deviation(row.gaps) for row in rows]
    return found


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_every_gap_in_a_card_is_one_of_a_row(card: Path, gaps: list[tuple[float, float]]) -> None:
    for size, deviation in claims_in(card.read_text()):
        digits = len(size.partition(".")[2])
        rows = {(f"{abs(mean):.{digits}f}", f"{spread:.{len(deviation.partition('.')[2])}f}") for mean, spread in gaps}
        assert (size, deviation) in rows, f"{card.name} says {size} ± {deviation}, which no row of the table is"


def test_a_claim_that_no_row_is_would_be_found(gaps: list[tuple[float, float]]) -> None:
    assert claims_in("it lost 0.0123 ± 0.4567 nats, or -1.5 ± 0.2") == [("0.0123", "0.4567"), ("1.5", "0.2")]
    assert len(gaps) > 40
    assert not any(round(abs(mean), 4) == 0.0123 and round(spread, 4) == 0.4567 for mean, spread in gaps)
