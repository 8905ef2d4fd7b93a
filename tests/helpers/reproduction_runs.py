"""Runs of ``scripts/reproduce_methods`` for tests: its words, what it wrote, and runs that were never made."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

Load = Callable[[str], ModuleType]


def arguments(folder: Path, *extra: str, methods: tuple[str, ...] = ("asp_one_shot",)) -> list[str]:
    chosen = [word for method in methods for word in ("--method", method)]
    common = ["--model", "tiny", "--steps", "2", "--seeds", "1", *chosen]
    return [*common, "--runs", str(folder / "runs"), "--out", str(folder / "results" / "methods"), *extra]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results" / "methods.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def a_run(load: Load, method: str, seed: int, losses: list[float], shares: list[float], **fields: Any) -> Any:
    training = load("training")
    every = len(shares) // len(losses)
    validations = [training.Validation(every * (turn + 1), loss) for turn, loss in enumerate(losses)]
    return training.Run(
        "GPT tiny",
        method,
        seed,
        validations,
        shares,
        [share > 0 for share in shares],
        [False] * len(shares),
        0,
        "2:4",
        1.0,
        **fields,
    )
