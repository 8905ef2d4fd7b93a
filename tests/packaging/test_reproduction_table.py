"""The table of ``scripts/reproduce_methods``: it is read back, and keeps what is not measured again."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from reproduction_runs import Load, a_run, arguments, rows_of
from script_modules import REPRODUCTION, importable


@pytest.fixture
def load():
    with importable(REPRODUCTION) as load:
        yield load


def test_a_table_keeps_the_rows_that_are_not_measured_again(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load("main")
    with pytest.raises(SystemExit):
        main.main(arguments(tmp_path, "--keep"))
    assert "--keep needs a table, but there is no" in capsys.readouterr().err
    for commit, task, methods in (("aaa", "gpt", ("step",)), ("bbb", "gpt", ("slope",)), ("ccc", "image", ("step",))):
        monkeypatch.setattr(main, "commit", lambda commit=commit: commit)
        words = ["--task", task, "--fresh", *(["--keep"] if commit != "aaa" else [])]
        capsys.readouterr()
        assert main.main(arguments(tmp_path, *words, methods=methods)) == 0
    printed = capsys.readouterr().out
    assert "image tiny" in printed
    assert "GPT tiny" not in printed
    found = {(row["task"], row["method"]): row["commit"] for row in rows_of(tmp_path)}
    assert found == {
        ("GPT tiny", "dense"): "bbb", ("GPT tiny", "slope"): "bbb", ("GPT tiny", "step"): "aaa",
        ("image tiny", "dense"): "ccc", ("image tiny", "step"): "ccc",
    }  # fmt: skip
    text = (tmp_path / "results" / "methods.md").read_text()
    assert text.index("## GPT tiny") < text.index("## image tiny")
    assert "| 2 | 0 | aaa |" in text


def test_runs_come_back_from_a_table(load: Load, tmp_path: Path) -> None:
    table, summary = load("table"), load("summary")
    runs = [
        a_run(load, "dense", 0, [3.0, 2.0], [0.0] * 4, commit="abc", environment="here, there", dense=2.0),
        replace(a_run(load, "a", 0, [3.0, 2.0], [0.0, 0.5, 0.5, 0.5]), taught=[False, True, True, True]),
        replace(a_run(load, "a", 1, [3.0, math.nan], [0.0, 0.5, 0.5, 0.5]), task="another"),
    ]  # fmt: skip
    table.write_csv(tmp_path / "a.csv", runs)
    again = table.read_csv(tmp_path / "a.csv")
    assert [repr(replace(run, shares=[])) for run in again] == [repr(replace(run, shares=[])) for run in runs]
    for ours, theirs in zip(again, runs, strict=True):
        for step in (2, 4):
            assert ours.flops_share(step) == pytest.approx(theirs.flops_share(step), abs=1e-5)
        times = [summary.relative_times(run, 1.5)[-1] for run in (ours, theirs)]
        assert times[0] == pytest.approx(times[1], abs=1e-4)
    assert table.together(runs[:2], again) == [*runs[:2], again[2]]
    (tmp_path / "b.csv").write_text("task,method\n")
    with pytest.raises(ValueError, match="has the columns task, method: it must have"):
        table.read_csv(tmp_path / "b.csv")
