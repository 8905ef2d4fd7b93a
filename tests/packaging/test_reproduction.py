"""``scripts/reproduce_methods`` with tiny models: what it trains, goes on from, and writes."""

import csv
import itertools
import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reproduction_runs import Load, a_run, arguments, numbers, rows_of
from script_modules import REPRODUCTION, importable

from sparsetrain.methods import PRESETS

FAILS = "fst by inputs that nobody saw"


@pytest.fixture
def load():
    threads = torch.get_num_threads()
    with importable(REPRODUCTION) as load:
        yield load
    torch.set_num_threads(threads)


def test_every_preset_is_compared(load: Load) -> None:
    entries = load("methods").METHODS
    assert {entry.get("preset") for entry in entries.values()} == {*PRESETS, None}
    assert entries["dense"] == {"schedule": [{"kind": "dense"}]}
    controls = {*load("controls").CONTROLS}
    methods = [load("methods").build(entry) for entry in entries.values() if not entry.keys() & controls]
    described = [json.dumps(method.describe() | {"name": ""}, sort_keys=True) for method in methods]
    assert len(set(described)) == len(described)  # no two rows train the same
    for method in methods:
        method.schedule.resolve(300)


def test_a_finetuning_preset_begins_after_dense_steps(load: Load) -> None:
    entry, _ = (
        value for value in load("methods").METHODS.values() if value.get("preset") == "dense_to_sparse_finetune"
    )
    method = load("methods").build(entry)
    timeline = method.schedule.resolve(800)
    # of the preset, 3/4 are sparse and λ grows in 1/4; both are of the 400 steps that are left
    assert (timeline.kinds, timeline.starts) == (("dense", "sparse", "frozen"), (0, 400, 700))
    assert round(method.decay_ramp * 800) == 100
    slope = load("methods").build({"preset": "slope", "after_dense": 0.25})
    assert slope.adapter_start == pytest.approx(0.25 + 0.75 * 0.99)
    with pytest.raises(ValueError, match="after_dense is 1"):
        load("methods").build({"preset": "slope", "after_dense": 1.0})


@pytest.mark.sweep
def test_all_methods_train_both_models_and_a_failing_run_is_told(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load("methods").METHODS[FAILS] = {"preset": "fst", "criterion": "wanda"}
    names = tuple(load("methods").METHODS)
    assert load("main").main(arguments(tmp_path, "--task", "gpt", "--task", "image", methods=names)) == 1
    printed = capsys.readouterr()
    failed = [line for line in printed.err.splitlines() if line.startswith("[") and " fails: " in line]
    assert sorted(line.partition("] ")[2].partition(" fails")[0] for line in failed) == sorted(
        f"{task}, {FAILS}, seed 0" for task in ("GPT tiny", "image tiny")
    )
    rows = rows_of(tmp_path)
    expected = set(itertools.product(("GPT tiny", "image tiny"), set(names) - {FAILS}))
    assert {(row["task"], row["method"]) for row in rows} == expected
    assert all((row["accuracy"] != "") == (row["task"] == "image tiny") for row in rows)
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows if row["accuracy"])
    assert {row["violations"] for row in rows} == {"0"}
    kinds = {
        name: load("methods").build(entry).schedule.phases[-1].kind for name, entry in load("methods").METHODS.items()
    }
    assert {row["method"] for row in rows if row["ends"] == "dense"} == {
        name for name, kind in kinds.items() if kind == "dense" and name != FAILS
    }
    text = (tmp_path / "results" / "methods.md").read_text()
    assert all(text.count(f"\n| {name} |") == 2 for name in set(names) - {FAILS})
    assert f"No result for GPT tiny, {FAILS}, seed 0: ValueError: criterion is 'wanda' but masks are searched" in text
    assert text.count("| accuracy |") == 1  # only of images
    for name in ("methods.png", "methods-losses.png"):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_comparison_goes_on_without_training_again(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, main = load("jobs"), load("main")
    real, trained = jobs.train, []

    def train(task: Any, name: str, method: Any, seed: int, *rest: Any) -> Any:
        trained.append((task.name, name))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(task, name, method, seed, *rest)

    monkeypatch.setattr(jobs, "train", train)
    with pytest.raises(KeyboardInterrupt):
        main.main(arguments(tmp_path, "--task", "image"))
    assert trained == [("image tiny", "dense"), ("image tiny", "asp_one_shot")]
    path = tmp_path / "runs" / "runs.jsonl"
    path.write_text(path.read_text() + '{"key": "cut o')  # as by a machine that went down
    assert main.main(arguments(tmp_path, "--task", "image")) == 0
    assert trained[2:] == [("image tiny", "asp_one_shot")]
    assert f"1 of 2 runs are in {path}." in capsys.readouterr().err
    before = rows_of(tmp_path)
    assert main.main(arguments(tmp_path, "--task", "image")) == 0
    assert len(trained) == 3
    assert rows_of(tmp_path) == before
    assert main.main(arguments(tmp_path, "--task", "image", "--steps", "3")) == 0
    assert len(trained) == 5  # other steps are other runs
    assert main.main(arguments(tmp_path, "--task", "image", "--fresh")) == 0
    assert len(trained) == 7
    assert numbers(rows_of(tmp_path)) == numbers(before)


def test_a_run_is_known_by_all_that_its_numbers_depend_on(load: Load) -> None:
    job_type, tasks = load("jobs").Job, load("tasks").TASKS
    task = tasks["gpt"]["tiny"]
    job = job_type(task, "fst", {"preset": "fst"}, 0)
    others = [
        replace(job, seed=1), replace(job, entry={"preset": "fst", "mvue": True}),
        replace(job, task=replace(task, steps=41)), replace(job, task=replace(task, targets="all-linear")),
        replace(job, task=tasks["image"]["tiny"]),
    ]  # fmt: skip
    keys = [entry.key("here") for entry in [job, *others]] + [job.key("there")]
    assert len(set(keys)) == len(keys)
    assert replace(job, method="renamed").key("here") == job.key("here")


@pytest.mark.sweep
def test_two_processes_give_the_numbers_of_one(load: Load, tmp_path: Path) -> None:
    main, methods = load("main"), ("fst, head 15 %, λ 2e-3, mvue",)
    results = []
    for jobs in ("1", "2"):
        folder = tmp_path / jobs
        assert main.main(arguments(folder, "--jobs", jobs, "--task", "gpt", "--steps", "4", methods=methods)) == 0
        results.append(numbers(rows_of(folder)))
    assert results[0] == results[1]
    assert len({(row["task"], row["method"]) for row in results[0]}) == 2


def test_wrong_masks_are_an_exit_status(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = load("jobs")

    def train(task: Any, name: str, method: Any, seed: int, *rest: Any) -> Any:
        wrong = 0 if name == "dense" else 3
        return replace(a_run(load, name, seed, [2.0, 1.0], [0.0, 0.5]), violations=wrong)

    monkeypatch.setattr(jobs, "train", train)
    assert load("main").main(arguments(tmp_path, "--task", "gpt")) == 1
    assert {row["violations"] for row in rows_of(tmp_path)} == {"0", "3"}


def test_shares_are_those_of_the_schedule(load: Load) -> None:
    tasks, methods, training = load("tasks"), load("methods"), load("training")
    task = replace(tasks.TASKS["gpt"]["tiny"], steps=12)
    entry = {"schedule": [{"kind": "dense", "length": 3}, {"kind": "sparse"}, {"kind": "dense", "length": 5}],
             "pattern": "row_wise", "refresh_every": 2}  # fmt: skip
    run = training.train(task, "by hand", methods.build(entry), 0)
    model = task.module(**task.module_options)
    counts = {name: layer.weight.numel() for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    # one of three products is sparse, in the MLPs
    share = sum(count for name, count in counts.items() if ".mlp." in name) / sum(counts.values()) / 3
    assert run.shares == pytest.approx([0.0] * 3 + [share] * 4 + [0.0] * 5)
    assert run.steps_share() == pytest.approx(4 / 12)
    assert run.steps_share(5) == pytest.approx(2 / 5)
    assert run.flops_share(6) == pytest.approx(3 * share / 6)
    assert (run.ends, run.violations, run.steps) == ("dense", 0, 12)
    assert [entry.step for entry in run.validations] == list(range(1, 13))


def test_a_row_is_the_mean_over_seeds_beside_dense_at_equal_seeds(load: Load) -> None:
    summary = load("summary")
    runs = [
        a_run(load, "dense", 0, [3.0, 2.0], [0.0] * 4), a_run(load, "dense", 1, [3.0, 2.5], [0.0] * 4),
        a_run(load, "a", 0, [1.9, 2.1], [0.0, 0.6, 0.6, 0.6]), a_run(load, "a", 1, [3.0, 2.4], [0.0, 0.6, 0.6, 0.6]),
        a_run(load, "b", 0, [2.2, 1.9], [0.3] * 4), a_run(load, "b", 1, [2.6, 2.6], [0.3] * 4),
    ]  # fmt: skip
    dense, a, b = summary.summarise(summary.beside_dense(runs), ratio=2.0)
    assert a.gaps == pytest.approx([0.1, -0.1])
    assert (a.steps_share, a.flops_share) == pytest.approx((0.75, 0.45))
    # a sparse step takes 1 - 0.6 / 2 of a dense one
    assert a.time == pytest.approx((1 + 3 * 0.7) / 4)
    assert a.reached == pytest.approx([1.7, 3.1])
    assert a.reached_at == pytest.approx(2.4)
    assert b.reached == [pytest.approx(4 * 0.85), None]
    assert b.reached_at is None
    assert dense.reached == [4, 4]
    assert [row.method for row in summary.first_to_reach([dense, a, b])] == ["a", "dense"]
    report = load("report")
    assert report.cells(b)[report.HEADER.index("dense loss reached at")] == "not reached at 1 of 2 seeds"


def test_losses_that_are_not_finite_are_published(load: Load, tmp_path: Path) -> None:
    report, summary, jobs = load("report"), load("summary"), load("jobs")
    task = load("tasks").TASKS["gpt"]["tiny"]
    ratio = load("ratios").PUBLISHED
    nan = math.nan
    runs = [
        a_run(load, "dense", 0, [3.0, 2.0], [0.0] * 4), a_run(load, "dense", 1, [3.0, 2.0], [0.0] * 4),
        a_run(load, "half", 0, [2.5, 2.25], [0.5] * 4), a_run(load, "half", 1, [2.5, nan], [0.5] * 4),
        a_run(load, "none", 0, [nan, nan], [0.5] * 4), a_run(load, "none", 1, [math.inf, math.inf], [0.5] * 4),
    ]  # fmt: skip
    finished = jobs.Finished(tmp_path / "runs.jsonl")
    for number, run in enumerate(runs):
        finished.add(str(number), run)
    again = list(finished.read().values())
    assert [repr(run) for run in again] == [repr(run) for run in runs]
    rows = summary.summarise(summary.beside_dense(again), ratio.value)
    load("table").write_csv(tmp_path / "a.csv", again)
    report.write_markdown(
        tmp_path / "a.md", "scripts/x", {"GPT tiny": (task, rows)}, [], "2 seeds", ratio, "here", ("a.png", "b.png")
    )
    load("figure").plot_gaps(tmp_path / "a.png", {"GPT tiny": rows}, "title")
    load("figure").plot_losses(tmp_path / "b.png", {"GPT tiny": rows}, ratio, "title")
    with (tmp_path / "a.csv").open(newline="") as file:
        losses = [row["loss"] for row in csv.DictReader(file) if row["step"] == "4"]
    assert losses == ["2.00000", "2.00000", "2.25000", "nan", "nan", "inf"]
    lines = (tmp_path / "a.md").read_text().splitlines()
    (half,) = [line for line in lines if line.startswith("| half |")]
    assert half.startswith("| half | 2.2500 (not finite: seed 1) | +0.2500 | 100.0% | 50.0% |")
    assert any(line.startswith("| none | nan (not finite: seed 0, 1) | nan |") for line in lines)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "b.png"))


@pytest.mark.parametrize("method", ["dense", "fst", "sr_ste", "slope"])
def test_a_run_that_diverges_comes_to_its_end(load: Load, method: str) -> None:
    task = load("tasks").TASKS["gpt"]["tiny"]
    task = replace(task, steps=6, module_options={**task.module_options, "learning_rate": 1e38})
    entry = load("methods").METHODS["dense"] if method == "dense" else {"preset": method}
    run = load("training").train(task, method, load("methods").build(entry), 0)
    assert not math.isfinite(run.final)
    assert [validation.step for validation in run.validations] == list(range(1, 7))
    assert run.violations == 0


def gemm_csv(path: Path, rows: list[tuple[str, str, int, float]], device: str = "NVIDIA H200") -> Path:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["kernel_name", "kernel_provider", "metric_name", "x_value", "y_value_50", "device"])
        writer.writerows([name, provider, "device time", tokens, ms, device] for name, provider, tokens, ms in rows)
    return path


def test_the_measured_ratio_is_the_median_of_large_products(load: Load, tmp_path: Path) -> None:
    shape = "gemm forward 4096x4096 bfloat16"
    rows = [
        (shape, "dense", 8192, 3.0), (shape, "masked", 8192, 1.0), (shape, "cusparselt", 8192, 2.5),
        (shape, "cusparselt best", 8192, 2.0), (shape, "dense", 4096, 1.2), (shape, "cutlass", 4096, 1.0),
        (shape, "dense", 16384, 6.5), (shape, "cusparselt", 16384, 5.0),
        (shape, "dense", 512, 9.0), (shape, "cutlass", 512, 1.0),
        (shape.replace("bfloat16", "float16"), "dense", 8192, 9.0),
        (shape.replace("bfloat16", "float16"), "cutlass", 8192, 1.0),
    ]  # fmt: skip
    path = gemm_csv(tmp_path / "gemm.csv", rows)
    ratio = load("ratios").measured(path)
    assert ratio.value == pytest.approx(1.3)  # of 1.5, 1.2 and 1.3
    assert ratio.source == "measured on NVIDIA H200"
    assert "3 bf16 products" in ratio.words
    assert str(tmp_path) not in ratio.words
    gemm_csv(path, rows, "NVIDIA B200")
    with pytest.raises(ValueError, match="so give the file of one GPU"):
        load("ratios").measured(path)
    with pytest.raises(ValueError, match="has no sparse and dense bf16 product"):
        load("ratios").measured(gemm_csv(tmp_path / "small.csv", rows[8:]))


def test_a_method_far_off_stands_at_the_edge_of_the_picture(load: Load) -> None:
    ceiling = load("figure").ceiling
    assert ceiling([0.1, -0.2, 0.2, 0.3, math.nan, 5.0]) == pytest.approx(4 * 0.3)
    assert ceiling([0.1, -0.2, 0.2, 0.3]) == ceiling([]) == math.inf


def test_points_at_the_same_place_are_drawn_apart(load: Load) -> None:
    moved = load("figure").side_by_side([50.0, 0.0, 50.0, 51.5, 90.0], apart=2.0)
    assert moved[1] == 0.0
    assert moved[4] == 90.0
    assert sorted(moved) == [0.0, *(pytest.approx(50.5 + shift) for shift in (-2, 0, 2)), 90.0]
    assert moved[0] < moved[2] < moved[3]


def test_the_commit_says_whether_anything_but_documents_differs(load: Load, tmp_path: Path) -> None:
    provenance = load("provenance")
    assert provenance.commit(tmp_path) == "unknown"

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "text.md").write_text("a")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    head = git("rev-parse", "--short", "HEAD")
    (tmp_path / "docs" / "text.md").write_text("b")
    assert provenance.commit(tmp_path) == head
    (tmp_path / "code.py").write_text("a = 2\n")
    assert provenance.commit(tmp_path) == f"{head}+"
    assert provenance.commit(tmp_path / "docs") == "unknown"  # a folder of another checkout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steps", "1"), "at least 2 are needed"),
        (("--jobs", "0"), "'0' is no number of at least 1"),
        (("--model", "124M", "--task", "image"), "task image has tiny, small"),
        (("--ratio", "-1"), "--ratio is -1.0: it must be a finite number above 0"),
        (("--measured", "missing.csv"), "No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_options_are_refused(
    load: Load, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        load("main").main(list(words))
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_help_has_examples_and_every_method(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        load("main").main(["--help"])
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:\n  scripts/reproduce_methods " in printed
    assert all(name in printed for name in load("methods").METHODS)
