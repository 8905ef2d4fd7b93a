"""``python -m scripts.reproduction.chooser`` writes the tables of gaps in documents from the published runs."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .report import line, spread
from .summary import summarise
from .table import read_csv
from .training import Run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "methods.csv"
MISSING = "❌ not measured"

MODELS = (
    ("from scratch", "GPT", "300", "GPT small"),
    ("", "GPT", "300, with Muon", "GPT small, Muon"),
    ("", "GPT", "1500", "GPT small, ×5 steps"),
    ("", "Llama", "150", "Llama small, ×½ steps"),
    ("", "Llama", "300", "Llama small"),
    ("", "Llama", "300, with Muon", "Llama small, Muon"),
    ("", "Llama, attention too", "300", "Llama small, attention too"),
    ("", "Llama", "1500", "Llama small, ×5 steps"),
    ("", "ViT, attention too", "600", "ViT small"),
    ("", "ConvNet", "600", "image small"),
    ("", "ConvNet", "3000", "image small, ×5 steps"),
    ("pretrained", "MiniLM, attention too", "200", "encoder small"),
    ("", "MiniLM, attention too", "600", "encoder small, ×3 steps"),
    ("", "last blocks of SmolLM2, attention too", "80", "last blocks small"),
    ("", "EfficientNet-Lite0, 1 × 1 convolutions", "600", "EfficientNet small"),
)
"""By model."""

CHANGES = (
    ("as it is", "GPT small"),
    ("loss × 10", "GPT small, loss ×10"),
    ("loss × 0.1", "GPT small, loss ×0.1"),
    ("learning rate × 4", "GPT small, learning rate ×4"),
    ("learning rate × 2", "GPT small, learning rate ×2"),
    ("learning rate × ½", "GPT small, learning rate ×½"),
    ("batch × 2", "GPT small, batch ×2"),
    ("batch × ½", "GPT small, batch ×½"),
    ("width × 2", "GPT small, width ×2"),
    ("width × ½", "GPT small, width ×½"),
)
"""By what is changed."""

FACTORS = (
    ("GPT, Muon", "GPT small, Muon"),
    ("Llama, Muon", "Llama small, Muon"),
    ("MiniLM, 200 steps", "encoder small"),
    ("MiniLM, 600 steps", "encoder small, ×3 steps"),
    ("last blocks of SmolLM2", "last blocks small"),
    ("EfficientNet-Lite0", "EfficientNet small"),
)
"""By model, where less than twice the learning rate was tried."""


class GapTable(NamedTuple):
    """A table of gaps to dense.

    Args:
        titles: Of the columns before the gaps.
        rows: Words before the gaps, and the task.
        methods: A column's title to the method whose gaps stand in it.
    """

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    methods: Mapping[str, str]


TABLES = {
    "docs/methods/README.md": [
        GapTable(
            ("weights", "model", "steps"),
            MODELS,
            {
                "`recommended`, ends 2:4": "recommended",
                "`recommended`, `dense_tail=1/6`": "recommended, dense tail 1/6",
                "`asp_one_shot` half-way, ends 2:4": "asp_one_shot",
            },
        )
    ],
    "docs/methods/recommended.md": [
        GapTable(
            ("",),
            (("GPT", "GPT small"), ("images", "image small")),
            {
                "recommended": "recommended",
                "`decay=0.1`": "recommended, share 0.1",
                "no pull in the head": "recommended, no pull in the head",
                "the whole pull from the first step on": "recommended, full share from the start",
                "`warmup=0.1`": "recommended, head 10 %",
                "`warmup=0`": "recommended, no head",
                "`lr_factor=1`": "recommended, lr_factor 1",
            },
        ),
        GapTable(
            ("",),
            CHANGES,
            {
                "recommended": "recommended",
                "`lr_factor=1`": "recommended, lr_factor 1",
            },
        ),
        GapTable(
            ("",),
            FACTORS,
            {
                "recommended, 2": "recommended",
                "`lr_factor=2**0.5`": "recommended, lr_factor √2",
                "`lr_factor=1`": "recommended, lr_factor 1",
            },
        ),
    ],
}
"""Of documents, in their order."""

PLACE = re.compile(r"(<!-- gaps: [^\n]* -->\n).*?(\n<!-- /gaps -->)", re.DOTALL)


def gaps_of(runs: Sequence[Run]) -> dict[tuple[str, str], str]:
    """Return the gap to dense of every task and method, as it is written.

    Args:
        runs: In which those of a task stand together.
    """
    found = {}
    for task, own in groupby(runs, key=lambda run: run.task):
        for row in summarise([*own], 1.0):  # gaps do not depend on the ratio of times
            found[task, row.method] = spread(row.gaps, "{:+.4f}")
    return found


def written(text: str, document: str, gaps: Mapping[tuple[str, str], str]) -> str:
    """Return a document with its tables as the gaps are.

    Args:
        text: The document.
        document: Its path.
        gaps: What :func:`gaps_of` returns.

    Raises:
        ValueError: If it has not one place for each table.
    """
    tables = TABLES[document]
    if (count := len(PLACE.findall(text))) != len(tables):
        raise ValueError(
            f"{document} has {count} places for tables of gaps: it must have {len(tables)}, as PLACE describes them."
        )
    following = iter(tables)
    return PLACE.sub(lambda found: f"{found[1]}\n{_rows(next(following), gaps)}\n{found[2]}", text)


def _rows(table: GapTable, gaps: Mapping[tuple[str, str], str]) -> str:
    header = [*table.titles, *table.methods]
    lines = [line(header), line(["---"] * len(header))]
    for *words, task in table.rows:
        lines.append(line([*words, *(gaps.get((task, method), MISSING) for method in table.methods.values())]))
    return "\n".join(lines)


def main() -> None:
    """Write the tables of every document."""
    gaps = gaps_of(read_csv(RESULTS))
    for document in TABLES:
        path = ROOT / document
        path.write_text(written(path.read_text(), document, gaps))


if __name__ == "__main__":
    main()
