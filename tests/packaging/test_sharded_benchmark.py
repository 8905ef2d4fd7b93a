"""``scripts/bench sharded``, small, and what it refuses."""

import csv
import os
from pathlib import Path

import pytest
from ranks import ranks

from scripts.benchmarks.command_line import command_line
from scripts.benchmarks.sharded import Size, run


def test_every_wire_is_timed_and_its_bytes_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    ranks(2)("scripts.benchmarks.sharded.measure", Size(1, 16, 8), 2, "cpu", path)
    with path.open() as file:
        rows = {(row["kernel_provider"], row["metric_name"]): row for row in csv.DictReader(file)}
    assert len(rows) == 8
    assert float(rows["masked, sent to dense", "bytes"]["y_value_50"]) == 1
    assert float(rows["packed, sent to dense", "bytes"]["y_value_50"]) == 17 / 32
    assert {row["x_value"] for row in rows.values()} == {"1 blocks of 16, 8 tokens, 2 ranks"}


def test_one_rank_sends_nothing(capsys) -> None:
    assert run(Size(1, 16, 8), 1, 1, "cpu", None) == 2
    assert capsys.readouterr().out == "--ranks is 1: it must be at least 2, as one alone sends nothing.\n"


@pytest.mark.parametrize(("width", "world"), [(30, 2), (20, 2), (64, 5)])
def test_blocks_that_ranks_cannot_share_are_refused_in_a_sentence(width: int, world: int, capsys) -> None:
    assert run(Size(1, width, 8), world, 1, "cpu", None) == 2
    message = capsys.readouterr().out
    assert message.startswith(f"--width is {width}, of which {world} ranks have parts of ")
    assert message.endswith(f"so take a multiple of {4 * world}.\n")
    assert message.count("\n") == 1


@pytest.mark.parametrize("command", ["sharded", "scale-model"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(command, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    for name in (tmp_path, tmp_path / "file" / "rows.csv"):
        with pytest.raises(SystemExit, match="2"):
            command_line().parse_args([command, "--csv", str(name)])
        assert "cannot be written: name a file in a folder that can" in capsys.readouterr().err.splitlines()[-1]
    path = os.path.join(tmp_path, "new", "rows.csv")
    assert command_line().parse_args([command, "--csv", path]).csv == Path(path)
