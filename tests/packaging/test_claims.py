"""What method cards say was measured stands in the published table."""

import re
from itertools import chain
from pathlib import Path

import pytest
from script_modules import REPRODUCTION, importable

ROOT = Path(__file__).parents[2]
CARDS = [*sorted((ROOT / "docs" / "methods").glob("*.md")), ROOT / "docs" / "refit.md"]
CLAIM = re.compile(r"([-+]?\d+\.(\d+))\s±\s(\d+\.\d+)")


def claims_in(text: str) -> list[tuple[str, str]]:
    """Return gaps as they are written, those above 0 without a sign, with their deviations."""
    return [(found[1].lstrip("+"), found[3]) for found in CLAIM.finditer(text)]


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
        rows = {(f"{mean:.{digits}f}", f"{spread:.{len(deviation.partition('.')[2])}f}") for mean, spread in gaps}
        assert (size, deviation) in rows, f"{card.name} says {size} ± {deviation}, which no row of the table is"


def test_a_claim_that_no_row_is_would_be_found(gaps: list[tuple[float, float]]) -> None:
    assert claims_in("it lost 0.0123 ± 0.4567 nats, or -1.5 ± 0.2") == [("0.0123", "0.4567"), ("-1.5", "0.2")]
    assert len(gaps) > 40
    assert not any(round(abs(mean), 4) == 0.0123 and round(spread, 4) == 0.4567 for mean, spread in gaps)


def test_tables_in_documents_are_those_of_the_published_runs() -> None:
    with importable(REPRODUCTION) as load:
        chooser = load("chooser")
        gaps = chooser.gaps_of(load("table").read_csv(chooser.RESULTS))
        for document in chooser.TABLES:
            text = (ROOT / document).read_text()
            assert chooser.written(text, document, gaps) == text, "run python -m scripts.reproduction.chooser"


def test_a_gap_stands_beside_its_model_and_below_its_method() -> None:
    with importable(REPRODUCTION) as load:
        chooser, document = load("chooser"), "docs/methods/README.md"
        known = {task.name for models in load("tasks").TASKS.values() for task in models.values()} | {""}
        for table in chain.from_iterable(chooser.TABLES.values()):
            assert {task for *_, task in table.rows} <= known
            assert {*table.methods.values()} <= {*load("methods").METHODS}
        gaps = {("GPT small, Muon", "asp_one_shot"): "+1", ("encoder small", "recommended"): "-2"}
        found = chooser.written((ROOT / document).read_text(), document, gaps)
        with pytest.raises(ValueError, match=f"^{document} has 0 places for tables of gaps: it must have 1,"):
            chooser.written("words", document, gaps)
    cells = [line.split(" | ") for line in found.splitlines() if "+1" in line or "-2" in line]
    no = "❌ not measured"
    assert cells == [
        ["| ", "GPT", "300, with Muon", no, no, "+1 |"],
        ["| pretrained", "MiniLM, attention too", "200", "-2", no, f"{no} |"],
    ]
